//! The queueing disciplines that a pod may need. `fq` is for its own interface: packets wait in it for their departure
//! time. On a kernel without fq, `htb` is there instead, and `tbf` may be on the host end of the veth. A qdisc of
//! another tool stays.

pub mod htb;

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use podshaper_abi::{MAX_HORIZON_NS, QDISC_MAJOR};

use crate::{
    error::{Code, Error, Result},
    netlink,
    request::Limit,
    units::{Burst, Rate},
};

/// The handle of the qdiscs that podshaper makes.
const OURS: TcHandle = class(0);

/// Attributes of fq (uapi/linux/pkt_sched.h).
const TCA_FQ_PLIMIT: u16 = 1;
const TCA_FQ_FLOW_PLIMIT: u16 = 2;
const TCA_FQ_RATE_ENABLE: u16 = 5;
const TCA_FQ_BUCKETS_LOG: u16 = 8;
const TCA_FQ_HORIZON: u16 = 14;
/// The most packets of one flow in fq. They are held acknowledgements: at 1 Gbit/s and without GRO, 40 in a
/// millisecond.
const FQ_FLOW_LIMIT: u32 = 10_000;
/// The most packets that wait in one qdisc. This is to bound neither time nor memory: the programs bound the time, and
/// the senders' buffers the memory. fq's own limit of 10000 would fill with small packets first, and then drop packets
/// of every flow.
pub const QUEUE_PACKETS: u32 = 100_000;

/// The number of trees in which fq looks for a packet's flow, as a power of two. The kernel's 1024 trees take 8 KiB for
/// a pod that may have ten flows. With 128 trees, a thousand flows are eight in each.
const FQ_BUCKETS_LOG: u32 = 7;
/// The number of trees in the waiting room, which has packets of all pods.
const FQ_ROOM_BUCKETS_LOG: u32 = 10;

/// Attributes of tbf.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// How long a packet may wait in tbf. This wait is latency, and the acknowledgements for packets that the pod sends
/// wait, too. bbr believes the round trip of its first packets for ten seconds, and then sends too little: half of 100
/// Mbit/s where acknowledgements wait 20 ms.
const TBF_QUEUE_NS: u64 = 10_000_000;
/// The least room in tbf, in bytes: one GSO packet of 64 KiB.
const MIN_TBF_QUEUE_BYTES: u128 = 1 << 16;
/// Bytes of an Ethernet header, which tbf and htb count and podshaper does not.
pub const ETHERNET_HEADER_BYTES: u64 = 14;
/// Bytes of a full packet at layer 3.
const FULL_PACKET_BYTES: u64 = 1500;

/// `tc qdisc replace dev IFINDEX root handle 7064: fq nopacing limit 100000 flow_limit 10000 horizon 60s buckets 128`,
/// in the calling thread's namespace.
///
/// nopacing: TCP goes on pacing itself, which is finer than fq's pacing. fq still honours departure times.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no fq (the error says so), or the interface has another tool's qdisc.
pub fn put_fq(ifindex: u32) -> Result<()> {
    put_fq_with(ifindex, FQ_BUCKETS_LOG)
}

/// Puts fq on the waiting room, like [`put_fq`].
///
/// # Errors
/// Those of [`put_fq`].
pub fn put_room_fq(ifindex: u32) -> Result<()> {
    put_fq_with(ifindex, FQ_ROOM_BUCKETS_LOG)
}

fn put_fq_with(ifindex: u32, buckets_log: u32) -> Result<()> {
    const WHAT: &str = "put fq on the pod's interface";
    let failed = |cause: io::Error| match cause.raw_os_error() {
        Some(libc::ENOENT) => Error::new(Code::Kernel, format!("{WHAT}: this kernel has no fq (modprobe sch_fq)")),
        _ => Error::because(Code::Kernel, WHAT, cause),
    };
    if add_root(ifindex, "fq", fq_options(buckets_log)).map_err(failed)? {
        return Ok(());
    }
    match root_qdisc(ifindex).map_err(failed)? {
        // Another tool's fq honours departure times as well.
        Some((kind, handle)) if kind == "fq" && handle != OURS => Ok(()),
        // The kernel does not replace a qdisc by one of another kind with the same handle, and programs count on the
        // qdisc that is there.
        Some((kind, OURS)) if kind != "fq" => {
            Err(Error::new(Code::Kernel, format!("{WHAT}: it has podshaper's {kind} already")))
        }
        Some((kind, handle)) if !is_ours_or_default(handle) => Err(taken(WHAT, &kind)),
        _ => replace_root(ifindex, "fq", fq_options(buckets_log)).map_err(failed),
    }
}

fn fq_options(buckets_log: u32) -> Vec<TcOption> {
    let horizon_us = u32::try_from(MAX_HORIZON_NS / 1_000).unwrap_or(u32::MAX);
    vec![
        option(TCA_FQ_PLIMIT, &QUEUE_PACKETS.to_ne_bytes()),
        option(TCA_FQ_FLOW_PLIMIT, &FQ_FLOW_LIMIT.to_ne_bytes()),
        option(TCA_FQ_RATE_ENABLE, &[0; 4]),
        option(TCA_FQ_BUCKETS_LOG, &buckets_log.to_ne_bytes()),
        option(TCA_FQ_HORIZON, &horizon_us.to_ne_bytes()),
    ]
}

/// `tc qdisc replace dev IFINDEX root handle 7064: tbf rate .. burst .. limit ..`, in the calling thread's namespace,
/// on the host end of a pod's veth.
///
/// # Errors
/// [`Code::Kernel`]: the interface has another tool's qdisc; or the kernel's error.
pub fn put_tbf(ifindex: u32, limit: &Limit) -> Result<()> {
    const WHAT: &str = "put tbf on the host's end of the pod's veth";
    let failed = |cause: io::Error| Error::because(Code::Kernel, WHAT, cause);
    if add_root(ifindex, "tbf", tbf_options(limit)).map_err(failed)? {
        return Ok(());
    }
    match root_qdisc(ifindex).map_err(failed)? {
        Some((kind, handle)) if !is_ours_or_default(handle) => Err(taken(WHAT, &kind)),
        _ => replace_root(ifindex, "tbf", tbf_options(limit)).map_err(failed),
    }
}

/// Whether the root qdisc of an interface in the calling thread's namespace is of this kind.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn has(ifindex: u32, kind: &str) -> Result<bool> {
    let root =
        root_qdisc(ifindex).map_err(|cause| Error::because(Code::Kernel, "list the qdiscs of the pod", cause))?;
    Ok(root.is_some_and(|(found, _)| found == kind))
}

/// `tc qdisc del dev IFINDEX root`, in the calling thread's namespace, if podshaper put the qdisc there.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn take_off(ifindex: u32) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "take podshaper's qdisc off", cause);
    if root_qdisc(ifindex).map_err(failed)?.is_none_or(|(_, handle)| handle != OURS) {
        return Ok(());
    }
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::ROOT;
    netlink::change(RouteNetlinkMessage::DelQueueDiscipline(message), 0).map_err(failed)
}

/// The handle of podshaper's qdisc, or of one of its classes, by the minor number.
const fn class(minor: u16) -> TcHandle {
    TcHandle { major: QDISC_MAJOR, minor }
}

/// struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate. A rate beyond 32 bits is in an attribute
/// of its own.
fn rate_spec(bytes_per_s: u64) -> Vec<u8> {
    let mut spec = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    spec.extend(u32::try_from(bytes_per_s).unwrap_or(u32::MAX).to_ne_bytes());
    spec
}

/// The rate, in bits per second, of full packets with their Ethernet headers, as queueing disciplines count it.
pub fn with_ethernet(rate: Rate) -> u64 {
    // Multiplied first: divided first, the lowest rates would be 0. The highest rate (`Rate::MAX`, 10^15) times 1514 is
    // below 2^61.
    rate.as_bits_per_s() * (FULL_PACKET_BYTES + ETHERNET_HEADER_BYTES) / FULL_PACKET_BYTES
}

fn tbf_options(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    let burst = tbf_burst_bytes(limit.burst);
    let queue = (u128::from(bytes_per_s) * u128::from(TBF_QUEUE_NS) / 1_000_000_000).max(MIN_TBF_QUEUE_BYTES);
    let queue = u32::try_from(queue).unwrap_or(u32::MAX).saturating_add(burst);
    // struct tc_tbf_qopt: rate, peakrate (none), limit, buffer (0: TCA_TBF_BURST counts), mtu.
    let mut parms = rate_spec(bytes_per_s);
    parms.extend([0; 12]);
    parms.extend(queue.to_ne_bytes());
    parms.extend([0; 8]);
    vec![
        option(TCA_TBF_PARMS, &parms),
        option(TCA_TBF_RATE64, &bytes_per_s.to_ne_bytes()),
        option(TCA_TBF_BURST, &burst.to_ne_bytes()),
    ]
}

/// tbf drops each packet that is longer than its burst (`tbf_enqueue`), so the burst has room for a full packet.
fn tbf_burst_bytes(burst: Burst) -> u32 {
    u32::try_from(burst.as_bytes().max(FULL_PACKET_BYTES + ETHERNET_HEADER_BYTES)).unwrap_or(u32::MAX)
}

/// Kind and handle of an interface's root qdisc.
fn root_qdisc(ifindex: u32) -> io::Result<Option<(String, TcHandle)>> {
    qdisc_at(ifindex, TcHandle::ROOT)
}

/// Kind and handle of the qdisc that an interface has at a parent.
///
/// # Errors
/// The kernel's error.
pub fn qdisc_at(ifindex: u32, parent: TcHandle) -> io::Result<Option<(String, TcHandle)>> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = parent;
    // The kernel reports no qdisc that does nothing (`tc_qdisc_dump_ignore`). The request is for one qdisc: a node with
    // many pods has too many to list them all.
    let root = match netlink::get_notified(RouteNetlinkMessage::GetQueueDiscipline(message)) {
        Ok(Some(RouteNetlinkMessage::NewQueueDiscipline(qdisc))) => Some(qdisc),
        Err(cause) if cause.raw_os_error() != Some(libc::ENOENT) => return Err(cause),
        _ => None,
    };
    Ok(root.map(|qdisc| {
        let kind = qdisc.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Kind(kind) => Some(kind.clone()),
            _ => None,
        });
        (kind.unwrap_or_default(), qdisc.header.handle)
    }))
}

/// The kernel gives its default qdiscs no handle.
fn is_ours_or_default(handle: TcHandle) -> bool {
    handle == OURS || handle.major == 0
}

/// Puts a root qdisc on an interface that only has the kernel's default qdisc. `false`: it has another one, which stays
/// as it is.
fn add_root(ifindex: u32, kind: &str, options: Vec<TcOption>) -> io::Result<bool> {
    match set_root(ifindex, kind, options, NLM_F_CREATE | NLM_F_EXCL) {
        Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        done => done.map(|()| true),
    }
}

fn replace_root(ifindex: u32, kind: &str, options: Vec<TcOption>) -> io::Result<()> {
    set_root(ifindex, kind, options, NLM_F_CREATE | NLM_F_REPLACE)
}

fn set_root(ifindex: u32, kind: &str, options: Vec<TcOption>, flags: u16) -> io::Result<()> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = OURS;
    message.attributes = vec![TcAttribute::Kind(kind.to_owned()), TcAttribute::Options(options)];
    netlink::change(RouteNetlinkMessage::NewQueueDiscipline(message), flags)
}

/// The error where another tool's qdisc has the place of podshaper's.
fn taken(what: &str, kind: &str) -> Error {
    Error::new(Code::Kernel, format!("{what}: it has the qdisc {kind} already, which is left alone"))
}

fn option(kind: u16, value: &[u8]) -> TcOption {
    TcOption::Other(DefaultNla::new(kind, value.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_headers_of_full_packets_are_added_at_every_rate() {
        for (rate, with_headers) in [
            (Rate::MIN, 1_009),
            (Rate::bits_per_s(8_000).unwrap(), 8_074),
            (Rate::bits_per_s(10_000_000).unwrap(), 10_093_333),
            (Rate::MAX, 1_009_333_333_333_333),
        ] {
            assert_eq!(with_ethernet(rate), with_headers, "{rate}bit/s");
        }
    }

    #[test]
    fn the_burst_of_tbf_has_room_for_a_full_packet() {
        for (burst, bytes) in [("8k", 1_514), ("16k", 2_000), ("8G", 1_000_000_000)] {
            assert_eq!(tbf_burst_bytes(burst.parse().unwrap()), bytes, "{burst}");
        }
    }
}
