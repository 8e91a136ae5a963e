//! The other end of a pod's veth, and the numbers by which namespaces know each other.

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
