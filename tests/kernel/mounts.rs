//! Mounts that are visible only to one thread and to the plugins that it calls.

use std::path::Path;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Runs `work` on a thread with a copy of this machine's mounts. Mounts and unmounts in it disappear with the thread.
pub fn with_own<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let inside = || {
        // unshare(2) demands that the thread no longer shares its root and working directory with other threads.
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(inside).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Unmounts a filesystem, and all filesystems mounted in it.
pub fn without(path: &Path) {
    umount2(path, MntFlags::MNT_DETACH).unwrap();
}

/// Makes STATUS forget what it has found, and remember new results only within [`with_own`].
pub fn without_memory() {
    empty(Path::new("/run/podshaper"));
}

/// Hides the runtime's results, and the files that podshaper keeps beside them.
pub fn without_results() {
    empty(Path::new("/var/lib/cni"));
}

/// Mounts an empty directory over a path.
pub fn empty(path: &Path) {
    // Where it exists, it is the node's own directory.
    std::fs::create_dir_all(path).unwrap();
    mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), Some("mode=700")).unwrap();
}

/// Mounts a bpffs without pins over the node's.
pub fn empty_bpffs() {
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), Some("mode=700")).unwrap();
}

/// Makes a file or a directory visible at another path as well.
pub fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).unwrap();
}

/// The number of filesystems that are mounted at a path, one over the other.
pub fn count_at(path: &Path) -> usize {
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|line| line.split(' ').nth(4).map(Path::new) == Some(path)).count()
}

/// Replaces /sys/fs by one with cgroups, but without a directory to mount bpffs on.
pub fn hide_bpffs() {
    let (cgroups, aside) = (Path::new("/sys/fs/cgroup"), tempfile::tempdir().unwrap());
    bind(cgroups, aside.path());
    mount(Some("none"), "/sys/fs", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    std::fs::create_dir(cgroups).unwrap();
    bind(aside.path(), cgroups);
    without(aside.path());
}
