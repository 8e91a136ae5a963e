//! The filters that run the programs (`tc filter .. bpf direct-action`), and clsact, the qdisc that has the filters.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage, TcOption},
};

use crate::{
    error::{Code, Error, Result},
    netlink, qdisc, sys,
};

/// uapi/linux/pkt_cls.h.
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// All protocols (uapi/linux/if_ether.h).
const ETH_P_ALL: u16 = 3;
/// Ahead of other tools' filters, whose verdict may be final. So packets have been charged when other filters see them.
const PRIORITY: u16 = 1;
/// The number of the filters that run the node's programs. The number is their handle, by which podshaper knows them
/// again: filters of other tools may stand beside them. The kernel has a tree of handles for each pod and direction,
/// with a node of 576 bytes for each six bits (`idr_alloc_u32`, include/linux/radix-tree.h). A filter that asks for no
/// handle gets the lowest free one, from 1 on.
pub const OF_NODE: u16 = 60;

const fn handle(number: u16) -> TcHandle {
    TcHandle { major: 0, minor: number }
}

/// The packets of an interface that a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in by the interface.
    Ingress,
    /// Packets that go out by the interface, before its queue.
    Egress,
}

impl Hook {
    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: TcHandle::CLSACT.major, minor }
    }
}

/// Puts a program on an interface that has clsact, ahead of other tools' filters. It replaces an earlier filter of this
/// number.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn put_filter(ifindex: u32, hook: Hook, number: u16, name: &str, program: BorrowedFd<'_>) -> Result<()> {
    let failed = |cause: io::Error| {
        let what = format!("put the eBPF program {name} on the interface {ifindex}");
        let text = if cause.raw_os_error() == Some(libc::EINVAL) && is_taken(ifindex, hook) {
            format!(
                "{what}: another filter has preference {PRIORITY} there, as the bandwidth plugin's has (tc filter show dev ..)"
            )
        } else {
            what
        };
        Error::because(Code::Kernel, text, cause)
    };
    let mut message = filter(ifindex, hook, number);
    let options = vec![
        option(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes()),
        option(TCA_BPF_NAME, format!("podshaper/{name}\0").as_bytes()),
        option(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes()),
    ];
    message.attributes = vec![TcAttribute::Kind("bpf".to_owned()), TcAttribute::Options(options)];
    netlink::change(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_REPLACE).map_err(failed)
}

/// Whether another filter has our preference. All filters of one preference are of one kind and one protocol
/// (`tc_new_tfilter`, net/sched/cls_api.c).
fn is_taken(ifindex: u32, hook: Hook) -> bool {
    let ours = filter(ifindex, hook, 0).header.info;
    let is_other = |answer: &RouteNetlinkMessage| match answer {
        RouteNetlinkMessage::NewTrafficFilter(filter) => {
            let is_bpf = filter.attributes.contains(&TcAttribute::Kind("bpf".to_owned()));
            filter.header.info >> 16 == u32::from(PRIORITY) && (!is_bpf || filter.header.info != ours)
        }
        _ => false,
    };
    filters(ifindex, hook).is_ok_and(|found| found.iter().any(is_other))
}

/// Takes the program of this number off an interface. Other tools' filters stay.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn take_filter(ifindex: u32, hook: Hook, number: u16) -> Result<()> {
    match netlink::change(RouteNetlinkMessage::DelTrafficFilter(filter(ifindex, hook, number)), 0) {
        Err(cause) if !matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
            Err(Error::because(Code::Kernel, format!("take podshaper's filter off the interface {ifindex}"), cause))
        }
        _ => Ok(()),
    }
}

/// `tc qdisc del dev IFINDEX clsact`, if no filter is there.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn take_clsact_if_unused(ifindex: u32) -> Result<()> {
    for hook in [Hook::Ingress, Hook::Egress] {
        let is_filter = |answer: &RouteNetlinkMessage| matches!(answer, RouteNetlinkMessage::NewTrafficFilter(_));
        if filters(ifindex, hook)?.iter().any(is_filter) {
            return Ok(());
        }
    }
    match netlink::change(RouteNetlinkMessage::DelQueueDiscipline(clsact(ifindex)), 0) {
        Err(cause) if !matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) => {
            Err(Error::because(Code::Kernel, format!("take podshaper's clsact off the interface {ifindex}"), cause))
        }
        _ => Ok(()),
    }
}

/// Whether the program of this number is on an interface.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn has_filter(ifindex: u32, hook: Hook, number: u16) -> Result<bool> {
    Ok(filters(ifindex, hook)?.iter().any(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(filter) => filter.header.handle == handle(number),
        _ => false,
    }))
}

/// Refuses a filter for egress on an interface that has plain `ingress` and not clsact: the kernel would put the filter
/// among those for ingress (`ingress_tcf_block`, net/sched/sch_ingress.c), in the place of ours.
///
/// # Errors
/// [`Code::Kernel`]: the interface has `ingress`; or the kernel's error.
pub fn refuse_ingress(ifindex: u32) -> Result<()> {
    let what = format!("put eBPF programs on both ways of the interface {ifindex}");
    match qdisc::qdisc_at(ifindex, TcHandle::CLSACT) {
        Ok(Some((kind, _))) if kind == "ingress" => {
            let text = format!(
                "{what}: it has the qdisc ingress, where clsact would have room for both (tc qdisc show dev ..)"
            );
            Err(Error::new(Code::Kernel, text))
        }
        Ok(_) => Ok(()),
        Err(cause) => Err(Error::because(Code::Kernel, what, cause)),
    }
}

/// Refuses an interface with tcx programs: these run before all filters, and their verdict may be final
/// (`sch_handle_ingress`, net/core/dev.c).
///
/// # Errors
/// [`Code::Kernel`]: the interface has tcx programs; or the kernel's error.
pub fn refuse_tcx(ifindex: u32, hook: Hook) -> Result<()> {
    let what = format!("put an eBPF program on the interface {ifindex}");
    match sys::programs_before_filters(ifindex, hook == Hook::Ingress) {
        Ok(0) => Ok(()),
        Ok(_) => {
            let text = format!("{what}: it has programs of tcx, as Cilium's are, which come first (bpftool net show)");
            Err(Error::new(Code::Kernel, text))
        }
        Err(cause) => Err(Error::because(Code::Kernel, what, cause)),
    }
}

fn filters(ifindex: u32, hook: Hook) -> Result<Vec<RouteNetlinkMessage>> {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = hook.parent();
    let all = netlink::dump(RouteNetlinkMessage::GetTrafficFilter(message));
    all.map_err(|cause| Error::because(Code::Kernel, "list the filters at the host's end", cause))
}

fn filter(ifindex: u32, hook: Hook, number: u16) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = hook.parent();
    message.header.handle = handle(number);
    message.header.info = u32::from(PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
    message.attributes = vec![TcAttribute::Kind("bpf".to_owned())];
    message
}

/// Makes the place for filters: `tc qdisc add dev IFINDEX clsact`, unless clsact or `ingress` is there. It queues
/// nothing. Returns whether this call made it.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn put_clsact(ifindex: u32) -> Result<bool> {
    match netlink::change(RouteNetlinkMessage::NewQueueDiscipline(clsact(ifindex)), NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(true),
        Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(cause) => Err(Error::because(Code::Kernel, format!("put clsact on the interface {ifindex}"), cause)),
    }
}

fn clsact(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    message
}

fn option(kind: u16, value: &[u8]) -> TcOption {
    TcOption::Other(DefaultNla::new(kind, value.to_vec()))
}
