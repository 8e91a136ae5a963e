//! A pod's directory in the cgroup2 hierarchy, as kubelet's two drivers name it.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::{Context, Failure, Result, note};

/// The sticky bit, which has no meaning here, marks the parents of pods (`kubepods`, ..) that a harness made. Any
/// process that finds such a directory empty removes it: this process, another harness at the same time, or a later
/// one after a kill. Kubelet's directories stay.
const MADE_BY_HARNESS: u32 = 0o1000;
/// Another process may remove a parent after it was made and before its child is made.
const ATTEMPTS: u32 = 100;

/// How a kubelet's cgroup driver names a pod's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `kubepods/burstable/pod<uid>`
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`
    Systemd,
}

impl Driver {
    /// The path below the mount, as a runtime passes it in `cgroupPath`.
    pub fn path(self, uid: &str) -> String {
        match self {
            Self::Cgroupfs => format!("/kubepods/burstable/pod{uid}"),
            Self::Systemd => {
                let uid = uid.replace('-', "_");
                format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice")
            }
        }
    }
}

/// Where cgroup2 is mounted: /sys/fs/cgroup, or .../unified on a hybrid host.
pub fn mount() -> Result<PathBuf> {
    // Read for this thread, since a test may have mounts of its own.
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("read /proc/thread-self/mountinfo")?;
    let found = mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| mount.split(' ').nth(4)).flatten()
    });
    found
        .map(PathBuf::from)
        .ok_or_else(|| Failure::new("find cgroup2 in /proc/thread-self/mountinfo: it is not mounted"))
}

/// A pod's cgroup. Dropping it kills all processes in it.
#[derive(Debug)]
pub struct PodCgroup {
    path: PathBuf,
}

impl PodCgroup {
    /// Makes the directory: empty, as kubelet leaves it before ADD.
    pub fn new(path: PathBuf) -> Result<Self> {
        let cgroup = Self { path };
        cgroup.make()?;
        Ok(cgroup)
    }

    /// A cgroup that another process is to make; removed like the others.
    pub fn absent(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory again if it has been removed, as a runtime does when it starts a container.
    pub fn make(&self) -> Result<()> {
        let mut result = Ok(());
        for _ in 0..ATTEMPTS {
            result = self.make_parents().and_then(|()| make_directory(&self.path));
            if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
                continue;
            }
            break;
        }
        result.context(format_args!("make {}", self.path.display()))
    }

    fn make_parents(&self) -> io::Result<()> {
        let mut missing: Vec<&Path> = self.parents().take_while(|parent| !parent.exists()).collect();
        missing.reverse();
        for parent in missing {
            match fs::create_dir(parent) {
                Ok(()) => fs::set_permissions(parent, Permissions::from_mode(0o755 | MADE_BY_HARNESS))?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The directories above, innermost first.
    fn parents(&self) -> impl Iterator<Item = &Path> {
        self.path.ancestors().skip(1)
    }

    /// The directory of a container in the pod, made if it is not there.
    pub fn container(&self, name: &str) -> Result<PathBuf> {
        self.make()?;
        let path = self.path.join(name);
        make_directory(&path).context(format_args!("make {}", path.display()))?;
        Ok(path)
    }

    /// Removes the directory, as kubelet does before a runtime's last DELs. Does nothing if it is gone.
    pub fn remove(&self) -> Result<()> {
        self.kill();
        remove_tree(&self.path).context(format_args!("remove {}", self.path.display()))
    }

    /// Kills every process in the cgroup.
    pub fn kill(&self) {
        // Since Linux 5.14. It kills the whole subtree at once.
        if fs::write(self.path.join("cgroup.kill"), "1").is_err() {
            kill_each(&self.path);
        }
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            note(error);
        }
        let made = |parent: &&Path| fs::metadata(parent).is_ok_and(|found| found.mode() & MADE_BY_HARNESS != 0);
        // The first parent that is still in use ends the loop: the parents above are in use as well.
        let _ = self.parents().take_while(made).try_for_each(fs::remove_dir);
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn kill_each(path: &Path) {
    children(path).iter().for_each(|child| kill_each(child));
    for id in fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(id) = id.parse() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// A killed process leaves its cgroup a moment later; until then the directory is busy.
fn remove_tree(path: &Path) -> io::Result<()> {
    for child in children(path) {
        remove_tree(&child)?;
    }
    let start = Instant::now();
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && start.elapsed() < Duration::from_secs(2) => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}
