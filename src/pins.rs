//! The pins, which are all the state there is, and the only file that knows how they lie:
//!
//! ```text
//! /sys/fs/bpf/podshaper/            locked (flock) by whoever changes anything below
//!   v4/                             layout of what follows: podshaper_abi::LAYOUT
//!     <pod uid or container id>/
//!       <interface>/                one attachment, whole: it is made under another name and renamed
//!         OWNER  LIMITS  METERS     maps
//!         count_egress  ..          links; the last one that goes takes its program along
//!       <interface>%new             being made, or (%old) being replaced: left only by a call that was killed
//! ```
//!
//! bpffs has no files but pins and refuses names with a dot, and an interface may be called eth0.100: every byte that is not a
//! letter, a digit, '-' or '_' is written as %XX. A lock file cannot be made there, but a directory can be locked; the kernel
//! lets go of it with the process.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use podshaper_abi::LAYOUT;

use crate::error::{Code, Error, Result};

/// Where bpffs is mounted on every distribution (systemd, libbpf, bpftool).
pub const BPFFS: &str = "/sys/fs/bpf";
const DIRECTORY: &str = "podshaper";
/// The map whose pin is removed last: as long as it is there, the attachment can be found again and removed.
pub const OWNER: &str = "OWNER";
/// The map of limits, which a change on a live pod writes.
pub const LIMITS: &str = "LIMITS";
/// The map of clocks and counters.
pub const METERS: &str = "METERS";
/// How long a call waits for another one. All of a node's pods may start at once, and each needs a few milliseconds; a runtime gives
/// up after minutes, without a word of why.
const LOCK_WAIT: Duration = Duration::from_secs(30);
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Name parts of unfinished attachments. Neither can come out of [`encode`]: '%' is followed by two hexadecimal digits there.
const NEW: &str = "%new";
const OLD: &str = "%old";

/// Where one attachment is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The pod: its UID, or the container id where the runtime passes no UID.
    pub pod: String,
    /// The interface inside the pod.
    pub interface: String,
}

/// podshaper's directory on bpffs.
pub struct Pins {
    root: PathBuf,
}

/// The same, locked against every other call until dropped.
pub struct LockedPins {
    root: PathBuf,
    _lock: Flock<File>,
}

/// A directory in which an attachment is being made. Removed when dropped, unless it was committed.
pub struct Staged<'a> {
    pins: &'a LockedPins,
    place: &'a Place,
    directory: PathBuf,
    target: PathBuf,
}

impl Pins {
    /// podshaper's directory, if anything was ever attached since boot.
    pub fn existing(bpffs: &Path) -> Option<Self> {
        let root = bpffs.join(DIRECTORY);
        (is_bpffs(bpffs) && root.is_dir()).then_some(Self { root })
    }

    /// podshaper's directory, made if need be; bpffs is mounted if it is not.
    ///
    /// # Errors
    /// [`Code::Kernel`] where bpffs is neither there nor allowed to be mounted.
    pub fn ensure(bpffs: &Path) -> Result<Self> {
        mount_bpffs(bpffs)?;
        let root = bpffs.join(DIRECTORY);
        make_directory(&root)?;
        refuse_strangers(&root)?;
        Ok(Self { root })
    }

    /// Waits for the lock, up to [`LOCK_WAIT`].
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says, or that somebody does not let go of it.
    pub fn lock(&self) -> Result<LockedPins> {
        let failed = |cause: io::Error| Error::because(Code::Kernel, format!("lock {}", self.root.display()), cause);
        let mut directory = File::open(&self.root).map_err(failed)?;
        let start = Instant::now();
        loop {
            directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(LockedPins { root: self.root.clone(), _lock: lock }),
                Err((directory, Errno::EWOULDBLOCK | Errno::EINTR)) if start.elapsed() < LOCK_WAIT => directory,
                Err((_, Errno::EWOULDBLOCK)) => {
                    let (path, waited) = (self.root.display(), LOCK_WAIT.as_secs());
                    let text =
                        format!("lock {path}: another process has held it for {waited} s (fuser -v {path} shows it)");
                    return Err(Error::new(Code::Kernel, text));
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            thread::sleep(LOCK_RETRY);
        }
    }

    /// Directory of an attachment, if there is one.
    pub fn find(&self, place: &Place) -> Option<PathBuf> {
        find(&self.root, place)
    }

    /// All attachments, of every layout. Unlocked: one may go before it is looked at.
    pub fn list(&self) -> Vec<(Place, PathBuf)> {
        list(&self.root)
    }

    /// Whether this process may look into it; where not, there seems to be nothing.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn check_readable(&self) -> Result<()> {
        let failed =
            |cause| Error::because(Code::Kernel, format!("look into {} (it takes root)", self.root.display()), cause);
        fs::read_dir(&self.root).map(drop).map_err(failed)
    }

    /// How many directories calls that were killed have left, or calls at work need just now.
    pub fn unfinished(&self) -> usize {
        let pods = layouts(&self.root).into_iter().flat_map(|layout| directories(&layout));
        let names = pods.flat_map(|(_, pod)| directories(&pod)).map(|(name, _)| name);
        names.filter(|name| [NEW, OLD].iter().any(|suffix| name.ends_with(suffix))).count()
    }
}

impl LockedPins {
    /// Directory of an attachment, if there is one.
    pub fn find(&self, place: &Place) -> Option<PathBuf> {
        find(&self.root, place)
    }

    /// All attachments, of every layout.
    pub fn list(&self) -> Vec<(Place, PathBuf)> {
        list(&self.root)
    }

    /// Whether any attachment of the pod is left.
    pub fn has_pod(&self, pod: &str) -> bool {
        layouts(&self.root).iter().any(|layout| layout.join(encode(pod)).exists())
    }

    /// Clears what killed calls left of an attachment: the lock is ours, so nobody is at work on it. One that was being
    /// replaced is put back.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn settle(&self, place: &Place) -> Result<()> {
        layouts(&self.root).iter().try_for_each(|layout| {
            let pod = layout.join(encode(&place.pod));
            settle(&pod, &encode(&place.interface))?;
            remove_if_empty(&pod)
        })
    }

    /// The same for every attachment.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn settle_all(&self) -> Result<()> {
        for (_, pod) in layouts(&self.root).iter().flat_map(|layout| directories(layout)) {
            for (name, _) in directories(&pod) {
                let interface = [NEW, OLD].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
                settle(&pod, interface)?;
            }
            remove_if_empty(&pod)?;
        }
        Ok(())
    }

    /// Makes the directory in which an attachment is then pinned.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn stage<'a>(&'a self, place: &'a Place) -> Result<Staged<'a>> {
        let layout = self.layout();
        let pod = layout.join(encode(&place.pod));
        let interface = encode(&place.interface);
        let (target, directory) = (pod.join(&interface), pod.join(interface.clone() + NEW));
        settle(&pod, &interface)?;
        for directory in [&layout, &pod, &directory] {
            make_directory(directory)?;
        }
        Ok(Staged { pins: self, place, directory, target })
    }

    /// Removes an attachment, finished or not, and the pod's directory with its last. The kernel detaches with the last pin.
    /// Nothing there is no error.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says.
    pub fn remove(&self, place: &Place) -> Result<()> {
        layouts(&self.root).iter().try_for_each(|layout| remove_from(layout, place))
    }

    /// The directory of this podshaper's layout.
    fn layout(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT}"))
    }
}

impl Staged<'_> {
    /// Where to pin.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Puts the finished attachment in its place, all at once, and removes what was there. The old links are live until the
    /// new ones are, so the pod is never unshaped.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says; the old attachment is then still in place.
    pub fn commit(self) -> Result<()> {
        self.swap()?;
        // Pins that an older podshaper made for this attachment, in its own layout, limited it until now.
        let current = self.pins.layout();
        let others = layouts(&self.pins.root).into_iter().filter(|layout| *layout != current);
        others.into_iter().try_for_each(|layout| remove_from(&layout, self.place))
    }

    fn swap(&self) -> Result<()> {
        let renamed = |result: nix::Result<()>, to: &Path| {
            result.map_err(|cause| {
                Error::because(Code::Kernel, format!("rename {} to {}", self.directory.display(), to.display()), cause)
            })
        };
        let rename = |from: &Path, to: &Path, flags| renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
        match rename(&self.directory, &self.target, RenameFlags::RENAME_EXCHANGE) {
            // Now the staging directory is the old attachment, and dropped.
            Ok(()) => Ok(()),
            Err(Errno::ENOENT) => renamed(rename(&self.directory, &self.target, RenameFlags::empty()), &self.target),
            // bpffs exchanges names since Linux 5.17 (simple_rename, fs/libfs.c). Before that the old attachment steps aside
            // first; killed between the two renames, it goes on limiting from there until the next call for the pod settles it.
            Err(Errno::EINVAL) => {
                let aside = with_suffix(&self.target, OLD);
                remove_directory(&aside)?;
                renamed(rename(&self.target, &aside, RenameFlags::empty()), &aside)?;
                renamed(rename(&self.directory, &self.target, RenameFlags::empty()), &self.target)?;
                remove_directory(&aside)
            }
            Err(cause) => renamed(Err(cause), &self.target),
        }
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        let removed =
            remove_directory(&self.directory).and_then(|()| self.directory.parent().map_or(Ok(()), remove_if_empty));
        if let Err(error) = removed {
            log::warn!("{error}");
        }
    }
}

/// The layout an attachment is pinned in: `v1`.
pub fn layout_of(directory: &Path) -> &str {
    let layout = directory.ancestors().nth(2).and_then(Path::file_name);
    layout.and_then(|name| name.to_str()).unwrap_or_default()
}

/// Whether an attachment's maps are laid out as this podshaper knows them.
pub fn is_current(directory: &Path) -> bool {
    layout_of(directory) == format!("v{LAYOUT}")
}

/// The links of an attachment of any layout, by name.
pub fn links(directory: &Path) -> Vec<String> {
    let names =
        fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|pin| pin.file_name().into_string().ok());
    let mut links: Vec<_> = names.filter(|name| ![OWNER, LIMITS, METERS].contains(&name.as_str())).collect();
    links.sort();
    links
}

/// When an attachment was made: a pin bears the time of its making, and OWNER's is made with it.
pub fn made_at(directory: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(directory.join(OWNER)).and_then(|pin| pin.modified()).ok()
}

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

fn layouts(root: &Path) -> Vec<PathBuf> {
    directories(root).into_iter().filter(|(name, _)| name.starts_with('v')).map(|(_, path)| path).collect()
}

fn find(root: &Path, place: &Place) -> Option<PathBuf> {
    let below = Path::new(&encode(&place.pod)).join(encode(&place.interface));
    // Without OWNER it is what a killed DEL left.
    layouts(root).into_iter().map(|layout| layout.join(&below)).find(|path| path.join(OWNER).exists())
}

fn list(root: &Path) -> Vec<(Place, PathBuf)> {
    let mut found = Vec::new();
    for (_, layout) in directories(root) {
        for (pod, pod_path) in directories(&layout) {
            for (interface, path) in directories(&pod_path) {
                if let (Some(pod), Some(interface)) = (decode(&pod), decode(&interface)) {
                    found.push((Place { pod, interface }, path));
                }
            }
        }
    }
    found
}

/// Directories in a directory, by name. One that went away meanwhile has none.
fn directories(path: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    found.sort();
    found
}

fn make_directory(path: &Path) -> Result<()> {
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
fn refuse_strangers(path: &Path) -> Result<()> {
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

/// Leaves of an attachment what is finished: its own directory, or nothing.
fn settle(pod: &Path, interface: &str) -> Result<()> {
    let [target, new, old] = ["", NEW, OLD].map(|suffix| pod.join(interface.to_owned() + suffix));
    remove_directory(&new)?;
    if !target.join(OWNER).exists() {
        remove_directory(&target)?;
        if old.join(OWNER).exists() {
            return fs::rename(&old, &target)
                .map_err(|cause| Error::because(Code::Kernel, format!("rename {} back", old.display()), cause));
        }
    }
    remove_directory(&old)
}

/// Removes an attachment from one layout, finished or not.
fn remove_from(layout: &Path, place: &Place) -> Result<()> {
    let pod = layout.join(encode(&place.pod));
    for suffix in [NEW, OLD, ""] {
        remove_directory(&pod.join(encode(&place.interface) + suffix))?;
    }
    remove_if_empty(&pod)
}

/// Removes a directory of pins, OWNER last; not being there is no error.
fn remove_directory(path: &Path) -> Result<()> {
    let failed =
        |cause: io::Error| Error::because(Code::Kernel, format!("remove the pins in {}", path.display()), cause);
    let entries = match fs::read_dir(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    let names =
        entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let (owner, others): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name == OWNER);
    for name in others.iter().chain(&owner) {
        fs::remove_file(path.join(name)).map_err(failed)?;
    }
    fs::remove_dir(path).map_err(failed)
}

fn remove_if_empty(path: &Path) -> Result<()> {
    match fs::remove_dir(path).map_err(|cause| (cause.kind(), cause)) {
        Ok(()) | Err((io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty, _)) => Ok(()),
        Err((_, cause)) => Err(Error::because(Code::Kernel, format!("remove the directory {}", path.display()), cause)),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn encode(name: &str) -> String {
    name.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02x}"));
        }
        encoded
    })
}

/// The name that was encoded; `None` for the name of an unfinished attachment and anything else podshaper did not make.
fn decode(encoded: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = encoded.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        bytes.push(if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            rest = &rest[2..];
            u8::from_str_radix(digits, 16).ok()?
        } else {
            *first
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_no_dot_on_bpffs_and_come_back_as_they_were() {
        for (name, encoded) in
            [("eth0", "eth0"), ("eth0.100", "eth0%2e100"), ("a%b", "a%25b"), ("net_1-é", "net_1-%c3%a9")]
        {
            assert_eq!(encode(name), encoded);
            assert_eq!(decode(encoded).as_deref(), Some(name));
        }
    }

    #[test]
    fn unfinished_attachments_are_not_listed() {
        for name in ["eth0%new", "eth0%old", "eth0%", "eth0%2", "%ff"] {
            assert_eq!(decode(name), None, "{name}");
        }
    }
}
