//! Pins that are being made: complete when they are committed, and removed if they are not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
};

use super::{
    LockedPins, OLD, Place,
    bpffs::remove_if_empty,
    layout::{is_current, layouts},
    remove_directory, remove_pod_if_unused, with_suffix,
};
use crate::error::{Code, Error, Result};

/// A directory in which an attachment is being made. It is removed when dropped, unless it was committed.
pub struct Staged<'a> {
    pub(super) pins: &'a LockedPins,
    pub(super) place: &'a Place,
    pub(super) directory: PathBuf,
    pub(super) target: PathBuf,
    /// Whether the directory has pins that are not to stay: those that are being made or, after the commit, those of
    /// the replaced attachment.
    pub(super) is_left: bool,
}

/// The node's programs and maps while they are being pinned. Removed when dropped, unless they were committed.
pub struct StagedNode {
    pub(super) directory: PathBuf,
    pub(super) target: PathBuf,
}

impl StagedNode {
    /// The directory to pin in.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Moves the programs and maps to their place.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn commit(self) -> Result<()> {
        fs::rename(&self.directory, &self.target).map_err(|cause| {
            let text = format!("rename {} to {}", self.directory.display(), self.target.display());
            Error::because(Code::Kernel, text, cause)
        })
    }
}

impl Drop for StagedNode {
    fn drop(&mut self) {
        let layout = self.target.parent();
        let removed = remove_directory(&self.directory).and_then(|()| layout.map_or(Ok(()), remove_if_empty));
        if let Err(error) = removed {
            log::warn!("{error}");
        }
    }
}

impl Staged<'_> {
    /// The directory to pin in.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Moves the finished attachment to its place in one step, and removes the attachment that was there `before`. The
    /// old links are live until the new ones are, so the pod is never without a limit.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error; the old attachment is then still in place.
    pub fn commit(mut self, before: Option<&Path>) -> Result<()> {
        self.is_left = self.swap()?;
        // Until now the attachment was limited by the pins that another podshaper made for it, in its own layout.
        if before.is_some_and(|before| !is_current(before))
            && let Err(error) = self.pins.remove_others(&layouts(&self.pins.root), self.place)
        {
            log::warn!("what the new limit replaced is still there, until the next call for the pod: {error}");
        }
        Ok(())
    }

    /// Moves the new attachment to its place. Returns whether the old one is in the directory now, to be removed with
    /// it.
    fn swap(&self) -> Result<bool> {
        let renamed = |result: nix::Result<()>, to: &Path| {
            result.map_err(|cause| {
                Error::because(Code::Kernel, format!("rename {} to {}", self.directory.display(), to.display()), cause)
            })
        };
        let rename = |from: &Path, to: &Path, flags| renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
        match rename(&self.directory, &self.target, RenameFlags::RENAME_EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => {
                renamed(rename(&self.directory, &self.target, RenameFlags::empty()), &self.target).map(|()| false)
            }
            // bpffs exchanges names since Linux 5.17 (simple_rename, fs/libfs.c). On an older kernel the old attachment
            // is renamed first. If the call is killed between the two renames, the old attachment goes on limiting from
            // there until the next call for the pod settles it.
            Err(Errno::EINVAL) => {
                let aside = with_suffix(&self.target, OLD);
                remove_directory(&aside)?;
                renamed(rename(&self.target, &aside, RenameFlags::empty()), &aside)?;
                renamed(rename(&self.directory, &self.target, RenameFlags::empty()), &self.target)?;
                if let Err(error) = remove_directory(&aside) {
                    log::warn!("what the new limit replaced is still there, until the next call for the pod: {error}");
                }
                Ok(false)
            }
            Err(cause) => renamed(Err(cause), &self.target).map(|()| false),
        }
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if !self.is_left {
            return;
        }
        let removed = remove_directory(&self.directory)
            .and_then(|()| self.directory.parent().map_or(Ok(()), remove_pod_if_unused));
        if let Err(error) = removed {
            log::warn!("{error}");
        }
    }
}
