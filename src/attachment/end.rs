//! Changes the limits of an attachment that is there, lifts them, and removes it.

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
    /// There was none.
    Nothing,
    /// It is gone.
    Removed,
    /// What is there now is not the one that was meant: it has been replaced, and stays.
    Another(Box<Owner>),
}

/// Removes the attachment at a place with all that was made for it, if it is still the one that is meant when the lock is ours.
/// `is_meant` gets `None` for one whose record nobody can read.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn remove(place: &Place, is_meant: impl FnOnce(&Path, Option<&Owner>) -> bool) -> Result<End> {
    lock()?.map_or(Ok(End::Nothing), |pins| remove_locked(&pins, place, is_meant))
}

/// The same where the lock is ours already.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
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

/// Clears what killed calls have left of every attachment: unfinished pins, and limits that nobody has.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says, of each that could not be cleared.
pub fn settle_all(pins: &LockedPins) -> Result<()> {
    let settled = pins.settle_all();
    let all: Vec<_> = pins.list().into_iter().map(|(_, directory)| directory).collect();
    let owners: Vec<_> = all.iter().filter_map(|directory| Pinned::at(directory).owner().ok()).collect();
    error::all([settled, other_paths::settle(pins, &owners), shaper::forget_others(pins, all.into_iter())])
}

/// Takes an attachment off the node's programs: its limits are gone, and so are the links that no other attachment of the pod needs. Where
/// nothing of the pod stays, the links go first, and with them whatever could still look for the limits.
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

/// Brings an interface to what is needed by the attachments that stay there. Errors are in the log.
pub(super) fn leave(pins: &LockedPins, place: &Place, ended: &Record) {
    interface::undo(ended, &others(pins, place, ended));
    if let Some(inode) = ended.netns_inode {
        interface::warn("the note of a limit that ended is left", pins.forget(inode, place));
    }
}

/// Other limits for an attachment that is there.
pub struct Change {
    /// In the directions that change.
    pub limits: Limits,
    /// The record that goes with them.
    pub owner: Owner,
}

/// Changes the limits of an attachment, in the directions that `to` names when it is given what is there; it may refuse.
///
/// # Errors
/// [`Code::Mismatch`]: it is gone. Those of `to`, and what the kernel says: the limits are as they were then.
pub fn change(place: &Place, to: impl FnOnce(&Present) -> Result<Change>) -> Result<()> {
    // Between the reading and the lock a DEL or an ADD may have come.
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

/// Brings the interface to other limits of an attachment, before they are in force.
fn settle(pins: &Pins, present: &Present, interface: &mut Option<Interface>, to: &Limits) -> Result<()> {
    let record = &present.owner.interface;
    let Some(interface) = interface else {
        let text = "change the queue that holds the limit: the pod's interface is not to be found any more";
        // A pod that has given it another name is held at its host's end.
        let is_held_elsewhere = record.held_at.is_some() && !record.has_tbf();
        if is_held_by_qdisc(record, to) && !is_held_elsewhere {
            return Err(Error::new(Code::Netns, text));
        }
        return change_place(present, to);
    };
    let mut own = present.need();
    own.limits = Some(present.limits_with(to));
    let mut needs = others(pins, &present.place, record);
    // Of those that have a tbf or an htb, which earlier versions allowed, this one is changed.
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

/// Brings what waits of it in the waiting room to other limits.
fn change_place(present: &Present, to: &Limits) -> Result<()> {
    let Record { held_at, ingress_by, .. } = present.owner.interface;
    let changed = held_at.map(|at| host_end::change_place(at.class, &present.limits_with(to), ingress_by));
    changed.unwrap_or(Ok(()))
}

/// Whether a qdisc has one of these limits too.
fn is_held_by_qdisc(record: &Record, limits: &Limits) -> bool {
    (record.has_tbf() && limits.ingress.is_some()) || (record.htb && limits.egress.is_some())
}

/// Lifts the limits of an attachment in these directions, if it is the one that is meant, and lets go of its connections. A connection that
/// no process of the cgroup has open goes on without a pace if it sends before the attachment is removed. An attachment that is of another
/// layout, or cannot be read, stays as it is.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn lift(place: &Place, directions: &[Direction], is_meant: impl FnOnce(&Path, &Owner) -> bool) -> Result<()> {
    let Some(pins) = lock()? else { return Ok(()) };
    let found = pins.find(place).and_then(|directory| Present::read(place.clone(), directory).ok());
    match found {
        Some(present) if is_meant(&present.directory, &present.owner) => match &present.limits {
            Some(limits) => {
                present.write(&unlimited(limits, directions), &present.owner.by_hand(limits))?;
                // From here on no program sets anything anew.
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
