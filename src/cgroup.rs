//! The cgroup v2 directory of a pod: finds it, opens it, and on a hybrid host makes and removes it.
//!
//! The directory is the pod's, not the sandbox's or a container's. Kubelet makes the pod's directory before the runtime
//! calls ADD. The directories of the sandbox and the containers do not exist yet at ADD, and will lie below the pod's.
//!
//! On a hybrid host kubelet makes the pod's directory on the v1 hierarchies only. Later runc puts the containers into
//! cgroup2 under the same relative path. So podshaper makes the pod's directory in cgroup2 at ADD. For a pod that is
//! limited later (`podshaper sync`), runc has already made the directory. Neither kubelet nor runc removes the
//! directory from cgroup2. Podshaper removes the directory of each pod that it has limited.

mod mounts;
mod names;
mod processes;
mod search;

use std::fs::{self, DirBuilder, remove_dir};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fchmod, fstat};

use crate::error::{Code, Error, Result};
pub use mounts::Hierarchies;
use names::Shape;
pub use processes::{network_namespace_of, network_namespaces, processes};
use search::{MAX_DEPTH, MAX_VISITED, Outcome};

/// The mode of the directories that podshaper makes. The sticky bit has no effect on a cgroup directory, and no other
/// program sets it. The bit marks the directory as podshaper's to remove; this fact is stored nowhere else. Podshaper
/// also sets the bit on a pod's directory that runc has made.
const MADE_HERE: u32 = 0o1755;
const STICKY: u32 = 0o1000;

/// How often [`PodCgroup::open`] starts anew when a DEL of another pod removes the parent directories at the same
/// moment. Two pods that come and go together need one or two attempts.
const OPEN_ATTEMPTS: u32 = 64;

/// How to find the pod's cgroup.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// A path below the cgroup2 mount, with or without a leading slash, as runtimes and the configuration give it in
    /// `cgroupPath`. CRI-O with the systemd driver gives the name of the slice alone.
    Path(&'a str),
    /// The pod's UID, already checked to be `[0-9A-Za-z-]{1,63}`. kubelet's UIDs for static pods have no dashes.
    Uid(&'a str),
}

/// The cgroup v2 directory of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The path, absolute, below the cgroup2 mount.
    pub path: PathBuf,
    /// Whether the directory did not exist when the pod was looked up (hybrid hosts only). [`PodCgroup::open`] would
    /// make it.
    pub missing: bool,
    /// The cgroup2 mount. Nothing is made at the mount or above it.
    mount: PathBuf,
    /// Whether the pod has a v1 directory. Then podshaper may make the one in cgroup2, even if it is removed between
    /// lookup and open.
    may_make: bool,
}

/// Finds the pod's cgroup; changes nothing. A search by UID works with every cgroup driver, QoS class and prefix that
/// kubelet uses.
///
/// # Errors
/// [`Code::Cgroup`] if there is no such cgroup, or if the given path is not a path below the mount.
pub fn find(hierarchies: &Hierarchies, wanted: Wanted<'_>) -> Result<PodCgroup> {
    match wanted {
        Wanted::Path(given) => by_path(hierarchies, given),
        Wanted::Uid(uid) => by_uid(hierarchies, uid),
    }
}

fn by_path(hierarchies: &Hierarchies, given: &str) -> Result<PodCgroup> {
    let place = names::relative(given)?;
    if hierarchies.roots().any(|root| search::is_dir(root, &place)) {
        return Ok(PodCgroup::at(hierarchies, &place));
    }
    let text = format!(
        "find the cgroup {given:?}: not {}; looked for {}; the path comes from the runtime's or the configuration's cgroupPath: \
         correct it there, or leave it out to have the pod found by its UID",
        where_searched(hierarchies),
        hierarchies.unified.join(place).display(),
    );
    Err(Error::new(Code::Cgroup, text))
}

fn by_uid(hierarchies: &Hierarchies, uid: &str) -> Result<PodCgroup> {
    let roots: Vec<&Path> = hierarchies.roots().collect();
    let gave_up = match search::by_uid(&roots, uid) {
        Outcome::Found(place) => return Ok(PodCgroup::at(hierarchies, &place)),
        Outcome::Absent { gave_up } => gave_up,
    };
    let bound = if gave_up { format!(", and gave up after {MAX_VISITED} directories") } else { String::new() };
    let text = format!(
        "find the cgroup of pod {uid}: not {}; looked for kubepods[-burstable|-besteffort]-pod{}.slice, \
         kubepods[/burstable|/besteffort]/pod{} down to a depth of {MAX_DEPTH}{bound}; kubelet makes it unless its cgroupsPerQOS \
         is off; with a runtime that knows the path (containerd 1.7, CRI-O) add the capability cgroupPath to the plugin",
        where_searched(hierarchies),
        Shape::Systemd.spell(uid),
        Shape::Cgroupfs.spell(uid),
    );
    Err(Error::new(Code::Cgroup, text))
}

fn where_searched(hierarchies: &Hierarchies) -> String {
    let unified = hierarchies.unified.display();
    match hierarchies.v1.len() {
        0 => format!("below {unified}"),
        count => format!("below {unified} nor on the cgroup v1 mounts ({count})"),
    }
}

impl PodCgroup {
    /// The cgroups above the pod's, up to the root of the mount. Directories above the mount are left out: they belong
    /// to other filesystems, whose inode numbers can be the same.
    pub fn above(&self) -> impl Iterator<Item = &Path> {
        self.path.ancestors().skip(1).take_while(|path| path.starts_with(&self.mount))
    }

    fn at(hierarchies: &Hierarchies, place: &Path) -> Self {
        Self {
            path: hierarchies.unified.join(place),
            missing: !search::is_dir(&hierarchies.unified, place),
            mount: hierarchies.unified.clone(),
            may_make: hierarchies.v1.iter().any(|root| search::is_dir(root, place)),
        }
    }

    /// Opens the directory. If it is missing and podshaper has to make it, makes it first. [`remove_if_ours`] later
    /// removes a directory that was made here or marked here.
    ///
    /// # Errors
    /// [`Code::Cgroup`] if it is gone, or cannot be made or opened.
    pub fn open(&self) -> Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        for _ in 0..OPEN_ATTEMPTS {
            match open(&self.path, flags, Mode::empty()) {
                Ok(fd) => {
                    self.take_over(&fd);
                    return Ok(fd);
                }
                Err(Errno::ENOENT) if self.may_make => self.make()?,
                Err(errno) => {
                    let text = format!("open the pod's cgroup {} (it goes away with the pod)", self.path.display());
                    return Err(Error::because(Code::Cgroup, text, errno));
                }
            }
        }
        let text = format!("make the pod's cgroup {}: removed again {OPEN_ATTEMPTS} times", self.path.display());
        Err(Error::new(Code::Cgroup, text))
    }

    /// Marks the directory as podshaper's to remove, where kubelet has its own directory on v1 and so will not remove
    /// this one. The parents of the directory are not marked.
    fn take_over(&self, directory: &OwnedFd) {
        let marked = || fchmod(directory, Mode::from_bits_truncate(fstat(directory)?.st_mode | STICKY));
        if self.may_make
            && let Err(errno) = marked()
        {
            log::debug!("the cgroup {} will be left when its pod has ended: mark it: {errno}", self.path.display());
        }
    }

    /// Makes the missing directories below the mount. Returns early if one of them is removed while the next is made;
    /// the caller then calls again.
    fn make(&self) -> Result<()> {
        let mut missing: Vec<&Path> = self.path.ancestors().take_while(|dir| *dir != self.mount).collect();
        missing.reverse();
        for dir in missing {
            let Err(error) = DirBuilder::new().mode(MADE_HERE).create(dir) else { continue };
            match errno(&error) {
                Errno::EEXIST => {}
                // ENODEV: the parent is being removed at this moment (Linux kernel/cgroup/cgroup.c, cgroup_mkdir()).
                Errno::ENOENT | Errno::ENODEV => return Ok(()),
                _ => return Err(Error::because(Code::Cgroup, format!("make the cgroup {}", dir.display()), error)),
            }
        }
        Ok(())
    }
}

/// Removes the pod's directory at `path` from cgroup2, and its parents below the mount, as long as each is marked as
/// podshaper's and is empty. DEL calls this, and so does the undoing of an ADD. Without v1 hierarchies, or with a path
/// that is not below the mount (a record from before a reboot), there is nothing to remove.
///
/// An attached eBPF program does not prevent the removal of the directory. So only the caller that removes the pod's
/// last attachment may call this.
///
/// # Errors
/// [`Code::Cgroup`] if an empty directory cannot be removed.
pub fn remove_if_ours(hierarchies: &Hierarchies, path: &Path) -> Result<()> {
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    if !hierarchies.are_hybrid() || !is_plain || !path.starts_with(&hierarchies.unified) {
        return Ok(());
    }
    for dir in path.ancestors().take_while(|dir| *dir != hierarchies.unified) {
        match dir.symlink_metadata() {
            Ok(found) if found.is_dir() && found.mode() & STICKY != 0 => {}
            Ok(_) => return Ok(()),
            Err(_) => continue, // gone already, its parents perhaps not: two DELs can run at once
        }
        let Err(error) = remove_dir(dir) else { continue };
        match errno(&error) {
            Errno::ENOENT => {}
            // cgroup2 returns EBUSY while the directory holds processes or cgroups; other filesystems return ENOTEMPTY.
            Errno::EBUSY | Errno::ENOTEMPTY => return Ok(()),
            _ => return Err(Error::because(Code::Cgroup, format!("remove the cgroup {}", dir.display()), error)),
        }
    }
    Ok(())
}

/// Whether the pod of a directory on a hybrid host has ended. The existence of the directory does not tell: podshaper
/// has to remove it. The pod has ended if the directory is marked as podshaper's, kubelet has removed its own directory
/// on v1, and no process is in the cgroup.
pub fn has_ended(hierarchies: &Hierarchies, path: &Path) -> bool {
    let Ok(place) = path.strip_prefix(&hierarchies.unified) else { return false };
    let is_ours = || path.symlink_metadata().is_ok_and(|found| found.is_dir() && found.mode() & STICKY != 0);
    let is_empty = || fs::read_to_string(path.join("cgroup.events")).is_ok_and(|text| text.contains("populated 0"));
    hierarchies.are_hybrid()
        && is_ours()
        && !hierarchies.v1.iter().any(|root| search::is_dir(root, place))
        && is_empty()
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use std::fs::create_dir_all;

    use tempfile::{TempDir, tempdir};

    use super::*;

    const PLACE: &str = "kubepods/burstable/podu-1";
    const SLICE: &str = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice";

    /// The mounts `unified` and two v1 mounts, `memory` and `pids`, in a temporary directory that lives as long as the
    /// first value.
    fn hybrid(dirs: &[&str]) -> (TempDir, Hierarchies) {
        let root = tempdir().unwrap();
        for dir in ["unified", "memory", "pids"].iter().chain(dirs) {
            create_dir_all(root.path().join(dir)).unwrap();
        }
        let v1 = ["memory", "pids"].map(|name| root.path().join(name)).to_vec();
        let hierarchies = Hierarchies { unified: root.path().join("unified"), v1 };
        (root, hierarchies)
    }

    fn pure(dirs: &[&str]) -> (TempDir, Hierarchies) {
        let root = tempdir().unwrap();
        for dir in dirs {
            create_dir_all(root.path().join(dir)).unwrap();
        }
        let hierarchies = Hierarchies { unified: root.path().into(), v1: Vec::new() };
        (root, hierarchies)
    }

    fn tree(root: &Path) -> Vec<PathBuf> {
        let below = std::fs::read_dir(root).unwrap().flat_map(|entry| tree(&entry.unwrap().path()));
        std::iter::once(root.into()).chain(below).collect()
    }

    #[test]
    fn a_pods_directory_is_found_in_cgroup2_or_made_there_after_its_v1_directory() {
        let (by_uid, by_slice) = (Wanted::Uid("u-1"), Wanted::Path("kubepods-burstable-podu_1.slice"));
        let by_path = Wanted::Path("/kubepods/burstable/podu-1");
        for (dirs, wanted, place, missing) in [
            ([format!("unified/{PLACE}"), format!("memory/{PLACE}")], by_uid, PLACE, false),
            ([format!("unified/{PLACE}"), format!("memory/{PLACE}")], by_path, PLACE, false),
            ([format!("unified/{PLACE}"), "memory/other".into()], by_path, PLACE, false),
            (["unified/other".into(), format!("pids/{PLACE}")], by_uid, PLACE, true),
            (["unified/other".into(), format!("pids/{PLACE}")], by_path, PLACE, true),
            (["unified/other".into(), format!("pids/{SLICE}")], by_uid, SLICE, true),
            (["unified/other".into(), format!("pids/{SLICE}")], by_slice, SLICE, true),
            // The systemd shape is preferred on every mount.
            ([format!("unified/{PLACE}"), format!("memory/{SLICE}")], by_uid, SLICE, true),
            (
                ["unified/docker/7".into(), format!("memory/docker/7/{PLACE}")],
                by_uid,
                "docker/7/kubepods/burstable/podu-1",
                true,
            ),
        ] {
            let (_root, hierarchies) = hybrid(&dirs.each_ref().map(String::as_str));
            let before = tree(&hierarchies.unified);
            let found = find(&hierarchies, wanted).unwrap();
            let expected = hierarchies.unified.join(place);
            assert_eq!((&found.path, found.missing), (&expected, missing), "{dirs:?}");
            assert_eq!(tree(&hierarchies.unified), before, "find changes nothing: {dirs:?}");
            found.open().unwrap();
            assert!(expected.is_dir());

            remove_if_ours(&hierarchies, &expected).unwrap();
            let is_kubelets = |dir: &String| !dir.starts_with("unified") && dir.ends_with(place);
            if missing || !dirs.iter().any(is_kubelets) {
                assert_eq!(tree(&hierarchies.unified), before, "all that was made is removed and no more: {dirs:?}");
            } else {
                // This one is runc's: kubelet has its own directory on v1 only.
                let expected: Vec<_> = before.into_iter().filter(|path| *path != expected).collect();
                assert_eq!(tree(&hierarchies.unified), expected, "the pod's alone is removed: {dirs:?}");
            }
        }
    }

    #[test]
    fn on_a_pure_host_nothing_is_made_or_removed() {
        let (_root, hierarchies) = pure(&[PLACE]);
        for wanted in [Wanted::Uid("u-1"), Wanted::Path(PLACE)] {
            let found = find(&hierarchies, wanted).unwrap();
            assert!(!found.missing);
            found.open().unwrap();
            remove_if_ours(&hierarchies, &found.path).unwrap();
            assert!(found.path.is_dir());
        }
        let marked = hierarchies.unified.join("marked");
        DirBuilder::new().mode(MADE_HERE).create(&marked).unwrap();
        remove_if_ours(&hierarchies, &marked).unwrap();
        assert!(marked.is_dir());

        let found = find(&hierarchies, Wanted::Uid("u-1")).unwrap();
        remove_dir(&found.path).unwrap();
        assert_eq!(
            found.open().unwrap_err().to_string(),
            format!(
                "open the pod's cgroup {} (it goes away with the pod): ENOENT: No such file or directory",
                found.path.display()
            )
        );
    }

    #[test]
    fn a_cgroup_that_is_not_there_is_an_error_that_says_what_was_looked_for() {
        let (_pure, pure) = pure(&["kubepods/podu-2"]);
        let (_hybrid, hybrid) = hybrid(&["pids/kubepods/podu-2"]);
        let names = "kubepods[-burstable|-besteffort]-podu_1.slice, kubepods[/burstable|/besteffort]/podu-1 down to a depth of 10";
        let uid_remedy = "kubelet makes it unless its cgroupsPerQOS is off; with a runtime that knows the path (containerd 1.7, \
                          CRI-O) add the capability cgroupPath to the plugin";
        let path_remedy = "the path comes from the runtime's or the configuration's cgroupPath: correct it there, or leave it \
                           out to have the pod found by its UID";
        for (hierarchies, also) in [(&pure, ""), (&hybrid, " nor on the cgroup v1 mounts (2)")] {
            let below = hierarchies.unified.display();
            let error = find(hierarchies, Wanted::Uid("u-1")).unwrap_err();
            assert_eq!(error.code(), Code::Cgroup);
            assert_eq!(
                error.to_string(),
                format!("find the cgroup of pod u-1: not below {below}{also}; looked for {names}; {uid_remedy}")
            );
            let error = find(hierarchies, Wanted::Path("/kubepods/podu-1")).unwrap_err();
            assert_eq!(error.code(), Code::Cgroup);
            assert_eq!(
                error.to_string(),
                format!(
                    "find the cgroup \"/kubepods/podu-1\": not below {below}{also}; looked for {below}/kubepods/podu-1; \
                     {path_remedy}"
                )
            );
        }
    }

    #[test]
    fn a_pod_has_ended_when_kubelets_directory_is_gone_and_nothing_runs_in_ours() {
        let (root, hierarchies) = hybrid(&[&format!("memory/{PLACE}"), &format!("pids/{PLACE}"), "unified/user.slice"]);
        let pod = find(&hierarchies, Wanted::Uid("u-1")).unwrap();
        pod.open().unwrap();
        let events = pod.path.join("cgroup.events");
        let populated = |count: u32| fs::write(&events, format!("populated {count}\nfrozen 0\n")).unwrap();
        populated(0);
        assert!(!has_ended(&hierarchies, &pod.path), "kubelet has it");
        fs::remove_dir_all(root.path().join("memory/kubepods")).unwrap();
        assert!(!has_ended(&hierarchies, &pod.path), "on one of them");
        fs::remove_dir_all(root.path().join("pids/kubepods")).unwrap();
        assert!(has_ended(&hierarchies, &pod.path));
        populated(1);
        assert!(!has_ended(&hierarchies, &pod.path), "a process is in it");
        // A directory of no pod.
        let other = hierarchies.unified.join("user.slice");
        fs::write(other.join("cgroup.events"), "populated 0\n").unwrap();
        assert!(!has_ended(&hierarchies, &other) && !has_ended(&hierarchies, Path::new("/elsewhere")));
        populated(0);
        assert!(!has_ended(&Hierarchies { v1: Vec::new(), ..hierarchies.clone() }, &pod.path));
    }

    #[test]
    fn removal_stops_at_what_is_in_use_or_someone_elses() {
        let (_root, hierarchies) = hybrid(&["unified/system.slice", "pids/kubepods/podu-1", "pids/kubepods/podu-2"]);
        let [one, two] = ["u-1", "u-2"].map(|uid| find(&hierarchies, Wanted::Uid(uid)).unwrap());
        one.open().unwrap();
        two.open().unwrap();
        let remove = |path: &Path| remove_if_ours(&hierarchies, path).unwrap();

        create_dir_all(one.path.join("container")).unwrap();
        remove(&one.path);
        assert!(one.path.is_dir(), "it holds a container");
        remove_dir(one.path.join("container")).unwrap();
        remove(&one.path);
        assert!(!one.path.exists() && two.path.is_dir(), "the other pod stays");
        // Marked as ours, but not below the mount.
        DirBuilder::new().mode(MADE_HERE).create(hierarchies.v1[0].join("marked")).unwrap();
        for elsewhere in ["system.slice", "../memory/marked", ""] {
            remove(&hierarchies.unified.join(elsewhere));
        }
        remove(&hierarchies.v1[0].join("marked"));
        assert!(hierarchies.unified.join("system.slice").is_dir() && hierarchies.v1[0].join("marked").is_dir());

        remove_dir(&two.path).unwrap();
        remove(&two.path);
        assert!(!two.path.parent().unwrap().exists(), "a parent left by an interrupted DEL goes too");
        remove(&two.path);
    }

    /// Opens and removes two pods below `parent` concurrently, many times; in the end no directory is left.
    fn come_and_go(hierarchies: &Hierarchies, parent: &str) {
        let pods = ["pod1", "pod2"].map(|name| format!("{parent}/a/{name}"));
        for pod in &pods {
            create_dir_all(hierarchies.v1[0].join(pod)).unwrap();
        }
        std::thread::scope(|scope| {
            for pod in &pods {
                scope.spawn(move || {
                    let pod = find(hierarchies, Wanted::Path(pod)).unwrap();
                    for _ in 0..500 {
                        pod.open().unwrap();
                        assert!(pod.path.is_dir());
                        remove_if_ours(hierarchies, &pod.path).unwrap();
                        assert!(!pod.path.exists());
                    }
                });
            }
        });
        assert!(!hierarchies.unified.join(parent).exists());
    }

    #[test]
    fn pods_that_come_and_go_at_once_do_not_take_each_others_parents() {
        let (_root, hierarchies) = hybrid(&[]);
        come_and_go(&hierarchies, "kubepods");
    }

    /// A name in the kernel's cgroup2. If a test fails, whatever is left of the tree that [`come_and_go`] makes is
    /// removed.
    struct Scratch<'a>(&'a Hierarchies, String);

    impl Drop for Scratch<'_> {
        fn drop(&mut self) {
            for below in ["a/pod1", "a/pod2", "a", ""] {
                let _ = remove_dir(self.0.unified.join(&self.1).join(below));
            }
        }
    }

    #[test]
    #[ignore = "needs root and cgroup2"]
    fn the_kernels_own_cgroup2_keeps_the_mark_and_bears_the_race() {
        let (_root, mut hierarchies) = hybrid(&[]);
        hierarchies.unified = Hierarchies::of_this_host().unwrap().unified;
        let scratch = Scratch(&hierarchies, format!("podshaper-test-{}", std::process::id()));
        create_dir_all(hierarchies.v1[0].join(&scratch.1).join("a/pod1")).unwrap();
        let found = find(&hierarchies, Wanted::Path(&format!("{}/a/pod1", scratch.1))).unwrap();
        assert!(found.missing);
        found.open().unwrap();
        remove_if_ours(&hierarchies, found.path.parent().unwrap()).unwrap();
        assert!(found.path.join("cgroup.procs").exists(), "a cgroup with children stays");
        remove_if_ours(&hierarchies, &found.path).unwrap();
        assert!(!hierarchies.unified.join(&scratch.1).exists());

        come_and_go(&hierarchies, &scratch.1);
    }
}
