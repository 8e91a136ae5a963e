//! Wire bytes (layer 3: IP header and up) from the counters of this process's network namespace.
//!
//! A TCP sender hands packets of up to 64 KiB through a veth. The octet counters count such a packet once, with one set
//! of headers, while a real link (and podshaper's clock) would carry it as many packets. Counters that know the
//! difference, tried on Linux 6.18:
//!
//! - `InNoECTPkts` and the other ECN counters count the packets within (`gso_segs`); `InReceives` counts the large
//!   packets. So `octets + headers * (packets - large packets)` is what the wire would carry. Over 2 s of one flow, at
//!   10 Mbit/s and at 17 Gbit/s, this equals the payload plus 52 bytes (72 with IPv6) for each of the sender's
//!   `OutSegs` plus 1500 for each of its `RetransSegs`, to less than a packet. Requests, ACKs and ICMP are included.
//! - `payload * (mss + 52) / mss` agrees to 0.01 % where nothing is sent twice, but does not include the rest.
//! - `OutOctets` and `OutSegs` of the sender include packets that a queue behind the sender still drops, so the
//!   receiver's counters are used.
//!
//! They count everything that the namespace receives, including loopback: a sink belongs in a namespace that receives
//! nothing else.

use std::collections::HashMap;
use std::fs;
use std::io;

use serde::Serialize;

use super::context;
use super::sockets::Protocol;

const TCP_HEADERS_V4: u64 = 20 + 20;
const TCP_HEADERS_V6: u64 = 40 + 20;

/// The packets and wire bytes that this namespace has received so far.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Received {
    pub wire_bytes: u64,
    pub packets: u64,
}

/// TCP segments that this namespace has sent so far.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    pub sent: u64,
    pub retransmitted: u64,
}

impl Received {
    /// The counts for a namespace that receives mostly data of this protocol.
    pub fn now(protocol: Protocol) -> io::Result<Self> {
        let option = protocol.option_bytes()?;
        let (ip, ip_ext) = (rows("snmp", "Ip")?, rows("netstat", "IpExt")?);
        let packets = sum(&ip_ext, &["InNoECTPkts", "InECT0Pkts", "InECT1Pkts", "InCEPkts"])?;
        let v4 =
            Self::count(sum(&ip_ext, &["InOctets"])?, packets, sum(&ip, &["InReceives"])?, TCP_HEADERS_V4 + option);
        let Some(ip6) = snmp6()? else { return Ok(v4) };
        let packets = sum(&ip6, &["Ip6InNoECTPkts", "Ip6InECT0Pkts", "Ip6InECT1Pkts", "Ip6InCEPkts"])?;
        let octets = sum(&ip6, &["Ip6InOctets"])?;
        let v6 = Self::count(octets, packets, sum(&ip6, &["Ip6InReceives"])?, TCP_HEADERS_V6 + option);
        Ok(Self { wire_bytes: v4.wire_bytes + v6.wire_bytes, packets: v4.packets + v6.packets })
    }

    fn count(octets: u64, packets: u64, big_packets: u64, headers: u64) -> Self {
        // The counters are not read at the same instant: on a live link `big_packets` can be ahead for a moment.
        Self { wire_bytes: octets + headers * packets.saturating_sub(big_packets), packets }
    }
}

impl Segments {
    pub fn now() -> io::Result<Self> {
        let tcp = rows("snmp", "Tcp")?;
        Ok(Self { sent: sum(&tcp, &["OutSegs"])?, retransmitted: sum(&tcp, &["RetransSegs"])? })
    }
}

/// UDP packets that this namespace has dropped because a socket's buffer was full.
pub fn udp_buffer_errors() -> io::Result<u64> {
    let v4 = sum(&rows("snmp", "Udp")?, &["RcvbufErrors"])?;
    Ok(v4 + snmp6()?.map_or(Ok(0), |ip6| sum(&ip6, &["Udp6RcvbufErrors"]))?)
}

/// MPTCP connections that this namespace has opened, and whose other end spoke MPTCP as well.
pub fn mptcp_connections() -> io::Result<u64> {
    sum(&rows("netstat", "MPTcpExt")?, &["MPCapableSYNACKRX"])
}

/// Packets with a congestion mark (CE) that this namespace has received.
pub fn marked() -> io::Result<u64> {
    let v4 = sum(&rows("netstat", "IpExt")?, &["InCEPkts"])?;
    Ok(v4 + snmp6()?.map_or(Ok(0), |ip6| sum(&ip6, &["Ip6InCEPkts"]))?)
}

/// Whether TCP segments of this namespace have timestamps.
pub fn timestamps() -> io::Result<bool> {
    Ok(read("/proc/sys/net/ipv4/tcp_timestamps")?.trim() != "0")
}

/// Reads the counters of this thread's namespace. `/proc/net` shows the main thread's, and a thread may have entered
/// another namespace.
fn rows(file: &str, protocol: &str) -> io::Result<HashMap<String, u64>> {
    let path = format!("/proc/thread-self/net/{file}");
    let text = read(&path)?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return Err(io::Error::other(format!("{path} has no rows of {protocol}")));
    };
    // Some values are signed (MaxConn is -1): these are not counters.
    let values = values.split_whitespace().map(|value| value.parse().unwrap_or(0));
    Ok(names.split_whitespace().map(String::from).zip(values).collect())
}

/// None on a machine without IPv6.
fn snmp6() -> io::Result<Option<HashMap<String, u64>>> {
    let path = "/proc/thread-self/net/snmp6";
    if !fs::exists(path)? {
        return Ok(None);
    }
    let pair = |line: &str| {
        let (name, value) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    Ok(Some(read(path)?.lines().filter_map(pair).collect()))
}

fn sum(counters: &HashMap<String, u64>, names: &[&str]) -> io::Result<u64> {
    let value = |name: &&str| counters.get(*name).ok_or_else(|| io::Error::other(format!("the kernel has no {name}")));
    names.iter().map(value).sum()
}

fn read(path: &str) -> io::Result<String> {
    fs::read_to_string(path).map_err(context(format_args!("read {path}")))
}
