//! Holds packets that pass a pod's interface by other paths than the sockets of its cgroup. They are held at the host
//! end of the interface, if it has one here. The programs decide which packets these are, and what happens to them
//! (`bpf/src/other_paths.rs`). `interface::host_end` puts the programs where they run.

use std::os::fd::{AsFd, OwnedFd};

use podshaper_abi::HostEnd;

use super::{Present, held::move_all};
use crate::{
    error::{Code, Error, Result},
    interface::{
        self, HeldAt, IngressBy, Interface, Record,
        host_end::{self, Hook, OF_NODE, WaitingRoom},
    },
    owner::Owner,
    pins::{self, LockedPins, Pins},
    request::Limits,
    shaper::{Pinned, Set},
    sys::{Map, Read},
};

/// This bit is set in the filter numbers of attachments with programs of their own. So the filters of such an
/// attachment and those of the node can be on an interface together while one attachment replaces the other.
const OWN: u16 = 1 << 15;

/// What an attachment wants to have held.
pub struct Wanted<'a> {
    /// podshaper's pins, locked.
    pub pins: &'a Pins,
    /// The programs and maps of the attachment.
    pub set: &'a Set,
    /// The node's set, if it is another one: its maps list all host ends.
    pub node: Option<&'a Set>,
    /// The slot by which the programs know the attachment.
    pub slot: u32,
    /// The number by which the programs know the list of subnets.
    pub list: u64,
    /// The limits.
    pub limits: &'a Limits,
    /// The host end, if it holds other paths for another attachment of the interface.
    pub taken: Option<u32>,
    /// Where the attachment that is replaced held its other paths.
    pub before: Option<HeldAt>,
}

impl Wanted<'_> {
    /// Whether tbf alone holds the limits, so that no filter is needed.
    pub fn is_held_by_tbf_alone(&self, ingress_by: Option<IngressBy>) -> bool {
        hooks(self.limits, ingress_by).is_empty()
    }
}

/// Other paths that are held from here on. Dropped before [`Held::keep`], it puts everything back.
pub struct Held<'a> {
    wanted: &'a Wanted<'a>,
    at: HeldAt,
    /// The entry that the maps had for this host end.
    before: Option<HostEnd>,
    /// The hooks that got a filter.
    put: Vec<Hook>,
    is_kept: bool,
}

impl<'a> Held<'a> {
    /// Holds the packets that pass the host end of an interface. `None`: the interface has no end here, or no filter is
    /// needed. `ingress_by`: what holds the ingress limit.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error; nothing is changed then. [`Code::Kernel`] if the host end holds other
    /// paths for another attachment; the host end is marked as shared then.
    pub fn begin(
        wanted: &'a Wanted<'a>,
        ingress_by: Option<IngressBy>,
        interface: &mut Interface,
    ) -> Result<Option<Self>> {
        if let Some(ifindex) = wanted.taken {
            share(wanted.set, ifindex)?;
            let text = "hold them by two limits of one interface: there is room for one";
            return Err(Error::new(Code::Kernel, text));
        }
        let hooks = hooks(wanted.limits, ingress_by);
        let Some(end) = interface.host_end()?.filter(|_| !hooks.is_empty()) else { return Ok(None) };
        let ifindex = end.ifindex;
        hooks.iter().try_for_each(|(hook, _)| host_end::refuse_tcx(ifindex, *hook))?;
        let namespace = end.pods_namespace.ok_or_else(|| {
            let text = "find the pod's network namespace from the host's end of its interface: it has no number";
            Error::new(Code::Kernel, text)
        })?;
        let filter = if wanted.node.is_none() { OF_NODE } else { wanted.slot as u16 | OWN };
        let clsact = wanted.before.is_some_and(|before| before.ifindex == ifindex && before.clsact);
        let at = HeldAt { ifindex, filter, class: 0, clsact };
        // The room's programs need no maps, so the programs of any set will do.
        let room = WaitingRoom::open(|name| wanted.set.program(name))?;
        if room.is_new {
            move_all(wanted.pins, &room);
        }
        let before = wanted.set.host_ends.get(&ifindex, Read::Plain).map_err(writing)?;
        let mut held = Self { wanted, at, before, put: Vec::new(), is_kept: false };
        held.at.class = room.make_place(wanted.slot, wanted.limits, ingress_by)?;
        held.write(Some(&HostEnd {
            slot: wanted.slot,
            namespace,
            waiting_ifindex: room.ifindex,
            waiting_class: host_end::class_id(held.at.class),
            list: wanted.list,
            is_shared: before.map_or(0, |before| before.is_shared),
            holds_streams: (ingress_by == Some(IngressBy::HeldData)).into(),
        }))?;
        let is_new = host_end::put_clsact(ifindex)?;
        held.at.clsact |= is_new;
        if !is_new && hooks.iter().any(|(hook, _)| *hook == Hook::Egress) {
            host_end::refuse_ingress(ifindex)?;
        }
        for (hook, name) in hooks {
            host_end::put_filter(ifindex, hook, filter, name, wanted.set.program(name)?.as_fd())?;
            held.put.push(hook);
        }
        Ok(Some(held))
    }

    /// The host end, the filter and the place, for the record.
    pub fn at(&self) -> HeldAt {
        self.at
    }

    /// Keeps what has been made.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    fn write(&self, end: Option<&HostEnd>) -> Result<()> {
        for set in [Some(self.wanted.set), self.wanted.node].into_iter().flatten() {
            match end {
                Some(end) => set.host_ends.set(&self.at.ifindex, end),
                None => set.host_ends.remove(&self.at.ifindex),
            }
            .map_err(writing)?;
        }
        Ok(())
    }
}

/// Marks a host end as shared: from here on a packet that was charged to any attachment passes it.
fn share(set: &Set, ifindex: u32) -> Result<()> {
    match set.host_ends.get(&ifindex, Read::Plain).map_err(writing)? {
        Some(end) => set.host_ends.set(&ifindex, &HostEnd { is_shared: 1, ..end }).map_err(writing),
        None => Ok(()),
    }
}

/// The hooks that need a filter, and the program of each. Ingress that tbf holds needs none: tbf holds all of it.
pub(super) fn hooks(limits: &Limits, ingress_by: Option<IngressBy>) -> Vec<(Hook, &'static str)> {
    let out = limits.egress.map(|_| (Hook::Ingress, host_end::OUT_OF_POD));
    let into = ingress_by.filter(|by| *by != IngressBy::Tbf).map(|_| (Hook::Egress, host_end::INTO_POD));
    [out, into].into_iter().flatten().collect()
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        // The earlier attachment uses the node's filters, too.
        if self.before.is_none() || self.at.filter != OF_NODE {
            take_filters(self.at, &self.put);
        }
        host_end::leave_place(self.at.class);
        let ends = &self.wanted.node.unwrap_or(self.wanted.set).host_ends;
        interface::warn(
            LEFT,
            self.write(self.before.as_ref()).and_then(|()| remove_room_if_empty(self.wanted.pins, ends)),
        );
    }
}

/// Gives the filters at the host end of an attachment new programs, and those of the waiting room as well.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn renew(record: &Record, limits: &Limits, program: impl Fn(&str) -> Result<OwnedFd>) -> Result<()> {
    let Some(at) = record.held_at.filter(|at| at.filter == OF_NODE && is_there(record, at.ifindex)) else {
        return Ok(());
    };
    WaitingRoom::open(&program)?.equip(&program)?;
    host_end::put_clsact(at.ifindex)?;
    hooks(limits, record.ingress_by)
        .into_iter()
        .try_for_each(|(hook, name)| host_end::put_filter(at.ifindex, hook, at.filter, name, program(name)?.as_fd()))
}

/// Clears the remains of killed calls from the node's list of host ends and from the waiting room. `owners`: the
/// records of all attachments.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn settle(pins: &LockedPins, owners: &[Owner]) -> Result<()> {
    let directory = pins.node();
    if !directory.exists() {
        return remove_room(pins);
    }
    let ends = Set::pinned(&directory)?.host_ends;
    for ifindex in ends.keys().map_err(writing)? {
        let end = ends.get(&ifindex, Read::Plain).map_err(writing)?;
        if end.is_some_and(|end| owners.iter().all(|owner| owner.slot != end.slot)) {
            ends.remove(&ifindex).map_err(writing)?;
        }
    }
    if ends.is_empty().map_err(writing)? {
        return remove_room(pins);
    }
    let classes: Vec<u16> = owners.iter().filter_map(|owner| owner.interface.held_at).map(|at| at.class).collect();
    host_end::keep_places(&classes)
}

/// Takes off the filters and the place of an attachment that ended, or that was replaced by one that is held at `now`.
pub fn leave(pins: &LockedPins, ended: &Record, slot: u32, now: Option<HeldAt>) {
    let Some(at) = ended.held_at else { return };
    host_end::leave_place(at.class);
    let is_same = now.is_some_and(|now| (now.ifindex, now.filter) == (at.ifindex, at.filter));
    if !is_same && is_there(ended, at.ifindex) {
        take_filters(at, &[Hook::Ingress, Hook::Egress]);
    }
    interface::warn(LEFT, forget(pins, at.ifindex, slot));
}

/// When a limit that held the other paths of its interface has ended, lets the next oldest limit of the interface hold
/// them. `staying`: the attachments in the namespace.
pub fn hand_over(pins: &Pins, ended: &Record, staying: &[Present]) {
    let waits = |present: &&Present| {
        let record = &present.owner.interface;
        record.takes_over && record.shares_interface(ended) && pins::shares(&present.directory)
    };
    let mut waiting: Vec<&Present> = staying.iter().filter(waits).collect();
    waiting.sort_by_key(|present| pins::made_at(&present.directory));
    if let Some((next, others)) = waiting.split_first().filter(|_| ended.held_at.is_some()) {
        let taken = next.take_over(pins, !others.is_empty());
        interface::warn("what passes by other paths than pods' sockets is not held any more", taken);
    }
}

impl Present {
    /// Holds the packets that pass its interface by other paths. `is_shared`: yet another limit stays on the interface.
    fn take_over(&self, pins: &Pins, is_shared: bool) -> Result<()> {
        let Self { owner, limits: Some(limits), directory, .. } = self else { return Ok(()) };
        let Some(mut interface) = Interface::of(&owner.interface)? else { return Ok(()) };
        let set = Pinned::at(directory).set()?;
        let (slot, list) = (owner.slot, owner.list);
        let wanted = Wanted { pins, set: &set, node: None, slot, list, limits, taken: None, before: None };
        let Some(held) = Held::begin(&wanted, owner.interface.ingress_by, &mut interface)? else { return Ok(()) };
        let record = Record { held_at: Some(held.at()), takes_over: false, ..owner.interface.clone() };
        self.write(limits, &Owner { interface: record, ..owner.clone() })?;
        let ifindex = held.at().ifindex;
        held.keep();
        if is_shared { share(&set, ifindex) } else { Ok(()) }
    }
}

/// Removes a host end from the node's list, if the entry still is this attachment's. The waiting room goes with the
/// last host end.
fn forget(pins: &LockedPins, ifindex: u32, slot: u32) -> Result<()> {
    let directory = pins.node();
    if !directory.exists() {
        return remove_room(pins);
    }
    let ends = Set::pinned(&directory)?.host_ends;
    let found = ends.get(&ifindex, Read::Plain).map_err(writing)?;
    if found.is_some_and(|end| end.slot == slot) {
        ends.remove(&ifindex).map_err(writing)?;
    }
    remove_room_if_empty(pins, &ends)
}

/// Removes the waiting room if no host end is left.
fn remove_room_if_empty(pins: &Pins, ends: &Map<u32, HostEnd>) -> Result<()> {
    if ends.is_empty().map_err(writing)? { remove_room(pins) } else { Ok(()) }
}

/// Removes the waiting room, unless an attachment of another layout is left. The host ends of such attachments are in
/// maps of their own, and their packets wait in the same room.
fn remove_room(pins: &Pins) -> Result<()> {
    let is_needed = pins.list().iter().any(|(_, directory)| !pins::is_current(directory));
    if is_needed { Ok(()) } else { host_end::remove_room() }
}

/// Whether the interface of a record still has this host end. Filters go with their interface, and another interface
/// may have got its number.
fn is_there(record: &Record, ifindex: u32) -> bool {
    let found = Interface::of(record).and_then(|interface| interface.map_or(Ok(None), |mut found| found.host_end()));
    matches!(found, Ok(Some(end)) if end.ifindex == ifindex)
}

fn take_filters(at: HeldAt, hooks: &[Hook]) {
    for hook in hooks {
        interface::warn(LEFT, host_end::take_filter(at.ifindex, *hook, at.filter));
    }
    if at.clsact {
        interface::warn(LEFT, host_end::take_clsact_if_unused(at.ifindex));
    }
}

/// The warning before the error, where something could not be taken off.
const LEFT: &str = "not all that held other paths of a pod could be taken off";

pub(super) fn writing(cause: std::io::Error) -> Error {
    Error::because(Code::Kernel, "write what is known of the host's end of the pod's interface", cause)
}
