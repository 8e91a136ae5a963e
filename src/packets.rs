//! How large a packet TCP builds in the pod: as large as the limit lets it, whatever the flow's share of it, and no larger. Fewer and larger
//! packets cost less CPU, and each is a timer less. Left alone, a flow with a short round trip builds up to 64 KiB at any pace, 52 ms of a
//! 10 Mbit/s link in one packet (since Linux 5.18, `tcp_tso_autosize` in net/ipv4/tcp_output.c), and one of many flows two segments. It takes
//! three settings of the pod's network namespace:
//!
//! - `net.ipv4.tcp_min_tso_segs`: the segments that a flow builds however slow it is (bbr has a number of its own, 2);
//! - `net.ipv4.tcp_tso_rtt_log` = 0: what is added to a packet is `gso_max_size >> round trip in us`, and not in units of 512 us;
//! - `gso_max_size` of the interface: at 2 us, which a connection within the node can have, that is 16 KiB still.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;

use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use crate::{
    error::{Code, Error, Result},
    netlink, netns,
    pod::Owner,
    units::Rate,
};

/// How long a packet of a bulk flow takes at the limit, however many flows there are: together they are ahead of the limit by one of each.
const PACKET_NS: u64 = 2_000_000;
/// How long the packet of a flow may take at the limit that is alone.
const LARGEST_PACKET_NS: u64 = 10_000_000;
/// Segments that it has at least, but where single ones are long (below).
const LEAST_BULK_SEGMENTS: u64 = 2;
/// Segments of the usual size in a packet of 64 KiB, which is the largest there is without BIG TCP.
const MOST_BULK_SEGMENTS: u64 = 44;
/// Payload of a segment of the usual size, with timestamps.
const USUAL_MSS: u64 = 1448;
/// Below this rate single segments are built. From here on bbr builds two all the same (`bbr_min_tso_rate`, net/ipv4/tcp_bbr.c).
const SINGLE_SEGMENTS_BELOW_BITS_PER_S: u64 = 1_200_000;

const LEAST_SEGMENTS: &str = "/proc/sys/net/ipv4/tcp_min_tso_segs";
const RTT_LOG: &str = "/proc/sys/net/ipv4/tcp_tso_rtt_log";

/// What the kernel keeps free of `gso_max_size` for headers, and more: `sk_setup_caps` takes MAX_TCP_HEADER off, at most 320.
const HEADERS_BYTES: u64 = 512;

/// Makes packets small for an egress limit, on an interface of the calling thread's namespace whose `gso_max_size` podshaper `found`,
/// if it changed it before. Returns what it is without podshaper, to be given to [`set_largest`]; `None`: it was left alone, since the
/// kernel builds no large packets. Connections that exist keep the size they have.
///
/// # Errors
/// [`Code::Netns`] or [`Code::Kernel`] if the kernel has a setting but refuses it. Lacking it is no error.
pub fn keep_small(ifindex: u32, limit: Rate, found: Option<u32>) -> Result<Option<u32>> {
    set_least_segments(limit)?;
    if !write_sysctl(Path::new(RTT_LOG), "0")? {
        return Ok(None);
    }
    let Some((now, mtu)) = sizes(ifindex)? else { return Ok(None) };
    let found = found.unwrap_or(now);
    let wanted = found.min(largest(limit, mtu));
    if wanted != now {
        set_largest(ifindex, wanted)?;
    }
    Ok(Some(found))
}

/// The same for another limit of an attachment.
///
/// # Errors
/// As for [`keep_small`], and those of entering the pod's namespace.
pub fn change(owner: &Owner, limit: Rate) -> Result<()> {
    let Some(path) = owner.netns.as_deref().map(Path::new) else { return Ok(()) };
    netns::in_netns(path, || {
        let ifindex = netns::interface(&owner.ifname, path)?.index;
        // What nobody has recorded could not be put back: an earlier version, which left it alone.
        let Some(found) = owner.gso_max_size else { return set_least_segments(limit) };
        keep_small(ifindex, limit, Some(found)).map(drop)
    })
}

/// Segments of the packets that a bulk flow builds at this limit, at its slowest.
pub fn bulk_segments(limit: Rate) -> u64 {
    if limit.as_bits_per_s() < SINGLE_SEGMENTS_BELOW_BITS_PER_S {
        return 1;
    }
    (bytes_in(PACKET_NS, limit) / USUAL_MSS).clamp(LEAST_BULK_SEGMENTS, MOST_BULK_SEGMENTS)
}

fn set_least_segments(limit: Rate) -> Result<()> {
    write_sysctl(Path::new(LEAST_SEGMENTS), &bulk_segments(limit).to_string()).map(drop)
}

/// What a link of the limit's rate carries in a time.
fn bytes_in(ns: u64, limit: Rate) -> u64 {
    limit.as_bits_per_s() / 8 / (1_000_000_000 / ns)
}

/// The largest packet a flow may build at a limit, in bytes with its headers.
fn largest(limit: Rate, mtu: u32) -> u32 {
    let bytes = bytes_in(LARGEST_PACKET_NS, limit).max(2 * u64::from(mtu)).saturating_add(HEADERS_BYTES);
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// `gso_max_size` and MTU of an interface.
fn sizes(ifindex: u32) -> Result<Option<(u32, u32)>> {
    let what = "read the gso_max_size of the pod's interface";
    let link = netlink::link(ifindex).map_err(|cause| Error::because(Code::Kernel, what, cause))?;
    Ok(link.and_then(|link| Some((gso_max_size(&link)?, mtu(&link)?))))
}

fn gso_max_size(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::GsoMaxSize(bytes) => Some(*bytes),
        _ => None,
    })
}

fn mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(bytes) => Some(*bytes),
        _ => None,
    })
}

/// `ip link set dev IFINDEX gso_max_size BYTES`, in the calling thread's namespace: to what [`keep_small`] returned, where a limit ends. The
/// other settings are the namespace's, and stay: without a limit they cost nothing.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn set_largest(ifindex: u32, bytes: u32) -> Result<()> {
    let failed = |cause: io::Error| {
        Error::because(Code::Kernel, format!("set the gso_max_size of the pod's interface to {bytes}"), cause)
    };
    netlink::set_link(ifindex, LinkAttribute::GsoMaxSize(bytes)).map_err(failed)
}

/// Files below /proc/sys/net are those of the namespace of the thread that opens them, wherever and whenever procfs was mounted
/// (Linux net/sysctl_net.c, net_ctl_header_lookup()). `false` if there is no such file; it is never made.
fn write_sysctl(file: &Path, value: &str) -> Result<bool> {
    let written = File::options()
        .write(true)
        .open(file)
        .and_then(|mut open| std::io::Write::write_all(&mut open, value.as_bytes()));
    match written {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(false),
        Err(cause) => {
            let text = format!("write {value} to {} (is /proc/sys mounted read-only?)", file.display());
            Err(Error::because(Code::Netns, text, cause))
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn a_packet_is_at_most_ten_milliseconds_of_the_limit_but_two_segments_at_least() {
        let megabit = |megabits: u64| Rate::bits_per_s(megabits * 1_000_000).unwrap();
        for (limit, mtu, bytes) in [
            (Rate::bits_per_s(1_000).unwrap(), 1500, 3_000 + 512),
            (megabit(10), 1500, 12_500 + 512),
            (megabit(10), 9000, 18_000 + 512),
            (megabit(100), 1500, 125_000 + 512),
            (megabit(1_000), 1500, 1_250_000 + 512),
            (Rate::MAX, 1500, u32::MAX),
        ] {
            assert_eq!(largest(limit, mtu), bytes, "{limit}bit/s with an MTU of {mtu}");
        }
    }

    #[test]
    fn slow_flows_of_a_fast_pod_build_packets_of_the_pods_limit() {
        for (megabits, segments) in [(1, 1), (2, 2), (10, 2), (100, 17), (1_000, 44), (100_000, 44)] {
            assert_eq!(bulk_segments(Rate::bits_per_s(megabits * 1_000_000).unwrap()), segments, "{megabits} Mbit/s");
        }
    }

    #[test]
    fn a_sysctl_this_kernel_lacks_is_not_an_error_but_a_refused_one_is() {
        let dir = tempdir().unwrap();
        let [absent, directory, file] = ["absent", "directory", "file"].map(|name| dir.path().join(name));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(&file, "9").unwrap();
        assert!(!write_sysctl(&absent, "0").unwrap() && !absent.exists());
        assert!(write_sysctl(&file, "0").unwrap());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "0");
        assert_eq!(
            write_sysctl(&directory, "0").unwrap_err().to_string(),
            format!(
                "write 0 to {} (is /proc/sys mounted read-only?): Is a directory (os error 21)",
                directory.display()
            )
        );
    }
}
