//! An attachment that is pinned: read, changed and checked through its pins alone.

use std::{
    cell::OnceCell,
    fs,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use podshaper_abi::{Limit as AbiLimit, Limits as AbiLimits, Meter, Others};

use super::{Set, Settings, owner, refusal::refused};
use crate::{
    direction::Direction,
    error::{Code, Error, Result},
    owner::Owner,
    pins::{self, OWNER},
    sys::{self, Read},
};

/// One attachment that is pinned.
pub struct Pinned<'a> {
    directory: &'a Path,
    /// The directory of its links. `podshaper sync` reads all links of all pods, and looks for the directory once.
    links: OnceCell<PathBuf>,
}

impl<'a> Pinned<'a> {
    /// The attachment that is pinned in a directory.
    pub fn at(directory: &'a Path) -> Self {
        Self { directory, links: OnceCell::new() }
    }

    /// The record of whose attachment it is.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the record cannot be read, because it is being removed or is not podshaper's.
    pub fn owner(&self) -> Result<Owner> {
        // The record may have any size: a record of another layout must be readable, so that its pins can be removed.
        let bytes = self.map(OWNER).and_then(|map| sys::element_bytes(map.as_fd()));
        let bytes = bytes.map_err(|cause| refused(self.reading(OWNER), &cause))?;
        let json = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        serde_json::from_slice(json).map_err(|cause| Error::because(Code::Kernel, self.reading(OWNER), cause))
    }

    /// Like [`Self::owner`]; `None`: the record cannot be read, now or later. A record of another layout can be read.
    ///
    /// # Errors
    /// [`Code::Kernel`]: this process may not read the record, or cannot read it now.
    pub fn owner_if_readable(&self) -> Result<Option<Owner>> {
        let bytes = self.map(OWNER).and_then(|map| sys::element_bytes(map.as_fd()));
        match bytes.map_err(|cause| (cause.raw_os_error(), cause)) {
            Err((Some(libc::EPERM | libc::EACCES | libc::ENOMEM | libc::EMFILE | libc::ENFILE), cause)) => {
                Err(refused(self.reading(OWNER), &cause))
            }
            _ => Ok(self.owner().ok()),
        }
    }

    /// Its programs' maps.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be opened.
    pub fn set(&self) -> Result<Set> {
        Set::pinned(&pins::maps_of(self.directory))
    }

    /// The limits of both directions, as the programs read them.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be read.
    pub fn limits(&self, owner: &Owner, set: &Set) -> Result<AbiLimits> {
        self.found("limits", set.limits.get(&owner.slot, Read::Plain))
    }

    /// The clocks and counters of both directions, all of one moment.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be read.
    pub fn meters(&self, owner: &Owner, set: &Set) -> Result<[Meter; 2]> {
        self.found("meters", set.meters.get(&owner.slot, Read::Locked)).map(|meters| meters.of)
    }

    /// The counters of other paths than the cgroup's sockets, in both directions.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be read.
    pub fn others(&self, owner: &Owner, set: &Set) -> Result<[Others; 2]> {
        self.found("counters of other paths", set.others.get(&owner.slot, Read::Plain)).map(|others| others.of)
    }

    /// The cgroup of a program, by the inode number of the cgroup's directory. `None`: the link is dead.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the link is not there, or cannot be read.
    pub fn linked_cgroup(&self, program: &str) -> Result<Option<u64>> {
        let link = sys::open_pin(&self.link(program)).and_then(|link| sys::cgroup_link(link.as_fd()));
        let link = link.map_err(|cause| refused(format!("read {}", self.link(program).display()), &cause))?;
        Ok(Some(link.cgroup_id).filter(|id| *id != 0))
    }

    /// Writes the limits of the settings, in force from the next packet on, and the record that goes with them. A
    /// direction without a limit in the settings stays as it is.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn change(&self, settings: &Settings, owner: &Owner) -> Result<()> {
        let set = self.set()?;
        let mut limits = self.limits(owner, &set)?;
        owner::write(owner, self.directory)?;
        for (limit, to) in limits.iter_mut().zip(settings.abi_limits()).filter(|(_, to)| to.rate_bits_per_s != 0) {
            *limit = to;
        }
        let written = set.limits.set(&owner.slot, &limits);
        written.map_err(|cause| refused(format!("write the limits of {}", self.directory.display()), &cause))
    }

    /// Checks that every link is live and on this cgroup, that the programs find the attachment there, and that the
    /// limits are those of the settings. The limits are not compared after an operator has set others, or after `sync`
    /// has changed them to what was asked for later.
    ///
    /// # Errors
    /// [`Code::Mismatch`] names the first difference. [`Code::Kernel`]: the record or the maps cannot be read.
    pub fn check(&self, cgroup: &Path, settings: &Settings) -> Result<()> {
        let cgroup_id = fs::metadata(cgroup)
            .map_err(|cause| Error::because(Code::Mismatch, format!("find the cgroup {}", cgroup.display()), cause))?
            .ino();
        for (name, _) in settings.programs() {
            self.check_link(name, cgroup, cgroup_id)?;
        }
        let (owner, set) = (self.owner()?, self.set()?);
        if !set.scopes_on(cgroup_id)?.contains(&owner.scope()) {
            let (pins, cgroup) = (self.directory.display(), cgroup.display());
            return Err(mismatch(format!("the programs on {cgroup} do not know of the limit pinned in {pins}")));
        }
        if owner.has_other_limits() {
            return Ok(());
        }
        let found = self.limits(&owner, &set)?;
        for ((name, asked), found) in Direction::BOTH.into_iter().zip(settings.abi_limits()).zip(found) {
            if found != asked {
                let AbiLimit { rate_bits_per_s: rate, burst_ns: burst, .. } = found;
                let AbiLimit { rate_bits_per_s: asked_rate, burst_ns: asked_burst, .. } = asked;
                return Err(mismatch(format!(
                    "{} limits {name} to {rate} bit/s with a burst of {burst} ns, but {asked_rate} bit/s and {asked_burst} ns were asked for (0: no limit)",
                    self.directory.display(),
                )));
            }
        }
        Ok(())
    }

    fn check_link(&self, name: &str, cgroup: &Path, cgroup_id: u64) -> Result<()> {
        let path = self.link(name);
        let link = sys::open_pin(&path)
            .and_then(|link| sys::cgroup_link(link.as_fd()))
            .map_err(|cause| Error::because(Code::Mismatch, format!("open the link {}", path.display()), cause))?;
        match link.cgroup_id {
            id if id == cgroup_id => Ok(()),
            0 => Err(mismatch(format!("the link {} is dead: its cgroup is gone", path.display()))),
            id => Err(mismatch(format!(
                "the link {} is on the cgroup with id {id}, not on {} with id {cgroup_id}",
                path.display(),
                cgroup.display()
            ))),
        }
    }

    fn found<V>(&self, what: &str, found: std::io::Result<Option<V>>) -> Result<V> {
        let reading = || format!("read the {what} of {}", self.directory.display());
        let found = found.map_err(|cause| refused(reading(), &cause))?;
        found.ok_or_else(|| Error::new(Code::Kernel, format!("{}: they are gone", reading())))
    }

    /// The pin of a program's link.
    fn link(&self, program: &str) -> PathBuf {
        self.links.get_or_init(|| pins::links_of(self.directory)).join(program)
    }

    fn map(&self, name: &str) -> std::io::Result<OwnedFd> {
        sys::open_pin(&self.directory.join(name))
    }

    fn reading(&self, name: &str) -> String {
        format!("read {}", self.directory.join(name).display())
    }
}

fn mismatch(text: String) -> Error {
    Error::new(Code::Mismatch, text)
}
