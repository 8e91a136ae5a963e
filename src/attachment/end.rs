//! Changes the limits of an attachment, lifts them, and removes an attachment.

use std::path::Path;

use super::{Present, let_go::connections, lock, other_paths, others, scopes, sharing, there, unlimited};
use crate::{
    direction::Direction,
    error::{self, Code, Error, Result},
    interface::{self, Interface, Record, host_end},
    owner::Owner,
    pins::{self, LockedPins, Pins, Place},
    request::Limits,
    shaper::{self, Pinned, Set, Settings},
};

/// What became of an attachment that was to end.
pub enum End {
    /// There was no attachment.
    Nothing,
    /// It has been removed.
    Removed,
    /// The attachment at the place is not the one that was meant. It has replaced that one, and stays.
    Another(Box<Owner>),
}

/// Removes the attachment at a place, with everything that was made for it, if it still is the attachment that the
/// caller means. `is_meant` decides this under the lock; it gets `None` for a record that cannot be read.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn remove(place: &Place, is_meant: impl FnOnce(&Path, Option<&Owner>) -> bool) -> Result<End> {
    lock()?.map_or(Ok(End::Nothing), |pins| remove_locked(&pins, place, is_meant))
}

/// Like [`remove`], for a caller that has the lock.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn remove_locked(
    pins: &LockedPins,
    place: &Place,
    is_meant: impl FnOnce(&Path, Option<&Owner>) -> bool,
) -> Result<End> {
    let Some(directory) = pins.settle(place)? else { return Ok(End::Nothing) };
    let owner = Pinned::at(&directory).owner_if_readable()?;
    if !is_meant(&directory, owner.as_ref()) {
        return Ok(End::Another(Box::new(owner.unwrap_or_default())));
    }
    let connections = owner.as_ref().and_then(|owner| connections(&directory, owner));
    if pins::shares(&directory) {
        release(pins, place, owner.as_ref())?;
    }
    pins.remove(place)?;
    if let Some(connections) = connections {
        connections.let_go(&Direction::BOTH);
    }
    match owner {
        Some(mut owner) => {
            owner.interface.complete();
            other_paths::leave(pins, &owner.interface, owner.slot, None);
            other_paths::hand_over(pins, &owner.interface, &there(pins, place, &owner.interface));
            leave(pins, place, &owner.interface);
        }
        None => log::warn!(
            "removed {}, whose record cannot be read: what was changed on the pod's interface is not known, and stays",
            directory.display()
        ),
    }
    log::info!("removed {}", directory.display());
    Ok(End::Removed)
}

/// Clears the remains of killed calls for all attachments: unfinished pins, and limits that no attachment has.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error for each thing that could not be cleared.
pub fn settle_all(pins: &LockedPins) -> Result<()> {
    let settled = pins.settle_all();
    let all: Vec<_> = pins.list().into_iter().map(|(_, directory)| directory).collect();
    let owners: Result<Vec<_>> = all.iter().map(|directory| Pinned::at(directory).owner_if_readable()).collect();
    // An owner that cannot be read at this moment may be that of a live pod, so nothing is removed then.
    let others = owners.and_then(|owners| other_paths::settle(pins, &owners.into_iter().flatten().collect::<Vec<_>>()));
    error::all([settled, others, shaper::forget_others(pins, all.into_iter())])
}

/// Takes an attachment off the node's programs: removes the links that no other attachment of the pod needs, and then
/// its limits. Where no attachment of the pod stays, no program is then left that could look for the limits.
fn release(pins: &LockedPins, place: &Place, owner: Option<&Owner>) -> Result<()> {
    let others = sharing(pins, place);
    let needed: Vec<_> = others.iter().flat_map(Present::programs).collect();
    pins.keep_links(&place.pod, &needed)?;
    if let Some(cgroup) = others.first().map(|other| Path::new(&other.owner.cgroup)) {
        shaper::leave(pins, cgroup, &scopes(&others))?;
    }
    match owner {
        Some(owner) => Set::pinned(&pins.node())?.forget(owner.slot),
        None => {
            let others = pins.list().into_iter().filter(|(other, _)| other != place);
            shaper::forget_others(pins, others.map(|(_, directory)| directory))
        }
    }
}

/// Brings an interface to the state that the attachments that stay there need. Errors go to the log.
pub(super) fn leave(pins: &LockedPins, place: &Place, ended: &Record) {
    interface::undo(ended, &others(pins, place, ended));
    if let Some(inode) = ended.netns_inode {
        interface::warn("the note of a limit that ended is left", pins.forget(inode, place));
    }
}

/// New limits for an attachment.
pub struct Change {
    /// The limits, in the directions that change.
    pub limits: Limits,
    /// The record that goes with the limits.
    pub owner: Owner,
}

/// Changes the limits of an attachment. `to` gets the attachment as it is and returns the change, or refuses.
///
/// # Errors
/// [`Code::Mismatch`]: the attachment is gone. The errors of `to`, and the kernel's error: then the limits are as they
/// were.
pub fn change(place: &Place, to: impl FnOnce(&Present) -> Result<Change>) -> Result<()> {
    // A DEL or an ADD may have come between the caller's reading and the lock.
    let gone = || {
        let text = format!("change the limits of {} of pod {}: it is gone", place.interface, place.pod);
        Error::new(Code::Mismatch, text)
    };
    let pins = lock()?.ok_or_else(gone)?;
    let directory = pins.find(place).ok_or_else(gone)?;
    let present = Present::read(place.clone(), directory)?;
    let Change { limits, owner } = to(&present)?;
    let mut interface = Interface::of(&present.owner.interface)?;
    let changed = settle(&pins, &present, &mut interface, &limits).and_then(|()| present.write(&limits, &owner));
    if changed.is_err() {
        let before = settle(&pins, &present, &mut interface, &Limits::default());
        interface::warn("the limit of before could not be put back", before);
    }
    changed
}

/// Brings the interface to the new limits of an attachment, before these limits are in force.
fn settle(pins: &Pins, present: &Present, interface: &mut Option<Interface>, to: &Limits) -> Result<()> {
    let record = &present.owner.interface;
    let Some(interface) = interface else {
        let text = "change the queue that holds the limit: the pod's interface is not to be found any more";
        // An interface that the pod has renamed is still held at its host end.
        let is_held_elsewhere = record.held_at.is_some() && !record.has_tbf();
        if is_held_by_qdisc(record, to) && !is_held_elsewhere {
            return Err(Error::new(Code::Netns, text));
        }
        return change_place(present, to);
    };
    let mut own = present.need();
    own.limits = Some(present.limits_with(to));
    let mut needs = others(pins, &present.place, record);
    // Earlier versions allowed more than one limit with tbf or htb on an interface. The qdisc gets the first limit of
    // the list: the one that changes.
    needs.insert(0, own);
    let settled = interface.settle(record, &needs);
    change_place(present, to)?;
    interface::warn("TCP may send larger packets than this limit is good for", settled.packets);
    if is_held_by_qdisc(record, to) {
        return settled.qdiscs;
    }
    interface::warn(interface::LEFT, settled.qdiscs);
    Ok(())
}

/// Brings the attachment's place in the waiting room to the new limits.
fn change_place(present: &Present, to: &Limits) -> Result<()> {
    let Record { held_at, ingress_by, .. } = present.owner.interface;
    let changed = held_at.map(|at| host_end::change_place(at.class, &present.limits_with(to), ingress_by));
    changed.unwrap_or(Ok(()))
}

/// Whether a qdisc holds one of these limits as well.
fn is_held_by_qdisc(record: &Record, limits: &Limits) -> bool {
    (record.has_tbf() && limits.ingress.is_some()) || (record.htb && limits.egress.is_some())
}

/// Lifts the limits of an attachment in these directions, if it is the attachment that the caller means, and takes pace
/// and window off its connections. A connection that no process of the cgroup has open loses its pace if it sends
/// before the attachment is removed. An attachment of another layout, or one that cannot be read, stays as it is.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn lift(place: &Place, directions: &[Direction], is_meant: impl FnOnce(&Path, &Owner) -> bool) -> Result<()> {
    let Some(pins) = lock()? else { return Ok(()) };
    let found = pins.find(place).and_then(|directory| Present::read(place.clone(), directory).ok());
    match found {
        Some(present) if is_meant(&present.directory, &present.owner) => match &present.limits {
            Some(limits) => {
                present.write(&unlimited(limits, directions), &present.owner.by_hand(limits))?;
                // From here on no program sets a socket's pace or window again.
                if let Some(connections) = present.connections() {
                    connections.let_go(directions);
                }
                Ok(())
            }
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

impl Present {
    pub(super) fn write(&self, limits: &Limits, owner: &Owner) -> Result<()> {
        Pinned::at(&self.directory).change(&Settings::of(owner, *limits), owner)
    }
}
