//! Packets that bypass the network stack: frames from an AF_PACKET socket, as fast as the socket takes them.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, sendto, setsockopt, socket,
    sockopt,
};
use serde::Serialize;

use super::{context, seconds, xdp};

const PAYLOAD: [u8; 1400] = [0; 1400];
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// How long a SYN may take until the receiver answers it.
const OPENING: Duration = Duration::from_millis(300);
const ETH_P_IP: u16 = 0x0800;

/// PACKET_QDISC_BYPASS.
#[derive(Clone, Copy, Debug)]
struct QdiscBypass;
nix::setsockopt_impl!(QdiscBypass, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, u32, sockopt::SetStruct<u32>);

#[derive(clap::Args)]
pub struct Frames {
    /// Address and port of the receiver
    #[arg(long)]
    to: SocketAddrV4,
    /// Address that they are said to be of
    #[arg(long)]
    from: Ipv4Addr,
    /// Index of the interface
    #[arg(long)]
    ifindex: u32,
    /// Hardware address of the next hop
    #[arg(long)]
    next_hop: String,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Send past the interface's queue: PACKET_QDISC_BYPASS
    #[arg(long, conflicts_with = "xdp")]
    bypass: bool,
    /// Send by AF_XDP
    #[arg(long)]
    xdp: bool,
    /// Send a SYN and then segments of that connection, which never opens. Their checksums are wrong
    #[arg(long, conflicts_with = "xdp")]
    opening: bool,
}

#[derive(Serialize)]
pub struct Report {
    packets: u64,
    refused: u64,
}

pub fn send(options: &Frames) -> io::Result<Report> {
    if options.xdp {
        return send_by_xdp(options);
    }
    let flags = SockFlag::empty();
    let socket =
        socket(AddressFamily::Packet, SockType::Datagram, flags, None::<SockProtocol>).map_err(io::Error::from)?;
    if options.bypass {
        setsockopt(&socket, QdiscBypass, &1).map_err(io::Error::from).map_err(context("set PACKET_QDISC_BYPASS"))?;
    }
    let to = address(options)?;
    let mut packet = datagram(options);
    if options.opening {
        let mut syn = segment(options, SYN, &[]);
        let pseudo = pseudo_header(options, syn.len());
        let sum = checksum(&[&pseudo[..], &syn].concat());
        syn[16..18].copy_from_slice(&sum.to_be_bytes());
        sendto(socket.as_raw_fd(), &ipv4(options, IPPROTO_TCP, &syn), &to, MsgFlags::empty())?;
        thread::sleep(OPENING);
        packet = ipv4(options, IPPROTO_TCP, &segment(options, ACK, &PAYLOAD));
    }
    let mut report = Report { packets: 0, refused: 0 };
    let start = Instant::now();
    while start.elapsed() < options.seconds {
        match sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()) {
            Ok(_) => report.packets += 1,
            Err(_) => report.refused += 1,
        }
    }
    Ok(report)
}

fn send_by_xdp(options: &Frames) -> io::Result<Report> {
    /// No interface has this address. The receiver checks only the destination address of a frame.
    const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
    let frame = [&next_hop(options)?[..], &FROM, &ETH_P_IP.to_be_bytes(), &datagram(options)].concat();
    let mut sender = xdp::Sender::new(options.ifindex, &frame)?;
    let mut report = Report { packets: 0, refused: 0 };
    let start = Instant::now();
    while start.elapsed() < options.seconds {
        report.packets += sender.send();
    }
    Ok(report)
}

fn next_hop(options: &Frames) -> io::Result<[u8; 6]> {
    let bytes: Vec<u8> = options.next_hop.split(':').map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().map_err(|_| io::Error::other("a hardware address has six bytes"))
}

fn address(options: &Frames) -> io::Result<LinkAddr> {
    link_address(options.ifindex, ETH_P_IP, next_hop(options)?)
}

/// An address of AF_PACKET.
pub fn link_address(ifindex: u32, protocol: u16, mac: [u8; 6]) -> io::Result<LinkAddr> {
    let raw = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: ifindex as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0],
    };
    #[expect(unsafe_code, reason = "nix has no other way to make such an address")]
    // SAFETY: the value is a complete address of this family, and has the given length.
    let address = unsafe { LinkAddr::from_raw((&raw const raw).cast(), Some(size_of_val(&raw) as u32)) };
    address.ok_or_else(|| io::Error::other("not an address of AF_PACKET"))
}

fn datagram(options: &Frames) -> Vec<u8> {
    let port = options.to.port().to_be_bytes();
    let length = (8 + PAYLOAD.len()) as u16;
    // No checksum: allowed with IPv4.
    ipv4(options, IPPROTO_UDP, &[&port[..], &port, &length.to_be_bytes(), &[0, 0], &PAYLOAD].concat())
}

/// A TCP segment without a checksum.
fn segment(options: &Frames, flags: u8, payload: &[u8]) -> Vec<u8> {
    let port = options.to.port().to_be_bytes();
    let sequence = if flags == SYN { 1_u32 } else { 2 };
    let header = [&port[..], &port, &sequence.to_be_bytes(), &[0; 4], &[5 << 4, flags, 255, 255, 0, 0, 0, 0]].concat();
    [&header, payload].concat()
}

fn pseudo_header(options: &Frames, length: usize) -> Vec<u8> {
    let length = (length as u16).to_be_bytes();
    [&options.from.octets()[..], &options.to.ip().octets(), &[0, IPPROTO_TCP], &length].concat()
}

fn ipv4(options: &Frames, protocol: u8, body: &[u8]) -> Vec<u8> {
    let length = (20 + body.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(options.from.octets());
    packet.extend(options.to.ip().octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

/// The checksum of the Internet, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum + (sum >> 16)) as u16)
}
