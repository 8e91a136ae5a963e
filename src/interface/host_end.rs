//! The host's end of a pod's veth, and the waiting room: where what comes out of a pod by other paths than its cgroup's sockets is held to the
//! limit. Which packets those are is decided by the programs (`bpf/src/other_paths.rs`); here they are put where they run.
//!
//! The waiting room is one veth for all pods of the node. Its one end has the queue, its other end sends back what has waited.

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

/// The program on what comes out of a pod.
pub const OUT_OF_POD: &str = "out_of_pod";
/// The program on what goes into a pod.
pub const INTO_POD: &str = "into_pod";
/// The program on what comes into the waiting room.
pub const WAIT_HERE: &str = "wait_here";
/// The program on what has waited.
pub const GO_BACK: &str = "go_back";

/// Where packets wait.
const WAITING: &str = "podshaper-wait";
/// The other end, by which they go back.
const GOING_BACK: &str = "podshaper-back";
/// As large as packets become: the room cuts none.
const ROOM_MTU: u32 = 65_535;
/// The most that newer kernels (7.3 is one) take as the length of an interface's queue. It is that of each class of htb in the room.
const ROOM_PACKETS: u32 = 32_767;

/// The node's waiting room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingRoom {
    /// The interface that packets are sent to.
    pub ifindex: u32,
    /// The interface from which they go back.
    back_ifindex: u32,
    /// Whether its queue is fq, and htb otherwise.
    has_fq: bool,
    /// Whether this call has made it, or put back what was gone of it: then other pods may wait elsewhere still.
    pub is_new: bool,
}

impl WaitingRoom {
    /// The one of the calling thread's namespace, made if there is none. Its ends are up when it is complete.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says: it has no veth, or neither fq nor htb; or somebody else's qdisc is on it. Those of `program`,
    /// which has the programs by name.
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
        // Other pods may wait in one that was up.
        if made.is_err() && !is_up {
            super::warn("an unfinished waiting room is left", remove_room());
        }
        made
    }

    /// The same with all that it needs, whatever of it somebody has taken away.
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

    /// Puts the programs on it.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn equip(&self, program: impl Fn(&str) -> Result<OwnedFd>) -> Result<()> {
        for (ifindex, hook, name) in
            [(self.ifindex, Hook::Egress, WAIT_HERE), (self.back_ifindex, Hook::Ingress, GO_BACK)]
        {
            put_clsact(ifindex)?;
            put_filter(ifindex, hook, OF_NODE, name, program(name)?.as_fd())?;
        }
        Ok(())
    }

    /// A place for the pod of a slot in it: the class of htb for what comes out of the pod, before that of what goes in; 0 where it has fq, which needs
    /// none.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
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

    /// The place of a pod that had one, in a room that may be another one by now: the class that it has from here on.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn keep_place(&self, class: u16, slot: u32, limits: &Limits, ingress_by: Option<IngressBy>) -> Result<u16> {
        if self.has_fq || class == 0 {
            return self.make_place(slot, limits, ingress_by);
        }
        let limits = waiting(limits, ingress_by);
        // That of what goes out is there in any case: by it a place is known to be taken.
        put_classes(self.ifindex, class, &Limits { egress: limits.egress.or(limits.ingress), ..limits })?;
        Ok(class)
    }
}

/// Sets other limits at a pod's place in the waiting room; in the direction that tbf holds, nothing waits there.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
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

/// Gives back the places in the waiting room that are not among these.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn keep_places(classes: &[u16]) -> Result<()> {
    let Some(ifindex) = index_of(WAITING) else { return Ok(()) };
    let is_left = |class: &u16| !classes.contains(&(class - class % ROOM_CLASSES));
    let mut left: Vec<u16> = htb::room_classes(ifindex)?.into_iter().filter(is_left).collect();
    // Those below others have higher numbers, and go first.
    left.sort_unstable_by(|one, other| other.cmp(one));
    left.into_iter().try_for_each(|class| htb::take_room_class(ifindex, class))
}

/// The name of a class of the waiting room in `skb->priority`.
pub fn class_id(class: u16) -> u32 {
    if class == 0 { 0 } else { u32::from(QDISC_MAJOR) << 16 | u32::from(class) }
}

/// Removes the waiting room, if there is one.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
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

/// The limits of the directions that wait.
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
    // Those below others go first.
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
    // There may be no IPv6 on this node. What it says there is dropped all the same.
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
