//! A pod's directory in the cgroup2 hierarchy, in the shapes kubelet's two drivers give it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Context, Failure, Result, note};

/// Parents this process made, outermost first. They are shared by its pods and go with the last one; kubelet's own stay.
static MADE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How a kubelet's cgroup driver names a pod's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `kubepods/burstable/pod<uid>`
    Cgroupfs,
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid with _>.slice`
    Systemd,
}

impl Driver {
    /// Below the mount, as a runtime passes it in `cgroupPath`.
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
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let found = mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_cgroup2 = filesystem.split(' ').next() == Some("cgroup2");
        is_cgroup2.then(|| mount.split(' ').nth(4)).flatten()
    });
    found.map(PathBuf::from).ok_or_else(|| Failure::new("find cgroup2 in /proc/self/mountinfo: it is not mounted"))
}

/// A pod's cgroup. Whatever runs in it is killed when it is dropped.
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

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory again if it has been removed, as a runtime does when it starts a container.
    pub fn make(&self) -> Result<()> {
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parents: Vec<&Path> = self.path.ancestors().skip(1).take_while(|parent| !parent.exists()).collect();
        parents.reverse();
        for parent in parents {
            match fs::create_dir(parent) {
                Ok(()) => made.push(parent.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(format_args!("make {}", parent.display())),
            }
        }
        make_directory(&self.path)
    }

    /// The directory of a container in the pod, made if it is not there.
    pub fn container(&self, name: &str) -> Result<PathBuf> {
        self.make()?;
        let path = self.path.join(name);
        make_directory(&path)?;
        Ok(path)
    }

    /// Removes the directory, as kubelet does before a runtime's last DELs. Nothing happens if it is gone.
    pub fn remove(&self) -> Result<()> {
        self.kill();
        remove_tree(&self.path).context(format_args!("remove {}", self.path.display()))
    }

    /// Kills every process in the cgroup.
    pub fn kill(&self) {
        // Since Linux 5.14; it takes the whole subtree at once.
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
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept: Vec<PathBuf> = made.drain(..).rev().filter(|parent| fs::remove_dir(parent).is_err()).collect();
        kept.retain(|parent| parent.exists());
        kept.reverse();
        *made = kept;
    }
}

fn make_directory(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).context(format_args!("make {}", path.display()))
        }
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

/// A killed process leaves its cgroup a moment later; until then it is busy.
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
