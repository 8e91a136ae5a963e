//! The other end of a pod's veth, and the numbers (nsids) by which namespaces know each other.

use std::{io, os::fd::RawFd};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};

use crate::{
    error::{Code, Error, Result},
    netlink,
};

/// The other end of a veth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    ifindex: u32,
    /// The nsid of its namespace in the namespace of the first end. The kernel assigns it when it is asked for the
    /// link.
    namespace: i32,
}

impl Peer {
    /// The other end of an interface. `None`: the interface is no veth, or both ends are in one namespace.
    pub fn of(link: &LinkMessage) -> Option<Self> {
        let ifindex = linked_to(link).filter(|_| is_veth(link))?;
        Some(Self { ifindex, namespace: peer_namespace_id(link)? })
    }

    /// Whether it is in the namespace `home`, podshaper's own. In another namespace its index means another interface,
    /// perhaps another pod's. Must be called in the namespace of the first end.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn is_in(self, home: RawFd) -> Result<bool> {
        Ok(namespace_id(home).map_err(not_found)? == Some(self.namespace))
    }

    /// Looks at it in its own namespace, which must be the calling thread's. `None`: it is not the other end of
    /// `ifindex`.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
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
    /// The nsid that the host's namespace has for the pod's.
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

/// The least nsid that a namespace gets for itself. The kernel numbers the other namespaces that a namespace knows from
/// 0 on.
const MIN_OWN_NUMBER: i32 = 1 << 17;

/// `ip netns set NAME NSID` in the namespace itself: gives the namespace a number for itself, by which the programs
/// tell it from others (`bpf/src/namespace.rs`). The number goes with the namespace. Returns 0 if the namespace has a
/// smaller number for itself already.
///
/// The number is made from the inode number. No namespace has it for another namespace. Of 131072 pairs of namespaces,
/// one has the same number for both. Larger numbers would make this rarer still, and take more of the kernel's memory:
/// a tree has a node of 576 bytes for each six bits of the number, and as many again, but one, for the number 0, which
/// is the node's.
///
/// # Errors
/// The kernel's error.
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

/// The nsid that the calling thread's namespace has for another namespace.
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
