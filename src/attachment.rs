//! One attachment, from nothing to pinned and back. The CNI verbs and the operator's commands both make, change and end
//! limits through this module.
//!
//! An attachment consists of programs on a cgroup (`shaper`), changes on an interface (`interface`) and pins (`pins`).
//! All three come, change and go together, under the lock of the pins. Loading programs takes long, so an attachment on
//! a cgroup that is not a pod's loads its own programs before it takes the lock. A call that holds the lock reads the
//! attachment again: another call may have replaced the one that was seen before the lock.

mod attach;
mod end;
mod held;
mod let_go;
mod other_paths;
mod upgrade;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use podshaper_abi::Scope;

use crate::{
    cgroup::{self, Hierarchies, PodCgroup},
    direction::Direction,
    error::{Code, Error, Result},
    interface::{Need, Record},
    owner::Owner,
    pins::{self, BPFFS, LockedPins, Pins, Place},
    request::{Limit, Limits, Source, Subnets},
    shaper::{self, Pinned, Settings},
};

use let_go::Connections;

pub use attach::attach;
pub use end::{Change, End, change, lift, remove, remove_locked, settle_all};
pub use held::{Node, hold_again};
pub use upgrade::{Upgrade, upgrade};

/// The interface name of an attachment that limits every interface but loopback.
pub const EVERY_INTERFACE: &str = "*";

/// An attachment to be made.
pub struct Plan<'a> {
    /// Where it is pinned.
    pub place: Place,
    /// The cgroup that gets its programs.
    pub cgroup: Directory<'a>,
    /// The interfaces whose traffic is limited.
    pub interfaces: Interfaces<'a>,
    /// The limits.
    pub limits: Limits,
    /// The remote addresses for which the limits hold.
    pub subnets: &'a Subnets,
    /// Whether packets by other paths than the cgroup's sockets are held as well.
    pub other_paths: bool,
    /// The record of whose it is. The changes on the interface are added to it.
    pub owner: Owner,
}

/// Which interfaces are limited.
#[derive(Clone, Copy)]
pub enum Interfaces<'a> {
    /// An interface in a network namespace of its own. podshaper may change it.
    One { netns: &'a Path, name: &'a str },
    /// An interface of the node, by number, or with 0 every interface but loopback. podshaper leaves it as it is.
    OfNode { index: u32 },
}

/// The cgroup of an attachment.
#[derive(Clone, Copy)]
pub enum Directory<'a> {
    /// A pod's cgroup. podshaper may have to make it, and then removes it with the pod's last attachment.
    Pod(&'a PodCgroup),
    /// A cgroup that is not a pod's.
    Other(&'a File),
}

/// An attachment that is pinned.
pub struct Present {
    /// Its place.
    pub place: Place,
    /// Its directory of pins.
    pub directory: PathBuf,
    /// Whose it is.
    pub owner: Owner,
    /// Its limits. `None`: its maps have another layout, so the limits cannot be read.
    pub limits: Option<Limits>,
}

impl Directory<'_> {
    fn open(self) -> Result<OwnedFd> {
        match self {
            Self::Pod(cgroup) => cgroup.open(),
            Self::Other(directory) => {
                let text = "keep the cgroup's directory open";
                directory.as_fd().try_clone_to_owned().map_err(|cause| Error::because(Code::Cgroup, text, cause))
            }
        }
    }
}

impl Present {
    /// The attachment that is pinned in a directory.
    ///
    /// # Errors
    /// [`Code::Kernel`]: its record cannot be read.
    pub fn read(place: Place, directory: PathBuf) -> Result<Self> {
        let owner = Pinned::at(&directory).owner()?;
        Ok(Self::of(place, directory, owner))
    }

    fn of(place: Place, directory: PathBuf, mut owner: Owner) -> Self {
        owner.interface.complete();
        let pinned = Some(Pinned::at(&directory)).filter(|_| pins::is_current(&directory));
        let limits = pinned.and_then(|pinned| pinned.limits(&owner, &pinned.set().ok()?).ok());
        let limits = limits.map(|both| shaper::limits_of(&both));
        Self { place, directory, owner, limits }
    }

    /// The programs that it needs on its cgroup.
    fn programs(&self) -> Vec<&'static str> {
        Settings::of(&self.owner, self.limits.unwrap_or_default()).program_names().collect()
    }

    /// Its connections, to take their pace and window off.
    fn connections(&self) -> Option<Connections> {
        let_go::connections(&self.directory, &self.owner)
    }

    fn need(&self) -> Need {
        Need { record: self.owner.interface.clone(), limits: self.limits }
    }

    /// Its limits, with those of `to` in the directions that `to` has.
    fn limits_with(&self, to: &Limits) -> Limits {
        let now = self.limits.unwrap_or_default();
        let limit = |direction: Direction| to.of(direction).or(now.of(direction)).copied();
        Limits { egress: limit(Direction::Egress), ingress: limit(Direction::Ingress) }
    }
}

/// podshaper's pins, locked. `None`: nothing has been attached since boot.
///
/// # Errors
/// [`Code::Kernel`]: another process holds the lock and does not release it.
pub fn lock() -> Result<Option<LockedPins>> {
    Pins::existing(Path::new(BPFFS)).map(|pins| pins.lock()).transpose()
}

/// The other attachments of a pod that share the node's programs with the attachment at a place.
fn sharing(pins: &Pins, place: &Place) -> Vec<Present> {
    let others = pins.sharing(&place.pod).into_iter().filter(|(other, _)| other != place);
    others.filter_map(|(other, directory)| Present::read(other, directory).ok()).collect()
}

/// The entries by which the programs find these attachments on the pod's cgroup.
fn scopes(sharing: &[Present]) -> Vec<Scope> {
    sharing.iter().map(|present| present.owner.scope()).collect()
}

/// The other attachments in the namespace of `own`, which is the record of `place`.
fn there(pins: &Pins, place: &Place, own: &Record) -> Vec<Present> {
    let Some(inode) = own.netns_inode else { return Vec::new() };
    let noted = pins.noted(inode).into_iter().filter(|other| other != place);
    let there = noted.filter_map(|other| {
        let directory = pins.find(&other)?;
        Present::read(other, directory).ok()
    });
    there.filter(|other| other.owner.interface.shares_namespace(own) && is_there(&other.owner, inode)).collect()
}

/// The needs of the other attachments in the namespace of `own`, which is the record of `place`.
fn others(pins: &Pins, place: &Place, own: &Record) -> Vec<Need> {
    there(pins, place, own).iter().map(Present::need).collect()
}

/// Whether an attachment is still in the namespace with this inode number. When a namespace is gone, the kernel gives
/// its number to another one. A path in /proc goes with its process, but the namespace may stay: then the cgroup tells
/// whether the attachment lives.
fn is_there(owner: &Owner, inode: u64) -> bool {
    match owner.interface.path().map(fs::metadata) {
        Some(Ok(found)) => found.ino() == inode,
        Some(Err(cause)) if cause.kind() == io::ErrorKind::NotFound => Path::new(&owner.cgroup).exists(),
        _ => false,
    }
}

/// Removes a pod's cgroup2 directory on a hybrid host, if podshaper is to remove it and it is empty.
pub fn remove_cgroup_if_ours(path: &Path) {
    let removed = Hierarchies::of_this_host().and_then(|hierarchies| cgroup::remove_if_ours(&hierarchies, path));
    if let Err(error) = removed {
        log::warn!("{error}");
    }
}

/// Limits without effect, in those of the directions that have a limit.
fn unlimited(limits: &Limits, directions: &[Direction]) -> Limits {
    let lifted = |direction| {
        let is_limited = directions.contains(&direction) && limits.of(direction).is_some();
        is_limited.then(|| Limit::of(crate::units::Rate::MAX, Source::Operator))
    };
    Limits { egress: lifted(Direction::Egress), ingress: lifted(Direction::Ingress) }
}
