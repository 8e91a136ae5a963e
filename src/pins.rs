//! The pins, which are all the state of the attachments. Only this file and the folder beside it know how the pins lie:
//!
//! ```text
//! /sys/fs/bpf/podshaper/            locked (flock) by each call that changes anything below
//!   v<LAYOUT>/                      layout of everything below: podshaper_abi::LAYOUT
//!     %node/                        the node's programs and maps, which its pods share; removed with the last pod
//!       LIMITS  METERS  ..          maps
//!       count_egress  ..            programs
//!     <pod uid or container id>/
//!       %links/                     the links of the node's programs on this pod's cgroup
//!         count_egress  ..
//!       <interface>/                one attachment, complete: it is made under another name and renamed
//!         OWNER                     a map: whose the attachment is
//!         LIMITS  ..  count_egress  only of an attachment that cannot share: its own maps and links; a program goes
//!                                   with its last link
//!       <interface>%new             being made, or (%old) being replaced: left only by a killed call
//!   netns/<inode>/<pod>%on%<interface>   an empty directory for each attachment in that network namespace: see
//!                                        `pins/sharing.rs`
//! ```
//!
//! bpffs has no files but pins, so there can be no lock file. But a directory can be locked; the kernel releases the
//! lock when the process ends.

mod bpffs;
mod layout;
mod names;
mod sharing;
mod staged;

use std::{
    fs::{self, File},
    io,
    ops::Deref,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use podshaper_abi::LAYOUT;

use crate::error::{self, Code, Error, Result};

use bpffs::{directories, make_directory, refuse_strangers, remove_if_empty};
pub use bpffs::{is_bpffs, mount_bpffs};
use layout::{has_own_maps, layouts, pods};
pub use layout::{is_current, layout_of, links, links_of, made_at, maps_of, shares};
use names::{decode, encode};
pub use staged::{Staged, StagedNode};

/// Where bpffs is mounted on every distribution (systemd, libbpf, bpftool).
pub const BPFFS: &str = "/sys/fs/bpf";
const DIRECTORY: &str = "podshaper";
/// The map whose pin is removed last. As long as this pin is there, the attachment can be found again and removed.
pub const OWNER: &str = "OWNER";
/// The map of limits. A change of the limits of a live pod writes it.
pub const LIMITS: &str = "LIMITS";
/// The map of clocks and counters.
pub const METERS: &str = "METERS";
/// The map that says which attachments a cgroup has.
pub const SCOPES: &str = "SCOPES";
/// The map of traffic by other paths than the cgroups' sockets.
pub const OTHERS: &str = "OTHERS";
/// The map of the host ends of the pods' interfaces.
pub const HOST_ENDS: &str = "HOST_ENDS";
/// The map of how long requests for connections have waited.
pub const REQUESTS: &str = "REQUESTS";
/// The map of subnets.
pub const SUBNETS: &str = "SUBNETS";
/// The map of the programs' state of each socket.
pub const FLOWS: &str = "FLOWS";
/// How long a call waits for the lock. All pods of a node may start at once, and each call needs a few milliseconds. A
/// runtime gives up after minutes, without saying why.
const LOCK_WAIT: Duration = Duration::from_secs(30);
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Name parts of unfinished attachments. [`encode`] never returns them: there, two hexadecimal digits follow each '%'.
const NEW: &str = "%new";
const OLD: &str = "%old";
/// Directories that pods and interfaces share. [`encode`] never returns these names.
const NODE: &str = "%node";
const LINKS: &str = "%links";

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

/// podshaper's directory, locked against every other call until dropped.
pub struct LockedPins {
    pins: Pins,
    _lock: Flock<File>,
}

impl Deref for LockedPins {
    type Target = Pins;

    fn deref(&self) -> &Pins {
        &self.pins
    }
}

impl Pins {
    /// podshaper's directory. `None`: nothing has been attached since boot. Another user's directory is none of
    /// podshaper's: bpffs may be writable for all users, and such a user could hold the lock for ever.
    pub fn existing(bpffs: &Path) -> Option<Self> {
        let root = bpffs.join(DIRECTORY);
        let is_roots = fs::symlink_metadata(&root).is_ok_and(|found| found.is_dir() && found.uid() == 0);
        (is_bpffs(bpffs) && is_roots).then_some(Self { root })
    }

    /// podshaper's directory, made if it is missing. bpffs is mounted if it is not.
    ///
    /// # Errors
    /// [`Code::Kernel`]: bpffs is not mounted and cannot be mounted, or the directory is not root's alone.
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
    /// [`Code::Kernel`] with the kernel's error, or because another process does not release the lock.
    pub fn lock(&self) -> Result<LockedPins> {
        let failed = |cause: io::Error| Error::because(Code::Kernel, format!("lock {}", self.root.display()), cause);
        let mut directory = File::open(&self.root).map_err(failed)?;
        let start = Instant::now();
        loop {
            directory = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(LockedPins { pins: Self { root: self.root.clone() }, _lock: lock }),
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

    /// The directory of an attachment: in this podshaper's layout, or else in another one. `None`: there is no such
    /// attachment.
    pub fn find(&self, place: &Place) -> Option<PathBuf> {
        find(&layouts(&self.root), place)
    }

    /// The directory of the node's programs and maps, of this podshaper's layout.
    pub fn node(&self) -> PathBuf {
        self.layout().join(NODE)
    }

    /// The directory of the links of the node's programs on a pod's cgroup.
    pub fn links(&self, pod: &str) -> PathBuf {
        self.layout().join(encode(pod)).join(LINKS)
    }

    /// The links of the node's programs on the cgroups of all pods.
    pub fn all_links(&self) -> Vec<PathBuf> {
        let links = pods(&self.layout()).into_iter().flat_map(|(_, pod)| fs::read_dir(pod.join(LINKS)));
        links.flatten().flatten().map(|link| link.path()).collect()
    }

    /// The attachments of a pod that share the node's programs.
    pub fn sharing(&self, pod: &str) -> Vec<(Place, PathBuf)> {
        let found = directories(&self.layout().join(encode(pod))).into_iter();
        let attachments = found.filter_map(|(name, path)| Some((decode(&name)?, path)));
        let attachments = attachments.map(|(interface, path)| (Place { pod: pod.to_owned(), interface }, path));
        attachments.filter(|(_, path)| path.join(OWNER).exists() && !has_own_maps(path)).collect()
    }

    /// The directory of this podshaper's layout.
    fn layout(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT}"))
    }

    /// All attachments, of every layout. This takes no lock: an attachment may go before the caller looks at it.
    pub fn list(&self) -> Vec<(Place, PathBuf)> {
        list(&self.root).0
    }

    /// Fails if this process may not read podshaper's directory, which would then seem to be empty.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn check_readable(&self) -> Result<()> {
        let failed =
            |cause| Error::because(Code::Kernel, format!("look into {} (it takes root)", self.root.display()), cause);
        fs::read_dir(&self.root).map(drop).map_err(failed)
    }

    /// All attachments like [`Self::list`], and the number of directories of unfinished ones, in one walk. Such
    /// directories are left from killed calls, or are in use by calls at work.
    pub fn list_all(&self) -> (Vec<(Place, PathBuf)>, usize) {
        list(&self.root)
    }
}

impl LockedPins {
    /// Whether any attachment of the pod is left.
    pub fn has_pod(&self, pod: &str) -> bool {
        self.with_any_of([pod.to_owned()].into_iter()).next().is_some()
    }

    /// Those of these pods that have an attachment.
    pub fn with_any_of(&self, pods: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
        let layouts = layouts(&self.root);
        pods.filter(move |pod| layouts.iter().any(|layout| layout.join(encode(pod)).exists()))
    }

    /// Clears the remains of killed calls for an attachment. No other call is at work on it, because the lock is ours.
    /// An attachment that was being replaced is put back. An attachment of another layout is removed if its replacement
    /// is in place. Returns the directory of the attachment, if there is one.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn settle(&self, place: &Place) -> Result<Option<PathBuf>> {
        let layouts = layouts(&self.root);
        error::all(layouts.iter().map(|layout| {
            let pod = layout.join(encode(&place.pod));
            if !pod.exists() {
                return remove_if_unused(layout);
            }
            settle(&pod, &encode(&place.interface))?;
            remove_pod_if_unused(&pod)
        }))?;
        let found = find(&layouts, place);
        if found.as_deref().is_some_and(is_current) {
            self.remove_others(&layouts, place)?;
        }
        Ok(found)
    }

    /// Like [`Self::settle`], for every attachment. Goes on after an error.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error for each attachment that could not be cleared.
    pub fn settle_all(&self) -> Result<()> {
        let mut results = Vec::new();
        for (_, pod) in layouts(&self.root).iter().flat_map(|layout| pods(layout)) {
            for (name, _) in directories(&pod).into_iter().filter(|(name, _)| name != LINKS) {
                let interface = [NEW, OLD].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
                results.push(settle(&pod, interface));
            }
            results.push(remove_pod_if_unused(&pod));
        }
        results.extend(self.list().iter().map(|(place, _)| self.settle(place).map(drop)));
        results.push(self.prune());
        error::all(results)
    }

    /// Makes the directory in which an attachment is then pinned. [`Self::settle`] must have cleared the remains of
    /// killed calls.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn stage<'a>(&'a self, place: &'a Place) -> Result<Staged<'a>> {
        let layout = self.layout();
        let pod = layout.join(encode(&place.pod));
        let interface = encode(&place.interface);
        let (target, directory) = (pod.join(&interface), pod.join(interface.clone() + NEW));
        for directory in [&layout, &pod, &directory] {
            make_directory(directory)?;
        }
        Ok(Staged { pins: self, place, directory, target, is_left: true })
    }

    /// Removes an attachment, finished or not, and the pod's directory with its last attachment. The kernel detaches a
    /// program when its last pin is gone. It is no error if there is no such attachment.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn remove(&self, place: &Place) -> Result<()> {
        error::all(layouts(&self.root).iter().map(|layout| remove_from(layout, place)))
    }

    /// Removes an attachment from every one of these layouts except this podshaper's.
    fn remove_others(&self, layouts: &[PathBuf], place: &Place) -> Result<()> {
        let current = self.layout();
        let others = layouts.iter().filter(|layout| **layout != current);
        error::all(others.map(|layout| remove_from(layout, place)))
    }

    /// Makes the directory of the links on a pod's cgroup. The pod's directory must exist.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn make_links(&self, pod: &str) -> Result<PathBuf> {
        let links = self.links(pod);
        make_directory(&links)?;
        Ok(links)
    }

    /// Removes the links of the node's programs on a pod's cgroup whose names are not given. The kernel then detaches
    /// the programs.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn keep_links(&self, pod: &str, names: &[&str]) -> Result<()> {
        let links = self.links(pod);
        if names.is_empty() {
            return remove_directory(&links);
        }
        let all = fs::read_dir(&links).into_iter().flatten().flatten();
        let unneeded = all.filter(|link| link.file_name().to_str().is_none_or(|name| !names.contains(&name)));
        error::all(unneeded.map(|link| {
            let failed = |cause| Error::because(Code::Kernel, format!("remove {}", link.path().display()), cause);
            fs::remove_file(link.path()).map_err(failed)
        }))
    }

    /// Makes the directory in which the node's programs and maps are then pinned.
    ///
    /// # Errors
    /// [`Code::Kernel`] with the kernel's error.
    pub fn stage_node(&self) -> Result<StagedNode> {
        let target = self.node();
        let directory = with_suffix(&target, NEW);
        remove_directory(&directory)?;
        for directory in [&self.layout(), &directory] {
            make_directory(directory)?;
        }
        Ok(StagedNode { directory, target })
    }
}

/// The key of the pins for a cgroup that is not a pod's. It has the cgroup's id: the kernel does not give an id to
/// another cgroup before the next boot, and a path may be too long for the name of a directory.
pub fn key_of_cgroup(id: u64) -> String {
    format!("cgroup-{id}")
}

/// Removes a pod's directory with its links, if it has no attachment, finished or not. The shared programs and maps go
/// with the last pod.
fn remove_pod_if_unused(pod: &Path) -> Result<()> {
    if directories(pod).iter().all(|(name, _)| name == LINKS) {
        remove_directory(&pod.join(LINKS))?;
        remove_if_empty(pod)?;
    }
    pod.parent().map_or(Ok(()), remove_if_unused)
}

/// Removes the programs and maps that the pods of a layout share, if the layout has no pods.
fn remove_if_unused(layout: &Path) -> Result<()> {
    /// The link count of a layout without pods: two for the directory itself, one for the finished directory of the
    /// node's programs, one for the unfinished directory. Each pod's directory adds one.
    const LINKS_WITHOUT_PODS: u64 = 4;
    // The count is looked at first: a node may have thousands of pods, and reading the directory gets hundreds at a
    // time.
    if fs::metadata(layout).is_ok_and(|found| found.nlink() > LINKS_WITHOUT_PODS) {
        return Ok(());
    }
    let mut entries = fs::read_dir(layout).into_iter().flatten().flatten();
    if entries.any(|entry| entry.file_name().to_str().and_then(decode).is_some()) {
        return Ok(());
    }
    let node = layout.join(NODE);
    remove_directory(&with_suffix(&node, NEW))?;
    remove_directory(&node)?;
    remove_if_empty(layout)
}

fn find(layouts: &[PathBuf], place: &Place) -> Option<PathBuf> {
    let below = Path::new(&encode(&place.pod)).join(encode(&place.interface));
    // A directory without OWNER is the rest of a killed DEL.
    layouts.iter().map(|layout| layout.join(&below)).find(|path| path.join(OWNER).exists())
}

/// All attachments, and the number of directories of unfinished ones.
fn list(root: &Path) -> (Vec<(Place, PathBuf)>, usize) {
    let (mut found, mut unfinished) = (Vec::new(), 0);
    // In the order of their names, because callers compare two readings.
    let mut layouts = layouts(root);
    layouts.sort();
    for layout in layouts {
        for (pod, pod_path) in pods(&layout) {
            for (interface, path) in directories(&pod_path) {
                unfinished += usize::from([NEW, OLD].iter().any(|suffix| interface.ends_with(suffix)));
                if let (Some(pod), Some(interface)) = (decode(&pod), decode(&interface)) {
                    found.push((Place { pod, interface }, path));
                }
            }
        }
    }
    (found, unfinished)
}

/// Leaves only a finished attachment: the one in its directory, else the one that was being replaced, else none.
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
    remove_pod_if_unused(&pod)
}

/// Removes a directory of pins, OWNER last. It is no error if there is no such directory.
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

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
