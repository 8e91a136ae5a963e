//! A pod's network namespace, entered once, and what is found there.
//!
//! A namespace belongs to a thread. The work is done on a thread of its own, which enters the namespace and ends there: the
//! caller never leaves its own, so there is no way back that could fail, whether the work returns, fails or panics.

use std::fmt;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::error::{Code, Error, Result};

/// /proc/self would be the main thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// An interface of the namespace the calling thread is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The number that `skb->ifindex` has in the programs; unique within its namespace only.
    pub index: u32,
}

/// A pod's network namespace, not entered yet.
pub struct Namespace {
    path: PathBuf,
    file: OwnedFd,
    /// Its number, by which it is told from others as long as it lives.
    pub inode: u64,
}

/// A network namespace that was entered. The thread in it ends when this is dropped.
pub struct Entered {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce() + Send>;

impl Namespace {
    /// The network namespace at `path` (`CNI_NETNS`).
    ///
    /// # Errors
    /// [`Code::Netns`] if `path` is not a network namespace, or is the caller's own: such a pod uses the host's network, and what
    /// is meant for the pod would be done to the node.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |cause: Errno, what: &str| failed(path, what, cause);
        let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let own = open(OWN, read, Mode::empty())
            .map_err(|errno| failed(errno, "open its own at /proc/thread-self/ns/net"))?;
        let file = open(path, read, Mode::empty()).map_err(|errno| failed(errno, "open (the sandbox may be gone)"))?;
        // Left behind by a reboot or an unmount, the file is an empty one on tmpfs.
        if fstatfs(&file).map_err(|errno| failed(errno, "statfs"))?.filesystem_type() != NSFS_MAGIC {
            return Err(refused(path, "not a namespace, perhaps the leftover of a sandbox of a former boot"));
        }
        let own = fstat(&own).map_err(|errno| failed(errno, "fstat of its own"))?;
        let there = fstat(&file).map_err(|errno| failed(errno, "fstat"))?;
        if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) {
            return Err(refused(path, "it is the host's own (hostNetwork): such a pod cannot be limited"));
        }
        Ok(Self { path: path.to_path_buf(), file, inode: there.st_ino })
    }

    /// Enters it.
    ///
    /// # Errors
    /// [`Code::Netns`]: it is a namespace of another kind, or podshaper may not.
    pub fn enter(self) -> Result<Entered> {
        let Self { path, file, inode: _ } = self;
        let (jobs, received) = channel();
        let (said, answer) = channel();
        let at = path.clone();
        let inside = move || {
            let entered = setns(&file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
                Errno::EINVAL => failed(&at, "setns (a namespace of another kind)", errno),
                _ => failed(&at, "setns (needs CAP_SYS_ADMIN)", errno),
            });
            let is_in = entered.is_ok();
            // Whoever waits for it is there.
            let _ = said.send(entered);
            if is_in {
                received.into_iter().for_each(|job: Job| job());
            }
        };
        let thread = thread::Builder::new().name("in-netns".into()).spawn(inside);
        let thread = thread.map_err(|cause| failed(&path, "start a thread", cause))?;
        let entered = Entered { jobs: Some(jobs), thread: Some(thread) };
        answer.recv().unwrap_or_else(|_| Err(refused(&path, "its thread ended")))?;
        Ok(entered)
    }
}

impl Entered {
    /// Runs `work` inside and returns what it returned. If it panics, so does this.
    pub fn run<T: Send + 'static>(&mut self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (said, answer): (_, Receiver<T>) = channel();
        let job: Job = Box::new(move || drop(said.send(work())));
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        match answer.recv().ok().filter(|_| sent) {
            Some(answer) => answer,
            None => self.end(),
        }
    }

    /// The thread ends by itself only in a panic.
    fn end(&mut self) -> ! {
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(panic)) => resume_unwind(panic),
            _ => resume_unwind(Box::new("the thread in the pod's netns has ended")),
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        drop(self.jobs.take());
        // A panic of its has been passed on, or there was none.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn failed(path: &Path, what: &str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::because(Code::Netns, entering(path, what), cause)
}

fn refused(path: &Path, why: &str) -> Error {
    Error::new(Code::Netns, entering(path, why))
}

fn entering(path: &Path, what: impl fmt::Display) -> String {
    format!("enter the pod's netns {}: {what}", path.display())
}

/// The interface `ifname` of the calling thread's namespace; `netns` is only named in the error.
///
/// # Errors
/// [`Code::Netns`] if there is none of that name.
pub fn link(ifname: &str, netns: &Path) -> Result<Link> {
    if_nametoindex(ifname).map(|index| Link { index }).map_err(|errno| {
        let text = format!(
            "find the interface {ifname:?} in the netns {}; podshaper must come after the plugin that makes it",
            netns.display()
        );
        Error::because(Code::Netns, text, errno)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use nix::sched::unshare;
    use tempfile::tempdir;

    use super::*;

    /// A network namespace with nothing but `lo`, which the kernel takes back when the file is closed.
    struct Netns(File);

    impl Netns {
        fn new() -> Self {
            let fresh = || {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                File::open(OWN).unwrap()
            };
            Self(thread::spawn(fresh).join().unwrap())
        }

        fn path(&self) -> PathBuf {
            format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
        }

        fn id(&self) -> (u64, u64) {
            id_of(&self.0)
        }
    }

    fn id_of(file: &File) -> (u64, u64) {
        let found = fstat(file).unwrap();
        (found.st_dev, found.st_ino)
    }

    fn here() -> (u64, u64) {
        id_of(&File::open(OWN).unwrap())
    }

    #[test]
    fn what_is_not_a_pods_namespace_is_refused() {
        let dir = tempdir().unwrap();
        let [gone, leftover] = ["gone", "leftover"].map(|name| dir.path().join(name));
        std::fs::write(&leftover, "").unwrap();
        for (path, why) in [
            (gone.as_path(), "open (the sandbox may be gone): ENOENT: No such file or directory"),
            (&leftover, "not a namespace, perhaps the leftover of a sandbox of a former boot"),
            (dir.path(), "not a namespace, perhaps the leftover of a sandbox of a former boot"),
            (Path::new(OWN), "it is the host's own (hostNetwork): such a pod cannot be limited"),
        ] {
            let error = Namespace::open(path).err().unwrap();
            assert_eq!(error.code(), Code::Netns);
            assert_eq!(error.to_string(), format!("enter the pod's netns {}: {why}", path.display()));
        }
    }

    #[test]
    fn a_missing_interface_is_named_with_its_namespace() {
        for ifname in ["podshaper-none", "a-name-longer-than-the-kernel-takes", ""] {
            assert_eq!(
                link(ifname, Path::new("/run/netns/x")).unwrap_err().to_string(),
                format!(
                    "find the interface {ifname:?} in the netns /run/netns/x; podshaper must come after the plugin that makes \
                     it: ENODEV: No such device"
                )
            );
        }
    }

    fn enter(path: &Path) -> Result<Entered> {
        Namespace::open(path).and_then(Namespace::enter)
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn work_runs_inside_and_the_caller_stays_where_it_is() {
        let (home, netns) = (here(), Netns::new());
        let mut inside = enter(&netns.path()).unwrap();
        assert_eq!([inside.run(here), inside.run(here)], [netns.id(), netns.id()]);
        assert_eq!(here(), home);
        let number = Namespace::open(&netns.path()).unwrap().inode;
        assert_eq!(number, netns.id().1);

        let panicked = catch_unwind(AssertUnwindSafe(|| inside.run(|| panic!("on purpose"))));
        assert_eq!(*panicked.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
        assert_eq!(here(), home);

        let other = Netns::new();
        let path = other.path();
        let nested = move || (enter(&path).unwrap().run(here), here());
        assert_eq!(enter(&netns.path()).unwrap().run(nested), (other.id(), netns.id()));
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn a_namespace_of_another_kind_is_refused() {
        let error = enter(Path::new("/proc/self/ns/uts")).err().unwrap();
        assert_eq!(
            error.to_string(),
            "enter the pod's netns /proc/self/ns/uts: setns (a namespace of another kind): EINVAL: Invalid argument"
        );
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn interfaces_are_the_pods() {
        let netns = Netns::new();
        let path = netns.path();
        assert_eq!(enter(&path).unwrap().run(move || link("lo", &path)).unwrap(), Link { index: 1 });
    }
}
