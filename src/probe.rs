//! What this node can do: the answer to STATUS, and the first lines of `podshaper doctor`. Features are tried, not deduced from the
//! kernel's version, which distributions patch.

use std::{fs, path::Path, thread};

use nix::sched::{CloneFlags, unshare};

use crate::{
    cgroup::Hierarchies,
    error::{Code, Error, Result},
    interface::IngressBy,
    pins, qdisc,
    request::{Limit, Limits, Source, Subnets},
    shaper::{self, Queue, Settings},
    units::Rate,
};

/// A check of one thing: its name, and what was found, or an error that says what to do.
pub type Check = (&'static str, fn(&Path) -> Result<String>);

/// What an ADD with a limit cannot do without.
pub const NEEDS: [Check; 3] = [("cgroup v2", cgroup), ("bpffs", bpffs), ("eBPF programs", programs)];

/// What makes it better.
pub const WISHES: [Check; 1] = [("fq", fq)];

/// Whether an ADD with a limit could succeed.
///
/// # Errors
/// [`Code::Unavailable`] with the reason.
pub fn node(path: &Path) -> Result<()> {
    NEEDS.iter().try_for_each(|(_, check)| {
        let unavailable = |error: Error| Error::new(Code::Unavailable, format!("this node cannot limit pods: {error}"));
        check(path).map(drop).map_err(unavailable)
    })
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

/// Loads and drops them: the kernel checks each program and all it uses.
fn programs(_: &Path) -> Result<String> {
    let limit = Limit::of(Rate::MAX, Source::Config);
    let limits = Limits { egress: Some(limit), ingress: Some(limit) };
    let settings = Settings { ifindex: 0, limits, queue: Queue::Fq, ingress_by: Some(IngressBy::HeldAcks) };
    shaper::load(&settings, &Subnets::default())?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!("Linux {} takes them", release.trim()))
}

/// Puts fq on an interface that nobody else has: the loopback of a new namespace, which goes with the thread.
fn fq(_: &Path) -> Result<String> {
    const LOOPBACK: u32 = 1;
    let tried = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|cause| {
            Error::because(Code::Netns, "make a network namespace to try fq in (needs CAP_SYS_ADMIN)", cause)
        })?;
        qdisc::put_fq(LOOPBACK)
    });
    let tried = tried.join().unwrap_or_else(|_| Err(Error::new(Code::Kernel, "try fq in a thread")));
    let consequence = "UDP over the limit is dropped, and ingress is held by tbf or drops";
    tried.map_err(|error| Error::new(Code::Kernel, format!("{error}: {consequence}")))?;
    Ok("in this kernel".to_owned())
}
