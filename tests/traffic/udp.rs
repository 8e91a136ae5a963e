//! UDP: a steady sender that counts the errors of its socket, and a counting receiver.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, sendmsg, setsockopt, sockopt,
};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::sampler::BUCKET;
use super::sockets::mark;
use super::{Receive, context, say_listening, seconds, wire};

/// IP and UDP headers.
const HEADERS_V4: u64 = 20 + 8;
const HEADERS_V6: u64 = 40 + 8;
/// "ECN-capable transport" in the low bits of the IPv4 TOS or the IPv6 traffic class (RFC 3168, section 5).
const ECT_0: i32 = 2;
/// A sender that was late (asleep, or blocked on its socket) catches up at most this much: some kernels wake it a
/// tick of 10 ms too late.
const CATCH_UP: Duration = Duration::from_millis(30);
/// The most packets that one call gives to the kernel.
const MOST_DUE: usize = 64;
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

#[derive(clap::Args)]
pub struct Send {
    /// Address and port of the receiver
    #[arg(long)]
    to: SocketAddr,
    /// Bits per second on the wire, IP header and up
    #[arg(long, value_name = "BITS")]
    rate: u64,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Payload of a packet, in bytes
    #[arg(long, default_value_t = 1400)]
    size: usize,
    /// Say that a congested link may mark the packets and need not drop them: ECT(0)
    #[arg(long)]
    ecn: bool,
    /// Give the kernel so many packets in one piece, to be cut by it (UDP_SEGMENT); at most 64 KiB in all
    #[arg(long, default_value_t = 1)]
    at_once: u16,
    /// Send every piece from a new socket, as if each were a flow of its own
    #[arg(long)]
    fresh_sockets: bool,
    /// SO_MARK of the socket
    #[arg(long, value_name = "NUMBER")]
    mark: Option<u32>,
    /// Buffer of the socket, in bytes, past net.core.wmem_max
    #[arg(long)]
    buffer: Option<usize>,
    /// Give each packet a departure time, so long after it was given to the kernel (SO_TXTIME, which fq honours)
    #[arg(long, value_name = "MILLISECONDS", conflicts_with = "at_once")]
    depart_after_ms: Option<u64>,
}

#[derive(Serialize)]
pub struct SendReport {
    packets: u64,
    wire_bytes: u64,
    /// Errors of sendto(), by name.
    errors: BTreeMap<String, u64>,
    seconds: f64,
}

/// Cumulative, like the TCP sink's.
#[derive(Serialize)]
pub struct SinkReport {
    sample_us: Vec<u64>,
    payload_bytes: Vec<u64>,
    wire_bytes: Vec<u64>,
    buckets: Vec<u64>,
    bytes: u64,
    packets: u64,
    /// Packets that found the socket's buffer full: they passed the limiter, and this program was too slow.
    buffer_errors: u64,
    /// Packets with a congestion mark that this namespace received.
    marked: u64,
    /// Packets that QUIC would take for lost, since enough later packets of the same sender have overtaken them (RFC
    /// 9002, `kPacketThreshold`).
    overtaken: u64,
}

pub fn send(options: &Send) -> io::Result<SendReport> {
    let any: SocketAddr =
        if options.to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16, 0, 0, 0, 0, 0, 0, 0], 0).into() };
    // Not connected: otherwise a receiver that has closed its socket would cause errors, which would be counted.
    let open = || UdpSocket::bind(any).and_then(|socket| set_up(&socket, options).map(|()| socket));
    let mut socket = open()?;
    let wire_bytes = options.size as u64 + if options.to.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
    let at_once = u64::from(options.at_once);
    let interval = Duration::from_secs_f64((wire_bytes * at_once * 8) as f64 / options.rate.max(1) as f64);
    let (mut packets, mut errors) = (0, BTreeMap::<String, u64>::new());
    let start = Instant::now();
    let mut due = start;
    while start.elapsed() < options.seconds {
        let now = Instant::now();
        if now < due {
            thread::sleep(due - now);
        }
        due = due.max(now.checked_sub(CATCH_UP).unwrap_or(now));
        if options.fresh_sockets {
            socket = open()?;
        }
        // All packets that are due in one call, since calls are expensive in User Mode Linux; but only one from each
        // new socket.
        let missed = now.saturating_duration_since(due).div_duration_f64(interval) as usize;
        let wanted = if options.fresh_sockets { 1 } else { (missed + 1).min(MOST_DUE) };
        let sent = match options.depart_after_ms {
            Some(ms) => send_later(&socket, &piece(options, packets), options.to, Duration::from_millis(ms)),
            None => {
                let pieces: Vec<_> =
                    (0..wanted as u64).map(|which| piece(options, packets + which * at_once)).collect();
                send_each(&socket, &pieces, options.to)
            }
        };
        due += interval * sent.unwrap_or(1) as u32;
        match sent {
            Ok(sent) => packets += at_once * sent as u64,
            Err(error) => *errors.entry(format!("{error:?}")).or_default() += 1,
        }
    }
    Ok(SendReport { packets, wire_bytes: packets * wire_bytes, errors, seconds: start.elapsed().as_secs_f64() })
}

fn set_up(socket: &UdpSocket, options: &Send) -> io::Result<()> {
    if let Some(bytes) = options.buffer {
        setsockopt(socket, sockopt::SndBufForce, &bytes)
            .map_err(io::Error::from)
            .map_err(context("set SO_SNDBUFFORCE"))?;
    }
    options.mark.map_or(Ok(()), |number| mark(socket, number))?;
    if options.ecn {
        match options.to {
            SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4Tos, &ECT_0),
            SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6TClass, &ECT_0),
        }?;
    }
    if options.at_once > 1 {
        let size = i32::try_from(options.size).map_err(io::Error::other)?;
        setsockopt(socket, sockopt::UdpGsoSegment, &size)
            .map_err(io::Error::from)
            .map_err(context("set UDP_SEGMENT"))?;
    }
    if options.depart_after_ms.is_some() {
        let clock = libc::sock_txtime { clockid: libc::CLOCK_MONOTONIC, flags: 0 };
        setsockopt(socket, sockopt::TxTime, &clock).map_err(io::Error::from).map_err(context("set SO_TXTIME"))?;
    }
    Ok(())
}

/// The bytes of one piece for the kernel. Each packet begins with its number, if there is room.
fn piece(options: &Send, first: u64) -> Vec<u8> {
    let mut piece = vec![0; options.size * usize::from(options.at_once)];
    for (number, packet) in (first..).zip(piece.chunks_exact_mut(options.size.max(1))) {
        if let Some(start) = packet.first_chunk_mut() {
            *start = number.to_be_bytes();
        }
    }
    piece
}

/// Sends a packet with a departure time this much later.
fn send_later(socket: &UdpSocket, packet: &[u8], to: SocketAddr, after: Duration) -> nix::Result<usize> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let edt_ns = (now + after).as_nanos() as u64;
    let (slices, to) = ([IoSlice::new(packet)], SockaddrStorage::from(to));
    sendmsg(socket.as_raw_fd(), &slices, &[ControlMessage::TxTime(&edt_ns)], MsgFlags::empty(), Some(&to)).map(|_| 1)
}

/// Sends pieces with one call. Returns how many were sent, at least one.
fn send_each(socket: &UdpSocket, pieces: &[Vec<u8>], to: SocketAddr) -> nix::Result<usize> {
    let slices: Vec<_> = pieces.iter().map(|piece| [IoSlice::new(piece)]).collect();
    let addresses = vec![Some(SockaddrStorage::from(to)); pieces.len()];
    let mut headers = MultiHeaders::preallocate(pieces.len(), None);
    sendmmsg(socket.as_raw_fd(), &mut headers, &slices, &addresses, [], MsgFlags::empty()).map(Iterator::count)
}

pub fn sink(options: &Receive) -> io::Result<SinkReport> {
    let socket = UdpSocket::bind(options.listen).map_err(context(format_args!("listen on {}", options.listen)))?;
    if let IpAddr::V4(group) = options.listen.ip()
        && group.is_multicast()
    {
        // On the interface to which the route to the group leads.
        socket.join_multicast_v4(&group, &Ipv4Addr::UNSPECIFIED).map_err(context(format_args!("join {group}")))?;
    }
    // More than net.core.rmem_max needs CAP_NET_ADMIN. Without it a large burst may show up in buffer_errors.
    let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES);
    let headers = if options.listen.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 };
    let (errors_before, marked_before) = (wire::udp_buffer_errors()?, wire::marked()?);
    say_listening(socket.local_addr()?);
    socket.set_read_timeout(Some(options.wait))?;
    let mut order = Order::default();
    let (mut bytes, mut packets) = receive(&socket, &mut order)?;
    if packets == 0 {
        return Err(io::Error::other(format!("no packet came within {:?}", options.wait)));
    }
    let start = Instant::now();
    let mut report = SinkReport {
        sample_us: vec![0],
        payload_bytes: vec![0],
        wire_bytes: vec![0],
        buckets: vec![],
        bytes: 0,
        packets: 0,
        buffer_errors: 0,
        marked: 0,
        overtaken: 0,
    };
    let mut next = start + BUCKET;
    while next <= start + options.seconds {
        let now = Instant::now();
        if now >= next {
            report.sample_us.push((now - start).as_micros() as u64);
            report.buckets.push(bytes - report.bytes);
            report.payload_bytes.push(bytes);
            report.wire_bytes.push(bytes + packets * headers);
            (report.bytes, report.packets) = (bytes, packets);
            next += BUCKET;
            continue;
        }
        // At least a millisecond: zero would mean no timeout.
        socket.set_read_timeout(Some((next - now).max(Duration::from_millis(1))))?;
        let (more_bytes, more_packets) = receive(&socket, &mut order)?;
        (bytes, packets) = (bytes + more_bytes, packets + more_packets);
    }
    report.buffer_errors = wire::udp_buffer_errors()? - errors_before;
    report.marked = wire::marked()? - marked_before;
    report.overtaken = order.overtaken;
    Ok(report)
}

/// The order in which packets arrive.
#[derive(Default)]
struct Order {
    largest: u64,
    overtaken: u64,
}

impl Order {
    fn note(&mut self, number: u64) {
        const MANY: u64 = 3;
        self.overtaken += u64::from(number + MANY <= self.largest);
        self.largest = self.largest.max(number);
    }
}

/// Payload and number of the waiting packets, or of the next one; nothing if none arrives within the socket's
/// timeout.
fn receive(socket: &UdpSocket, order: &mut Order) -> io::Result<(u64, u64)> {
    const AT_ONCE: usize = 64;
    // MSG_TRUNC: returns a packet's full length, even if the buffer is shorter.
    let flags = MsgFlags::MSG_WAITFORONE | MsgFlags::MSG_TRUNC;
    let mut starts = [[0; size_of::<u64>()]; AT_ONCE];
    let mut slices = starts.each_mut().map(|start| [IoSliceMut::new(start)]);
    let mut headers = MultiHeaders::<()>::preallocate(AT_ONCE, None);
    let lengths: Vec<usize> = match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None) {
        Ok(packets) => packets.map(|packet| packet.bytes).collect(),
        // A process that was stopped and continued gets EINTR if its socket has a timeout.
        Err(Errno::EAGAIN | Errno::EINTR) => vec![],
        Err(error) => return Err(context("receive")(error.into())),
    };
    let numbered = lengths.iter().zip(starts).filter(|(length, _)| **length >= size_of::<u64>());
    numbered.for_each(|(_, start)| order.note(u64::from_be_bytes(start)));
    Ok((lengths.iter().sum::<usize>() as u64, lengths.len() as u64))
}
