//! Puts an attachment into the maps of a set and its programs on a cgroup, or leaves everything as it was. Takes an
//! attachment off again.

use std::{
    collections::{HashSet, hash_map::RandomState},
    fs,
    hash::BuildHasher,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::fstat;
use podshaper_abi::{Counters, MAX_ATTACHMENTS, MAX_SCOPES, Meter, Meters, OtherPaths, Others, Scope};

use super::{Hooked, Pinned, Set, Settings, refusal::refused};
use crate::{
    direction::Direction,
    error::{self, Code, Error, Result},
    owner::Owner,
    pins::{self, LockedPins},
    sys::{self, Read},
};

/// An attachment in the maps of a set. Dropped before [`Attached::keep`], it is removed from them.
pub struct Attached<'a> {
    set: &'a Set,
    slot: u32,
    /// The cgroup's id and its entries from before, once they were changed.
    changed: Option<(u64, Vec<Scope>)>,
    /// The pins of the links that were made for it.
    made: Vec<PathBuf>,
    is_kept: bool,
}

/// An attachment that another one replaces.
#[derive(Clone, Copy)]
pub struct Before {
    /// The key of its limits and meters.
    pub slot: u32,
    /// Whether the new attachment is for the same sandbox, and goes on with its counters.
    pub is_of_same_sandbox: bool,
}

impl<'a> Attached<'a> {
    /// Writes the limits of an attachment. They are not in force yet. `before`: the attachment that is replaced. Its
    /// clocks go on, so that no pod gets a second burst by being attached again.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn write(set: &'a Set, settings: &Settings, before: Option<Before>) -> Result<Self> {
        let failed = |cause: io::Error| match cause.raw_os_error() {
            Some(libc::E2BIG) => {
                let text = format!(
                    "write the limits: this node has {MAX_ATTACHMENTS} already (podshaper gc removes what is dead)"
                );
                Error::because(Code::Kernel, text, cause)
            }
            _ => refused("write the limits", &cause),
        };
        let slot = free_slot(set).map_err(failed)?;
        let attached = Self { set, slot, changed: None, made: Vec::new(), is_kept: false };
        let before = before.map(|before| going_on(set, before, settings)).transpose().map_err(failed)?;
        let (meters, others) = before.unwrap_or_default();
        let written = set.meters.set(&slot, &meters).and_then(|()| set.others.set(&slot, &others));
        let written = written.and_then(|()| set.limits.set(&slot, &settings.abi_limits()));
        written.map(|()| attached).map_err(failed)
    }

    /// Writes other limits. They are not in force yet.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn change(&self, settings: &Settings) -> Result<()> {
        self.set.limits.set(&self.slot, &settings.abi_limits()).map_err(|cause| refused("write the limits", &cause))
    }

    /// The key of its limits and meters.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Attaches the programs that the settings need, beside the programs that are on the cgroup already. Then lets them
    /// find `scopes`: this attachment, and those of the set that stay on the cgroup. The links are pinned in `links`; a
    /// link that is there stays.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn attach(
        &mut self,
        settings: &Settings,
        cgroup: BorrowedFd<'_>,
        scopes: &[Scope],
        links: &Path,
    ) -> Result<()> {
        let cgroup_id = id(cgroup)?;
        for hooked in settings.programs() {
            self.link(hooked, cgroup, cgroup_id, links)?;
        }
        let before = self.set.scopes_on(cgroup_id)?;
        self.changed = Some((cgroup_id, before));
        let written = self.set.set_scopes(cgroup_id, scopes);
        written.map_err(|cause| refused("put the limits in force on the pod's cgroup", &cause))
    }

    /// Keeps the attachment.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    fn link(&mut self, (name, hook): Hooked, cgroup: BorrowedFd<'_>, cgroup_id: u64, links: &Path) -> Result<()> {
        let path = links.join(name);
        let failed = |cause: &io::Error| refused(format!("attach the eBPF program {name} to the pod's cgroup"), cause);
        match sys::open_pin(&path).and_then(|link| sys::cgroup_link(link.as_fd())) {
            Ok(link) if link.cgroup_id == cgroup_id => return Ok(()),
            // The link is dead: the cgroup that has the path now is another one.
            Ok(_) => fs::remove_file(&path).map_err(|cause| failed(&cause))?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(failed(&cause)),
        }
        let program = self.set.program(name)?;
        let link = sys::link_to_cgroup(program.as_fd(), cgroup, hook).map_err(|cause| match cause.raw_os_error() {
            // The programs are loaded, so no capability is missing.
            Some(libc::EPERM) => {
                occupied(name, "another one is attached there or above, and tolerates none beside it", cause)
            }
            Some(libc::E2BIG) => occupied(name, "64 are attached there already", cause),
            _ => failed(&cause),
        })?;
        sys::pin(link.as_fd(), &path).map_err(|cause| refused(format!("pin {}", path.display()), &cause))?;
        self.made.push(path);
        Ok(())
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let scopes = self.changed.take().map(|(cgroup_id, before)| self.set.set_scopes(cgroup_id, &before));
        let links = self.made.iter().map(fs::remove_file);
        for cause in scopes.into_iter().chain(links).filter_map(Result::err) {
            // The directory may be gone, with all pins in it.
            if cause.kind() != io::ErrorKind::NotFound {
                log::warn!("a limit that failed is not cleared whole: {cause}");
            }
        }
        if let Err(error) = self.set.forget(self.slot) {
            log::warn!("a limit that failed is not cleared whole: {error}");
        }
    }
}

/// Whether an attachment may share the node's set: the programs can find the attachment by cgroup and interface, and no
/// link of the pod is on another cgroup. `others`: the attachments of the pod that share the set.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn can_share(
    set: &Set,
    cgroup: BorrowedFd<'_>,
    ifindex: u32,
    others: &[Scope],
    before: Option<u32>,
    links: &Path,
) -> Result<bool> {
    let cgroup_id = id(cgroup)?;
    let is_of_pod = |scope: &Scope| others.contains(scope) || Some(scope.slot) == before;
    let is_live = |scope: &Scope| matches!(set.limits.get(&scope.slot, Read::Plain), Ok(Some(_)));
    let is_alone = set.scopes_on(cgroup_id)?.iter().all(|scope| is_of_pod(scope) || !is_live(scope));
    let overlaps = |other: &Scope| other.ifindex == ifindex || other.ifindex == 0 || ifindex == 0;
    let are_elsewhere = fs::read_dir(links).into_iter().flatten().flatten().any(|link| {
        let link = sys::open_pin(&link.path()).and_then(|link| sys::cgroup_link(link.as_fd()));
        link.is_ok_and(|link| link.cgroup_id != 0 && link.cgroup_id != cgroup_id)
    });
    Ok(is_alone && !are_elsewhere && others.len() < MAX_SCOPES && !others.iter().any(overlaps))
}

/// Writes which attachments stay on a pod's cgroup. An attachment that is not among them limits nothing from here on.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn leave(pins: &LockedPins, cgroup: &Path, scopes: &[Scope]) -> Result<()> {
    // If the cgroup is gone, so are its entries.
    let Ok(directory) = fs::metadata(cgroup) else { return Ok(()) };
    let left = Set::pinned(&pins.node())?.set_scopes(directory.ino(), scopes);
    left.map_err(|cause| refused(format!("take a limit off the cgroup {}", cgroup.display()), &cause))
}

/// Removes from the node's maps the limits and the lists of subnets that none of these attachments has. Killed calls
/// have left them, or attachments whose record cannot be read.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn forget_others(pins: &LockedPins, attachments: impl Iterator<Item = PathBuf>) -> Result<()> {
    let directory = pins.node();
    if !directory.exists() {
        return Ok(());
    }
    let set = Set::pinned(&directory)?;
    let sharing = attachments.filter(|directory| pins::shares(directory));
    // An owner that cannot be read at this moment may be that of a live pod, so nothing is removed then.
    let owners = sharing.map(|directory| Pinned::at(&directory).owner_if_readable()).collect::<Result<Vec<_>>>()?;
    let owners: Vec<Owner> = owners.into_iter().flatten().collect();
    let slots: HashSet<u32> = owners.iter().map(|owner| owner.slot).collect();
    let found = [set.limits.keys(), set.meters.keys(), set.others.keys()].into_iter().collect::<io::Result<Vec<_>>>();
    let found = found.map_err(|cause| refused("list the node's limits", &cause))?;
    let left = found.into_iter().flatten().filter(|slot| !slots.contains(slot));
    error::all(left.map(|slot| set.forget(slot)).chain([set.keep_lists(owners.iter().map(|owner| owner.list))]))
}

/// A slot that no attachment has. It is random, so that no counter has to be kept. 0 stands for none.
fn free_slot(set: &Set) -> io::Result<u32> {
    loop {
        let slot = RandomState::new().hash_one(0) as u32;
        if slot != 0 && set.meters.get(&slot, Read::Locked)?.is_none() {
            return Ok(slot);
        }
    }
}

/// The clocks of an attachment that is replaced, and its counters in the directions that go on.
fn going_on(set: &Set, before: Before, settings: &Settings) -> io::Result<(Meters, OtherPaths)> {
    let mut meters = set.meters.get(&before.slot, Read::Locked)?.unwrap_or_default().of;
    let mut others = set.others.get(&before.slot, Read::Plain)?.unwrap_or_default();
    for direction in Direction::BOTH {
        let index = direction.index() as usize;
        if !before.is_of_same_sandbox || settings.limits.of(direction).is_none() {
            meters[index] = Meter { counters: Counters::default(), ..meters[index] };
            others.of[index] = Others::default();
        }
    }
    Ok((Meters::new(meters), others))
}

fn id(cgroup: BorrowedFd<'_>) -> Result<u64> {
    let found = fstat(cgroup).map_err(|errno| Error::because(Code::Cgroup, "look at the pod's cgroup", errno))?;
    Ok(found.st_ino)
}

/// The error where a program does not fit beside those that are attached.
fn occupied(name: &str, why: &str, cause: io::Error) -> Error {
    let text = format!("attach the eBPF program {name} to the pod's cgroup: {why} (bpftool cgroup tree shows them)");
    Error::because(Code::Kernel, text, cause)
}
