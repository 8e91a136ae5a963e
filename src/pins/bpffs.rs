//! bpffs itself: mounts it, and makes directories that are root's alone.

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

/// Whether bpffs is mounted at a path.
pub fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// `mount -t bpf bpf /sys/fs/bpf`, as systemd does at boot. Does nothing if bpffs is mounted.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error.
pub fn mount_bpffs(path: &Path) -> Result<()> {
    if is_bpffs(path) {
        return Ok(());
    }
    let failed = |cause: io::Error| {
        let path = path.display();
        let text = format!("mount bpffs on {path}, where it is missing (on the node: mount -t bpf bpf {path})");
        Error::because(Code::Kernel, text, cause)
    };
    // The first pods of a node start together, and a second bpffs over the first would hide the pins of the first. So
    // one call mounts, and the others wait for the lock on the directory below the mount.
    let below = File::open(path).map_err(failed)?;
    let _lock = Flock::lock(below, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))?;
    if is_bpffs(path) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| failed(errno.into()))
}

/// The directories in a directory, by name. A directory that has gone meanwhile has none.
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
    // Root's alone: a process that can open the directory can lock it, and so hold up every pod of the node. Not every
    // node mounts bpffs with a mode that keeps other users out.
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::because(Code::Kernel, format!("make the directory {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}

/// Refuses a directory that is not root's alone. On a bpffs that all users may write to, any user can make podshaper's
/// directory first, and then lock it or remove pins from it.
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
