//! How large a packet TCP builds in the pod: about a millisecond of its pace, and no more than two segments or a millisecond of the
//! limit. Otherwise a flow with a short round trip builds up to 64 KiB whatever its pace, 52 ms of a 10 Mbit/s link in one packet
//! (since Linux 5.18, `tcp_tso_autosize` in net/ipv4/tcp_output.c). It takes three settings of the pod's network namespace:
//!
//! - `net.ipv4.tcp_tso_rtt_log` = 0: what is added to a packet is `gso_max_size >> round trip in us`, and not in units of 512 us;
//! - `gso_max_size` of the interface: at 2 us, which a connection within the node can have, that is 16 KiB still;
//! - `net.ipv4.tcp_min_tso_segs` = 1 at very low rates, where two segments are long.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;

use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use crate::{
    error::{Code, Error, Result},
    netlink, netns,
    pod::Owner,
    shaper,
    units::Rate,
};

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
    allow_single_segments(limit)?;
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
        let Some(found) = owner.gso_max_size else { return allow_single_segments(limit) };
        keep_small(ifindex, limit, Some(found)).map(drop)
    })
}

fn allow_single_segments(limit: Rate) -> Result<()> {
    if shaper::bulk_segments(limit) == 1 {
        write_sysctl(Path::new(LEAST_SEGMENTS), "1")?;
    }
    Ok(())
}

/// The largest packet a flow may build at a limit, in bytes with its headers.
fn largest(limit: Rate, mtu: u32) -> u32 {
    let millisecond_bytes = limit.as_bits_per_s() / 8 / 1_000;
    let bytes = millisecond_bytes.max(2 * u64::from(mtu)).saturating_add(HEADERS_BYTES);
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
    fn a_packet_is_two_segments_or_a_millisecond_of_the_limit() {
        let megabit = |megabits: u64| Rate::bits_per_s(megabits * 1_000_000).unwrap();
        for (limit, mtu, bytes) in [
            (Rate::bits_per_s(1_000).unwrap(), 1500, 3_000 + 512),
            (megabit(10), 1500, 3_000 + 512),
            (megabit(10), 9000, 18_000 + 512),
            (megabit(100), 1500, 12_500 + 512),
            (megabit(1_000), 1500, 125_000 + 512),
            (Rate::MAX, 1500, u32::MAX),
        ] {
            assert_eq!(largest(limit, mtu), bytes, "{limit}bit/s with an MTU of {mtu}");
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
