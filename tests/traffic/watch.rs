//! The bytes that an interface receives, at layer 3: a GSO packet counts as the packets that it would be on a real
//! link, each with all headers, including those of a tunnel. The counters of `wire.rs` belong to a namespace, and
//! count a packet twice that a tunnel or a bridge delivers.
//!
//! The kernel provides the arrival time of each packet, so a late reader assigns no packet to the wrong second.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, MultiHeaders, SockFlag, SockType, bind, getsockopt, recvmmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeVal, TimeValLike};
use serde::Serialize;

use super::sampler::BUCKET;
use super::{context, frames, seconds};

/// struct virtio_net_hdr, which precedes each packet and says how it is to be cut.
const CUTS_BYTES: usize = 10;
const ETHERNET_BYTES: usize = 14;
/// Enough for the headers of a tunnel and of the packet in it.
const HEAD_BYTES: usize = 192;
/// Room for packets while this process does not run.
const BUFFER_BYTES: usize = 256 << 20;
/// The time begins with the first packet of this size: the first one of a load, and not of the connection's set-up.
const LOAD_BYTES: u64 = 600;
/// The most time between a packet's arrival and its reading.
const LATE: Duration = Duration::from_millis(300);

/// PACKET_VNET_HDR.
#[derive(Clone, Copy, Debug)]
struct SayCuts;
nix::setsockopt_impl!(SayCuts, libc::SOL_PACKET, libc::PACKET_VNET_HDR, u32, sockopt::SetStruct<u32>);

/// PACKET_IGNORE_OUTGOING.
#[derive(Clone, Copy, Debug)]
struct IgnoreOutgoing;
nix::setsockopt_impl!(IgnoreOutgoing, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, u32, sockopt::SetStruct<u32>);

/// PACKET_STATISTICS.
#[derive(Clone, Copy, Debug)]
struct Statistics;
nix::getsockopt_impl!(
    Statistics,
    libc::SOL_PACKET,
    libc::PACKET_STATISTICS,
    libc::tpacket_stats,
    sockopt::GetStruct<libc::tpacket_stats>
);

#[derive(clap::Args)]
pub struct Watch {
    #[arg(long)]
    interface: String,
    /// Stop this long after the first large packet
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Give up when none has come after this long
    #[arg(long, value_parser = seconds, default_value = "15")]
    wait: Duration,
}

/// Cumulative, as in [`super::sampler::Timeline`].
#[derive(Serialize)]
pub struct Report {
    sample_us: Vec<u64>,
    wire_bytes: Vec<u64>,
    packets: u64,
}

/// A packet and its arrival time, by CLOCK_REALTIME.
#[derive(Clone, Copy)]
struct Received {
    at: Duration,
    wire: Wire,
}

#[derive(Clone, Copy)]
struct Wire {
    bytes: u64,
    packets: u64,
}

pub fn watch(options: &Watch) -> io::Result<Report> {
    let socket = open(&options.interface).map_err(context(format_args!("watch {}", options.interface)))?;
    super::say("watching");
    let report = sample(&socket, options)?;
    let lost = getsockopt(&socket, Statistics)?.tp_drops;
    if lost != 0 {
        return Err(io::Error::other(format!("{lost} packets came while there was no room to count them")));
    }
    Ok(report)
}

fn open(interface: &str) -> io::Result<OwnedFd> {
    // Without a protocol the socket receives nothing before it is bound to the interface.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, SayCuts, &1)?;
    setsockopt(&socket, IgnoreOutgoing, &1)?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
    bind(socket.as_raw_fd(), &frames::link_address(if_nametoindex(interface)?, libc::ETH_P_ALL as u16, [0; 6])?)?;
    Ok(socket)
}

fn sample(socket: &OwnedFd, options: &Watch) -> io::Result<Report> {
    let watching = Instant::now();
    let buckets = (options.seconds.as_micros() / BUCKET.as_micros()) as usize;
    let mut counts = vec![0; buckets];
    let mut packets = 0;
    let mut start: Option<(Duration, Instant)> = None;
    loop {
        for Received { at, wire } in receive(socket)? {
            if start.is_none() && wire.bytes >= LOAD_BYTES {
                start = Some((at, Instant::now()));
            }
            let Some((start, _)) = start else { continue };
            let bucket = (at.saturating_sub(start).as_micros() / BUCKET.as_micros()) as usize;
            if let Some(count) = counts.get_mut(bucket) {
                *count += wire.bytes;
                packets += wire.packets;
            }
        }
        match start {
            Some((_, read)) if read.elapsed() > options.seconds + LATE => break,
            None if watching.elapsed() > options.wait => {
                return Err(io::Error::other(format!("nothing came by {} in {:?}", options.interface, options.wait)));
            }
            _ => {}
        }
    }
    let mut report = Report { sample_us: vec![0], wire_bytes: vec![0], packets };
    let mut sum = 0;
    for (bucket, count) in counts.iter().enumerate() {
        sum += count;
        report.sample_us.push((bucket as u64 + 1) * BUCKET.as_micros() as u64);
        report.wire_bytes.push(sum);
    }
    Ok(report)
}

/// The waiting packets, or the next one; nothing if none arrives within the socket's timeout.
fn receive(socket: &OwnedFd) -> io::Result<Vec<Received>> {
    const AT_ONCE: usize = 64;
    // MSG_TRUNC: returns a packet's full length, even if the buffer is shorter.
    let flags = MsgFlags::MSG_WAITFORONE | MsgFlags::MSG_TRUNC;
    let mut cuts = [[0; CUTS_BYTES]; AT_ONCE];
    let mut heads = [[0; HEAD_BYTES]; AT_ONCE];
    let mut slices: Vec<_> =
        cuts.iter_mut().zip(&mut heads).map(|(cuts, head)| [IoSliceMut::new(cuts), IoSliceMut::new(head)]).collect();
    let mut headers = MultiHeaders::<()>::preallocate(AT_ONCE, Some(cmsg_space!(TimeSpec)));
    let came = match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None) {
        Ok(packets) => packets
            .map(|packet| {
                let time = packet.cmsgs()?.find_map(|message| match message {
                    ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
                    _ => None,
                });
                Ok((time.unwrap_or_default(), packet.bytes))
            })
            .collect::<io::Result<Vec<_>>>()?,
        Err(Errno::EAGAIN | Errno::EINTR) => vec![],
        Err(error) => return Err(context("receive")(error.into())),
    };
    let whole = came.into_iter().zip(cuts.iter().zip(&heads));
    whole.map(|((at, bytes), (cuts, head))| Ok(Received { at, wire: wire(cuts, head, bytes - CUTS_BYTES)? })).collect()
}

/// The packets and bytes that a packet of this length would be on a link, after it was cut.
fn wire(cuts: &[u8; CUTS_BYTES], head: &[u8; HEAD_BYTES], length: usize) -> io::Result<Wire> {
    let layer_3 = (length - ETHERNET_BYTES) as u64;
    let size = usize::from(u16::from_le_bytes([cuts[4], cuts[5]]));
    if cuts[1] == 0 || size == 0 {
        return Ok(Wire { bytes: layer_3, packets: 1 });
    }
    let headers = headers(head).ok_or_else(|| io::Error::other("headers of a GSO packet that are unknown here"))?;
    let packets = (length - headers).div_ceil(size) as u64;
    Ok(Wire { bytes: layer_3 + (packets - 1) * (headers - ETHERNET_BYTES) as u64, packets })
}

/// The bytes before the payload of TCP or UDP, also within VXLAN, GRE, or IP.
fn headers(frame: &[u8]) -> Option<usize> {
    const VXLAN_PORT: [u8; 2] = 4789_u16.to_be_bytes();
    const VXLAN_BYTES: usize = 8 + 8 + ETHERNET_BYTES;
    const IPV6_BYTES: usize = 40;
    let mut at = ETHERNET_BYTES;
    loop {
        let is_ipv6 = *frame.get(at)? >> 4 == 6;
        let protocol = i32::from(*frame.get(at + if is_ipv6 { 6 } else { 9 })?);
        let next = at + if is_ipv6 { IPV6_BYTES } else { usize::from(frame[at] & 15) * 4 };
        at = match protocol {
            libc::IPPROTO_TCP => return Some(next + usize::from(*frame.get(next + 12)? >> 4) * 4),
            libc::IPPROTO_UDP if frame.get(next + 2..next + 4)? == VXLAN_PORT => next + VXLAN_BYTES,
            libc::IPPROTO_UDP => return Some(next + 8),
            libc::IPPROTO_GRE => next + 4,
            libc::IPPROTO_IPIP | libc::IPPROTO_IPV6 => next,
            _ => return None,
        };
    }
}
