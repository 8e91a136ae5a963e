//! Checks the parts of an attachment that are not on its cgroup: the filters at the host end, the place in the waiting
//! room, the queue on the interface. A process that may configure the node's network, or the pod's, can remove these
//! parts. [`Node::check`] finds the parts that are gone, and [`hold_again`] puts them back. Where another tool has put
//! something in their place, that stays, and the error says what it is.

use std::{cell::OnceCell, os::fd::AsFd};

use podshaper_abi::HostEnd;

use super::{
    Present, lock,
    other_paths::{self, writing},
    others,
};
use crate::{
    error::{self, Code, Error, Result},
    interface::{
        self, HeldAt, Interface, Record,
        host_end::{self, Hook, Room, WaitingRoom},
    },
    owner::Owner,
    pins::{self, LockedPins, Pins, Place},
    request::Limits,
    shaper::{Pinned, Set},
    sys::Read,
};

/// The node as one call finds it. Parts that all attachments share are looked at once.
#[derive(Default)]
pub struct Node {
    room: OnceCell<Result<Room>>,
}

impl Node {
    /// Checks that the filters, the place in the waiting room and the queues of an attachment are as podshaper made
    /// them. `set`: the maps of the attachment.
    ///
    /// # Errors
    /// [`Code::Mismatch`] names the part that is gone. [`Code::Netns`]: the interface itself is gone. [`Code::Kernel`]:
    /// it cannot be looked at.
    pub fn check(&self, owner: &Owner, limits: &Limits, set: &Set) -> Result<()> {
        error::all([self.check_other_paths(owner, limits, set), interface::check(&owner.interface, owner.ifindex)])
    }

    /// The half of [`Self::check`] for other paths: the filters and the place in the waiting room.
    ///
    /// # Errors
    /// Those of [`Self::check`].
    pub fn check_other_paths(&self, owner: &Owner, limits: &Limits, set: &Set) -> Result<()> {
        let Some(at) = owner.interface.held_at else { return Ok(()) };
        let end = set.host_ends.get(&at.ifindex, Read::Plain).map_err(writing)?;
        let Some(end) = end.filter(|end| end.slot == owner.slot) else {
            let text = format!("the programs do not know the host's end of {}", owner.interface.ifname);
            return Err(Error::new(Code::Mismatch, text));
        };
        check_filters(&owner.interface, limits, at, &end)?;
        let room = self.room.get_or_init(Room::look).as_ref();
        let room = room.map_err(|error| Error::new(error.code(), error.to_string()))?;
        let waits_there = end.waiting_ifindex == room.ifindex && end.waiting_class == host_end::class_id(at.class);
        if waits_there && room.has_place(at.class) {
            return Ok(());
        }
        let text = format!("{} has no place in the waiting room of the node any more", owner.interface.ifname);
        Err(Error::new(Code::Mismatch, text))
    }
}

fn check_filters(record: &Record, limits: &Limits, at: HeldAt, end: &HostEnd) -> Result<()> {
    for (hook, name) in other_paths::hooks(limits, record.ingress_by) {
        if host_end::has_filter(at.ifindex, hook, at.filter)? {
            continue;
        }
        let of = format!("the host's end of {} of {}", record.ifname, record.netns.as_deref().unwrap_or_default());
        if !host_end::leads_to(at.ifindex, end.namespace)? {
            return Err(Error::new(Code::Netns, format!("find {of}: it is gone")));
        }
        let text = format!("the program {name} has been taken off {of}: podshaper put it there");
        return Err(Error::new(Code::Mismatch, text));
    }
    Ok(())
}

/// Puts back the parts of an attachment that are gone. Returns whether the attachment is held then; `false`: the
/// attachment is gone, with or without its interface. A part that could not be put back stays in the record, so that a
/// check reports it and a later call tries again.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error, or with the name of what another tool has put there.
pub fn hold_again(place: &Place) -> Result<bool> {
    let Some(pins) = lock()? else { return Ok(false) };
    let Some(present) = find(&pins, place)? else { return Ok(false) };
    match present.check() {
        // Another call was quicker, or another attachment has replaced this one.
        Ok(()) => return Ok(true),
        Err(error) if error.code() == Code::Netns => return Ok(false),
        Err(_) => {}
    }
    let queue = present.put_queue_back(&pins);
    let room = present.find_room_again(&pins);
    // The attachment may have got another place in the room.
    let Some(present) = find(&pins, place)? else { return Ok(false) };
    error::all([room.and_then(|()| present.put_filters_back()), queue])?;
    present.check().map(|()| true)
}

fn find(pins: &Pins, place: &Place) -> Result<Option<Present>> {
    let directory = pins.find(place).filter(|directory| pins::is_current(directory));
    directory.map(|directory| Present::read(place.clone(), directory)).transpose()
}

/// Moves all pods of the node to a waiting room that was made anew. Until then, packets that must wait go to an
/// interface that is gone. Errors go to the log: `sync` tries again.
pub(super) fn move_all(pins: &Pins, room: &WaitingRoom) {
    let all = pins.list().into_iter().filter(|(_, directory)| pins::is_current(directory));
    let present = all.filter_map(|(place, directory)| Present::read(place, directory).ok());
    let moved = error::all(present.map(|present| present.wait_in(pins, room)));
    interface::warn("not all pods wait in the waiting room that was made anew", moved);
}

impl Present {
    fn check(&self) -> Result<()> {
        let set = Pinned::at(&self.directory).set()?;
        Node::default().check(&self.owner, &self.limits.unwrap_or_default(), &set)
    }

    /// Makes the waiting room what it was, and gives the attachment a place there.
    fn find_room_again(&self, pins: &LockedPins) -> Result<()> {
        if self.owner.interface.held_at.is_none() {
            return Ok(());
        }
        // The room's programs need no maps, so the node's programs will do.
        let node = Set::of_node(pins)?;
        if Room::look().is_err() {
            move_all(pins, &WaitingRoom::mend(|name| node.program(name))?);
            return Ok(());
        }
        self.wait_in(pins, &WaitingRoom::open(|name| node.program(name))?)
    }

    fn put_filters_back(&self) -> Result<()> {
        let Self { owner, limits: Some(limits), directory, .. } = self else { return Ok(()) };
        let Some(at) = owner.interface.held_at else { return Ok(()) };
        let mut gone = Vec::new();
        for (hook, name) in other_paths::hooks(limits, owner.interface.ingress_by) {
            if !host_end::has_filter(at.ifindex, hook, at.filter)? {
                gone.push((hook, name));
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        let set = Pinned::at(directory).set()?;
        gone.iter().try_for_each(|(hook, _)| host_end::refuse_tcx(at.ifindex, *hook))?;
        let is_new = host_end::put_clsact(at.ifindex)?;
        if !is_new && gone.iter().any(|(hook, _)| *hook == Hook::Egress) {
            host_end::refuse_ingress(at.ifindex)?;
        }
        // clsact was another tool's before. Now it is podshaper's, and goes with the last filter, also if a filter
        // fails here.
        if is_new && !at.clsact {
            self.note(HeldAt { clsact: true, ..at })?;
        }
        gone.into_iter().try_for_each(|(hook, name)| {
            host_end::put_filter(at.ifindex, hook, at.filter, name, set.program(name)?.as_fd())
        })
    }

    /// Lets the held packets of the attachment wait in this room from here on, if it has any.
    fn wait_in(&self, pins: &Pins, room: &WaitingRoom) -> Result<()> {
        let Self { owner, limits: Some(limits), directory, .. } = self else { return Ok(()) };
        let Some(at) = owner.interface.held_at else { return Ok(()) };
        let class = room.keep_place(at.class, owner.slot, limits, owner.interface.ingress_by)?;
        let own = (!pins::shares(directory)).then(|| Pinned::at(directory).set()).transpose()?;
        for set in [Set::pinned(&pins.node()).ok(), own].into_iter().flatten() {
            let end = set.host_ends.get(&at.ifindex, Read::Plain).map_err(writing)?;
            let Some(end) = end.filter(|end| end.slot == owner.slot) else { continue };
            let end = HostEnd { waiting_ifindex: room.ifindex, waiting_class: host_end::class_id(class), ..end };
            set.host_ends.set(&at.ifindex, &end).map_err(writing)?;
        }
        if class == at.class { Ok(()) } else { self.note(HeldAt { class, ..at }) }
    }

    fn note(&self, held_at: HeldAt) -> Result<()> {
        let interface = Record { held_at: Some(held_at), ..self.owner.interface.clone() };
        let limits = self.limits.unwrap_or_default();
        self.write(&limits, &Owner { interface, ..self.owner.clone() })
    }

    fn put_queue_back(&self, pins: &Pins) -> Result<()> {
        let record = &self.owner.interface;
        if interface::check(record, self.owner.ifindex).is_ok() {
            return Ok(());
        }
        let Some(mut interface) = Interface::of(record)? else { return Ok(()) };
        if !interface.is_that_of(record, self.owner.ifindex)? {
            let text = format!("put the queue back on {}: its name has been given to another interface", record.ifname);
            return Err(Error::new(Code::Mismatch, text));
        }
        let mut needs = others(pins, &self.place, record);
        needs.insert(0, self.need());
        interface.settle(record, &needs).qdiscs
    }
}
