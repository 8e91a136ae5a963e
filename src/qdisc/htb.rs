//! htb, where the kernel has no fq: on a pod's own interface, and in the waiting room, where each pod has classes of
//! its own.

use std::{collections::HashSet, io};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use podshaper_abi::{HTB_QUEUE, ROOM_CLASSES, ROOM_INTO, ROOM_INTO_AT_ONCE, ROOM_INTO_QUEUE, ROOM_OUT};

use super::{
    OURS, QUEUE_PACKETS, add_root, class, is_ours_or_default, option, rate_spec, replace_root, root_qdisc, taken,
    with_ethernet,
};
use crate::{
    error::{Code, Error, Result},
    netlink,
    request::Limit,
};

/// uapi/linux/rtnetlink.h.
const TCA_OPTIONS: u16 = 2;
/// Attributes of htb (uapi/linux/pkt_sched.h).
const TCA_HTB_PARMS: u16 = 1;
const TCA_HTB_INIT: u16 = 2;
const TCA_HTB_RATE64: u16 = 6;
const TCA_HTB_CEIL64: u16 = 7;
/// The class around the two others. It has the limit's rate.
const HTB_LIMIT: u16 = 1;
/// The class of packets that leave at once. Its low bits are those of best effort, as those of [`HTB_QUEUE`] are.
const HTB_AT_ONCE: u16 = 0x20;
/// The programs hold packets that leave at once. So their class has this many times the limit, and never waits.
const HTB_AT_ONCE_TIMES: u64 = 100;
/// The class of packets that wait always gets the limit divided by this. Packets that leave at once may use the whole
/// limit, and may be ahead of htb's tokens for long: the programs' clock makes their senders give way.
const HTB_QUEUE_PART: u64 = 4;
/// The first class of a pod in the waiting room.
const FIRST_ROOM_CLASS: u16 = 0x100;
/// The scheduler's unit of time, in nanoseconds (include/net/pkt_sched.h, `PSCHED_SHIFT`).
const TICK_NS: u64 = 64;

/// Puts htb on the pod's interface, in the calling thread's namespace, for a kernel without fq, or sets another limit
/// in it:
///
/// ```text
/// tc qdisc add dev IFINDEX root handle 7064: htb default 20
/// tc class replace dev IFINDEX parent 7064: classid 7064:1 htb rate LIMIT burst BURST
/// tc class replace dev IFINDEX parent 7064:1 classid 7064:20 htb prio 0 rate 100*LIMIT
/// tc class replace dev IFINDEX parent 7064:1 classid 7064:10 htb prio 1 rate LIMIT/4 ceil 100*LIMIT burst BURST
/// tc qdisc replace dev IFINDEX parent 7064:10 pfifo limit 100000
/// ```
///
/// Packets that leave at once never wait, and use up tokens that packets in the queue would have. Together they have
/// the limit.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no htb (the error says so), or the interface has another tool's qdisc.
pub fn put(ifindex: u32, limit: &Limit) -> Result<()> {
    const WHAT: &str = "put htb on the pod's interface";
    let failed = |cause: io::Error| match cause.raw_os_error() {
        Some(libc::ENOENT) => Error::new(Code::Kernel, format!("{WHAT}: this kernel has no htb (modprobe sch_htb)")),
        _ => Error::because(Code::Kernel, WHAT, cause),
    };
    if !add_root(ifindex, "htb", root()).map_err(failed)? {
        match root_qdisc(ifindex).map_err(failed)? {
            // An htb that is there accepts no other options.
            Some((kind, OURS)) if kind == "htb" => {}
            Some((kind, handle)) if !is_ours_or_default(handle) => return Err(taken(WHAT, &kind)),
            _ => replace_root(ifindex, "htb", root()).map_err(failed)?,
        }
    }
    put_classes(ifindex, [HTB_LIMIT, HTB_AT_ONCE, HTB_QUEUE], limit).map_err(failed)?;
    put_pfifo(ifindex, class(HTB_QUEUE)).map_err(failed)
}

/// `tc qdisc add dev IFINDEX root handle 7064: htb`, on the waiting room, if it has none.
///
/// # Errors
/// [`Code::Kernel`]: the kernel has no htb; or the kernel's error.
pub fn put_room(ifindex: u32) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, "put htb on the waiting room", cause);
    match root_qdisc(ifindex).map_err(failed)? {
        Some((kind, OURS)) if kind == "htb" => Ok(()),
        _ => replace_root(ifindex, "htb", root()).map_err(failed),
    }
}

/// Makes the first of a pod's classes in the waiting room, at a place that no other pod has. The search starts at a
/// number that follows from the pod's slot: a list of all classes would be as long as the node has pods.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error, or because all places are taken.
pub fn add_room_class(ifindex: u32, slot: u32, limit: &Limit) -> Result<u16> {
    const PLACES: u32 = ((u16::MAX - FIRST_ROOM_CLASS) / ROOM_CLASSES) as u32;
    for place in 0..PLACES {
        let first = FIRST_ROOM_CLASS + ROOM_CLASSES * (slot.wrapping_add(place) % PLACES) as u16;
        match put_class(ifindex, OURS, first + ROOM_OUT, of_limit(limit), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => return Ok(first),
            Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => {}
            Err(cause) => return Err(no_room(cause)),
        }
    }
    Err(Error::new(Code::Kernel, "find a place for the pod in the waiting room: all are taken (podshaper gc)"))
}

/// The classes in the waiting room, by their minor numbers.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn room_classes(ifindex: u32) -> Result<HashSet<u16>> {
    let all = netlink::dump(RouteNetlinkMessage::GetTrafficClass(TcMessage::with_index(ifindex as i32)));
    let all = all.map_err(|cause| Error::because(Code::Kernel, "list the places in the waiting room", cause))?;
    let classes = all.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficClass(class) => Some(class.header.handle.minor),
        _ => None,
    });
    Ok(classes.collect())
}

/// `tc class del dev IFINDEX classid 7064:MINOR`. It is no error if there is no such class.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
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

/// A pod's class for packets out of it: `tc class replace dev IFINDEX parent 7064: classid 7064:FIRST htb rate LIMIT`.
/// Its queue is the pfifo that htb makes for a new class, as long as the room's `txqueuelen` (`htb_change_class`,
/// `fifo_init`).
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn put_room_class_out(ifindex: u32, first: u16, limit: &Limit) -> Result<()> {
    let replaces = NLM_F_CREATE | NLM_F_REPLACE;
    put_class(ifindex, OURS, first + ROOM_OUT, of_limit(limit), replaces).map_err(no_room)
}

/// A pod's classes for packets into it. They are like those that [`put`] makes for packets that the pod sends.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn put_room_classes_into(ifindex: u32, first: u16, limit: &Limit) -> Result<()> {
    put_classes(ifindex, [ROOM_INTO, ROOM_INTO_AT_ONCE, ROOM_INTO_QUEUE].map(|class| first + class), limit)
        .map_err(no_room)
}

/// The class that has a limit, and in it the class of packets that leave at once and that of packets that wait.
fn put_classes(ifindex: u32, [whole, at_once, queue]: [u16; 3], limit: &Limit) -> io::Result<()> {
    for (parent, minor, options) in [
        (OURS, whole, of_limit(limit)),
        (class(whole), at_once, of_what_leaves_at_once(limit)),
        (class(whole), queue, of_what_waits(limit)),
    ] {
        put_class(ifindex, parent, minor, options, NLM_F_CREATE | NLM_F_REPLACE)?;
    }
    Ok(())
}

/// Options of the class that has the limit.
fn of_limit(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    options(bytes_per_s, bytes_per_s, limit.burst.as_ns_at(limit.rate), 0)
}

fn of_what_leaves_at_once(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = (with_ethernet(limit.rate) / 8).saturating_mul(HTB_AT_ONCE_TIMES);
    options(bytes_per_s, bytes_per_s, limit.burst.as_ns_at(limit.rate), 0)
}

/// Options of the class of packets that wait. The class around it has the limit. With a ceiling of its own at the same
/// rate, each wait would end a moment before that of the class around, and htb would set its timer twice for each
/// packet (`htb_dequeue` takes one level after the other).
fn of_what_waits(limit: &Limit) -> Vec<TcOption> {
    let bytes_per_s = with_ethernet(limit.rate) / 8;
    let ceil_bytes_per_s = bytes_per_s.saturating_mul(HTB_AT_ONCE_TIMES);
    options((bytes_per_s / HTB_QUEUE_PART).max(1), ceil_bytes_per_s, limit.burst.as_ns_at(limit.rate), 1)
}

fn no_room(cause: io::Error) -> Error {
    Error::because(Code::Kernel, "put a class into the waiting room", cause)
}

/// `tc qdisc replace dev IFINDEX parent PARENT pfifo limit 100000`
fn put_pfifo(ifindex: u32, parent: TcHandle) -> io::Result<()> {
    let mut queue = TcMessage::with_index(ifindex as i32);
    queue.header.parent = parent;
    // struct tc_fifo_qopt: limit. pfifo is the one qdisc here whose options are no attributes.
    let options = DefaultNla::new(TCA_OPTIONS, QUEUE_PACKETS.to_ne_bytes().to_vec());
    queue.attributes = vec![TcAttribute::Kind("pfifo".to_owned()), TcAttribute::Other(options)];
    netlink::change(RouteNetlinkMessage::NewQueueDiscipline(queue), NLM_F_CREATE | NLM_F_REPLACE)
}

fn put_class(ifindex: u32, parent: TcHandle, minor: u16, options: Vec<TcOption>, flags: u16) -> io::Result<()> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = parent;
    message.header.handle = class(minor);
    message.attributes = vec![TcAttribute::Kind("htb".to_owned()), TcAttribute::Options(options)];
    netlink::change(RouteNetlinkMessage::NewTrafficClass(message), flags)
}

/// struct tc_htb_glob: version (3), rate2quantum, defcls, debug, direct_pkts.
fn root() -> Vec<TcOption> {
    const RATE_TO_QUANTUM: u32 = 10;
    let init = [3, RATE_TO_QUANTUM, HTB_AT_ONCE.into(), 0, 0];
    vec![option(TCA_HTB_INIT, &init.iter().flat_map(|value: &u32| value.to_ne_bytes()).collect::<Vec<_>>())]
}

fn options(bytes_per_s: u64, ceil_bytes_per_s: u64, burst_ns: u64, priority: u32) -> Vec<TcOption> {
    /// Bytes that a class may send before another class of its priority. Each class is the only one of its priority.
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
