//! Mounts that only one thread, and the plugins it calls, see.

use std::path::Path;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread with a copy of this machine's mounts; what it mounts and unmounts goes with the thread.
pub fn with_own<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        // A thread shares its root and working directory with the others, which must end first.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Takes a filesystem away, and those mounted in it.
pub fn without(path: &Path) {
    umount2(path, MntFlags::MNT_DETACH).unwrap();
}

/// Has STATUS remember nothing, and what it finds from now on only where [`with_own`] is at work.
pub fn without_memory() {
    empty(Path::new("/run/podshaper"));
}

/// Has nobody's results be there, nor what podshaper keeps beside them.
pub fn without_results() {
    empty(Path::new("/var/lib/cni"));
}

/// Puts an empty directory over one.
pub fn empty(path: &Path) {
    // It is the node's own, where there is one.
    std::fs::create_dir_all(path).unwrap();
    mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some("mode=700")).unwrap();
}

/// Shows a file or a directory at another place as well.
pub fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).unwrap();
}

/// How many filesystems are mounted at a path, one over the other.
pub fn count_at(path: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|line| line.split(' ').nth(4).map(Path::new) == Some(path)).count()
}

/// Puts a /sys/fs in place in which there are cgroups, but no directory to mount bpffs on.
pub fn hide_bpffs() {
    let (cgroups, aside) = (Path::new("/sys/fs/cgroup"), tempfile::tempdir().unwrap());
    bind(cgroups, aside.path());
    mount(Some("none"), "/sys/fs", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    std::fs::create_dir(cgroups).unwrap();
    bind(aside.path(), cgroups);
    without(aside.path());
}
