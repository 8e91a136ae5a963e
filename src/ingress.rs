//! What holds a pod's ingress to its limit, and the qdiscs both directions use. Which it is depends on the kernel and on the pod's
//! interface; it is recorded with the attachment and logged, never silent.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::{
    error::{Code, Error, Result},
    netns, packets,
    pod::Owner,
    qdisc,
    request::{Limit, Limits},
    shaper::Queue,
};

/// The mechanism in force, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IngressBy {
    /// The pod's acknowledgements leave at the limit's pace, by fq on the pod's interface, and windows follow the backlog.
    HeldAcks,
    /// tbf on the host's end of the veth: a queue, as the bandwidth plugin makes it, but a short one.
    Tbf,
    /// What is over the limit is dropped: TCP gets much less than the limit on a short path.
    Drops,
}

const NAMES: [(IngressBy, &str); 3] =
    [(IngressBy::HeldAcks, "held-acks"), (IngressBy::Tbf, "tbf"), (IngressBy::Drops, "drops")];

impl fmt::Display for IngressBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(mechanism, _)| mechanism == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

impl FromStr for IngressBy {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        NAMES.iter().find(|(_, name)| *name == text).map(|(mechanism, _)| *mechanism).ok_or(())
    }
}

/// What could be prepared from inside the pod's network namespace.
pub struct Inside {
    fq: Result<()>,
    has_htb: bool,
    peer: Result<Option<u32>>,
}

/// Prepares the pod's side; to be called in its network namespace. fq is of use to both directions: it lets acknowledgements
/// leave when they should, and what the pod sends without having waited. htb is for the latter, where there is no fq.
pub fn prepare(ifindex: u32, limits: &Limits) -> Inside {
    let fq = qdisc::put_fq(ifindex);
    let htb = limits.egress.filter(|_| fq.is_err()).map(|limit| qdisc::put_htb(ifindex, &limit));
    if let (Err(no_fq), Some(Err(no_htb))) = (&fq, &htb) {
        log::warn!("what the pod sends without having waited has no queue: {no_fq}; {no_htb}");
    }
    let has_htb = htb.is_some_and(|htb| htb.is_ok());
    let needs_peer = fq.is_err() && limits.ingress.is_some();
    let peer = if needs_peer { qdisc::veth_peer(ifindex) } else { Ok(None) };
    Inside { fq, has_htb, peer }
}

impl Inside {
    /// The qdisc that is on the pod's interface.
    pub fn queue(&self) -> Queue {
        match self.fq {
            Ok(()) => Queue::Fq,
            Err(_) if self.has_htb => Queue::Htb,
            Err(_) => Queue::None,
        }
    }

    /// Takes the best mechanism there is, and prepares the host's side of it; says in the log why it is not a better one. A queue
    /// is none if the limit is not for `all_traffic`: it cannot tell.
    pub fn choose(self, ifindex: u32, limit: &Limit, all_traffic: bool) -> IngressBy {
        let Err(no_fq) = self.fq else { return IngressBy::HeldAcks };
        log::warn!("ingress is held by a queue or by drops, not by acknowledgements: {no_fq}");
        if !all_traffic {
            log::warn!("exemptSubnets and shapedSubnets leave drops: tbf would limit what they exempt");
            return IngressBy::Drops;
        }
        let tbf = self.peer.map(|peer| peer.map(|peer| qdisc::put_tbf(peer, ifindex, limit)));
        match tbf {
            Ok(Some(Ok(()))) => return IngressBy::Tbf,
            Ok(Some(Err(error))) | Err(error) => log::warn!("{error}"),
            Ok(None) => log::warn!("the pod's interface is no veth with an end on this host to put tbf on"),
        }
        IngressBy::Drops
    }
}

fn is_held_by_tbf(owner: &Owner) -> bool {
    owner.ingress_by.as_deref() == Some(&IngressBy::Tbf.to_string())
}

/// Sets another egress limit where htb has one; nothing to do where it has not.
///
/// # Errors
/// As for [`change`].
pub fn change_egress(owner: &Owner, limit: &Limit) -> Result<()> {
    let Some(path) = owner.netns.as_deref().map(Path::new).filter(|_| owner.htb) else { return Ok(()) };
    netns::in_netns(path, || qdisc::put_htb(netns::interface(&owner.ifname, path)?.index, limit))
}

/// Sets another rate where tbf holds an attachment's ingress; nothing to do where it does not.
///
/// # Errors
/// [`Code::Kernel`] or [`Code::Netns`]: the tbf cannot be found or changed.
pub fn change(owner: &Owner, limit: &Limit) -> Result<()> {
    if !is_held_by_tbf(owner) {
        return Ok(());
    }
    let path = owner.netns.as_deref().map(Path::new).unwrap_or(Path::new(""));
    let (index, peer) = netns::in_netns(path, || {
        let index = netns::interface(&owner.ifname, path)?.index;
        Ok((index, qdisc::veth_peer(index)?))
    })?;
    let no_peer = || Error::new(Code::Kernel, "change tbf: the pod's interface has no end on this host any more");
    qdisc::put_tbf(peer.ok_or_else(no_peer)?, index, limit)
}

/// Undoes what an ADD that failed, for `failed`, has done to an attachment that stays, which had this ingress limit.
pub fn restore(stays: &Owner, limit: Option<&Limit>, failed: &Owner) {
    if !is_held_by_tbf(stays) {
        undo_host_side(failed);
    } else if let Some(Err(error)) = limit.map(|limit| change(stays, limit)) {
        log::warn!("the limit of before could not be put back: {error}");
    }
}

/// Checks that what was put on the interfaces for an attachment is still there.
///
/// # Errors
/// [`Code::Mismatch`] naming what is gone; [`Code::Netns`] or [`Code::Kernel`] where it cannot be looked at.
pub fn check(owner: &Owner) -> Result<()> {
    let tbf = is_held_by_tbf(owner);
    let queue = match Queue::of(owner) {
        Queue::Fq => Some("fq"),
        Queue::Htb => Some("htb"),
        Queue::None => None,
    };
    let Some(path) = owner.netns.as_ref().map(Path::new).filter(|_| queue.is_some() || tbf) else { return Ok(()) };
    let gone = |what: &str| {
        let text = format!("{what} has been taken off {} of {}: podshaper put it there", owner.ifname, path.display());
        Err(Error::new(Code::Mismatch, text))
    };
    let (has_queue, peer) = netns::in_netns(path, || {
        let index = netns::interface(&owner.ifname, path)?.index;
        let has_queue = queue.map_or(Ok(true), |kind| qdisc::has(index, kind))?;
        Ok((has_queue, if tbf { qdisc::veth_peer(index)? } else { None }))
    })?;
    if let Some(kind) = queue.filter(|_| !has_queue) {
        return gone(kind);
    }
    if tbf && !peer.map_or(Ok(false), |peer| qdisc::has(peer, "tbf"))? {
        return gone("tbf, at the host's end,");
    }
    Ok(())
}

/// Undoes what was done to the interfaces for an attachment that ends before its namespace does: it would go on limiting.
pub fn undo(owner: &Owner) {
    take_off(owner, owner.fq || owner.htb, owner.gso_max_size);
}

/// The same for what was put on the host's side alone: the attachment is replaced by one that does not use it.
pub fn undo_host_side(owner: &Owner) {
    take_off(owner, false, None);
}

fn take_off(owner: &Owner, queue: bool, gso_max_size: Option<u32>) {
    let tbf = is_held_by_tbf(owner);
    let is_changed = queue || tbf || gso_max_size.is_some();
    let Some(path) = owner.netns.as_ref().map(Path::new).filter(|_| is_changed) else { return };
    let inside = netns::in_netns(path, || {
        let index = netns::interface(&owner.ifname, path)?.index;
        if let Some(bytes) = gso_max_size {
            packets::set_largest(index, bytes)?;
        }
        if queue {
            qdisc::take_off(index)?;
        }
        Ok((index, if tbf { qdisc::veth_peer(index)? } else { None }))
    });
    let undone = inside.and_then(|(index, peer)| peer.map_or(Ok(()), |peer| qdisc::take_off_peer(peer, index)));
    if let Err(error) = undone {
        // Most often the namespace is gone, and all of this with it.
        log::debug!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (mechanism, name) in NAMES {
            assert_eq!(mechanism.to_string(), name);
            assert_eq!(name.parse(), Ok(mechanism));
        }
        assert_eq!("fq".parse::<IngressBy>(), Err(()));
    }
}
