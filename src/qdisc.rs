//! The one queueing discipline a pod may need: `fq` on its own interface, which lets acknowledgements leave when they should, or,
//! on a kernel without fq, `tbf` on the host's end of its veth. Whatever somebody else has put there stays.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use crate::{
    error::{Code, Error, Result},
    netlink,
    request::Limit,
};

/// Handle of the qdiscs podshaper makes ("7064:"): by it they are known again.
const OURS: TcHandle = TcHandle { major: 0x7064, minor: 0 };

/// Attributes of fq (uapi/linux/pkt_sched.h).
const TCA_FQ_FLOW_PLIMIT: u16 = 2;
const TCA_FQ_RATE_ENABLE: u16 = 5;
/// Packets one flow may have in fq. They are acknowledgements that are held: at 1 Gbit/s and without GRO, 40 in a millisecond.
const FQ_FLOW_LIMIT: u32 = 10_000;

/// Attributes of tbf.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// How long a packet may wait in tbf: it is latency, and the acknowledgements of what the pod sends wait too. bbr, which believes the
/// round trip of its first packets for ten seconds, then sends little: half of 100 Mbit/s where they wait 20 ms.
const TBF_QUEUE_NS: u64 = 10_000_000;
/// The least room in tbf: one GSO packet of 64 KiB.
const TBF_QUEUE_LEAST_BYTES: u128 = 1 << 16;
/// Ethernet headers, which tbf counts and podshaper does not.
const ETHERNET_PERCENT_OF_FULL_PACKET: (u64, u64) = (1514, 1500);

/// `tc qdisc replace dev IFINDEX root handle 7064: fq nopacing flow_limit 10000`, in the calling thread's namespace.
///
/// nopacing: TCP goes on pacing itself, which is finer than fq's; departure times are honoured all the same.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no fq (its text says so), or there is a qdisc of somebody else's.
pub fn put_fq(ifindex: u32) -> Result<()> {
    const WHAT: &str = "put fq on the pod's interface";
    match root_qdisc(ifindex).map_err(|cause| Error::because(Code::Kernel, WHAT, cause))? {
        // Somebody else's fq honours departure times as well.
        Some((kind, handle)) if kind == "fq" && handle != OURS => return Ok(()),
        Some((kind, handle)) if !is_ours_or_default(handle) => {
            let text = format!("{WHAT}: it has the qdisc {kind} already, which is left alone");
            return Err(Error::new(Code::Kernel, text));
        }
        _ => {}
    }
    let options = vec![option(TCA_FQ_FLOW_PLIMIT, &FQ_FLOW_LIMIT.to_ne_bytes()), option(TCA_FQ_RATE_ENABLE, &[0; 4])];
    replace_root(ifindex, "fq", options).map_err(|cause| match cause.raw_os_error() {
        Some(libc::ENOENT) => Error::new(Code::Kernel, format!("{WHAT}: this kernel has no fq (modprobe sch_fq)")),
        _ => Error::because(Code::Kernel, WHAT, cause),
    })
}

/// The other end of a veth, by its index; `None` for an interface that is no veth, or whose other end is not in the namespace of
/// podshaper's first thread: the index means another interface here, perhaps another pod's.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn veth_peer(ifindex: u32) -> Result<Option<u32>> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "find the host's end of the pod's interface", cause);
    let Some(link) = netlink::link(ifindex).map_err(failed)?.filter(is_veth) else { return Ok(None) };
    let peers = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(id) => Some(*id),
        _ => None,
    });
    // Asked after the link, since asking for a link is what gives its peer's namespace an id.
    let hosts = namespace_id(std::process::id()).map_err(failed)?;
    Ok(linked_to(&link).filter(|_| peers.is_some() && peers == hosts))
}

/// The id that the calling thread's namespace has for that of a process.
fn namespace_id(process: u32) -> io::Result<Option<i32>> {
    let mut message = NsidMessage::default();
    message.attributes = vec![NsidAttribute::Pid(process)];
    let answer = netlink::get(RouteNetlinkMessage::GetNsId(message))?;
    Ok(answer.and_then(|answer| match answer {
        RouteNetlinkMessage::NewNsId(answer) => answer.attributes.into_iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(id) => Some(id),
            _ => None,
        }),
        _ => None,
    }))
}

/// `tc qdisc replace dev IFINDEX root handle 7064: tbf rate .. burst .. limit ..`, in the calling thread's namespace, on the
/// host's end of the veth whose other end is `pod_ifindex`.
///
/// # Errors
/// [`Code::Kernel`]: it is not that interface, has a qdisc of somebody else's, or what the kernel says.
pub fn put_tbf(ifindex: u32, pod_ifindex: u32, limit: &Limit) -> Result<()> {
    const WHAT: &str = "put tbf on the host's end of the pod's veth";
    let failed = |cause: io::Error| Error::because(Code::Kernel, WHAT, cause);
    if !is_peer(ifindex, pod_ifindex).map_err(failed)? {
        return Err(Error::new(Code::Kernel, format!("{WHAT}: it is in another namespace than podshaper")));
    }
    if let Some((kind, handle)) = root_qdisc(ifindex).map_err(failed)?
        && !is_ours_or_default(handle)
    {
        return Err(Error::new(Code::Kernel, format!("{WHAT}: it has the qdisc {kind} already, which is left alone")));
    }
    replace_root(ifindex, "tbf", tbf_options(limit)).map_err(failed)
}

/// Whether the root qdisc of an interface, in the calling thread's namespace, is of this kind.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn has(ifindex: u32, kind: &str) -> Result<bool> {
    let root =
        root_qdisc(ifindex).map_err(|cause| Error::because(Code::Kernel, "list the qdiscs of the pod", cause))?;
    Ok(root.is_some_and(|(found, _)| found == kind))
}

/// `tc qdisc del dev IFINDEX root`, in the calling thread's namespace, if the qdisc is one that podshaper put there.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn take_off(ifindex: u32) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "take podshaper's qdisc off", cause);
    if root_qdisc(ifindex).map_err(failed)?.is_none_or(|(_, handle)| handle != OURS) {
        return Ok(());
    }
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::ROOT;
    netlink::change(RouteNetlinkMessage::DelQueueDiscipline(message), 0).map_err(failed)
}

/// The same for the host's end of the veth whose other end is `pod_ifindex`.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn take_off_peer(ifindex: u32, pod_ifindex: u32) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "find the host's end of the pod's interface", cause);
    if is_peer(ifindex, pod_ifindex).map_err(failed)? { take_off(ifindex) } else { Ok(()) }
}

fn is_peer(ifindex: u32, pod_ifindex: u32) -> io::Result<bool> {
    Ok(netlink::link(ifindex)?.is_some_and(|link| is_veth(&link) && linked_to(&link) == Some(pod_ifindex)))
}

fn tbf_options(limit: &Limit) -> Vec<TcOption> {
    let (ethernet, ip) = ETHERNET_PERCENT_OF_FULL_PACKET;
    let bytes_per_s = limit.rate.as_bits_per_s() / 8 * ethernet / ip;
    let burst = u32::try_from(limit.burst.as_bytes()).unwrap_or(u32::MAX);
    let queue = (u128::from(bytes_per_s) * u128::from(TBF_QUEUE_NS) / 1_000_000_000).max(TBF_QUEUE_LEAST_BYTES);
    let queue = u32::try_from(queue).unwrap_or(u32::MAX).saturating_add(burst);
    // struct tc_tbf_qopt: rate, peakrate (none), limit, buffer (0: TCA_TBF_BURST counts), mtu.
    let rate32 = u32::try_from(bytes_per_s).unwrap_or(u32::MAX);
    let mut parms = Vec::new();
    // struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate.
    parms.extend([0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
    parms.extend(rate32.to_ne_bytes());
    parms.extend([0; 12]);
    parms.extend(queue.to_ne_bytes());
    parms.extend([0; 8]);
    vec![
        option(TCA_TBF_PARMS, &parms),
        option(TCA_TBF_RATE64, &bytes_per_s.to_ne_bytes()),
        option(TCA_TBF_BURST, &burst.to_ne_bytes()),
    ]
}

/// Kind and handle of an interface's root qdisc.
fn root_qdisc(ifindex: u32) -> io::Result<Option<(String, TcHandle)>> {
    let all = netlink::dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))?;
    let root = all.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewQueueDiscipline(qdisc)
            if qdisc.header.index == ifindex as i32 && qdisc.header.parent == TcHandle::ROOT =>
        {
            Some(qdisc)
        }
        _ => None,
    });
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

fn replace_root(ifindex: u32, kind: &str, options: Vec<TcOption>) -> io::Result<()> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = OURS;
    message.attributes = vec![TcAttribute::Kind(kind.to_owned()), TcAttribute::Options(options)];
    netlink::change(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

fn option(kind: u16, value: &[u8]) -> TcOption {
    TcOption::Other(DefaultNla::new(kind, value.to_vec()))
}

fn is_veth(link: &LinkMessage) -> bool {
    let kinds = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    kinds.flatten().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)))
}

/// IFLA_LINK: for a veth the index of its other end.
fn linked_to(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}
