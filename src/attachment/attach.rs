//! Makes an attachment, in the place of an earlier one if there is one, or leaves everything as it was.

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use super::{
    Directory, Interfaces, Plan, Present, is_there,
    let_go::Connections,
    other_paths::{self, Held, Wanted},
    others, remove_cgroup_if_ours, scopes, sharing,
};
use crate::{
    direction::Direction,
    error::{Code, Error, Result},
    interface::{self, HeldAt, IngressBy, Interface, Need, Queue, Record},
    owner::Owner,
    pins::{self, BPFFS, LockedPins, Pins},
    shaper::{self, Attached, Before, Set, Settings},
};

/// Makes an attachment and returns its record.
///
/// # Errors
/// What could not be found or made. Then nothing of the new attachment is left, and an earlier attachment is as it was.
pub fn attach(plan: &Plan<'_>) -> Result<Owner> {
    let mut attaching = Attaching::prepare(plan)?;
    // Not returned before the lock: undoing the changes on the interface takes the lock.
    let own = attaching.own_set();
    attaching.lock()?;
    let own = own?;
    attaching.refuse_another_interface()?;
    attaching.change()?;
    attaching.commit(own)
}

/// An attachment that is being made. If it is dropped before the commit, it puts back what it has changed.
struct Attaching<'a> {
    plan: &'a Plan<'a>,
    pins: Pins,
    interface: Option<Interface>,
    /// The interface's number in its namespace. 0: every interface but loopback.
    index: u32,
    /// Whether fq could be put on the interface, and the error if not.
    fq: Option<Result<()>>,
    /// The record of the changes so far.
    record: Record,
    under_lock: Option<UnderLock>,
    is_committed: bool,
}

/// The programs of an attachment that is being made.
struct Programs {
    set: Set,
    /// The attachments that share the set; `None` for a set of its own.
    sharing: Option<Sharing>,
}

/// The attachments that the node's programs find on the pod's cgroup beside the one that is being made.
#[derive(Default)]
struct Sharing {
    /// The pod's other attachments.
    others: Vec<Present>,
    /// The slot of the attachment that is replaced.
    before: Option<u32>,
}

/// What was read again under the lock.
struct UnderLock {
    pins: LockedPins,
    /// The directory of the attachment that is replaced.
    found: Option<PathBuf>,
    /// That attachment, if it can be read.
    before: Option<Present>,
    /// The connections of the attachment that is replaced, and the directions in which the new one does not go on
    /// holding them.
    ending: Option<(Connections, Vec<Direction>)>,
    /// The needs of the other attachments in the namespace.
    others: Vec<Need>,
}

impl<'a> Attaching<'a> {
    fn prepare(plan: &'a Plan<'a>) -> Result<Self> {
        let pins = Pins::ensure(Path::new(BPFFS))?;
        let (mut interface, index) = match plan.interfaces {
            Interfaces::One { netns, name } => {
                let interface = Interface::enter(netns, name)?;
                let index = interface.index;
                (Some(interface), index)
            }
            Interfaces::OfNode { index } => (None, index),
        };
        let mut record = interface.as_ref().map_or_else(|| plan.owner.interface.clone(), Interface::record);
        let fq = interface.as_mut().map(Interface::prepare);
        record.fq = matches!(fq, Some(Ok(())));
        Ok(Self { plan, pins, interface, index, fq, record, under_lock: None, is_committed: false })
    }

    fn settings(&self) -> Settings {
        Settings { limits: self.plan.limits, queue: Queue::of(&self.record), ingress_by: self.record.ingress_by }
    }

    fn lock(&mut self) -> Result<()> {
        let pins = self.pins.lock()?;
        let place = &self.plan.place;
        let found = pins.settle(place)?;
        let before = found.clone().and_then(|directory| Present::read(place.clone(), directory).ok());
        let others = others(&pins, place, &self.record);
        // Opened now: the programs' state of its sockets may go with its pins.
        let ending = before.as_ref().and_then(|before| {
            let directions = self.ending(before);
            let connections = if directions.is_empty() { None } else { before.connections() };
            connections.map(|connections| (connections, directions))
        });
        self.under_lock = Some(UnderLock { pins, found, before, ending, others });
        Ok(())
    }

    /// The directions in which a replaced attachment lets go of its connections: those that are not limited any more.
    /// An attachment with programs of its own lets go in both directions: its programs' state of each socket goes with
    /// the programs, and with that state the application's own options.
    fn ending(&self, before: &Present) -> Vec<Direction> {
        let (then, now) = (before.limits.unwrap_or_default(), &self.plan.limits);
        let goes_on = |direction: Direction| pins::shares(&before.directory) && now.of(direction).is_some();
        let ends = |direction: &Direction| then.of(*direction).is_some() && !goes_on(*direction);
        Direction::BOTH.into_iter().filter(ends).collect()
    }

    /// Refuses another interface of the same name in the same sandbox. The pod may have given the name to another
    /// interface, and would go on sending by the first one, which nothing would limit any more.
    fn refuse_another_interface(&mut self) -> Result<()> {
        let Some(before) = self.under_lock.as_ref().and_then(|lock| lock.before.as_ref()) else { return Ok(()) };
        let record = &before.owner.interface;
        let is_same = self.is_of_same_sandbox(Some(before)) && record.shares_interface(&self.record);
        let Some(interface) = self.interface.as_mut().filter(|_| is_same) else { return Ok(()) };
        if interface.is_that_of(record, before.owner.ifindex)? {
            return Ok(());
        }
        let text = format!(
            "limit {} of pod {} anew: it is another interface than the one that has the limit, whose name has been changed in the pod; \
             that limit stays as it is",
            record.ifname, self.plan.place.pod
        );
        Err(Error::new(Code::Mismatch, text))
    }

    /// Changes the interface. fq is on it already, if the kernel has fq.
    fn change(&mut self) -> Result<()> {
        let staying = self.staying();
        let Self { plan, interface, fq, record, under_lock, .. } = self;
        let (Some(interface), Some(fq), Some(under_lock)) = (interface, fq, under_lock) else {
            record.ingress_by = plan.limits.ingress.map(|_| IngressBy::Drops);
            return Ok(());
        };
        if let Some(inode) = record.netns_inode {
            // Without the note, another limit does not know that it shares the interface. The pod is not made to fail
            // for this.
            interface::warn(
                "another limit of this interface may undo what this one needs",
                under_lock.pins.note(inode, &plan.place),
            );
        }
        // The replaced attachment is among `staying`: its record has the settings from before podshaper.
        interface.change(record, &plan.limits, fq, &staying, &under_lock.others)
    }

    /// A set of its own for a cgroup that is not a pod's: an attachment on a cgroup above or below may have the same
    /// sockets.
    fn own_set(&self) -> Result<Option<Set>> {
        match self.plan.cgroup {
            Directory::Pod(_) => Ok(None),
            Directory::Other(_) => Set::own().map(Some),
        }
    }

    /// Attaches the programs and pins the attachment, which stays from then on.
    fn commit(mut self, own: Option<Set>) -> Result<Owner> {
        let mut interface = self.interface.take();
        let under_lock = self.under_lock.take().ok_or_else(not_locked)?;
        let owner = self.attach(&under_lock, own, interface.as_mut());
        (self.interface, self.under_lock) = (interface, Some(under_lock));
        let owner = owner?;
        self.is_committed = true;
        self.warn_of_limits_above();
        if let Some((connections, directions)) = self.under_lock.as_ref().and_then(|lock| lock.ending.as_ref()) {
            connections.let_go(directions);
        }
        self.leave_before(owner.interface.held_at);
        Ok(owner)
    }

    fn attach(
        &mut self,
        under_lock: &UnderLock,
        own: Option<Set>,
        mut interface: Option<&mut Interface>,
    ) -> Result<Owner> {
        let UnderLock { pins, found, before, .. } = under_lock;
        let place = &self.plan.place;
        let cgroup = self.plan.cgroup.open()?;
        let staged = pins.stage(place)?;
        let Programs { set, sharing } = self.programs(own, pins, before.as_ref(), cgroup.as_fd())?;
        let is_shared = sharing.is_some();
        let links = if is_shared {
            pins.make_links(&place.pod)?
        } else {
            set.pin_maps(staged.directory())?;
            staged.directory().to_path_buf()
        };
        let Sharing { others, before: slot_before } = sharing.unwrap_or_default();
        let goes_on =
            slot_before.map(|slot| Before { slot, is_of_same_sandbox: self.is_of_same_sandbox(before.as_ref()) });
        let mut attached = Attached::write(&set, &self.settings(), goes_on)?;
        let list = set.list(self.plan.subnets)?;
        let node = if is_shared { None } else { Set::pinned(&pins.node()).ok() };
        let wanted = Wanted {
            pins,
            set: &set,
            node: node.as_ref(),
            slot: attached.slot(),
            list,
            limits: &self.plan.limits,
            taken: self.taken_host_end(under_lock),
            before: before.as_ref().and_then(|before| before.owner.interface.held_at),
        };
        let by_now = self.record.ingress_by;
        let held = self.hold(&wanted, interface.as_deref_mut(), &under_lock.others);
        let settings = self.settings();
        if settings.ingress_by != by_now {
            attached.change(&settings)?;
        }
        let owner = Owner {
            interface: Record {
                held_at: held.as_ref().map(Held::at),
                takes_over: self.plan.other_paths && wanted.taken.is_some(),
                leaves_others: !self.plan.other_paths && interface.is_some(),
                ..self.record.clone()
            },
            ifindex: self.index,
            slot: attached.slot(),
            list,
            namespace: interface.as_ref().map_or(0, |interface| interface.namespace),
            ..self.plan.owner.clone()
        };
        shaper::pin_owner(&owner, staged.directory())?;
        let mut scopes = scopes(&others);
        scopes.push(owner.scope());
        attached.attach(&settings, cgroup.as_fd(), &scopes, &links)?;
        staged.commit(found.as_deref())?;
        attached.keep();
        if let Some(held) = held {
            held.keep();
        }
        if let Some(slot) = slot_before {
            interface::warn("the numbers of the limit that was replaced are left", set.forget(slot));
        }
        if is_shared && found.is_some() {
            let needed = others.iter().flat_map(Present::programs).chain(settings.program_names());
            let left = pins.keep_links(&place.pod, &needed.collect::<Vec<_>>());
            interface::warn("programs of the limit that was replaced are still on the pod's cgroup", left);
        }
        Ok(owner)
    }

    fn is_of_same_sandbox(&self, before: Option<&Present>) -> bool {
        before.is_some_and(|before| before.owner.container_id == self.plan.owner.container_id)
    }

    /// Warns of an operator's limit on a cgroup above (`podshaper attach` pins it), which holds as well.
    fn warn_of_limits_above(&self) {
        let (Directory::Pod(cgroup), Some(UnderLock { pins, .. })) = (self.plan.cgroup, &self.under_lock) else {
            return;
        };
        let keys: BTreeMap<String, &Path> = cgroup
            .above()
            .filter_map(|path| Some((pins::key_of_cgroup(fs::metadata(path).ok()?.ino()), path)))
            .collect();
        for limited in pins.with_any_of(keys.keys().cloned()) {
            log::warn!(
                "{} has a limit, too (podshaper attach): what the pod sends and gets has to pass both",
                keys[&limited].display()
            );
        }
    }

    /// Holds packets at the host end of the interface: those of other paths and, with [`IngressBy::HeldData`], those to
    /// the pod's own sockets. Where packets to the pod's own sockets cannot wait there, tbf or drops hold ingress.
    fn hold<'w>(
        &mut self,
        wanted: &'w Wanted<'w>,
        interface: Option<&mut Interface>,
        others: &[Need],
    ) -> Option<Held<'w>> {
        let interface = interface?;
        if let (Some(limit), Some(IngressBy::HeldData)) = (self.plan.limits.ingress, self.record.ingress_by) {
            let why = if self.plan.other_paths {
                match Held::begin(wanted, self.record.ingress_by, interface) {
                    Ok(Some(held)) => return Some(held),
                    Ok(None) => "the pod's interface has no end on this host".to_owned(),
                    Err(error) => error.to_string(),
                }
            } else {
                "otherPaths is false".to_owned()
            };
            log::warn!("what comes to the pod cannot wait its turn at the host's end, and tbf or drops hold it: {why}");
            let all_traffic = self.plan.subnets.is_empty();
            self.record.ingress_by = Some(interface.hold_ingress(&self.record, &limit, others, all_traffic));
        }
        self.hold_other_paths(wanted, interface)
    }

    /// Holds other paths at the host end. Where this fails, the limit still holds for the pod's own sockets, so the pod
    /// is not made to fail. The record says whether other paths are held.
    fn hold_other_paths<'w>(&self, wanted: &'w Wanted<'w>, interface: &mut Interface) -> Option<Held<'w>> {
        if !self.plan.other_paths {
            return None;
        }
        const NOT_HELD: &str = "what passes by other paths than the pod's sockets is not held";
        let ingress_by = self.record.ingress_by;
        match Held::begin(wanted, ingress_by, interface) {
            Ok(held) => {
                if held.is_none() && !wanted.is_held_by_tbf_alone(ingress_by) {
                    log::warn!("{NOT_HELD}: the pod's interface has no end on this host");
                }
                held
            }
            Err(error) => {
                log::warn!("{NOT_HELD}: {error}");
                None
            }
        }
    }

    /// The host end of the interface, if it holds the other paths for another attachment.
    fn taken_host_end(&self, under_lock: &UnderLock) -> Option<u32> {
        let held = under_lock.others.iter().filter(|other| other.record.shares_interface(&self.record));
        held.filter_map(|other| other.record.held_at).map(|at| at.ifindex).next()
    }

    /// The node's programs, if the attachment can share them; else programs of its own.
    fn programs(
        &self,
        own: Option<Set>,
        pins: &LockedPins,
        before: Option<&Present>,
        cgroup: BorrowedFd<'_>,
    ) -> Result<Programs> {
        if let Some(set) = own {
            return Ok(Programs { set, sharing: None });
        }
        let place = &self.plan.place;
        let set = Set::of_node(pins)?;
        let before = before.filter(|before| pins::shares(&before.directory)).map(|before| before.owner.slot);
        let sharing = Sharing { others: sharing(pins, place), before };
        let links = pins.links(&place.pod);
        let can_share = || shaper::can_share(&set, cgroup, self.index, &scopes(&sharing.others), before, &links);
        if can_share()? {
            return Ok(Programs { set, sharing: Some(sharing) });
        }
        self.refuse_cgroup_of_another_pod(pins)?;
        // A killed call may have left limits that no attachment has.
        shaper::forget_others(pins, pins.list().into_iter().map(|(_, directory)| directory))?;
        if can_share()? {
            return Ok(Programs { set, sharing: Some(sharing) });
        }
        Ok(Programs { set: Set::own()?, sharing: None })
    }

    /// Refuses a cgroup that another pod has, too: the sockets of both pods would be held to both limits. A pod whose
    /// namespace is gone has ended, and its DEL is late.
    fn refuse_cgroup_of_another_pod(&self, pins: &LockedPins) -> Result<()> {
        let Plan { place, owner, .. } = self.plan;
        let others = pins.list().into_iter().filter(|(other, _)| other.pod != place.pod);
        let mut others = others.filter_map(|(other, directory)| Present::read(other, directory).ok());
        let is_same = |other: &Present| {
            other.owner.cgroup == owner.cgroup
                && other.owner.interface.netns_inode.is_some_and(|inode| is_there(&other.owner, inode))
        };
        let Some(other) = others.find(is_same) else { return Ok(()) };
        let name = other.owner.pod_name.unwrap_or(other.place.pod);
        let text = format!(
            "limit pod {}: its cgroup {} is that of {name} as well, and each would be held to the other's limit, too; the path comes from \
             the runtime's or the configuration's cgroupPath: give each pod its own ({{containerID}} in it is replaced), or leave it out",
            place.pod, owner.cgroup
        );
        Err(Error::new(Code::Cgroup, text))
    }

    /// Puts back the changes of the replaced attachment that the new one does not use.
    fn leave_before(&mut self, held_at: Option<HeldAt>) {
        let Some(UnderLock { pins, before: Some(before), others: staying, .. }) = &self.under_lock else { return };
        let (place, replaced) = (&self.plan.place, &before.owner.interface);
        other_paths::leave(pins, replaced, before.owner.slot, held_at);
        if !replaced.shares_namespace(&self.record) {
            super::end::leave(pins, place, replaced);
            return;
        }
        if let Some(interface) = self.interface.as_mut().filter(|_| replaced.has_more_than(&self.record)) {
            let mut needs = staying.clone();
            needs.push(Need { record: self.record.clone(), limits: Some(self.plan.limits) });
            interface::warn(interface::LEFT, interface.settle(replaced, &needs).all());
        }
    }

    /// The needs of the attachments that stay without this one.
    fn staying(&self) -> Vec<Need> {
        let place = &self.plan.place;
        let is_here = |need: &Need| need.record.shares_namespace(&self.record);
        match &self.under_lock {
            Some(UnderLock { before, others, .. }) => {
                let before = before.iter().map(Present::need).filter(is_here);
                others.iter().cloned().chain(before).collect()
            }
            // The lock could not be taken: the pins are read without it.
            None => {
                let directory: Option<PathBuf> = self.pins.find(place);
                let before = directory.and_then(|directory| Present::read(place.clone(), directory).ok());
                let before = before.map(|before| before.need()).filter(is_here);
                others(&self.pins, place, &self.record).into_iter().chain(before).collect()
            }
        }
    }

    fn undo(&mut self) {
        let staying = self.staying();
        if let Some(interface) = &mut self.interface {
            interface::warn(interface::LEFT, interface.settle(&self.record, &staying).all());
        }
        let Some(UnderLock { pins, before, .. }) = &self.under_lock else { return };
        let stays = before.as_ref().is_some_and(|before| before.owner.interface.shares_namespace(&self.record));
        if let Some(inode) = self.record.netns_inode.filter(|_| !stays) {
            interface::warn("a note of a limit that failed is left", pins.forget(inode, &self.plan.place));
        }
        if let Directory::Pod(cgroup) = self.plan.cgroup
            && !pins.has_pod(&self.plan.place.pod)
        {
            remove_cgroup_if_ours(&cgroup.path);
        }
    }
}

fn not_locked() -> Error {
    Error::new(Code::Kernel, "attach without podshaper's lock: please report this")
}

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        if !self.is_committed {
            self.undo();
        }
    }
}
