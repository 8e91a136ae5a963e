//! The waiting room and a host end as they are found. They may differ from what podshaper has made.

use std::{collections::HashSet, io};

use netlink_packet_route::{
    link::{LinkAttribute, LinkFlags, LinkMessage},
    tc::TcHandle,
};
use podshaper_abi::QDISC_MAJOR;

use super::{GO_BACK, Hook, OF_NODE, WAIT_HERE, WAITING, has_filter};
use crate::{
    error::{Code, Error, Result},
    interface::peer,
    netlink,
    qdisc::{self, htb},
};

/// The waiting room, with the parts that serve all pods.
pub struct Room {
    /// The interface that packets are sent to.
    pub ifindex: u32,
    /// Its htb classes; `None`: its queue is fq.
    classes: Option<HashSet<u16>>,
}

impl Room {
    /// Looks at the waiting room of the calling thread's namespace.
    ///
    /// # Errors
    /// [`Code::Mismatch`] names the part that is gone. [`Code::Kernel`]: the room cannot be looked at.
    pub fn look() -> Result<Self> {
        let gone = |what: &str| Error::new(Code::Mismatch, format!("the waiting room {WAITING} of the node {what}"));
        let link = netlink::link_by_name(WAITING).map_err(looking)?.ok_or_else(|| gone("is gone"))?;
        let ifindex = link.header.index;
        let back = peer::linked_to(&link)
            .map_or(Ok(None), netlink::link)
            .map_err(looking)?
            .ok_or_else(|| gone("has lost its other end"))?;
        if [&link, &back].iter().any(|end| !end.header.flags.contains(LinkFlags::Up)) {
            return Err(gone("is down"));
        }
        let has_fq = has_fq(&link).ok_or_else(|| gone("has lost its queue"))?;
        for (ifindex, hook, name) in [(ifindex, Hook::Egress, WAIT_HERE), (back.header.index, Hook::Ingress, GO_BACK)] {
            if !has_filter(ifindex, hook, OF_NODE)? {
                return Err(gone(&format!("has lost the program {name}")));
            }
        }
        let classes = if has_fq { None } else { Some(htb::room_classes(ifindex)?) };
        Ok(Self { ifindex, classes })
    }

    /// Whether a pod's place is there. In a room with fq a pod needs no class (0).
    pub fn has_place(&self, class: u16) -> bool {
        match &self.classes {
            Some(classes) => class != 0 && classes.contains(&class),
            None => class == 0,
        }
    }
}

/// Whether an interface is the host end of the veth of the pod whose namespace has this nsid in the node's.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn leads_to(ifindex: u32, namespace: u32) -> Result<bool> {
    let is_its = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::LinkNetNsId(id) if u32::try_from(*id) == Ok(namespace));
    let found = netlink::link(ifindex).map_err(looking)?;
    Ok(found.is_some_and(|link| link.attributes.iter().any(is_its)))
}

/// Whether the queue of a waiting room is fq; `false`: it is htb. `None`: it is neither.
pub(super) fn has_fq(link: &LinkMessage) -> Option<bool> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Qdisc(kind) if kind == "fq" => Some(true),
        LinkAttribute::Qdisc(kind) if kind == "htb" => Some(false),
        _ => None,
    })
}

/// Refuses a waiting room with another tool's qdisc, unless that qdisc is fq.
///
/// # Errors
/// [`Code::Kernel`]: there is such a qdisc; or the kernel's error.
pub(super) fn refuse_foreign_queue(ifindex: u32) -> Result<()> {
    match qdisc::qdisc_at(ifindex, TcHandle::ROOT).map_err(looking)? {
        Some((kind, handle)) if ![0, QDISC_MAJOR].contains(&handle.major) && kind != "fq" => {
            let text = format!(
                "put a queue on the waiting room {WAITING}: it has the qdisc {kind} already, which is left alone"
            );
            Err(Error::new(Code::Kernel, text))
        }
        _ => Ok(()),
    }
}

fn looking(cause: io::Error) -> Error {
    Error::because(Code::Kernel, "look at what holds other paths of pods", cause)
}
