//! What this node can do: the answer to STATUS, and the first lines of `podshaper doctor`. Features are tried, not
//! deduced from the kernel's version, because distributions patch their kernels.
//!
//! STATUS is about the node, and a node that fails it gets no pods. A pod without a limit needs nothing that is checked
//! here. So a missing feature goes to the log, unless the configuration limits every pod.

mod sockets;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sched::{CloneFlags, unshare};

use crate::{
    cgroup::Hierarchies,
    error::{Code, Error, Result},
    pins, qdisc, shaper,
};

/// Where STATUS and `sync` remember their findings. It is on a tmpfs, so that a finding of another boot is forgotten.
pub const MEMORY: &str = "/run/podshaper";
/// The file of STATUS in that directory. It holds [`FIT`], or what is missing.
const FOUND: &str = "status";
const FIT: &str = "fit";
/// How long a finding counts. A check loads all the programs, and containerd asks every 5 s. But a log that is rotated
/// must still have the warning.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// A check of one thing: its name, and the function that returns a finding, or an error that says what to do.
pub type Check = (&'static str, fn(&Path) -> Result<String>);

/// What an ADD with a limit needs.
pub const NEEDS: [Check; 3] = [("cgroup v2", cgroup), ("bpffs", bpffs), ("eBPF programs", programs)];

/// What makes limits better.
pub const WISHES: [Check; 2] = [("fq", fq), SOCKETS];

/// Whether programs on a cgroup see its sockets' packets, so that limits hold where they are paced.
const SOCKETS: Check = ("sockets", sockets::check);

/// The answer to STATUS.
///
/// # Errors
/// [`Code::Unavailable`] with the reason: the configuration limits every pod, and this node cannot.
pub fn status(bpffs: &Path, memory: &Path, is_every_pod_limited: bool) -> Result<()> {
    match recall(memory).as_deref() {
        Some(FIT) => return Ok(()),
        Some(missing) if !is_every_pod_limited => {
            log::debug!("as STATUS has found before: {missing}");
            return Ok(());
        }
        // Where every pod is limited, the node is checked again: it may be able to limit pods since, and a finding may
        // be an hour old.
        _ => {}
    }
    let found = node(bpffs);
    let (_, sockets) = SOCKETS;
    // If no program can be loaded, there is nothing to try.
    if found.is_ok()
        && let Err(error) = sockets(bpffs)
    {
        log::warn!("{error}");
    }
    let text = found.as_ref().err().map(Error::to_string);
    if let Err(cause) = remember(memory, text.as_deref().unwrap_or(FIT)) {
        log::debug!("STATUS will check again: write {}: {cause}", memory.join(FOUND).display());
    }
    match (found, is_every_pod_limited) {
        (Ok(()), _) => Ok(()),
        (Err(error), true) => {
            let text = format!("this node cannot limit pods, and its configuration limits each of them: {error}");
            Err(Error::new(Code::Unavailable, text))
        }
        (Err(error), false) => {
            log::warn!("this node cannot limit pods; one that asks for a limit will fail: {error}");
            Ok(())
        }
    }
}

/// Removes the findings of STATUS from the node. A file that cannot be removed goes with the next boot.
pub fn forget(memory: &Path) {
    if let Err(cause) = fs::remove_dir_all(memory) {
        log::debug!("remove {}: {cause}", memory.display());
    }
}

/// Whether an ADD with a limit could succeed.
fn node(bpffs: &Path) -> Result<()> {
    NEEDS.iter().try_for_each(|(_, check)| check(bpffs).map(drop))
}

/// The finding of STATUS, as long as it counts.
fn recall(memory: &Path) -> Option<String> {
    let path = memory.join(FOUND);
    let written = fs::metadata(&path).and_then(|file| file.modified()).ok()?;
    // When the program was put there: a copy of a program may keep the modification time of the build.
    let program = fs::metadata("/proc/self/exe").ok()?;
    let installed = UNIX_EPOCH + Duration::new(program.ctime().try_into().ok()?, program.ctime_nsec().try_into().ok()?);
    // A file that is just being written is empty.
    let text = || fs::read_to_string(&path).ok().filter(|text| !text.is_empty());
    if counts(written, installed, SystemTime::now()) { text() } else { None }
}

/// Whether this very program has written the finding, within [`REMEMBERED`]. After the clock was set back, the age is
/// not known, and the finding does not count.
fn counts(written: SystemTime, installed: SystemTime, now: SystemTime) -> bool {
    written > installed && now.duration_since(written).is_ok_and(|age| age < REMEMBERED)
}

/// Makes the directory that [`MEMORY`] names, if it is not there.
///
/// # Errors
/// The kernel's error.
pub fn make_memory(memory: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(memory) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => Err(cause),
        _ => Ok(()),
    }
}

fn remember(memory: &Path, text: &str) -> io::Result<()> {
    make_memory(memory)?;
    fs::write(memory.join(FOUND), text)
}

fn cgroup(_: &Path) -> Result<String> {
    let hierarchies = Hierarchies::of_this_host()?;
    let beside = if hierarchies.are_hybrid() { ", beside cgroup v1" } else { "" };
    Ok(format!("mounted on {}{beside}", hierarchies.unified.display()))
}

fn bpffs(path: &Path) -> Result<String> {
    pins::mount_bpffs(path)?;
    Ok(format!("mounted on {}", path.display()))
}

/// Loads the programs and drops them: the kernel checks each program and everything that it uses.
fn programs(_: &Path) -> Result<String> {
    shaper::try_programs()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!("Linux {} takes them", release.trim()))
}

/// Puts fq on an interface that nothing else uses: the loopback of a new namespace, which goes with the thread.
fn fq(_: &Path) -> Result<String> {
    const LOOPBACK: u32 = 1;
    let tried = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|cause| {
            Error::because(Code::Netns, "make a network namespace to try fq in (needs CAP_SYS_ADMIN)", cause)
        })?;
        qdisc::put_fq(LOOPBACK)
    });
    let tried = tried.join().unwrap_or_else(|_| Err(Error::new(Code::Kernel, "try fq in a thread")));
    let consequence =
        "what a pod sends without having waited waits in htb, and what it receives at the host's end of its interface";
    tried.map_err(|error| Error::new(Code::Kernel, format!("{error}: {consequence}")))?;
    Ok("in this kernel".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_counts_for_an_hour_and_for_the_program_that_found_it() {
        let at = |minute: u64| UNIX_EPOCH + Duration::from_secs(60 * minute);
        for (written, installed, now, counted) in [
            (100, 90, 100, true),
            (100, 90, 159, true),
            (100, 90, 160, false),
            (100, 100, 101, false),
            (100, 101, 102, false),
            (100, 90, 99, false),
        ] {
            assert_eq!(counts(at(written), at(installed), at(now)), counted, "{written} {installed} {now}");
        }
    }

    #[test]
    fn what_is_remembered_is_recalled_and_an_empty_file_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let memory = directory.path().join("podshaper");
        assert_eq!(recall(&memory), None);
        for text in [FIT, "no cgroup2", FIT] {
            remember(&memory, text).unwrap();
            assert_eq!(recall(&memory).as_deref(), Some(text));
        }
        remember(&memory, "").unwrap();
        assert_eq!(recall(&memory), None);
        forget(&memory);
        assert!(!memory.exists());
    }
}
