//! An attachment that is pinned: read, changed and checked through its pins alone.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::Path,
};

use podshaper_abi::{Limit as AbiLimit, Meter};

use crate::{
    error::{Code, Error, Result},
    pins::{LIMITS, METERS, OWNER},
    pod::Owner,
    sys::{self, Read},
};

use super::{Settings, owner_bytes, refusal::refused};

/// One attachment that is pinned.
pub struct Pinned<'a> {
    directory: &'a Path,
}

impl<'a> Pinned<'a> {
    /// The attachment that is pinned in a directory.
    pub fn at(directory: &'a Path) -> Self {
        Self { directory }
    }

    /// Whose attachment it is.
    ///
    /// # Errors
    /// [`Code::Kernel`] where the record cannot be read: it is being removed, or not podshaper's.
    pub fn owner(&self) -> Result<Owner> {
        // Whatever its size: a record of another layout must be readable for its pins to be removed.
        let bytes = self.map(OWNER).and_then(|map| sys::element_bytes(map.as_fd(), 0));
        let bytes = bytes.map_err(|cause| refused(self.reading(OWNER), &cause))?;
        let json = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        serde_json::from_slice(json).map_err(|cause| Error::because(Code::Kernel, self.reading(OWNER), cause))
    }

    /// The same; `None` where there is a record that nobody can read, now or later. A record of another layout can be read.
    ///
    /// # Errors
    /// [`Code::Kernel`] where this process may not read it, or not now.
    pub fn owner_if_readable(&self) -> Result<Option<Owner>> {
        let bytes = self.map(OWNER).and_then(|map| sys::element_bytes(map.as_fd(), 0));
        match bytes.map_err(|cause| (cause.raw_os_error(), cause)) {
            Err((Some(libc::EPERM | libc::EACCES | libc::ENOMEM | libc::EMFILE | libc::ENFILE), cause)) => {
                Err(refused(self.reading(OWNER), &cause))
            }
            _ => Ok(self.owner().ok()),
        }
    }

    /// The limits of both directions, as the programs read them.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be read.
    pub fn limits(&self) -> Result<[AbiLimit; 2]> {
        self.both(LIMITS, Read::Plain)
    }

    /// Clocks and counters of both directions, each of one moment.
    ///
    /// # Errors
    /// [`Code::Kernel`] where they cannot be read.
    pub fn meters(&self) -> Result<[Meter; 2]> {
        self.both(METERS, Read::Locked)
    }

    /// The cgroup a program is on, by the inode number of its directory; `None` if the link is dead.
    ///
    /// # Errors
    /// [`Code::Kernel`] where there is no such link.
    pub fn linked_cgroup(&self, program: &str) -> Result<Option<u64>> {
        let link = sys::open_pin(&self.directory.join(program)).and_then(|link| sys::cgroup_link(link.as_fd()));
        let link = link.map_err(|cause| refused(self.reading(program), &cause))?;
        Ok(Some(link.cgroup_id).filter(|id| *id != 0))
    }

    /// Writes the limits that the settings have, in force from the next packet on, and records that they are no longer what the
    /// pod asked for. A direction without a limit stays as it is.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn change(&self, settings: &Settings, owner: &Owner) -> Result<()> {
        let writing = |name: &str| format!("write {}", self.directory.join(name).display());
        let owner = owner_bytes(&Owner { changed: true, ..owner.clone() })?;
        let written = self.map(OWNER).and_then(|map| sys::set_element(map.as_fd(), 0, &owner));
        written.map_err(|cause| refused(writing(OWNER), &cause))?;
        let limits = settings.abi_limits().into_iter().filter(|(_, limit)| limit.rate_bits_per_s != 0);
        for (direction, limit) in limits {
            let written = self.map(LIMITS).and_then(|map| sys::set_element(map.as_fd(), direction.index(), &limit));
            written.map_err(|cause| refused(writing(LIMITS), &cause))?;
        }
        Ok(())
    }

    /// Checks that every link is live and on this cgroup, and that the limits are these, unless an operator has set others.
    ///
    /// # Errors
    /// [`Code::Mismatch`] naming the first difference.
    pub fn check(&self, cgroup: &Path, settings: &Settings) -> Result<()> {
        let cgroup_id = fs::metadata(cgroup)
            .map_err(|cause| Error::because(Code::Mismatch, format!("find the cgroup {}", cgroup.display()), cause))?
            .ino();
        for (name, _) in settings.programs() {
            self.check_link(name, cgroup, cgroup_id)?;
        }
        if self.owner()?.changed {
            return Ok(());
        }
        for ((name, asked), found) in settings.abi_limits().into_iter().zip(self.limits()?) {
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
        let path = self.directory.join(name);
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

    fn both<V: aya::Pod + Default>(&self, name: &str, read: Read) -> Result<[V; 2]> {
        let both = self.map(name).and_then(|map| sys::both_elements(map.as_fd(), read));
        both.map_err(|cause| refused(self.reading(name), &cause))
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
