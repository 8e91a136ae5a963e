//! The queueing disciplines a pod may need: `fq` on its own interface, in which packets wait for their departure time; on a kernel without
//! fq, `htb` in its place, and `tbf` on the host's end of its veth. Whatever somebody else has put there stays.

use std::{collections::HashSet, io, os::fd::RawFd};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use podshaper_abi::{
    HTB_QUEUE, MAX_HORIZON_NS, QDISC_MAJOR, ROOM_CLASSES, ROOM_INTO, ROOM_INTO_AT_ONCE, ROOM_INTO_QUEUE, ROOM_OUT,
};

use crate::{
    error::{Code, Error, Result},
    netlink,
    request::Limit,
    units::Rate,
};

/// Handle of the qdiscs podshaper makes.
const OURS: TcHandle = class(0);

/// Attributes of fq (uapi/linux/pkt_sched.h).
const TCA_FQ_PLIMIT: u16 = 1;
const TCA_FQ_FLOW_PLIMIT: u16 = 2;
const TCA_FQ_RATE_ENABLE: u16 = 5;
const TCA_FQ_BUCKETS_LOG: u16 = 8;
const TCA_FQ_HORIZON: u16 = 14;
/// Packets one flow may have in fq. They are acknowledgements that are held: at 1 Gbit/s and without GRO, 40 in a millisecond.
const FQ_FLOW_LIMIT: u32 = 10_000;
/// Packets that may wait in all. The programs bound the time, and the senders' buffers the memory: this is for neither, and fq's own limit of
/// 10000 would fill with small packets first and then drop everybody's.
pub const QUEUE_PACKETS: u32 = 100_000;

/// Trees of fq in which it looks for a packet's flow, as a power of two. The kernel's 1024 of them take 8 KiB of a pod that may have ten flows;
/// of a thousand flows there are eight in each of 128.
const FQ_BUCKETS_LOG: u32 = 7;
/// Those of the waiting room, where packets of all pods are.
const FQ_ROOM_BUCKETS_LOG: u32 = 10;

/// uapi/linux/rtnetlink.h.
const TCA_OPTIONS: u16 = 2;
/// Attributes of htb.
const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
/// The class around the two others, which has the limit's rate.
const HTB_LIMIT: u16 = 1;
/// The class of what leaves at once. Its low bits are those of best effort, as those of [`HTB_QUEUE`] are.
const HTB_AT_ONCE: u16 = 0x20;
/// What leaves at once is held by the programs: its class has this many times the limit, and never waits.
const HTB_AT_ONCE_TIMES: u64 = 100;
/// What waits has this part of the limit in any case. What leaves at once has the limit too, and may be ahead of htb's tokens for long; the
/// programs' clock makes those senders give way.
const HTB_QUEUE_PART: u64 = 4;
/// The first class of a pod in the waiting room.
const FIRST_ROOM_CLASS: u16 = 0x100;
/// The scheduler's unit of time, in nanoseconds (include/net/pkt_sched.h, `PSCHED_SHIFT`).
const TICK_NS: u64 = 64;

/// Attributes of tbf.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;
/// How long a packet may wait in tbf: it is latency, and the acknowledgements of what the pod sends wait too. bbr, which believes the
/// round trip of its first packets for ten seconds, then sends little: half of 100 Mbit/s where they wait 20 ms.
const TBF_QUEUE_NS: u64 = 10_000_000;
/// The least room in tbf: one GSO packet of 64 KiB.
const MIN_TBF_QUEUE_BYTES: u128 = 1 << 16;
/// Ethernet headers, which tbf and htb count and podshaper does not.
pub const ETHERNET_HEADER_BYTES: u64 = 14;
/// A full packet at layer 3.
const FULL_PACKET_BYTES: u64 = 1500;

/// `tc qdisc replace dev IFINDEX root handle 7064: fq nopacing limit 100000 flow_limit 10000 horizon 60s buckets 128`, in the calling thread's
/// namespace.
///
/// nopacing: TCP goes on pacing itself, which is finer than fq's; departure times are honoured all the same.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no fq (its text says so), or there is a qdisc of somebody else's.
pub fn put_fq(ifindex: u32) -> Result<()> {
    put_fq_with(ifindex, FQ_BUCKETS_LOG)
}

/// The same on the waiting room.
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
        // Somebody else's fq honours departure times as well.
        Some((kind, handle)) if kind == "fq" && handle != OURS => Ok(()),
        // The kernel does not put another kind in the place of a qdisc with the same handle, and there are programs that count on this one.
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

/// Puts htb on the pod's interface, in the calling thread's namespace, for a kernel without fq, or sets another limit in it:
///
/// ```text
/// tc qdisc add dev IFINDEX root handle 7064: htb default 20
/// tc class replace dev IFINDEX parent 7064: classid 7064:1 htb rate LIMIT burst BURST
/// tc class replace dev IFINDEX parent 7064:1 classid 7064:20 htb prio 0 rate 100*LIMIT
/// tc class replace dev IFINDEX parent 7064:1 classid 7064:10 htb prio 1 rate LIMIT/4 ceil 100*LIMIT burst BURST
/// tc qdisc replace dev IFINDEX parent 7064:10 pfifo limit 100000
/// ```
///
/// What leaves at once never waits, and is taken off what the others have: together they have the limit.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no htb (its text says so), or there is a qdisc of somebody else's.
pub fn put_htb(ifindex: u32, limit: &Limit) -> Result<()> {
    const WHAT: &str = "put htb on the pod's interface";
    let failed = |cause: io::Error| match cause.raw_os_error() {
        Some(libc::ENOENT) => Error::new(Code::Kernel, format!("{WHAT}: this kernel has no htb (modprobe sch_htb)")),
        _ => Error::because(Code::Kernel, WHAT, cause),
    };
    if !add_root(ifindex, "htb", htb_root()).map_err(failed)? {
        match root_qdisc(ifindex).map_err(failed)? {
            // It takes no other options once it is there.
            Some((kind, OURS)) if kind == "htb" => {}
            Some((kind, handle)) if !is_ours_or_default(handle) => return Err(taken(WHAT, &kind)),
            _ => replace_root(ifindex, "htb", htb_root()).map_err(failed)?,
        }
    }
    put_classes(ifindex, [HTB_LIMIT, HTB_AT_ONCE, HTB_QUEUE], limit).map_err(failed)?;
    put_pfifo(ifindex, class(HTB_QUEUE)).map_err(failed)
}

/// `tc qdisc add dev IFINDEX root handle 7064: htb`, on the waiting room, where there is none.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no htb, or what it says.
pub fn put_room_htb(ifindex: u32) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "put htb on the waiting room", cause);
    match root_qdisc(ifindex).map_err(failed)? {
        Some((kind, OURS)) if kind == "htb" => Ok(()),
        _ => replace_root(ifindex, "htb", htb_root()).map_err(failed),
    }
}

/// Makes the first of a pod's classes in it, where nobody has any. They are looked for from a number that the pod's slot gives: a list of all
/// would be as long as the node has pods.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says, or all are taken.
pub fn add_room_class(ifindex: u32, slot: u32, limit: &Limit) -> Result<u16> {
    const PLACES: u32 = ((u16::MAX - FIRST_ROOM_CLASS) / ROOM_CLASSES) as u32;
    for place in 0..PLACES {
        let first = FIRST_ROOM_CLASS + ROOM_CLASSES * (slot.wrapping_add(place) % PLACES) as u16;
        match put_htb_class(ifindex, OURS, first + ROOM_OUT, of_limit(limit), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => return Ok(first),
            Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => {}
            Err(cause) => return Err(no_room(cause)),
        }
    }
    Err(Error::new(Code::Kernel, "find a place for the pod in the waiting room: all are taken (podshaper gc)"))
}

/// The classes in it, by their minor numbers.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn room_classes(ifindex: u32) -> Result<HashSet<u16>> {
    let all = netlink::dump(RouteNetlinkMessage::GetTrafficClass(TcMessage::with_index(ifindex as i32)));
    let all = all.map_err(|cause| Error::because(Code::Kernel, "list the places in the waiting room", cause))?;
    let classes = all.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficClass(class) => Some(class.header.handle.minor),
        _ => None,
    });
    Ok(classes.collect())
}

/// `tc class del dev IFINDEX classid 7064:MINOR`; that there is none is no error.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn take_room_class(ifindex: u32, minor: u16) -> Result<()> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.handle = class(minor);
    match netlink::change(RouteNetlinkMessage::DelTrafficClass(message), 0) {
        Err(cause) if !matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
            Err(Error::because(Code::Kernel, "take a class out of the waiting room", cause))
        }
        _ => Ok(()),
    }
}

/// A pod's class for what comes out of it: `tc class replace dev IFINDEX parent 7064: classid 7064:FIRST htb rate LIMIT`. Its queue is the
/// pfifo that htb makes for a new class, as long as the room's `txqueuelen` (`htb_change_class`, `fifo_init`).
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn put_room_class_out(ifindex: u32, first: u16, limit: &Limit) -> Result<()> {
    let replaces = NLM_F_CREATE | NLM_F_REPLACE;
    put_htb_class(ifindex, OURS, first + ROOM_OUT, of_limit(limit), replaces).map_err(no_room)
}

/// A pod's classes for what goes into it, as [`put_htb`] makes them for what it sends.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn put_room_classes_into(ifindex: u32, first: u16, limit: &Limit) -> Result<()> {
    put_classes(ifindex, [ROOM_INTO, ROOM_INTO_AT_ONCE, ROOM_INTO_QUEUE].map(|class| first + class), limit)
        .map_err(no_room)
}

/// The class that has a limit, and in it that of what leaves at once, and that of what waits.
fn put_classes(ifindex: u32, [whole, at_once, queue]: [u16; 3], limit: &Limit) -> io::Result<()> {
    for (parent, minor, options) in [
        (OURS, whole, of_limit(limit)),
        (class(whole), at_once, of_what_leaves_at_once(limit)),
        (class(whole), queue, of_what_waits(limit)),
    ] {
        put_htb_class(ifindex, parent, minor, options, NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    Ok(())
}

/// Options of the class that has the limit.
fn of_limit(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    htb_options(bytes_per_s, bytes_per_s, limit.burst.as_ns_at(limit.rate), 0)
}

fn of_what_leaves_at_once(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = (with_ethernet(limit.rate) / 8).saturating_mul(HTB_AT_ONCE_TIMES);
    htb_options(bytes_per_s, bytes_per_s, limit.burst.as_ns_at(limit.rate), 0)
}

/// The class around it has the limit. A ceiling of its own at the same rate would end each wait a moment before that of the class around, and htb
/// would set its timer twice for each packet (`htb_dequeue`, a level after the other).
fn of_what_waits(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    let ceil_bytes_per_s = bytes_per_s.saturating_mul(HTB_AT_ONCE_TIMES);
    htb_options((bytes_per_s / HTB_QUEUE_PART).max(1), ceil_bytes_per_s, limit.burst.as_ns_at(limit.rate), 1)
}

fn no_room(cause: io::Error) -> Error {
    Error::because(Code::Kernel, "put a class into the waiting room", cause)
}

/// `tc qdisc replace dev IFINDEX parent PARENT pfifo limit 100000`
fn put_pfifo(ifindex: u32, parent: TcHandle) -> io::Result<()> {
    let mut queue = TcMessage::with_index(ifindex as i32);
    queue.header.parent = parent;
    // struct tc_fifo_qopt: limit. It is the one qdisc whose options are no attributes.
    let options = DefaultNla::new(TCA_OPTIONS, QUEUE_PACKETS.to_ne_bytes().to_vec());
    queue.attributes = vec![TcAttribute::Kind("pfifo".to_owned()), TcAttribute::Other(options)];
    netlink::change(RouteNetlinkMessage::NewQueueDiscipline(queue), NLM_F_CREATE | NLM_F_REPLACE)
}

/// The other end of a veth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    ifindex: u32,
    /// The id of its namespace in that of the first end, which the kernel gives it when it is asked for the link.
    namespace: i32,
}

impl Peer {
    /// That of an interface; `None` for one that is no veth, or whose other end is in the same namespace.
    pub fn of(link: &LinkMessage) -> Option<Self> {
        let ifindex = linked_to(link).filter(|_| is_veth(link))?;
        Some(Self { ifindex, namespace: peer_namespace_id(link)? })
    }

    /// Whether it is in the namespace `home`, podshaper's own: elsewhere its index means another interface, perhaps another pod's. To be
    /// called in the namespace of the first end.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn is_in(self, home: RawFd) -> Result<bool> {
        Ok(namespace_id(home).map_err(not_found)? == Some(self.namespace))
    }

    /// It, as it is seen from its own namespace, which is the calling thread's; `None` if it is not the other end of `ifindex`.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn look(self, ifindex: u32) -> Result<Option<HostsEnd>> {
        let link = netlink::link(self.ifindex).map_err(not_found)?;
        let link = link.filter(|link| is_veth(link) && linked_to(link) == Some(ifindex));
        let namespace = |link: &LinkMessage| peer_namespace_id(link).and_then(|id| u32::try_from(id).ok());
        Ok(link.map(|link| HostsEnd { ifindex: self.ifindex, pods_namespace: namespace(&link) }))
    }
}

/// The end of a pod's veth that is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostsEnd {
    pub ifindex: u32,
    /// The number that the host's namespace has for the pod's.
    pub pods_namespace: Option<u32>,
}

fn not_found(cause: io::Error) -> Error {
    Error::because(Code::Kernel, "find the host's end of the pod's interface", cause)
}

fn peer_namespace_id(link: &LinkMessage) -> Option<i32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(id) => Some(*id),
        _ => None,
    })
}

/// The least number that a namespace gets for itself. The kernel numbers those that a namespace hears of from 0 on.
const MIN_OWN_NUMBER: i32 = 1 << 17;

/// `ip netns set NAME NSID` in the namespace itself, so that the programs can tell it from others (`bpf/src/namespace.rs`): the number that it
/// has for itself. It goes with the namespace. 0: it has another one already.
///
/// The number is made of the inode's. No namespace has it for another one, and of two namespaces one in 131072 pairs have the same for themselves.
/// A larger one would be rarer still, and take more of the kernel's memory: a tree has a node of 576 bytes for each six bits of it, and
/// as many again, but one, for the number 0, which is the node's.
///
/// # Errors
/// What the kernel says.
pub fn name_namespace(namespace: RawFd, inode: u64) -> io::Result<u64> {
    let id = MIN_OWN_NUMBER | (inode as i32 & (MIN_OWN_NUMBER - 1));
    let mut message = NsidMessage::default();
    message.attributes = vec![NsidAttribute::Fd(namespace as u32), NsidAttribute::Id(id)];
    match netlink::change(RouteNetlinkMessage::NewNsId(message), 0) {
        Ok(()) => Ok(id as u64),
        Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => {
            Ok(namespace_id(namespace)?.filter(|known| *known >= MIN_OWN_NUMBER).map_or(0, |id| id as u64))
        }
        Err(cause) => Err(cause),
    }
}

/// The id that the calling thread's namespace has for another one.
fn namespace_id(namespace: RawFd) -> io::Result<Option<i32>> {
    let mut message = NsidMessage::default();
    message.attributes = vec![NsidAttribute::Fd(namespace as u32)];
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
/// host's end of a pod's veth.
///
/// # Errors
/// [`Code::Kernel`]: it has a qdisc of somebody else's, or what the kernel says.
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

/// Of this minor number.
const fn class(minor: u16) -> TcHandle {
    TcHandle { major: QDISC_MAJOR, minor }
}

fn put_htb_class(ifindex: u32, parent: TcHandle, minor: u16, options: Vec<TcOption>, flags: u16) -> io::Result<()> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = parent;
    message.header.handle = class(minor);
    message.attributes = vec![TcAttribute::Kind("htb".to_owned()), TcAttribute::Options(options)];
    netlink::change(RouteNetlinkMessage::NewTrafficClass(message), flags)
}

/// struct tc_htb_glob: version (3), rate2quantum, defcls, debug, direct_pkts.
fn htb_root() -> Vec<TcOption> {
    const RATE_TO_QUANTUM: u32 = 10;
    let init = [3, RATE_TO_QUANTUM, HTB_AT_ONCE.into(), 0, 0];
    vec![option(TCA_HTB_INIT, &init.iter().flat_map(|value: &u32| value.to_ne_bytes()).collect::<Vec<_>>())]
}

fn htb_options(bytes_per_s: u64, ceil_bytes_per_s: u64, burst_ns: u64, priority: u32) -> Vec<TcOption> {
    /// What a class may send before another of its priority: each is the only one.
    const QUANTUM_BYTES: u32 = 1 << 16;
    let burst_ticks = u32::try_from(burst_ns / TICK_NS).unwrap_or(u32::MAX);
    // struct tc_htb_opt: rate, ceil, buffer, cbuffer, quantum, level, prio.
    let mut parms = [rate_spec(bytes_per_s), rate_spec(ceil_bytes_per_s)].concat();
    for value in [burst_ticks, burst_ticks, QUANTUM_BYTES, 0, priority] {
        parms.extend(value.to_ne_bytes());
    }
    vec![
        option(TCA_HTB_PARMS, &parms),
        option(TCA_HTB_RATE64, &bytes_per_s.to_ne_bytes()),
        option(TCA_HTB_CEIL64, &ceil_bytes_per_s.to_ne_bytes()),
    ]
}

/// struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate. What is beyond 32 bits is in an attribute of its own.
fn rate_spec(bytes_per_s: u64) -> Vec<u8> {
    let mut spec = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
    spec.extend(u32::try_from(bytes_per_s).unwrap_or(u32::MAX).to_ne_bytes());
    spec
}

/// The bits per second that full packets of this rate have with their Ethernet headers, as queueing disciplines count them.
pub fn with_ethernet(rate: Rate) -> u64 {
    // Multiplied first: divided first, the lowest rates were none. The highest one (`Rate::MAX`, 10^15) times 1514 is below 2^61.
    rate.as_bits_per_s() * (FULL_PACKET_BYTES + ETHERNET_HEADER_BYTES) / FULL_PACKET_BYTES
}

fn tbf_options(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    let burst = u32::try_from(limit.burst.as_bytes()).unwrap_or(u32::MAX);
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

/// Kind and handle of an interface's root qdisc.
fn root_qdisc(ifindex: u32) -> io::Result<Option<(String, TcHandle)>> {
    qdisc_at(ifindex, TcHandle::ROOT)
}

/// Kind and handle of the qdisc at a place of an interface.
///
/// # Errors
/// What the kernel says.
pub fn qdisc_at(ifindex: u32, parent: TcHandle) -> io::Result<Option<(String, TcHandle)>> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = parent;
    // Of a qdisc that does nothing it says nothing (`tc_qdisc_dump_ignore`). A node with many pods has too many to ask for all.
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

/// Puts a root qdisc on an interface that has only what the kernel gives it; `false`: it has one, which is left as it is.
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

/// Somebody else's qdisc is where podshaper's would be.
fn taken(what: &str, kind: &str) -> Error {
    Error::new(Code::Kernel, format!("{what}: it has the qdisc {kind} already, which is left alone"))
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
pub fn linked_to(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
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
}
