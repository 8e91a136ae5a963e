//! Makes an attachment, in the place of one that may be there, or leaves everything as it was.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use super::{Directory, Plan, Present, Scope, others, remove_cgroup_if_made};
use crate::{
    error::Result,
    interface::{self, IngressBy, Interface, Need, Record},
    pins::{BPFFS, LockedPins, Pins},
    pod::Owner,
    shaper::{self, Loaded, Queue, Settings},
};

/// Makes an attachment and returns its record.
///
/// # Errors
/// What could not be found or made. Nothing of it is left then, and an attachment that was there before is as it was.
pub fn attach(plan: &Plan<'_>) -> Result<Owner> {
    let mut attaching = Attaching::prepare(plan)?;
    // Not returned yet: what was changed on the interface is put back under the lock.
    let loaded = shaper::load(&attaching.settings(), plan.subnets);
    attaching.lock()?;
    let loaded = loaded?;
    attaching.change()?;
    attaching.commit(loaded)
}

/// An attachment that is being made. Dropped before it is committed, it puts back what it has changed.
struct Attaching<'a> {
    plan: &'a Plan<'a>,
    pins: Pins,
    interface: Option<Interface>,
    /// Whether fq could be put on the interface, and why not.
    fq: Option<Result<()>>,
    /// What it has changed so far.
    record: Record,
    under_lock: Option<UnderLock>,
    is_committed: bool,
}

/// What was read again when the lock was ours.
struct UnderLock {
    pins: LockedPins,
    /// The attachment in whose place this one comes.
    before: Option<Present>,
    /// What the others in the namespace need.
    others: Vec<Need>,
}

impl<'a> Attaching<'a> {
    fn prepare(plan: &'a Plan<'a>) -> Result<Self> {
        let pins = Pins::ensure(Path::new(BPFFS))?;
        let mut interface = match plan.scope {
            Scope::Interface { netns, name } => Some(Interface::enter(netns, name)?),
            Scope::Node { .. } => None,
        };
        let mut record = interface.as_ref().map_or_else(|| plan.owner.interface.clone(), Interface::record);
        let fq = interface.as_mut().map(Interface::prepare);
        record.fq = matches!(fq, Some(Ok(())));
        Ok(Self { plan, pins, interface, fq, record, under_lock: None, is_committed: false })
    }

    /// What is known before [`Attaching::change`] decides which programs are loaded; tbf and drops take the same, and so do htb and no
    /// queue.
    fn settings(&self) -> Settings {
        let by_fq = if self.record.fq { IngressBy::HeldAcks } else { IngressBy::Drops };
        let limits = self.plan.limits;
        let ingress_by = self.record.ingress_by.or(limits.ingress.map(|_| by_fq));
        Settings { ifindex: self.index(), limits, queue: Queue::of(&self.record), ingress_by }
    }

    fn index(&self) -> u32 {
        match (&self.interface, self.plan.scope) {
            (Some(interface), _) => interface.index,
            (None, Scope::Node { index }) => index,
            (None, Scope::Interface { .. }) => 0,
        }
    }

    fn lock(&mut self) -> Result<()> {
        let pins = self.pins.lock()?;
        let place = &self.plan.place;
        pins.settle(place)?;
        let before = pins.find(place).and_then(|directory| Present::read(place.clone(), directory).ok());
        let others = others(&pins, place, &self.record);
        self.under_lock = Some(UnderLock { pins, before, others });
        Ok(())
    }

    /// Changes the interface. fq is there already, if there is any.
    fn change(&mut self) -> Result<()> {
        let staying = self.staying();
        let Self { plan, interface, fq, record, under_lock, .. } = self;
        let (Some(interface), Some(fq), Some(under_lock)) = (interface, fq, under_lock) else {
            record.ingress_by = plan.limits.ingress.map(|_| IngressBy::Drops);
            return Ok(());
        };
        if let Some(inode) = record.netns_inode {
            // Without it another limit of the interface is not known to share it: not worth a pod.
            interface::warn(
                "another limit of this interface may undo what this one needs",
                under_lock.pins.note(inode, &plan.place),
            );
        }
        // The one that this one replaces has found what was there before podshaper, and its tbf is this one's.
        let all_traffic = plan.subnets.is_empty();
        interface.change(record, &plan.limits, fq, &staying, &under_lock.others, all_traffic)
    }

    /// Attaches and pins; from then on it is there.
    fn commit(mut self, mut loaded: Loaded) -> Result<Owner> {
        let owner = Owner { interface: self.record.clone(), ..self.plan.owner.clone() };
        loaded.write(&self.settings(), &owner)?;
        let cgroup = self.plan.cgroup.open()?;
        let attached = loaded.attach(cgroup.as_fd())?;
        if let Some(UnderLock { pins, .. }) = &self.under_lock {
            let staged = pins.stage(&self.plan.place)?;
            attached.pin(staged.directory())?;
            staged.commit()?;
        }
        self.is_committed = true;
        self.leave_before();
        Ok(owner)
    }

    /// Puts back what the attachment that was replaced had changed and this one does not use.
    fn leave_before(&mut self) {
        let Some(UnderLock { pins, before: Some(before), others: staying }) = &self.under_lock else { return };
        let (place, replaced) = (&self.plan.place, &before.owner.interface);
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

    /// What the attachments need that are there without this one.
    fn staying(&self) -> Vec<Need> {
        let place = &self.plan.place;
        match &self.under_lock {
            Some(UnderLock { before, others, .. }) => {
                let before = before.iter().map(Present::need).filter(|need| need.record.shares_namespace(&self.record));
                others.iter().cloned().chain(before).collect()
            }
            // The lock was not to be had: what can be seen without it must do.
            None => {
                let directory: Option<PathBuf> = self.pins.find(place);
                let before = directory.and_then(|directory| Present::read(place.clone(), directory).ok());
                let before = before.map(|before| before.need());
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
            remove_cgroup_if_made(&cgroup.path);
        }
    }
}

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        if !self.is_committed {
            self.undo();
        }
    }
}
