//! Puts this podshaper's programs in the place of those that a node's pods share. The maps stay.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use super::{
    object::{IDENTITY, Object},
    program_names,
    refusal::refused,
    set::{OBJECT, pin},
};
use crate::{
    error::{Code, Error, Result},
    pins::LockedPins,
    sys,
};

/// A pin that is being made to replace another.
const NEW: &str = "%new";

/// Programs that are loaded and not yet in use.
pub struct NewPrograms {
    object: Object,
    node: PathBuf,
}

impl NewPrograms {
    /// Loads the programs. `None`: the node has these programs already, or it has none.
    ///
    /// # Errors
    /// [`Code::Kernel`]: the kernel refuses a program, and why.
    pub fn load(pins: &LockedPins) -> Result<Option<Self>> {
        let node = pins.node();
        if !node.exists() || fs::read_link(node.join(OBJECT)).is_ok_and(|found| found == Path::new(IDENTITY)) {
            return Ok(None);
        }
        Ok(Some(Self { object: Object::load_beside(&node)?, node }))
    }

    /// Makes a link go on with the new program of its name. No packet passes unseen, and all state of the old program
    /// is in the maps. `false`: the link is dead.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn run_on(&self, link: &Path) -> Result<bool> {
        let name = link.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let program = self.object.program(name)?;
        let updated = sys::open_pin(link).and_then(|link| sys::update_link(link.as_fd(), program.as_fd()));
        match updated {
            Err(cause) if cause.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
            updated => {
                updated.map_err(|cause| refused(format!("give {} its new program", link.display()), &cause))?;
                Ok(true)
            }
        }
    }

    /// A program by its name.
    ///
    /// # Errors
    /// [`Code::Kernel`]: podshaper was built wrong, or the process has no descriptors left.
    pub fn program(&self, name: &str) -> Result<OwnedFd> {
        self.object.program(name)
    }

    /// Pins the programs in the place of the old ones. New pods get them from here on.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn commit(&self) -> Result<()> {
        for name in program_names() {
            self.replace(name, |path| pin(self.object.program(name)?, path))?;
        }
        // Last: by this link the next call knows that everything is done.
        self.replace(OBJECT, |path| {
            symlink(IDENTITY, path).map_err(|cause| failed("make the symbolic link", path, cause))
        })
    }

    fn replace(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (path, new) = (self.node.join(name), self.node.join(name.to_owned() + NEW));
        match fs::remove_file(&new) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &new, cause)),
            _ => {}
        }
        make(&new)?;
        fs::rename(&new, &path).map_err(|cause| failed("replace", &path, cause))
    }
}

fn failed(what: &str, path: &Path, cause: io::Error) -> Error {
    Error::because(Code::Kernel, format!("{what} {}", path.display()), cause)
}
