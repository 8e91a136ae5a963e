//! The size of a packet on the wire, at layer 3.
//!
//! The stack hands over GSO packets: one header and up to 512 KiB of payload, to be cut into segments that each carry a
//! header of their own. `wire_len` would be the size but may not be read in cgroup_skb, and `len` counts one header
//! only.

use core::{
    mem::{self, MaybeUninit},
    ptr::NonNull,
};

use aya_ebpf::{
    bindings::{BPF_TCP_LISTEN, BPF_TCP_NEW_SYN_RECV, bpf_sock, bpf_sock_tuple},
    helpers::{bpf_sk_fullsock, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_load_bytes, bpf_skc_lookup_tcp},
    programs::SkBuffContext,
};

/// The next filters, of other tools, see the packet (uapi/linux/pkt_cls.h).
pub const TC_ACT_UNSPEC: i32 = -1;
pub const TC_ACT_SHOT: i32 = 2;
pub const ETHERNET_HEADER_BYTES: u64 = 14;
const IPV4_HEADER_BYTES: u64 = 20;
const IPV6_HEADER_BYTES: u64 = 40;
const UDP_HEADER_BYTES: u64 = 8;
const TCP_HEADER_WITH_TIMESTAMPS_BYTES: u64 = 32;
const TCP_DATA_OFFSET_OFFSET: u64 = 12;
const TCP_HEADER_BYTES: u64 = 20;
/// include/net/tcp.h.
const TCPOPT_MPTCP: u8 = 30;
/// Including the padding that aligns them.
const TIMESTAMPS_BYTES: usize = 12;
/// FIN, SYN and RST of TCP's flags byte.
pub const OPENS_OR_CLOSES: u8 = 0b111;
/// SYN and ACK of the flags byte, and SYN alone.
const SYN_AND_ACK: u8 = 0b1_0010;
const SYN: u8 = 0b10;
/// IANA protocol numbers.
pub const IPPROTO_TCP: u8 = 6;
pub const IPPROTO_UDP: u8 = 17;
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
    /// The size of a packet whose data start at the IP header, as they do in cgroup_skb (kernel/bpf/cgroup.c pushes the
    /// data back there).
    #[inline(always)]
    pub fn of(ctx: &SkBuffContext) -> Self {
        Self::after(ctx, 0)
    }

    /// The size of a packet whose data start with a link header of so many bytes, as they do at tc.
    #[inline(always)]
    pub fn after(ctx: &SkBuffContext, link_bytes: u64) -> Self {
        let bytes = u64::from(ctx.len()) - link_bytes;
        // SAFETY: cgroup_skb programs may read gso_segs (net/core/filter.c, cg_skb_is_valid_access), since Linux 5.1.
        let segments = u64::from(unsafe { (*ctx.skb.skb).gso_segs });
        if segments <= 1 {
            return Self { bytes, segments: 1 };
        }
        let start: [u64; 2] = load(ctx, link_bytes);
        let extension: u16 = load(ctx, link_bytes + IPV6_HEADER_BYTES);
        let headers = network_headers(start[0], start[1], extension.into());
        let data_offset: u8 = load(ctx, link_bytes + Headers(headers).network_bytes() + TCP_DATA_OFFSET_OFFSET);
        // SAFETY: as for gso_segs; since Linux 5.7.
        let payload = segments * u64::from(unsafe { (*ctx.skb.skb).gso_size });
        Self { bytes: bytes_with_headers(bytes, segments, headers, data_offset.into(), payload), segments }
    }
}

/// Bytes of all segments of a packet with one header. `payload`: the payload of all segments, if the last segment were
/// as long as the others.
///
/// Like `network_headers` this is a global function: the verifier checks it by itself, once, and not together with each
/// branch of the code that follows. The check with each branch took half of the time of an ADD. Both functions take
/// numbers and not the packet, since a kernel without BTF of its own would not know the packet's type.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn bytes_with_headers(bytes: u64, segments: u64, headers: u64, data_offset: u64, payload: u64) -> u64 {
    let headers = Headers(headers);
    // Linux cuts TCP and UDP for its own sockets; SCTP makes its own chunks.
    let transport_bytes = if headers.are_tcp() { (data_offset >> 4) * 4 } else { UDP_HEADER_BYTES };
    let known_bytes = headers.network_bytes() - headers.jumbo_bytes() + transport_bytes;
    // A tunnel's packet has inner headers, which each segment carries as well: they are the bytes that are no payload.
    let repeated_bytes = known_bytes.max(bytes.max(payload) - payload);
    bytes - headers.jumbo_bytes() + (segments - 1) * repeated_bytes
}

/// Reads from the packet; zeros if the packet ends before (the helper writes the zeros). To test the helper's return
/// value would double the verifier's work for all code that follows.
#[inline(always)]
pub fn load<T: Copy>(ctx: &SkBuffContext, offset: u64) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    let (skb, size) = (ctx.skb.skb.cast(), size_of::<T>() as u32);
    // SAFETY: `value` has room for `size` bytes, and the helper writes all of them. The function is used for integers
    // and arrays of integers, for which any bytes are valid.
    unsafe {
        bpf_skb_load_bytes(skb, offset as u32, value.as_mut_ptr().cast(), size);
        value.assume_init()
    }
}

/// The result of [`network_headers`], packed into one number, since a global function can return only a number.
#[derive(Clone, Copy)]
struct Headers(u64);

impl Headers {
    #[inline(always)]
    fn new(network_bytes: u64, jumbo_bytes: u64, protocol: u64) -> Self {
        Self(network_bytes | jumbo_bytes << 16 | protocol << 32)
    }

    /// Bytes before the transport header.
    #[inline(always)]
    fn network_bytes(self) -> u64 {
        self.0 & 0xffff
    }

    /// The part of these bytes that no segment carries: the jumbo hop-by-hop header of IPv6 packets over 64 KiB, which
    /// is taken off before sending (include/net/ipv6.h, `ipv6_hopopt_jumbo_remove`).
    #[inline(always)]
    fn jumbo_bytes(self) -> u64 {
        self.0 >> 16 & 0xffff
    }

    #[inline(always)]
    fn are_tcp(self) -> bool {
        self.0 >> 32 == u64::from(IPPROTO_TCP)
    }
}

/// The transport protocol of a packet behind a link header of so many bytes, the bytes of its network headers, and
/// whether it is IPv4. `None` for an IPv4 fragment, and for a packet that is not IP.
#[inline(always)]
pub fn transport(ctx: &SkBuffContext, link_bytes: u64) -> Option<(u8, u64, bool)> {
    /// The fragment offset and the "more fragments" bit.
    const FRAGMENT: u16 = u16::from_ne_bytes([0x3f, 0xff]);
    let start: [u64; 2] = load(ctx, link_bytes);
    let extension: u16 = load(ctx, link_bytes + IPV6_HEADER_BYTES);
    let headers = Headers(network_headers(start[0], start[1], extension.into()));
    let version = start[0].to_ne_bytes()[0] >> 4;
    let fragment: u16 = load(ctx, link_bytes + 6);
    let is_ipv4 = version == 4;
    if version != 6 && !is_ipv4 || is_ipv4 && fragment & FRAGMENT != 0 {
        return None;
    }
    Some(((headers.0 >> 32) as u8, headers.network_bytes(), is_ipv4))
}

/// Addresses and ports of a packet, for the lookup of its receiver's socket.
pub struct Peers {
    tuple: bpf_sock_tuple,
    is_ipv4: bool,
    /// The packet is TCP; otherwise it is UDP.
    pub are_of_tcp: bool,
}

impl Peers {
    /// The sender of the packet: the last word of its address, and its port, in host byte order.
    #[inline(always)]
    pub fn sender(&self) -> (u32, u16) {
        // SAFETY: integers, all of which were written.
        unsafe {
            if self.is_ipv4 {
                let tuple = self.tuple.__bindgen_anon_1.ipv4;
                (u32::from_be(tuple.saddr), u16::from_be(tuple.sport))
            } else {
                let tuple = self.tuple.__bindgen_anon_1.ipv6;
                (u32::from_be(tuple.saddr[3]), u16::from_be(tuple.sport))
            }
        }
    }

    /// Swaps source and destination, so that a lookup finds the sender's socket.
    #[inline(always)]
    pub fn turn(&mut self) {
        // SAFETY: integers, all of which were written.
        unsafe {
            if self.is_ipv4 {
                let tuple = &mut self.tuple.__bindgen_anon_1.ipv4;
                mem::swap(&mut tuple.saddr, &mut tuple.daddr);
                mem::swap(&mut tuple.sport, &mut tuple.dport);
            } else {
                let tuple = &mut self.tuple.__bindgen_anon_1.ipv6;
                mem::swap(&mut tuple.saddr, &mut tuple.daddr);
                mem::swap(&mut tuple.sport, &mut tuple.dport);
            }
        }
    }

    /// The socket that receives packets with these addresses, in a namespace given by number (nsid), and whether the
    /// socket is only a connection request (a SYN that has been answered).
    ///
    /// # Safety
    /// The socket must be given to [`release`], once.
    #[inline(always)]
    pub unsafe fn socket(&mut self, ctx: &SkBuffContext, namespace: u64) -> Option<(NonNull<bpf_sock>, bool)> {
        let (skb, tuple) = (ctx.skb.skb.cast(), &raw mut self.tuple);
        // Not a field beside the tuple: the verifier forgets the value of a number there.
        let bytes = if self.is_ipv4 { IPV4_TUPLE_BYTES } else { IPV6_TUPLE_BYTES };
        // SAFETY: the tuple is on the stack, and has the length that is passed. The program may read the state of the
        // socket found. The read is not behind the branch, since the two lookups return different types to the verifier
        // ("same insn cannot be used with different pointers").
        unsafe {
            if self.are_of_tcp {
                let socket = NonNull::new(bpf_skc_lookup_tcp(skb, tuple, bytes, namespace, 0))?;
                Some((socket, (&raw const (*socket.as_ptr()).state).read_volatile() == BPF_TCP_NEW_SYN_RECV))
            } else {
                Some((NonNull::new(bpf_sk_lookup_udp(skb, tuple, bytes, namespace, 0))?, false))
            }
        }
    }
}

const IPV4_TUPLE_BYTES: u32 = 12;
const IPV6_TUPLE_BYTES: u32 = 36;

/// Releases a socket of [`Peers::socket`].
///
/// # Safety
/// `socket` comes from [`Peers::socket`], and is not used any more.
#[inline(always)]
pub unsafe fn release(socket: NonNull<bpf_sock>) {
    // SAFETY: the caller's duty.
    unsafe { bpf_sk_release(socket.as_ptr().cast()) };
}

/// Addresses and ports of a packet behind a link header of so many bytes; `None` for a packet without ports, or a
/// fragment.
#[inline(always)]
pub fn peers(ctx: &SkBuffContext, link_bytes: u64) -> Option<Peers> {
    // SAFETY: integers, which take any bytes.
    let mut tuple: bpf_sock_tuple = unsafe { mem::zeroed() };
    let (protocol, network_bytes, is_ipv4) = transport(ctx, link_bytes)?;
    let are_of_tcp = protocol == IPPROTO_TCP;
    if !are_of_tcp && protocol != IPPROTO_UDP {
        return None;
    }
    let ports: [u16; 2] = load(ctx, link_bytes + network_bytes);
    if is_ipv4 {
        let [from, to]: [u32; 2] = load(ctx, link_bytes + 12);
        tuple.__bindgen_anon_1.ipv4.saddr = from;
        tuple.__bindgen_anon_1.ipv4.daddr = to;
        tuple.__bindgen_anon_1.ipv4.sport = ports[0];
        tuple.__bindgen_anon_1.ipv4.dport = ports[1];
        return Some(Peers { tuple, is_ipv4, are_of_tcp });
    }
    let [from, to]: [[u32; 4]; 2] = load(ctx, link_bytes + 8);
    tuple.__bindgen_anon_1.ipv6.saddr = from;
    tuple.__bindgen_anon_1.ipv6.daddr = to;
    tuple.__bindgen_anon_1.ipv6.sport = ports[0];
    tuple.__bindgen_anon_1.ipv6.dport = ports[1];
    Some(Peers { tuple, is_ipv4, are_of_tcp })
}

/// The header fields of a TCP segment.
#[derive(Clone, Copy)]
pub struct Segment {
    /// The sequence number of the segment's first byte.
    pub sequence: u32,
    /// Bytes of payload.
    pub payload: u32,
    /// Whether the segment opens, closes or resets the connection.
    opens_or_closes: bool,
    /// Whether the segment is a SYN.
    pub is_request: bool,
    /// Whether the segment is a SYN-ACK.
    answers: bool,
    /// Offset of the segment's options in the packet.
    options_offset: u64,
    /// Bytes of the options.
    options_bytes: u64,
}

impl Segment {
    /// The value for a packet that is not TCP.
    pub const NONE: Self = Self {
        sequence: 0,
        payload: 0,
        opens_or_closes: false,
        is_request: false,
        answers: false,
        options_offset: 0,
        options_bytes: 0,
    };

    /// The segment behind a link header of so many bytes, in a packet that is TCP.
    #[inline(always)]
    pub fn of(ctx: &SkBuffContext, link_bytes: u64) -> Self {
        let start: [u64; 2] = load(ctx, link_bytes);
        let extension: u16 = load(ctx, link_bytes + IPV6_HEADER_BYTES);
        let network_bytes = Headers(network_headers(start[0], start[1], extension.into())).network_bytes();
        let start = link_bytes + network_bytes;
        let [_, sequence, _, offset_and_flags]: [u32; 4] = load(ctx, start);
        let [data_offset, flags, ..] = offset_and_flags.to_ne_bytes();
        let header_bytes = (u64::from(data_offset >> 4) * 4).max(TCP_HEADER_BYTES);
        let headers_bytes = start + header_bytes;
        Self {
            sequence: u32::from_be(sequence),
            payload: (u64::from(ctx.len()).max(headers_bytes) - headers_bytes) as u32,
            opens_or_closes: flags & OPENS_OR_CLOSES != 0,
            is_request: flags & SYN_AND_ACK == SYN,
            answers: flags & SYN_AND_ACK == SYN_AND_ACK,
            options_offset: start + TCP_HEADER_BYTES,
            options_bytes: header_bytes - TCP_HEADER_BYTES,
        }
    }

    /// Whether the segment belongs to MPTCP, whose option Linux puts first, or behind the timestamps
    /// (`tcp_options_write`).
    #[inline(always)]
    pub fn is_multipath(&self, ctx: &SkBuffContext) -> bool {
        let options: [u8; 16] = load(ctx, self.options_offset);
        // Behind the options is payload, which may have any bytes.
        self.options_bytes > 0 && options[0] == TCPOPT_MPTCP
            || self.options_bytes > TIMESTAMPS_BYTES as u64 && options[TIMESTAMPS_BYTES] == TCPOPT_MPTCP
    }

    /// Whether the segment is a SYN-ACK without data.
    #[inline(always)]
    pub fn is_answer(&self) -> bool {
        self.payload == 0 && self.answers
    }

    /// Whether the segment is a pure acknowledgement.
    #[inline(always)]
    pub fn is_acknowledgement(&self) -> bool {
        self.payload == 0 && !self.opens_or_closes
    }
}

/// The headers of a packet before its transport header, from the packet's first 16 bytes and the two bytes that follow
/// an IPv6 header.
///
/// The function skips one extension header: the jumbo header, or a header that an application asked for. With several
/// extension headers in a row each segment is counted a few bytes short.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn network_headers(start: u64, next: u64, extension: u64) -> u64 {
    let (start, next, extension) = (start.to_le_bytes(), next.to_le_bytes(), extension.to_le_bytes());
    let headers = if start[0] >> 4 == 4 {
        Headers::new(u64::from(start[0] & 0xf) * 4, 0, next[1].into())
    } else if matches!(start[6], IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS) {
        let extension_bytes = (u64::from(extension[1]) + 1) * 8;
        // A payload length of 0 means "see the jumbo option".
        let is_jumbo = start[6] == IPPROTO_HOPOPTS && start[4] | start[5] == 0;
        let jumbo_bytes = if is_jumbo { extension_bytes } else { 0 };
        Headers::new(IPV6_HEADER_BYTES + extension_bytes, jumbo_bytes, extension[0].into())
    } else {
        Headers::new(IPV6_HEADER_BYTES, 0, start[6].into())
    };
    headers.0
}

/// The size on the wire of TCP payload cut at `mss`, for the hook that runs before the headers exist. The MSS of a
/// socket already excludes the options that every segment carries. The function assumes a timestamp (12 bytes), since
/// timestamps are the default; the clock itself counts the packets as they are sent.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn wire_bytes_of_tcp(payload: u64, mss: u64, is_ipv6: u64) -> u64 {
    let ip_header = if is_ipv6 != 0 { IPV6_HEADER_BYTES } else { IPV4_HEADER_BYTES };
    let segments = if mss == 0 { 1 } else { payload.div_ceil(mss) };
    payload + segments * (ip_header + TCP_HEADER_WITH_TIMESTAMPS_BYTES)
}

/// The packet's socket, if it is a full one: neither a connection request nor in TIME-WAIT.
///
/// `NonNull`, because an `Option` of a pointer that may be null has a second word, which is undefined for `None`. The
/// compiler spills that word nevertheless, and the verifier says "R3 !read_ok".
#[inline(always)]
pub fn full_socket(ctx: &SkBuffContext) -> Option<NonNull<bpf_sock>> {
    // SAFETY: cgroup_skb programs may read sk; the helper takes any socket that is not NULL.
    unsafe {
        let socket = NonNull::new((*ctx.skb.skb).__bindgen_anon_2.sk)?;
        NonNull::new(bpf_sk_fullsock(socket.as_ptr()))
    }
}

/// Whether a socket listens. Packets to a listening socket may be a flood.
#[inline(always)]
pub fn listens(socket: NonNull<bpf_sock>) -> bool {
    // SAFETY: cgroup_skb programs may read the state of a full socket. The state of a socket that is not TCP has this
    // value by coincidence only.
    unsafe { socket.as_ref().state == BPF_TCP_LISTEN }
}
