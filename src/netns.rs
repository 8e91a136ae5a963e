//! A pod's network namespace, which is entered once, and the interfaces in it.
//!
//! A namespace belongs to a thread. The calling thread goes there and comes back, whether the work returns, fails or
//! panics. A separate thread would cost an ADD a millisecond on a busy node, which has to schedule that thread several
//! times.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use netlink_packet_route::link::LinkMessage;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::{
    error::{Code, Error, Result},
    netlink::{self, Connection},
};

/// Not /proc/self, which would be the main thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// A pod's network namespace, not entered yet.
pub struct Namespace {
    path: PathBuf,
    home: OwnedFd,
    file: OwnedFd,
    /// Its inode number, which tells it from other namespaces as long as it lives.
    pub inode: u64,
}

/// A network namespace that can be entered.
pub struct Entered {
    home: OwnedFd,
    there: OwnedFd,
    /// The netlink connection in the namespace.
    connection: Option<Connection>,
}

/// The calling thread in another namespace, until this is dropped.
struct Away<'a> {
    entered: &'a mut Entered,
    /// The thread's netlink connection at home.
    connection: Option<Connection>,
}

impl Namespace {
    /// The network namespace at `path` (`CNI_NETNS`).
    ///
    /// # Errors
    /// [`Code::Netns`]: `path` is not a network namespace, or it is the caller's own. A pod in the caller's namespace
    /// uses the host's network, and changes for the pod would be made on the node.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |cause: Errno, what: &str| failed(path, what, cause);
        let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let home = open(OWN, read, Mode::empty())
            .map_err(|errno| failed(errno, "open its own at /proc/thread-self/ns/net"))?;
        let file = open(path, read, Mode::empty()).map_err(|errno| failed(errno, "open (the sandbox may be gone)"))?;
        // After a reboot or an unmount an empty file on tmpfs may be left.
        if fstatfs(&file).map_err(|errno| failed(errno, "statfs"))?.filesystem_type() != NSFS_MAGIC {
            return Err(refused(path, "not a namespace, perhaps the leftover of a sandbox of a former boot"));
        }
        let own = fstat(&home).map_err(|errno| failed(errno, "fstat of its own"))?;
        let there = fstat(&file).map_err(|errno| failed(errno, "fstat"))?;
        if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) {
            return Err(refused(path, "it is the host's own (hostNetwork): such a pod cannot be limited"));
        }
        Ok(Self { path: path.to_path_buf(), home, file, inode: there.st_ino })
    }

    /// Enters the namespace, runs `work` inside and leaves it.
    ///
    /// # Errors
    /// [`Code::Netns`]: it is a namespace of another kind. [`Code::Kernel`]: podshaper may not enter it.
    pub fn enter<T>(self, work: impl FnOnce() -> T) -> Result<(Entered, T)> {
        let Self { path, home, file: there, inode: _ } = self;
        let mut entered = Entered { home, there, connection: None };
        let done = match entered.go() {
            Ok(_away) => work(),
            Err(errno @ Errno::EINVAL) => return Err(failed(&path, "setns (a namespace of another kind)", errno)),
            Err(errno) => {
                let text = entering(&path, "setns (needs CAP_SYS_ADMIN)");
                return Err(Error::because(Code::Kernel, text, errno));
            }
        };
        Ok((entered, done))
    }
}

impl Entered {
    /// Runs `work` inside and returns its result. If `work` panics, so does this.
    ///
    /// # Panics
    /// The kernel has let the thread in before and does not now.
    #[expect(clippy::panic, reason = "the kernel let it in before: nobody could go on from here")]
    pub fn run<T>(&mut self, work: impl FnOnce() -> T) -> T {
        match self.go() {
            Ok(_away) => work(),
            // Changes for the pod must not be made on the node.
            Err(errno) => panic!("enter the pod's netns again: {errno}"),
        }
    }

    /// The caller's own namespace, as a descriptor that lives as long as this. By a process id the kernel would find
    /// the namespace in which the thread is now.
    pub fn home(&self) -> RawFd {
        self.home.as_raw_fd()
    }

    /// The namespace itself, as a descriptor that lives as long as this.
    pub fn there(&self) -> RawFd {
        self.there.as_raw_fd()
    }

    fn go(&mut self) -> nix::Result<Away<'_>> {
        setns(&self.there, CloneFlags::CLONE_NEWNET)?;
        let connection = netlink::replace_connection(self.connection.take());
        Ok(Away { entered: self, connection })
    }
}

impl Drop for Away<'_> {
    /// # Panics
    /// There is no way back: changes for the node must not be made in the pod. The next call clears what this one
    /// leaves.
    #[expect(clippy::panic, reason = "nobody may go on in the wrong namespace")]
    fn drop(&mut self) {
        if let Err(errno) = setns(&self.entered.home, CloneFlags::CLONE_NEWNET) {
            panic!("leave the pod's netns: {errno}");
        }
        self.entered.connection = netlink::replace_connection(self.connection.take());
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

/// The interface `ifname` of the calling thread's namespace. `netns` is only named in the error.
///
/// # Errors
/// [`Code::Netns`] if there is none of that name.
pub fn link(ifname: &str, netns: &Path) -> Result<LinkMessage> {
    /// The kernel's IFNAMSIZ, without the zero byte at the end.
    const MAX_NAME_BYTES: usize = 15;
    let text = || {
        format!(
            "find the interface {ifname:?} in the netns {}; podshaper must come after the plugin that makes it",
            netns.display()
        )
    };
    let found = match ifname.len() {
        1..=MAX_NAME_BYTES => netlink::link_by_name(ifname),
        _ => Ok(None),
    };
    let found = found.map_err(|cause| Error::because(Code::Netns, text(), cause))?;
    found.ok_or_else(|| Error::because(Code::Netns, text(), Errno::ENODEV))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;

    use nix::sched::unshare;
    use tempfile::tempdir;

    use super::*;

    /// A network namespace with nothing but `lo`. The kernel removes it when the file is closed.
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
        Namespace::open(path).and_then(|namespace| namespace.enter(|| ())).map(|(entered, ())| entered)
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
        let lo = enter(&path).unwrap().run(move || link("lo", &path)).unwrap();
        assert_eq!(lo.header.index, 1);
    }
}
