//! bpffs itself: that it is there, and directories in it that are root's alone.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::error::{Code, Error, Result};

/// Whether bpffs is mounted there.
pub fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// `mount -t bpf bpf /sys/fs/bpf`, as systemd does it at boot, where it has not been done.
///
/// # Errors
/// [`Code::Kernel`] with what the kernel says.
pub fn mount_bpffs(path: &Path) -> Result<()> {
    if is_bpffs(path) {
        return Ok(());
    }
    let failed = |cause: io::Error| {
        let path = path.display();
        let text = format!("mount bpffs on {path}, where it is missing (on the node: mount -t bpf bpf {path})");
        Error::because(Code::Kernel, text, cause)
    };
    // The first pods of a node come together, and a second bpffs over the first would hide its pins: one call mounts, the
    // others wait at the directory below.
    let below = File::open(path).map_err(failed)?;
    let _lock = Flock::lock(below, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))?;
    if is_bpffs(path) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| failed(errno.into()))
}

/// Directories in a directory, by name. One that went away meanwhile has none.
pub fn directories(path: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    found.sort();
    found
}

pub fn make_directory(path: &Path) -> Result<()> {
    // Root's alone: whoever can open the directory can lock it, and hold up every pod of the node. Not everybody mounts bpffs
    // with a mode that keeps others out.
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::because(Code::Kernel, format!("make the directory {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}

/// A bpffs that everybody may write to lets everybody make podshaper's directory first, and then lock it or remove from it.
pub fn refuse_strangers(path: &Path) -> Result<()> {
    let failed = |cause: io::Error| Error::because(Code::Kernel, format!("look at {}", path.display()), cause);
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if found.uid() == 0 && found.is_dir() && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let text = format!(
        "use {}: it is not a directory that root alone may write to (uid {}, mode {:o}); remove it and find out who made it",
        path.display(),
        found.uid(),
        found.mode() & 0o7777
    );
    Err(Error::new(Code::Kernel, text))
}

pub fn remove_if_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path).map_err(|cause| (cause.kind(), cause)) {
        Ok(()) | Err((io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty, _)) => Ok(()),
        Err((_, cause)) => Err(Error::because(Code::Kernel, format!("remove the directory {}", path.display()), cause)),
    }
}
