//! The host end of a pod's veth, and the waiting room: here packets of other paths than the cgroup's sockets are held
//! to the limit. The programs decide which packets these are (`bpf/src/other_paths.rs`); this module puts the programs
//! where they run.
//!
//! The waiting room is one veth for all pods of the node. One end has the queue. The other end sends packets back after
//! they have waited.

mod filters;
mod seen;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{
        AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
        LinkMessage,
    },
};
use nix::net::if_::if_nametoindex;
use podshaper_abi::{QDISC_MAJOR, ROOM_CLASSES};

use super::{IngressBy, peer};
use crate::{
    error::{Code, Error, Result},
    netlink,
    qdisc::{self, htb},
    request::Limits,
};
pub use filters::{
    Hook, OF_NODE, has_filter, put_clsact, put_filter, refuse_ingress, refuse_tcx, take_clsact_if_unused, take_filter,
};
pub use seen::{Room, leads_to};

/// The program for packets out of a pod.
pub const OUT_OF_POD: &str = "out_of_pod";
/// The program for packets into a pod.
pub const INTO_POD: &str = "into_pod";
/// The program for packets into the waiting room.
pub const WAIT_HERE: &str = "wait_here";
/// The program for packets that have waited.
pub const GO_BACK: &str = "go_back";

/// The end in whose queue packets wait.
const WAITING: &str = "podshaper-wait";
/// The other end, by which packets go back.
const GOING_BACK: &str = "podshaper-back";
/// No packet is larger, so the room cuts none.
const ROOM_MTU: u32 = 65_535;
/// The longest interface queue that newer kernels (7.3 is one) accept. The queue of each htb class in the room has this
/// length.
const ROOM_PACKETS: u32 = 32_767;

/// The node's waiting room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingRoom {
    /// The interface that packets are sent to.
    pub ifindex: u32,
    /// The interface from which they go back.
    back_ifindex: u32,
    /// Whether its queue is fq; else it is htb.
    has_fq: bool,
    /// Whether this call has made or repaired the room. Other pods may then still wait in another room.
    pub is_new: bool,
}

impl WaitingRoom {
    /// The waiting room of the calling thread's namespace. It is made if there is none. A room whose ends are up is
    /// complete.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error: the kernel has no veth, or neither fq nor htb. [`Code::Kernel`]: the
    /// room has another tool's qdisc. The errors of `program`, which returns a program by its name.
    pub fn open(program: impl Fn(&str) -> Result<OwnedFd>) -> Result<Self> {
        let failed = |cause: io::Error| {
            Error::because(Code::Kernel, format!("make the waiting room {WAITING} on the node"), cause)
        };
        let missing = || failed(io::Error::from_raw_os_error(libc::ENODEV));
        let mut found = netlink::link_by_name(WAITING).map_err(failed)?;
        if found.is_none() {
            make_veth().map_err(failed)?;
            found = netlink::link_by_name(WAITING).map_err(failed)?;
        }
        let link = found.ok_or_else(missing)?;
        let ifindex = link.header.index;
        let back_ifindex = peer::linked_to(&link).ok_or_else(missing)?;
        let is_up = link.header.flags.contains(LinkFlags::Up);
        if let Some(has_fq) = seen::has_fq(&link).filter(|_| is_up) {
            return Ok(Self { ifindex, back_ifindex, has_fq, is_new: false });
        }
        let made = Self::complete(ifindex, back_ifindex, program);
        // Other pods may wait in a room that was up.
        if made.is_err() && !is_up {
            super::warn("an unfinished waiting room is left", remove_room());
        }
        made
    }

    /// Like [`Self::open`], but also puts back every part of the room that another tool has taken off.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn mend(program: impl Fn(&str) -> Result<OwnedFd>) -> Result<Self> {
        let room = Self::open(&program)?;
        if room.is_new { Ok(room) } else { Self::complete(room.ifindex, room.back_ifindex, program) }
    }

    fn complete(ifindex: u32, back_ifindex: u32, program: impl Fn(&str) -> Result<OwnedFd>) -> Result<Self> {
        seen::refuse_foreign_queue(ifindex)?;
        let has_fq = match qdisc::put_room_fq(ifindex) {
            Ok(()) => true,
            Err(no_fq) => {
                log::debug!("{no_fq}");
                htb::put_room(ifindex)?;
                false
            }
        };
        let room = Self { ifindex, back_ifindex, has_fq, is_new: true };
        room.equip(program)?;
        let raised = raise(back_ifindex).and_then(|()| raise(ifindex));
        raised.map_err(|cause| Error::because(Code::Kernel, format!("raise the waiting room {WAITING}"), cause))?;
        Ok(room)
    }

    /// Puts the programs on both ends.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn equip(&self, program: impl Fn(&str) -> Result<OwnedFd>) -> Result<()> {
        for (ifindex, hook, name) in
            [(self.ifindex, Hook::Egress, WAIT_HERE), (self.back_ifindex, Hook::Ingress, GO_BACK)]
        {
            put_clsact(ifindex)?;
            put_filter(ifindex, hook, OF_NODE, name, program(name)?.as_fd())?;
        }
        Ok(())
    }

    /// Makes a place in the room for the pod of a slot. Returns the first of the pod's htb classes: that for packets
    /// out of the pod, before those for packets into it. 0: no class is needed, as with fq.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn make_place(&self, slot: u32, limits: &Limits, ingress_by: Option<IngressBy>) -> Result<u16> {
        let limits = waiting(limits, ingress_by);
        let Some(limit) = limits.egress.or(limits.ingress).filter(|_| !self.has_fq) else { return Ok(0) };
        let class = htb::add_room_class(self.ifindex, slot, &limit)?;
        if let Some(limit) = &limits.ingress {
            htb::put_room_classes_into(self.ifindex, class, limit)
                .inspect_err(|_| take_classes(self.ifindex, class))?;
        }
        Ok(class)
    }

    /// Keeps the place of a pod, in a room that may have been made anew. Returns the class that the pod has from here
    /// on.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn keep_place(&self, class: u16, slot: u32, limits: &Limits, ingress_by: Option<IngressBy>) -> Result<u16> {
        if self.has_fq || class == 0 {
            return self.make_place(slot, limits, ingress_by);
        }
        let limits = waiting(limits, ingress_by);
        // The class for packets out of the pod is made in any case: it marks the place as taken.
        put_classes(self.ifindex, class, &Limits { egress: limits.egress.or(limits.ingress), ..limits })?;
        Ok(class)
    }
}

/// Sets new limits at a pod's place in the waiting room. Packets of the direction that tbf holds do not wait there.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn change_place(class: u16, limits: &Limits, ingress_by: Option<IngressBy>) -> Result<()> {
    match index_of(WAITING).filter(|_| class != 0) {
        Some(ifindex) => put_classes(ifindex, class, &waiting(limits, ingress_by)),
        None => Ok(()),
    }
}

/// Gives a pod's place in the waiting room back.
pub fn leave_place(class: u16) {
    if let Some(ifindex) = index_of(WAITING).filter(|_| class != 0) {
        take_classes(ifindex, class);
    }
}

/// Gives back the places in the waiting room whose class is not among these.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn keep_places(classes: &[u16]) -> Result<()> {
    let Some(ifindex) = index_of(WAITING) else { return Ok(()) };
    let is_left = |class: &u16| !classes.contains(&(class - class % ROOM_CLASSES));
    let mut left: Vec<u16> = htb::room_classes(ifindex)?.into_iter().filter(is_left).collect();
    // Child classes have higher numbers than their parents, and go first.
    left.sort_unstable_by(|one, other| other.cmp(one));
    left.into_iter().try_for_each(|class| htb::take_room_class(ifindex, class))
}

/// The value of `skb->priority` that selects a class of the waiting room.
pub fn class_id(class: u16) -> u32 {
    if class == 0 { 0 } else { u32::from(QDISC_MAJOR) << 16 | u32::from(class) }
}

/// Removes the waiting room, if there is one.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn remove_room() -> Result<()> {
    let Some(ifindex) = index_of(WAITING) else { return Ok(()) };
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    match netlink::change(RouteNetlinkMessage::DelLink(message), 0) {
        Err(cause) if cause.raw_os_error() != Some(libc::ENODEV) => {
            Err(Error::because(Code::Kernel, format!("remove the waiting room {WAITING} of the node"), cause))
        }
        _ => Ok(()),
    }
}

/// The limits of the directions whose packets wait in the room.
fn waiting(limits: &Limits, ingress_by: Option<IngressBy>) -> Limits {
    Limits { ingress: limits.ingress.filter(|_| ingress_by != Some(IngressBy::Tbf)), ..*limits }
}

fn put_classes(ifindex: u32, class: u16, limits: &Limits) -> Result<()> {
    if let Some(limit) = &limits.egress {
        htb::put_room_class_out(ifindex, class, limit)?;
    }
    limits.ingress.as_ref().map_or(Ok(()), |limit| htb::put_room_classes_into(ifindex, class, limit))
}

fn take_classes(ifindex: u32, first: u16) {
    // Child classes go first.
    for class in (first..first + ROOM_CLASSES).rev() {
        super::warn("a pod's place in the waiting room is left", htb::take_room_class(ifindex, class));
    }
}

/// `ip link add podshaper-wait mtu 65535 txqueuelen 32767 type veth peer name podshaper-back ..`
fn make_veth() -> io::Result<()> {
    let end = |name: &str| {
        let mut end = LinkMessage::default();
        end.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(ROOM_MTU),
            LinkAttribute::TxQueueLen(ROOM_PACKETS),
        ];
        end
    };
    let mut message = end(WAITING);
    message.header.interface_family = AddressFamily::Unspec;
    let peer = InfoData::Veth(InfoVeth::Peer(end(GOING_BACK)));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(peer)]));
    match netlink::change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL) {
        // Another call was quicker.
        Err(cause) if cause.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        made => made,
    }
}

/// `ip link set IFINDEX addrgenmode none up`
fn raise(ifindex: u32) -> io::Result<()> {
    let silent = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    // The node may have no IPv6. Packets that IPv6 sends there by itself are dropped anyway.
    let _ = netlink::set_link(ifindex, vec![LinkAttribute::AfSpecUnspec(vec![silent])]);
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink::change(RouteNetlinkMessage::SetLink(message), 0)
}

fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}
