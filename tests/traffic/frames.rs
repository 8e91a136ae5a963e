//! UDP packets that bypass the network stack: frames from an AF_PACKET socket, as fast as the socket takes them.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, sendto, setsockopt, socket,
    sockopt,
};
use serde::Serialize;

use super::{context, seconds, xdp};

const HEADERS: usize = 20 + 8;
const IPPROTO_UDP: u8 = 17;
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
    let packet = packet(options, 1400);
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
    let frame = [&next_hop(options)?[..], &FROM, &ETH_P_IP.to_be_bytes(), &packet(options, 1400)].concat();
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

fn packet(options: &Frames, payload: usize) -> Vec<u8> {
    let length = (HEADERS + payload) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, IPPROTO_UDP, 0, 0]);
    packet.extend(options.from.octets());
    packet.extend(options.to.ip().octets());
    let words = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(options.to.port().to_be_bytes());
    packet.extend(options.to.port().to_be_bytes());
    packet.extend((length - 20).to_be_bytes());
    // No checksum: allowed with IPv4.
    packet.extend([0, 0]);
    packet.resize(HEADERS + payload, 0);
    packet
}
