//! What a packet weighs on the wire, at layer 3.
//!
//! The stack hands over GSO packets: one header and up to 512 KiB of payload, to be cut into segments that each carry a header
//! of their own. `wire_len` has the answer but may not be read in cgroup_skb, and `len` counts one header only.

use aya_ebpf::{bindings::bpf_sock, helpers::bpf_sk_fullsock, programs::SkBuffContext};

const IPV4_HEADER_BYTES: u64 = 20;
const IPV6_HEADER_BYTES: u64 = 40;
const UDP_HEADER_BYTES: u64 = 8;
const IPV4_PROTOCOL_OFFSET: usize = 9;
const IPV6_PAYLOAD_LENGTH_OFFSET: usize = 4;
const IPV6_NEXT_HEADER_OFFSET: usize = 6;
const TCP_DATA_OFFSET_OFFSET: u64 = 12;

/// IANA protocol numbers.
pub const IPPROTO_TCP: u8 = 6;
const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_DSTOPTS: u8 = 60;

/// More extension headers than these are not looked through: Linux itself sends at most hop-by-hop, destination, routing and
/// destination options again (`struct ipv6_txoptions`).
const MAX_EXTENSION_HEADERS: usize = 4;

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
        let bytes = u64::from(ctx.len());
        // SAFETY: cgroup_skb programs may read gso_segs (net/core/filter.c, cg_skb_is_valid_access), since Linux 5.1.
        let segments = u64::from(unsafe { (*ctx.skb.skb).gso_segs });
        if segments <= 1 {
            return Self { bytes, segments: 1 };
        }
        // A header that cannot be read was not made by this host's stack, and its packet is not GSO.
        let headers = header_bytes(ctx).unwrap_or(Headers { repeated: 0, not_sent: 0 });
        Self { bytes: bytes - headers.not_sent + (segments - 1) * headers.repeated, segments }
    }
}

struct Headers {
    /// Bytes that every segment carries.
    repeated: u64,
    /// Bytes that no segment carries: the jumbo hop-by-hop header of IPv6 packets over 64 KiB, taken off before sending
    /// (include/net/ipv6.h, `ipv6_hopopt_jumbo_remove`).
    not_sent: u64,
}

#[inline(always)]
fn header_bytes(ctx: &SkBuffContext) -> Option<Headers> {
    let version_and_length: u8 = ctx.load(0).ok()?;
    let (offset, protocol, not_sent) = match version_and_length >> 4 {
        4 => (u64::from(version_and_length & 0xf) * 4, ctx.load(IPV4_PROTOCOL_OFFSET).ok()?, 0),
        6 => behind_ipv6_headers(ctx)?,
        _ => return None,
    };
    let transport = match protocol {
        IPPROTO_TCP => {
            let data_offset: u8 = ctx.load((offset + TCP_DATA_OFFSET_OFFSET) as usize).ok()?;
            u64::from(data_offset >> 4) * 4
        }
        // Linux segments TCP and UDP only for its own sockets (SCTP makes its chunks itself).
        _ => UDP_HEADER_BYTES,
    };
    Some(Headers { repeated: offset - not_sent + transport, not_sent })
}

/// Offset and protocol of the transport header, and the length of a jumbo header before it.
#[inline(always)]
fn behind_ipv6_headers(ctx: &SkBuffContext) -> Option<(u64, u8, u64)> {
    let mut offset = IPV6_HEADER_BYTES;
    let mut protocol: u8 = ctx.load(IPV6_NEXT_HEADER_OFFSET).ok()?;
    let payload_length: u16 = ctx.load(IPV6_PAYLOAD_LENGTH_OFFSET).ok()?;
    let mut not_sent = 0;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !matches!(protocol, IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS) {
            break;
        }
        let [next, units]: [u8; 2] = ctx.load(offset as usize).ok()?;
        let length = (u64::from(units) + 1) * 8;
        // A payload length of 0 means "see the jumbo option".
        if protocol == IPPROTO_HOPOPTS && payload_length == 0 {
            not_sent = length;
        }
        offset += length;
        protocol = next;
    }
    Some((offset, protocol, not_sent))
}

/// What a TCP segment of `payload` bytes, cut at `mss`, will weigh: for the hook that runs before the headers exist. The MSS of
/// a socket already has the options taken off that every segment carries, so a timestamp (12 bytes) is guessed from nothing
/// better than its being the default; the clock itself counts what is sent.
#[inline(always)]
pub fn wire_bytes_of_tcp(payload: u64, mss: u64, is_ipv6: bool) -> u64 {
    const TCP_HEADER_WITH_TIMESTAMPS: u64 = 32;
    let ip_header = if is_ipv6 { IPV6_HEADER_BYTES } else { IPV4_HEADER_BYTES };
    let segments = if mss == 0 { 1 } else { payload.div_ceil(mss) };
    payload + segments * (ip_header + TCP_HEADER_WITH_TIMESTAMPS)
}

/// The packet's socket, if it is a full one: not a connection request and not one in TIME-WAIT.
#[inline(always)]
pub fn full_socket(ctx: &SkBuffContext) -> Option<*mut bpf_sock> {
    // SAFETY: cgroup_skb programs may read sk; the helper takes any socket that is not NULL.
    unsafe {
        let socket = (*ctx.skb.skb).__bindgen_anon_2.sk;
        if socket.is_null() {
            return None;
        }
        let full = bpf_sk_fullsock(socket);
        (!full.is_null()).then_some(full)
    }
}
