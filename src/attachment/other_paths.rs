//! Holds what passes a pod's interface by other paths than the sockets of its cgroup: at the host's end of the interface, if it has one here.
//! Which packets those are, and what becomes of them, is decided by the programs (`bpf/src/other_paths.rs`); `interface::host_end` puts
//! them where they run.

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

/// The bit that the numbers of filters have whose programs are an attachment's own. So those and the node's can be there while one takes the
/// other's place.
const OWN: u16 = 1 << 15;

/// What is to be held.
pub struct Wanted<'a> {
    /// podshaper's pins, locked.
    pub pins: &'a Pins,
    /// The programs and maps of the attachment.
    pub set: &'a Set,
    /// Those of the node, where that is another one: it has a list of all host's ends.
    pub node: Option<&'a Set>,
    /// The attachment, as the programs know it.
    pub slot: u32,
    /// The list of subnets, as the programs know it.
    pub list: u64,
    /// The limits.
    pub limits: &'a Limits,
    /// The host's end, where it holds other paths of another attachment of the interface.
    pub taken: Option<u32>,
    /// Where those of the attachment were held in whose place this one comes.
    pub before: Option<HeldAt>,
}

impl Wanted<'_> {
    /// Whether tbf holds all that is limited.
    pub fn is_held_by_tbf_alone(&self, ingress_by: Option<IngressBy>) -> bool {
        hooks(self.limits, ingress_by).is_empty()
    }
}

/// What is held from here on. Dropped before [`Held::keep`], everything is as it was before.
pub struct Held<'a> {
    wanted: &'a Wanted<'a>,
    at: HeldAt,
    /// What the maps had for this host's end.
    before: Option<HostEnd>,
    /// The filters that were put there.
    put: Vec<Hook>,
    is_kept: bool,
}

impl<'a> Held<'a> {
    /// Holds what passes the host's end of an interface; `None` for an interface that has none here. `ingress_by`: what holds the ingress
    /// limit.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says. Nothing is changed then.
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
        // The room's programs need no maps: those of any set will do.
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

    /// As the record has it.
    pub fn at(&self) -> HeldAt {
        self.at
    }

    /// It stays.
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

/// From here on what was charged to any attachment passes a host's end.
fn share(set: &Set, ifindex: u32) -> Result<()> {
    match set.host_ends.get(&ifindex, Read::Plain).map_err(writing)? {
        Some(end) => set.host_ends.set(&ifindex, &HostEnd { is_shared: 1, ..end }).map_err(writing),
        None => Ok(()),
    }
}

/// Where which program is put. What tbf holds is held whole.
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
        // The node's filters serve the attachment that was there, too.
        if self.before.is_none() || self.at.filter != OF_NODE {
            take_filters(self.at, &self.put);
        }
        host_end::leave_place(self.at.class);
        let ends = &self.wanted.node.unwrap_or(self.wanted.set).host_ends;
        interface::warn(LEFT, self.write(self.before.as_ref()).and_then(|()| remove_room_if_empty(ends)));
    }
}

/// Gives what is at the host's end of an attachment new programs, and the waiting room with it.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
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

/// Clears what killed calls have left of the node's list of host's ends, and in the waiting room; `owners`: whose attachments are there.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn settle(pins: &LockedPins, owners: &[Owner]) -> Result<()> {
    let directory = pins.node();
    if !directory.exists() {
        return host_end::remove_room();
    }
    let ends = Set::pinned(&directory)?.host_ends;
    for ifindex in ends.keys().map_err(writing)? {
        let end = ends.get(&ifindex, Read::Plain).map_err(writing)?;
        if end.is_some_and(|end| owners.iter().all(|owner| owner.slot != end.slot)) {
            ends.remove(&ifindex).map_err(writing)?;
        }
    }
    if ends.is_empty().map_err(writing)? {
        return host_end::remove_room();
    }
    let classes: Vec<u16> = owners.iter().filter_map(|owner| owner.interface.held_at).map(|at| at.class).collect();
    host_end::keep_places(&classes)
}

/// Takes off what held an attachment that ends, or was replaced by one that is held at `now`.
pub fn leave(pins: &LockedPins, ended: &Record, slot: u32, now: Option<HeldAt>) {
    let Some(at) = ended.held_at else { return };
    host_end::leave_place(at.class);
    let is_same = now.is_some_and(|now| (now.ifindex, now.filter) == (at.ifindex, at.filter));
    if !is_same && is_there(ended, at.ifindex) {
        take_filters(at, &[Hook::Ingress, Hook::Egress]);
    }
    interface::warn(LEFT, forget(pins, at.ifindex, slot));
}

/// Has the next oldest limit of an interface hold its other paths, where the one that ended did. `staying`: the attachments in its namespace.
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
    /// Holds what passes its interface by other paths. `is_shared`: another limit stays there beside it.
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

/// Removes a host's end from the node's list, if it is still this attachment's, and with the last one the waiting room.
fn forget(pins: &LockedPins, ifindex: u32, slot: u32) -> Result<()> {
    let directory = pins.node();
    if !directory.exists() {
        return host_end::remove_room();
    }
    let ends = Set::pinned(&directory)?.host_ends;
    let found = ends.get(&ifindex, Read::Plain).map_err(writing)?;
    if found.is_some_and(|end| end.slot == slot) {
        ends.remove(&ifindex).map_err(writing)?;
    }
    remove_room_if_empty(&ends)
}

/// With the last host's end the waiting room goes.
fn remove_room_if_empty(ends: &Map<u32, HostEnd>) -> Result<()> {
    if ends.is_empty().map_err(writing)? { host_end::remove_room() } else { Ok(()) }
}

/// Whether the interface of a record still has this host's end: with the interface all of it is gone, and the number may be another's.
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

/// Before what could not be taken off.
const LEFT: &str = "not all that held other paths of a pod could be taken off";

pub(super) fn writing(cause: std::io::Error) -> Error {
    Error::because(Code::Kernel, "write what is known of the host's end of the pod's interface", cause)
}
