//! Runs something inside the pod's network namespace, and what is found there.
//!
//! A namespace belongs to a thread. The work is done on a thread of its own, which enters the namespace and ends there: the
//! caller never leaves its own, so there is no way back that could fail, whether the work returns, fails or panics.

use std::panic::resume_unwind;
use std::path::Path;
use std::thread;

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
pub struct Interface {
    /// The number that `skb->ifindex` has in the programs; unique within its namespace only.
    pub index: u32,
}

/// Runs `work` inside the network namespace at `path` (`CNI_NETNS`) and returns what it returned.
///
/// # Errors
/// Those of `work`; [`Code::Netns`] if `path` is not a network namespace, or is the caller's own: such a pod uses the host's
/// network, and what is meant for the pod would be done to the node.
pub fn in_netns<T: Send>(path: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let at = path.display();
    let failed =
        |cause: Errno, what: &str| Error::because(Code::Netns, format!("enter the pod's netns {at}: {what}"), cause);
    let read = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let own =
        open(OWN, read, Mode::empty()).map_err(|errno| failed(errno, "open its own at /proc/thread-self/ns/net"))?;
    let pods = open(path, read, Mode::empty()).map_err(|errno| failed(errno, "open (the sandbox may be gone)"))?;
    // Left behind by a reboot or an unmount, the file is an empty one on tmpfs.
    if fstatfs(&pods).map_err(|errno| failed(errno, "statfs"))?.filesystem_type() != NSFS_MAGIC {
        return Err(Error::new(
            Code::Netns,
            format!("enter the pod's netns {at}: not a namespace, perhaps the leftover of a sandbox of a former boot"),
        ));
    }
    let [own, there] = [&own, &pods].map(|fd| fstat(fd).map(|found| (found.st_dev, found.st_ino)));
    if own.map_err(|errno| failed(errno, "fstat of its own"))? == there.map_err(|errno| failed(errno, "fstat"))? {
        return Err(Error::new(
            Code::Netns,
            format!("enter the pod's netns {at}: it is the host's own (hostNetwork): such a pod cannot be limited"),
        ));
    }
    let inside = || {
        setns(&pods, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            Errno::EINVAL => failed(errno, "setns (a namespace of another kind)"),
            _ => failed(errno, "setns (needs CAP_SYS_ADMIN)"),
        })?;
        work()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("in-netns".into()).spawn_scoped(scope, inside);
        let thread = thread.map_err(|cause| {
            Error::because(Code::Netns, format!("enter the pod's netns {at}: start a thread"), cause)
        })?;
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// The interface `ifname` of the calling thread's namespace; `netns` is only named in the error.
///
/// # Errors
/// [`Code::Netns`] if there is none of that name.
pub fn interface(ifname: &str, netns: &Path) -> Result<Interface> {
    if_nametoindex(ifname).map(|index| Interface { index }).map_err(|errno| {
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
    use std::path::PathBuf;

    use nix::sched::unshare;
    use tempfile::tempdir;

    use super::*;
    use crate::{packets, units::Rate};

    const TSO_RTT: &str = "/proc/sys/net/ipv4/tcp_tso_rtt_log";

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
            let error = in_netns(path, || -> Result<()> { panic!("entered {}", path.display()) }).unwrap_err();
            assert_eq!(error.code(), Code::Netns);
            assert_eq!(error.to_string(), format!("enter the pod's netns {}: {why}", path.display()));
        }
    }

    #[test]
    fn a_missing_interface_is_named_with_its_namespace() {
        for ifname in ["podshaper-none", "a-name-longer-than-the-kernel-takes", ""] {
            assert_eq!(
                interface(ifname, Path::new("/run/netns/x")).unwrap_err().to_string(),
                format!(
                    "find the interface {ifname:?} in the netns /run/netns/x; podshaper must come after the plugin that makes \
                     it: ENODEV: No such device"
                )
            );
        }
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn work_runs_inside_and_the_caller_stays_where_it_is() {
        let (home, netns) = (here(), Netns::new());
        assert_eq!(in_netns(&netns.path(), || Ok(here())).unwrap(), netns.id());
        assert_eq!(here(), home);

        let failed = in_netns(&netns.path(), || -> Result<()> { Err(Error::new(Code::Kernel, "as said")) });
        assert_eq!(failed.unwrap_err().to_string(), "as said");
        assert_eq!(here(), home);

        let panicked =
            catch_unwind(AssertUnwindSafe(|| in_netns(&netns.path(), || -> Result<()> { panic!("on purpose") })));
        assert_eq!(*panicked.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
        assert_eq!(here(), home);

        let other = Netns::new();
        let nested = || Ok((in_netns(&other.path(), || Ok(here()))?, here()));
        assert_eq!(in_netns(&netns.path(), nested).unwrap(), (other.id(), netns.id()));
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn a_namespace_of_another_kind_is_refused() {
        let error = in_netns(Path::new("/proc/self/ns/uts"), || Ok(())).unwrap_err();
        assert_eq!(
            error.to_string(),
            "enter the pod's netns /proc/self/ns/uts: setns (a namespace of another kind): EINVAL: Invalid argument"
        );
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn interfaces_and_sysctls_are_the_pods() {
        let netns = Netns::new();
        let path = netns.path();
        assert_eq!(in_netns(&path, || interface("lo", &path)).unwrap(), Interface { index: 1 });

        // Read before, so that the host's file is in the dentry cache.
        let hosts = std::fs::read_to_string(TSO_RTT).ok();
        let small = || {
            packets::keep_small(1, Rate::bits_per_s(10_000_000).unwrap(), None)?;
            Ok(std::fs::read_to_string(TSO_RTT).ok())
        };
        let pods = in_netns(&path, small).unwrap();
        assert_eq!(pods, hosts.as_ref().map(|_| "0\n".to_owned()));
        assert_eq!(std::fs::read_to_string(TSO_RTT).ok(), hosts, "the host's setting is untouched");
        let again = in_netns(&path, || Ok(std::fs::read_to_string(TSO_RTT).ok())).unwrap();
        assert_eq!(again, pods, "it stays with the namespace");
    }
}
