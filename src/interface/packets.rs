//! Sets the least size and the largest size of the packets that TCP builds in the pod. Fewer and larger packets cost
//! less CPU: each packet costs a timer. Between the two sizes the eBPF programs choose, by the number of flows
//! (bpf/src/pace.rs). Without these settings a flow with a short round trip builds up to 64 KiB at any pace, which is
//! 52 ms of a 10 Mbit/s link in one packet (since Linux 5.18, `tcp_tso_autosize` in net/ipv4/tcp_output.c), and each of
//! many flows builds two segments. Three settings in the pod's network namespace change this:
//!
//! - `net.ipv4.tcp_min_tso_segs`: the segments that a flow builds however slow it is (bbr has a number of its own, 2);
//! - `net.ipv4.tcp_tso_rtt_log` = 0: TCP adds `gso_max_size >> round trip in us` to a packet, and does not count the
//!   round trip in units of 512 us;
//! - `gso_max_size` of the interface, and for IPv4, since Linux 6.3, `gso_ipv4_max_size`: at a round trip of 2 us,
//!   which a connection within the node can have, TCP would still add 16 KiB.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use netlink_packet_route::link::LinkAttribute;
use podshaper_abi::MAX_PACKET_NS;

use super::record::{Found, Need, Record};
use crate::{
    error::{self, Code, Error, Result},
    netlink,
    units::Rate,
};

/// How long a link of the limit's rate takes for a packet of the least size, however many bulk flows there are.
/// Together the flows are ahead of the limit by one such packet each.
const PACKET_NS: u64 = 2_000_000;
/// The fewest segments of such a packet, except at low rates, where single segments take long (below).
const MIN_TSO_SEGS: u64 = 2;
/// Segments of the usual size in a packet of 64 KiB, which is the largest there is without BIG TCP.
const MAX_TSO_SEGS: u64 = 44;
/// Payload of a segment of the usual size, with timestamps.
const USUAL_MSS: u64 = 1448;
/// Below this rate flows build single segments. From this rate on bbr builds two in any case (`bbr_min_tso_rate`,
/// net/ipv4/tcp_bbr.c).
const SINGLE_SEGMENTS_BELOW_BITS_PER_S: u64 = 1_200_000;

const TCP_MIN_TSO_SEGS: &str = "/proc/sys/net/ipv4/tcp_min_tso_segs";
const RTT_LOG: &str = "/proc/sys/net/ipv4/tcp_tso_rtt_log";

/// More than the part of `gso_max_size` that the kernel keeps for headers: `sk_setup_caps` subtracts MAX_TCP_HEADER, at
/// most 320.
const HEADERS_BYTES: u64 = 512;

/// The fewest segments of a bulk flow's packet at this limit.
pub fn min_tso_segs(limit: Rate) -> u64 {
    if limit.as_bits_per_s() < SINGLE_SEGMENTS_BELOW_BITS_PER_S {
        return 1;
    }
    (bytes_in(PACKET_NS, limit) / USUAL_MSS).clamp(MIN_TSO_SEGS, MAX_TSO_SEGS)
}

/// The bytes that a link of the limit's rate carries in a time.
fn bytes_in(ns: u64, limit: Rate) -> u64 {
    limit.as_bits_per_s() / 8 / (1_000_000_000 / ns)
}

/// The settings from before podshaper: those that the attachments on the interface have recorded, or else the settings
/// of now, with these sizes.
pub fn find(own: &Record, others: &[Need], sizes: Option<&Sizes>, sysctls: &Sysctls) -> Found {
    let limited: Vec<&Record> =
        others.iter().filter(|other| other.limits_egress()).map(|other| &other.record).collect();
    // An attachment of an earlier version did not record the setting. Then it is not known.
    let sysctl = |recorded: fn(&Found) -> Option<u32>, sysctl: &Sysctl| match limited.as_slice() {
        [] => sysctl.read(),
        limited => limited.iter().find_map(|record| recorded(&record.found)),
    };
    let tcp_tso_rtt_log = sysctl(|found| found.tcp_tso_rtt_log, &sysctls.tso_rtt_log);
    let tcp_min_tso_segs = sysctl(|found| found.tcp_min_tso_segs, &sysctls.min_tso_segs);
    let lowered = limited.iter().find(|record| record.shares_interface(own) && record.found.gso_max_size.is_some());
    let sizes = match lowered {
        Some(Record { found: Found { gso_max_size, gso_ipv4_max_size, .. }, .. }) => {
            (*gso_max_size, *gso_ipv4_max_size)
        }
        None => sizes.map_or((None, None), |now| (Some(now.gso_max), now.gso_ipv4_max)),
    };
    Found { gso_max_size: sizes.0, gso_ipv4_max_size: sizes.1, tcp_tso_rtt_log, tcp_min_tso_segs }
}

/// Sets the interface and the namespace so that packets are as small as the attachments need, or puts back what was
/// `found` if no attachment limits egress. Goes on after an error. Must be called in the namespace. Existing
/// connections keep their size.
///
/// # Errors
/// [`Code::Netns`] or [`Code::Kernel`]: everything that the kernel refuses. A setting that the kernel lacks is no
/// error.
pub fn settle(index: u32, own: &Record, needs: &[Need], now: Result<Option<Sizes>>, sysctls: Sysctls) -> Result<()> {
    let limited = || needs.iter().filter(|need| need.limits_egress());
    let segments = |need: &Need| match need.limits.and_then(|limits| limits.egress) {
        Some(limit) => u32::try_from(min_tso_segs(limit.rate)).ok(),
        // Its limits have another layout: the setting stays as it is.
        None => sysctls.min_tso_segs.read(),
    };
    let rtt_log = limited().next().map(|_| 0);
    let least_segments = limited().filter_map(segments).min();
    error::all([
        sysctls.min_tso_segs.set(least_segments.or(own.found.tcp_min_tso_segs)),
        sysctls.tso_rtt_log.set(rtt_log.or(own.found.tcp_tso_rtt_log)),
        now.and_then(|now| now.map_or(Ok(()), |now| settle_sizes(index, own, needs, now))),
    ])
}

fn settle_sizes(index: u32, own: &Record, needs: &[Need], now: Sizes) -> Result<()> {
    // A size that is not recorded could not be put back, so it is not changed.
    let Some(found) = own.found.gso_max_size else { return Ok(()) };
    let here = needs.iter().filter(|need| need.limits_egress() && need.record.shares_interface(own));
    let most = here.map(|need| match need.limits.and_then(|limits| limits.egress) {
        Some(limit) => largest(limit.rate, now.mtu),
        None => now.gso_max,
    });
    let most = most.min().unwrap_or(u32::MAX);
    let wanted = Sizes {
        gso_max: found.min(most),
        gso_ipv4_max: own.found.gso_ipv4_max_size.map(|found| found.min(most)).or(now.gso_ipv4_max),
        mtu: now.mtu,
    };
    if wanted == now { Ok(()) } else { wanted.set(index, own.found.gso_ipv4_max_size.is_some()) }
}

/// The largest packet that a flow may build at a limit, in bytes with headers.
fn largest(limit: Rate, mtu: u32) -> u32 {
    let bytes = bytes_in(MAX_PACKET_NS, limit).max(2 * u64::from(mtu)).saturating_add(HEADERS_BYTES);
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Sizes of an interface, in bytes.
#[derive(PartialEq, Eq)]
pub struct Sizes {
    gso_max: u32,
    gso_ipv4_max: Option<u32>,
    mtu: u32,
}

impl Sizes {
    /// The sizes of an interface in the calling thread's namespace. `None`: the kernel has no `tcp_tso_rtt_log`, so
    /// that the sizes do not matter, or the interface is gone.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the interface cannot be read.
    pub fn read(index: u32, sysctls: &Sysctls) -> Result<Option<Self>> {
        if !sysctls.tso_rtt_log.is_there() {
            return Ok(None);
        }
        let what = "read the gso_max_size of the pod's interface";
        let link = netlink::link(index).map_err(|cause| Error::because(Code::Kernel, what, cause))?;
        let Some(link) = link else { return Ok(None) };
        let (mut gso_max, mut gso_ipv4_max, mut mtu) = (None, None, None);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::GsoMaxSize(bytes) => gso_max = Some(*bytes),
                LinkAttribute::GsoIpv4MaxSize(bytes) => gso_ipv4_max = Some(*bytes),
                LinkAttribute::Mtu(bytes) => mtu = Some(*bytes),
                _ => {}
            }
        }
        Ok(gso_max.zip(mtu).map(|(gso_max, mtu)| Self { gso_max, gso_ipv4_max, mtu }))
    }

    /// `ip link set dev INDEX gso_max_size BYTES gso_ipv4_max_size BYTES`. The kernel applies them in this order. Where
    /// the first one is 64 KiB or less, it also sets the second (`netif_set_gso_max_size`, net/core/dev.c).
    fn set(&self, index: u32, knows_ipv4: bool) -> Result<()> {
        let ipv4 = self.gso_ipv4_max.filter(|_| knows_ipv4).map(LinkAttribute::GsoIpv4MaxSize);
        let attributes = [LinkAttribute::GsoMaxSize(self.gso_max)].into_iter().chain(ipv4).collect();
        netlink::set_link(index, attributes).map_err(|cause: io::Error| {
            let text = format!("set the gso_max_size of the pod's interface to {}", self.gso_max);
            Error::because(Code::Kernel, text, cause)
        })
    }
}

/// The sysctls of the namespace. A file below /proc/sys/net is that of the namespace of the thread that opens it,
/// wherever and whenever procfs was mounted (`net_ctl_header_lookup`, net/sysctl_net.c).
pub struct Sysctls {
    min_tso_segs: Sysctl,
    /// Kernels that have this sysctl (Linux 5.18 and later) build large packets for short round trips, whatever the
    /// pace.
    tso_rtt_log: Sysctl,
}

impl Sysctls {
    /// Must be called, and the result used, in the namespace.
    pub fn here() -> Self {
        Self { min_tso_segs: Sysctl::at(TCP_MIN_TSO_SEGS), tso_rtt_log: Sysctl::at(RTT_LOG) }
    }
}

/// A file below /proc/sys. It is opened once: the kernel searches all files of this name for the namespace's own, and a
/// node with thousands of pods has as many.
struct Sysctl {
    path: PathBuf,
    opened: OnceCell<io::Result<Opened>>,
}

/// Such a file, opened.
struct Opened {
    file: File,
    /// Why the file cannot be written.
    refusal: Option<io::Error>,
}

impl Sysctl {
    fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), opened: OnceCell::new() }
    }

    fn opened(&self) -> &io::Result<Opened> {
        self.opened.get_or_init(|| Opened::open(&self.path))
    }

    fn is_there(&self) -> bool {
        self.opened().is_ok()
    }

    fn read(&self) -> Option<u32> {
        self.opened().as_ref().ok().and_then(Opened::number)
    }

    /// Writes a value. A file that does not exist is not made.
    fn set(self, value: Option<u32>) -> Result<()> {
        let Some(value) = value else { return Ok(()) };
        let opened = self.opened.into_inner().unwrap_or_else(|| Opened::open(&self.path));
        match opened.and_then(|opened| opened.set(value)) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => {
                let text = format!("write {value} to {} (is /proc/sys mounted read-only?)", self.path.display());
                Err(Error::because(Code::Netns, text, cause))
            }
            _ => Ok(()),
        }
    }
}

impl Opened {
    fn open(path: &Path) -> io::Result<Self> {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => Ok(Self { file, refusal: None }),
            Err(cause) => File::open(path).map(|file| Self { file, refusal: Some(cause) }),
        }
    }

    /// The number in the file: one read gets the whole of a procfs file.
    fn number(&self) -> Option<u32> {
        let mut text = [0; 16];
        let length = self.file.read_at(&mut text, 0).ok()?;
        str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
    }

    /// Writes a number. A file that has the number already need not be writable.
    fn set(self, value: u32) -> io::Result<()> {
        match (self.number() == Some(value), self.refusal) {
            (true, _) => Ok(()),
            (false, Some(cause)) => Err(cause),
            (false, None) => self.file.write_all_at(value.to_string().as_bytes(), 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;

    #[test]
    fn a_packet_is_two_segments_or_twenty_milliseconds_of_the_limit() {
        let megabit = |megabits: u64| Rate::bits_per_s(megabits * 1_000_000).unwrap();
        for (limit, mtu, bytes) in [
            (Rate::bits_per_s(1_000).unwrap(), 1500, 3_000 + 512),
            (megabit(1), 1500, 3_000 + 512),
            (megabit(10), 1500, 25_000 + 512),
            (megabit(5), 9000, 18_000 + 512),
            (megabit(100), 1500, 250_000 + 512),
            (megabit(1_000), 1500, 2_500_000 + 512),
            (Rate::MAX, 1500, u32::MAX),
        ] {
            assert_eq!(largest(limit, mtu), bytes, "{limit}bit/s with an MTU of {mtu}");
        }
    }

    #[test]
    fn slow_flows_of_a_fast_pod_build_packets_of_the_pods_limit() {
        for (megabits, segments) in [(1, 1), (2, 2), (10, 2), (100, 17), (1_000, 44), (100_000, 44)] {
            assert_eq!(min_tso_segs(Rate::bits_per_s(megabits * 1_000_000).unwrap()), segments, "{megabits} Mbit/s");
        }
    }

    #[test]
    fn a_sysctl_this_kernel_lacks_is_not_an_error_but_a_refused_one_is() {
        let dir = tempdir().unwrap();
        let [absent, directory, file] = ["absent", "directory", "file"].map(|name| dir.path().join(name));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(&file, "9").unwrap();
        let set = |path: &Path| Sysctl::at(path).set(Some(0));
        set(&absent).unwrap();
        assert!(!absent.exists());
        set(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "0");
        assert_eq!(
            set(&directory).unwrap_err().to_string(),
            format!(
                "write 0 to {} (is /proc/sys mounted read-only?): Is a directory (os error 21)",
                directory.display()
            )
        );
    }
}
