//! What a packet weighs on the wire, at layer 3.
//!
//! The stack hands over GSO packets: one header and up to 512 KiB of payload, to be cut into segments that each carry a header
//! of their own. `wire_len` has the answer but may not be read in cgroup_skb, and `len` counts one header only.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::bpf_sk_fullsock,
    programs::SkBuffContext,
};

const IPV4_HEADER_BYTES: u64 = 20;
const IPV6_HEADER_BYTES: u64 = 40;
const UDP_HEADER_BYTES: u64 = 8;
const TCP_HEADER_BYTES: u64 = 20;
const TCP_HEADER_WITH_TIMESTAMPS_BYTES: u64 = 32;
const TCP_DATA_OFFSET_OFFSET: u64 = 12;
/// The smallest packet that can be GSO: IPv4 and UDP, with a byte in each of two segments.
const SMALLEST_GSO_BYTES: usize = 30;

/// IANA protocol numbers.
pub const IPPROTO_TCP: u8 = 6;
const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_DSTOPTS: u8 = 60;

/// A packet as the link would carry it.
pub struct Wire {
    /// Bytes of all segments, each with its IP and transport header.
    pub bytes: u64,
    /// Number of segments.
    pub segments: u64,
}

impl Wire {
    /// Weighs a packet whose data start at the IP header, as they do in cgroup_skb (kernel/bpf/cgroup.c pushes it back there).
    #[inline(always)]
    pub fn of(ctx: &SkBuffContext) -> Self {
        let packed = weigh(ctx.skb.skb);
        Self { bytes: packed >> SEGMENTS_BITS, segments: packed & ((1 << SEGMENTS_BITS) - 1) }
    }
}

const SEGMENTS_BITS: u32 = 32;

/// Bytes and segments in one number: what a function of its own can return. It is a function of its own, and a global one, so that
/// the verifier checks it once, and not together with each branch of what follows; that was half of the time an ADD took.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn weigh(skb: *mut __sk_buff) -> u64 {
    let ctx = SkBuffContext::new(skb);
    let bytes = u64::from(ctx.len());
    // SAFETY: cgroup_skb programs may read gso_segs (net/core/filter.c, cg_skb_is_valid_access), since Linux 5.1.
    let segments = u64::from(unsafe { (*skb).gso_segs });
    if segments <= 1 {
        return bytes << SEGMENTS_BITS | 1;
    }
    let headers = Headers::of(&ctx);
    (bytes - headers.not_sent + (segments - 1) * headers.repeated) << SEGMENTS_BITS | segments
}

struct Headers {
    /// Bytes that every segment carries.
    repeated: u64,
    /// Bytes that no segment carries: the jumbo hop-by-hop header of IPv6 packets over 64 KiB, taken off before sending
    /// (include/net/ipv6.h, `ipv6_hopopt_jumbo_remove`).
    not_sent: u64,
}

impl Headers {
    /// Every branch here is checked by the verifier together with all that follows, at each ADD: this reads as little as it can.
    #[inline(always)]
    fn of(ctx: &SkBuffContext) -> Self {
        let Ok(start) = ctx.load::<[u8; SMALLEST_GSO_BYTES]>(0) else { return Self { repeated: 0, not_sent: 0 } };
        let is_ipv4 = start[0] >> 4 == 4;
        let (mut offset, mut protocol) =
            if is_ipv4 { (u64::from(start[0] & 0xf) * 4, start[9]) } else { (IPV6_HEADER_BYTES, start[6]) };
        let mut not_sent = 0;
        // One extension header is looked behind: the jumbo header, or one an application asked for. With more than that in a
        // row each segment is counted a few bytes short.
        if !is_ipv4
            && matches!(protocol, IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS)
            && let Ok([next, units]) = ctx.load::<[u8; 2]>(offset as usize)
        {
            let length = (u64::from(units) + 1) * 8;
            // A payload length of 0 means "see the jumbo option".
            if protocol == IPPROTO_HOPOPTS && start[4] | start[5] == 0 {
                not_sent = length;
            }
            (offset, protocol) = (offset + length, next);
        }
        // Linux cuts TCP and UDP for its own sockets; SCTP makes its chunks itself.
        let transport = if protocol == IPPROTO_TCP {
            match ctx.load::<u8>((offset + TCP_DATA_OFFSET_OFFSET) as usize) {
                Ok(data_offset) => u64::from(data_offset >> 4) * 4,
                Err(_) => TCP_HEADER_BYTES,
            }
        } else {
            UDP_HEADER_BYTES
        };
        Self { repeated: offset - not_sent + transport, not_sent }
    }
}

/// What a TCP segment of `payload` bytes, cut at `mss`, will weigh: for the hook that runs before the headers exist. The MSS of
/// a socket already has the options taken off that every segment carries, so a timestamp (12 bytes) is guessed from nothing
/// better than its being the default; the clock itself counts what is sent.
#[inline(always)]
pub fn wire_bytes_of_tcp(payload: u64, mss: u64, is_ipv6: bool) -> u64 {
    let ip_header = if is_ipv6 { IPV6_HEADER_BYTES } else { IPV4_HEADER_BYTES };
    let segments = if mss == 0 { 1 } else { payload.div_ceil(mss) };
    payload + segments * (ip_header + TCP_HEADER_WITH_TIMESTAMPS_BYTES)
}

/// The packet's socket, if it is a full one: not a connection request and not one in TIME-WAIT.
///
/// `NonNull`, because an `Option` of a pointer that may be null has a second word, which is undefined where there is none; the
/// compiler spills that all the same, and the verifier says "R3 !read_ok".
#[inline(always)]
pub fn full_socket(ctx: &SkBuffContext) -> Option<NonNull<bpf_sock>> {
    // SAFETY: cgroup_skb programs may read sk; the helper takes any socket that is not NULL.
    unsafe {
        let socket = NonNull::new((*ctx.skb.skb).__bindgen_anon_2.sk)?;
        NonNull::new(bpf_sk_fullsock(socket.as_ptr()))
    }
}
