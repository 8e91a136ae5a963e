//! The facts that a sock_ops program can read about its socket and about the segment that is about to leave.
//!
//! The kernel calls the program for every segment, if the program asks for this callback. The callback exists to let
//! the program add header options (BPF_SOCK_OPS_HDR_OPT_LEN_CB, from `tcp_established_options`, with the socket
//! locked). podshaper adds none; the callback is the one hook before each transmission.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, bpf_sock},
    programs::SockOpsContext,
};
use podshaper_abi::{Scope, SubnetAddress};

use crate::{flow::Flow, maps, packet, subnets};

/// Bytes that a TCP sender sends before the first acknowledgement: ten segments (RFC 6928).
pub const FIRST_FLIGHT_BYTES: u64 = 10 * 1460;

/// First argument of the callback when `tcp_current_mss` calls it (uapi/linux/bpf.h; not in aya's bindings).
const BPF_WRITE_HDR_TCP_CURRENT_MSS: u32 = 1;
const AF_INET6: u32 = 10;

/// The callback for every segment that leaves.
pub const SEGMENTS: u32 = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
/// The callback for every acknowledgement that gives a round-trip sample, as most do.
pub const ACKNOWLEDGEMENTS: u32 = BPF_SOCK_OPS_RTT_CB_FLAG;

/// Asks for callbacks of a connection.
#[inline(always)]
pub fn ask_for(ctx: &SockOpsContext, callbacks: u32) {
    // A socket that cannot have the callbacks (no such socket is known) would be limited by the horizon alone.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | callbacks) as i32);
}

/// Whether the callback is for a segment. tcp_current_mss() also calls it, to learn the length of the options; no
/// segment is sent then.
#[inline(always)]
pub fn is_segment(ctx: &SockOpsContext) -> bool {
    ctx.arg(0) != BPF_WRITE_HDR_TCP_CURRENT_MSS
}

/// Whether the socket is the connection request of a remote. It is no full socket yet.
#[inline(always)]
pub fn is_request(ctx: &SockOpsContext) -> bool {
    // SAFETY: sock_ops programs may read is_fullsock.
    unsafe { (*ctx.ops).is_fullsock == 0 }
}

/// Whether a connection that is being opened may belong to the attachment, by its addresses: the pod does not talk to
/// itself, and the remote is not exempt. The interface by which the socket will send is not known yet.
#[inline(always)]
pub fn may_be_ours(ctx: &SockOpsContext, scope: &Scope) -> bool {
    // SAFETY: sock_ops programs may read the addresses, which are in network order, of a connection request as well as
    // of a full socket. Volatile, and all addresses are read: the compiler would otherwise choose between their
    // offsets, and the verifier refuses a variable offset into the context.
    let (local4, remote4, local6, remote6) = unsafe {
        let socket = ctx.ops;
        (
            (&raw const (*socket).local_ip4).read_volatile(),
            (&raw const (*socket).remote_ip4).read_volatile(),
            words(&raw const (*socket).local_ip6),
            words(&raw const (*socket).remote_ip6),
        )
    };
    let (local, remote) = if ctx.family() == AF_INET6 {
        (local6, remote6)
    } else {
        (podshaper_abi::ipv4_mapped(local4.to_ne_bytes()), podshaper_abi::ipv4_mapped(remote4.to_ne_bytes()))
    };
    local != remote && !subnets::is_exempt(scope.list, remote)
}

/// The last word of the remote's address, and its port, in host byte order.
#[inline(always)]
pub fn remote(ctx: &SockOpsContext) -> (u32, u16) {
    // SAFETY: as in `may_be_ours`.
    let (address4, address6, port) = unsafe {
        let socket = ctx.ops;
        (
            (&raw const (*socket).remote_ip4).read_volatile(),
            (&raw const (*socket).remote_ip6[3]).read_volatile(),
            (&raw const (*socket).remote_port).read_volatile(),
        )
    };
    let address = if ctx.family() == AF_INET6 { address6 } else { address4 };
    (u32::from_be(address), u32::from_be(port) as u16)
}

/// An address of the context.
#[inline(always)]
unsafe fn words(address: *const [u32; 4]) -> SubnetAddress {
    let first: *const u32 = address.cast();
    // SAFETY: the caller's pointer points to four words, which are as many bytes in the same order.
    unsafe { core::mem::transmute([0, 1, 2, 3].map(|word| first.add(word).read_volatile())) }
}

/// Bytes of the segment's payload; the segment has no headers yet.
#[inline(always)]
pub fn payload_bytes(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read skb_len since Linux 5.10, which introduced header options.
    u64::from(unsafe { (*ctx.ops).skb_len })
}

/// Segments with payload that the socket has sent so far, including repeated ones.
#[inline(always)]
pub fn sent_segments(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read data_segs_out.
    u64::from(unsafe { (*ctx.ops).data_segs_out })
}

/// The congestion window in segments, if the window still doubles with each round trip (slow start).
#[inline(always)]
pub fn opening_window_segments(ctx: &SockOpsContext) -> Option<u64> {
    // SAFETY: sock_ops programs may read snd_cwnd and snd_ssthresh.
    let (window, threshold) = unsafe { ((*ctx.ops).snd_cwnd, (*ctx.ops).snd_ssthresh) };
    if window < threshold { Some(window.into()) } else { None }
}

/// Whether all bytes that were sent before have been acknowledged.
#[inline(always)]
pub fn has_arrived(ctx: &SockOpsContext) -> bool {
    // SAFETY: sock_ops programs may read packets_out.
    unsafe { (*ctx.ops).packets_out == 0 }
}

/// Whether the segment opens, closes or resets the connection.
#[inline(always)]
pub fn opens_or_closes(ctx: &SockOpsContext) -> bool {
    // SAFETY: as for skb_len.
    unsafe { (*ctx.ops).skb_tcp_flags & u32::from(packet::OPENS_OR_CLOSES) != 0 }
}

/// The socket's flow, if the socket sends by an attachment's interface. `count_egress` made the flow with the first
/// packet that left.
#[inline(always)]
pub fn flow<'a>(ctx: &SockOpsContext) -> Option<&'a mut Flow> {
    // SAFETY: sock_ops programs may read sk since Linux 5.9; the callbacks that podshaper asks for run for full sockets
    // only.
    unsafe {
        let socket: NonNull<bpf_sock> = NonNull::new((*ctx.ops).__bindgen_anon_2.sk)?;
        maps::flow(socket).filter(|flow| flow.slot != 0)
    }
}

/// The segment size in force, in bytes of payload.
#[inline(always)]
pub fn mss(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read mss_cache.
    u64::from(unsafe { (*ctx.ops).mss_cache })
}

/// Smoothed round-trip time in nanoseconds.
#[inline(always)]
pub fn rtt_ns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read srtt_us, which the kernel keeps in eighths of a microsecond.
    u64::from(unsafe { (*ctx.ops).srtt_us }) * 1000 / 8
}

/// The shortest round-trip time of the last minutes, in nanoseconds: it excludes waits of the pod's own packets.
#[inline(always)]
pub fn shortest_rtt_ns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read rtt_min, which the kernel keeps in microseconds; all ones where there is none.
    let us = unsafe { (*ctx.ops).rtt_min };
    if us == u32::MAX { 0 } else { u64::from(us) * 1000 }
}

/// Bytes of payload the socket has received in order.
#[inline(always)]
pub fn received_bytes(ctx: &SockOpsContext) -> u64 {
    // SAFETY: sock_ops programs may read bytes_received.
    unsafe { (*ctx.ops).bytes_received }
}

/// Whether the socket is an IPv6 one. An IPv4 connection on such a socket counts as IPv6: an error of 20 bytes a
/// segment in an estimate.
#[inline(always)]
pub fn is_ipv6(ctx: &SockOpsContext) -> bool {
    ctx.family() == AF_INET6
}
