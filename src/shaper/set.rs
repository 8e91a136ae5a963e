//! A set of programs and maps. A node has one pinned set, which all its pods share. So an ADD writes a few numbers, and
//! the kernel need not check and compile the programs again. An attachment that cannot share has a set of its own.

use std::{
    collections::HashSet,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use podshaper_abi::{HostEnd, Limits as AbiLimits, ListedAddress, Meters, OtherPaths, Scope, Scopes, SocketState};

use super::{
    object::{IDENTITY, MAPS, Object},
    program_names,
    refusal::refused,
};
use crate::{
    error::{Code, Error, Result},
    pins::{FLOWS, HOST_ENDS, LIMITS, LockedPins, METERS, OTHERS, SCOPES, SUBNETS},
    request::Subnets,
    sys::{self, Map, Read, TrieKey},
};

/// The name of a symbolic link that tells of which object the pinned programs are: bpffs has no files. No program or
/// map has this name.
pub(super) const OBJECT: &str = "%object";

/// Programs and maps.
pub struct Set {
    origin: Origin,
    /// The limits of each attachment.
    pub limits: Map<u32, AbiLimits>,
    /// The clocks and counters of each attachment.
    pub meters: Map<u32, Meters>,
    /// The attachments on each cgroup, by the inode number of its directory.
    pub scopes: Map<u64, Scopes>,
    /// The counters of other paths than the sockets of each attachment's cgroup.
    pub others: Map<u32, OtherPaths>,
    /// The host ends of the interfaces, by their number in the node's namespace.
    pub host_ends: Map<u32, HostEnd>,
}

/// Where the programs and the other maps of a set come from.
enum Origin {
    /// This process has loaded them.
    Loaded(Object),
    /// They are pinned in this directory.
    Pinned(PathBuf),
}

impl Set {
    /// The node's set. The first attachment loads it.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the kernel refuses a map or program, and why.
    pub fn of_node(pins: &LockedPins) -> Result<Self> {
        let directory = pins.node();
        if !directory.exists() {
            let object = Object::load(None)?;
            let staged = pins.stage_node()?;
            for name in MAPS {
                pin(object.map(name)?, &staged.directory().join(name))?;
            }
            pin_programs(&object, staged.directory())?;
            staged.commit()?;
        }
        Self::pinned(&directory)
    }

    /// A set for a single attachment.
    ///
    /// # Errors
    /// Those of [`Set::of_node`].
    pub fn own() -> Result<Self> {
        let object = Object::load(Some(1))?;
        Ok(Self {
            limits: map(LIMITS, object.map(LIMITS)?)?,
            meters: map(METERS, object.map(METERS)?)?,
            scopes: map(SCOPES, object.map(SCOPES)?)?,
            others: map(OTHERS, object.map(OTHERS)?)?,
            host_ends: map(HOST_ENDS, object.map(HOST_ENDS)?)?,
            origin: Origin::Loaded(object),
        })
    }

    /// The set whose maps are pinned in a directory.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be opened.
    pub fn pinned(directory: &Path) -> Result<Self> {
        Ok(Self {
            limits: map(LIMITS, open(&directory.join(LIMITS))?)?,
            meters: map(METERS, open(&directory.join(METERS))?)?,
            scopes: map(SCOPES, open(&directory.join(SCOPES))?)?,
            others: map(OTHERS, open(&directory.join(OTHERS))?)?,
            host_ends: map(HOST_ENDS, open(&directory.join(HOST_ENDS))?)?,
            origin: Origin::Pinned(directory.to_path_buf()),
        })
    }

    /// A program by its name.
    ///
    /// # Errors
    /// [`Code::Kernel`] where it cannot be opened.
    pub fn program(&self, name: &str) -> Result<OwnedFd> {
        match &self.origin {
            Origin::Loaded(object) => object.program(name),
            Origin::Pinned(directory) => open(&directory.join(name)),
        }
    }

    /// Pins the maps that a reader of the attachment needs. The attachment's links keep the other maps and the
    /// programs.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn pin_maps(&self, directory: &Path) -> Result<()> {
        let flows = self.find_map(FLOWS)?;
        let maps = [
            (FLOWS, flows.as_fd()),
            (LIMITS, self.limits.as_fd()),
            (METERS, self.meters.as_fd()),
            (SCOPES, self.scopes.as_fd()),
            (OTHERS, self.others.as_fd()),
            (HOST_ENDS, self.host_ends.as_fd()),
        ];
        maps.into_iter().try_for_each(|(name, map)| {
            let path = directory.join(name);
            sys::pin(map, &path).map_err(|cause| refused(format!("pin {}", path.display()), &cause))
        })
    }

    /// The attachments on a cgroup.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn scopes_on(&self, cgroup_id: u64) -> Result<Vec<Scope>> {
        let found = self.scopes.get(&cgroup_id, Read::Plain);
        let found = found.map_err(|cause| refused("read what is attached to the pod's cgroup", &cause))?;
        Ok(found.unwrap_or_default().0.into_iter().filter(|scope| scope.slot != 0).collect())
    }

    /// Writes which attachments are on a cgroup that has one of the programs. In force from the next packet on.
    ///
    /// # Errors
    /// The kernel's error; `ENOENT` where no program was ever attached to it, or it is gone.
    pub fn set_scopes(&self, cgroup_id: u64, scopes: &[Scope]) -> std::io::Result<()> {
        let mut all = Scopes::default();
        all.0.iter_mut().zip(scopes).for_each(|(to, from)| *to = *from);
        self.scopes.set(&cgroup_id, &all)
    }

    /// Removes the limits and meters of an attachment.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn forget(&self, slot: u32) -> Result<()> {
        let removed = self.limits.remove(&slot).and(self.meters.remove(&slot)).and(self.others.remove(&slot));
        removed.map_err(|cause| refused("remove the limits", &cause))
    }

    /// Writes a list of subnets, if it is not there yet, and returns its number.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn list(&self, subnets: &Subnets) -> Result<u64> {
        let number = subnets.number();
        if number == 0 {
            return Ok(0);
        }
        let failed = |cause: std::io::Error| refused("write the subnets", &cause);
        let map: Map<TrieKey, u32> = map(SUBNETS, self.find_map(SUBNETS)?)?;
        let key = |(bits, address, _)| TrieKey {
            bits: bits + LIST_BITS,
            address: ListedAddress { list: number.to_ne_bytes(), address },
        };
        // The subnet around every address is written last. If it is there, the whole list is.
        if map.get(&key((0, [0; 16], 0)), Read::Plain).map_err(failed)?.is_some() {
            return Ok(number);
        }
        let entries: Vec<_> = subnets.entries().collect();
        let (keys, kinds): (Vec<_>, Vec<_>) = entries.iter().map(|entry| (key(*entry), entry.2)).unzip();
        sys::insert_all(map.as_fd(), &keys, &kinds).map_err(failed)?;
        Ok(number)
    }

    /// Removes the lists of subnets that no attachment of the node has.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn keep_lists(&self, numbers: impl Iterator<Item = u64>) -> Result<()> {
        let numbers: HashSet<u64> = numbers.collect();
        let failed = |cause: std::io::Error| refused("remove the subnets of an old configuration", &cause);
        let map: Map<TrieKey, u32> = map(SUBNETS, self.find_map(SUBNETS)?)?;
        let keys = map.keys().map_err(failed)?;
        let mut old = keys.iter().filter(|key| !numbers.contains(&u64::from_ne_bytes(key.address.list)));
        old.try_for_each(|key| map.remove(key)).map_err(failed)
    }

    /// The programs' state of each socket, by the socket's descriptor.
    ///
    /// # Errors
    /// [`Code::Kernel`] where it cannot be opened.
    pub fn socket_states(&self) -> Result<Map<i32, SocketState>> {
        map(FLOWS, self.find_map(FLOWS)?)
    }

    fn find_map(&self, name: &str) -> Result<OwnedFd> {
        match &self.origin {
            Origin::Loaded(object) => object.map(name),
            Origin::Pinned(directory) => open(&directory.join(name)),
        }
    }
}

/// Bits of a list's number, which come before those of an address.
const LIST_BITS: u32 = u64::BITS;

/// Loads everything and drops it: the kernel checks each program and everything that it uses.
///
/// # Errors
/// [`Code::Kernel`]: the kernel refuses a map or program, and why.
pub fn try_programs() -> Result<()> {
    Object::load(Some(1)).map(drop)
}

fn pin_programs(object: &Object, directory: &Path) -> Result<()> {
    for name in program_names() {
        pin(object.program(name)?, &directory.join(name))?;
    }
    let path = directory.join(OBJECT);
    symlink(IDENTITY, &path)
        .map_err(|cause| Error::because(Code::Kernel, format!("make the symbolic link {}", path.display()), cause))
}

pub(super) fn pin(object: OwnedFd, path: &Path) -> Result<()> {
    sys::pin(object.as_fd(), path).map_err(|cause| refused(format!("pin {}", path.display()), &cause))
}

fn open(path: &Path) -> Result<OwnedFd> {
    sys::open_pin(path).map_err(|cause| refused(format!("open {}", path.display()), &cause))
}

fn map<K: Copy + Default, V: aya::Pod + Default>(name: &str, fd: OwnedFd) -> Result<Map<K, V>> {
    Map::of(fd).map_err(|cause| refused(format!("open the eBPF map {name}"), &cause))
}
