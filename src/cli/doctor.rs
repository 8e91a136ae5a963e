//! `podshaper doctor`: what this node needs, has and lacks, and what to do about it, with a line for each check. The
//! checks of the kernel are those whose result the CNI verb STATUS logs ([`probe`]); they run anew at each call.

pub mod conflists;

use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;

use super::{
    attachments::{self, Attachment},
    directories::Directories,
    install,
    output::Output,
    sync::{self, LastRun},
    table::{Left, Table},
};
use crate::{
    error::Result,
    pins::{self, BPFFS},
    probe, shaper,
};

#[derive(Args)]
pub struct Arguments {
    /// Where the runtime reads its network configuration [default: what containerd, k3s or RKE2 says, else
    /// /etc/cni/net.d]
    #[arg(long, value_name = "DIRECTORY")]
    conf_dir: Option<PathBuf>,
    /// Where the runtime finds its plugins [default: what containerd, k3s or RKE2 says, else /opt/cni/bin]
    #[arg(long, value_name = "DIRECTORY")]
    bin_dir: Option<PathBuf>,
    /// Directory in which the runtime's CNI library keeps the results of its calls
    #[arg(long, value_name = "DIRECTORY", default_value = sync::CACHE_DIR)]
    cache_dir: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Everything is as it should be.
    Ok,
    /// It works, but could work better.
    Warn,
    /// It does not work.
    Missing,
}

/// One line of the output.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    check: String,
    state: State,
    /// What the check found and, if there is a problem, the remedy.
    found: String,
}

impl Finding {
    fn new(check: impl Into<String>, state: State, found: impl Into<String>) -> Self {
        Self { check: check.into(), state, found: found.into() }
    }
}

impl Arguments {
    /// The exit status says whether something is missing.
    pub fn run(self) -> Result<ExitCode> {
        let mut findings = kernel();
        let Directories { conf, bin } = Directories::of_this_node(self.conf_dir.as_deref(), self.bin_dir.as_deref());
        findings.extend(conflists::check(&conf, &bin));
        findings.extend(units(&install::not_enabled()));
        findings.extend(
            pinned().unwrap_or_else(|error| vec![Finding::new("attachments", State::Missing, error.to_string())]),
        );
        findings.extend(LastRun::recall().map(last_sync).unwrap_or_default());
        findings.extend(unlimited(&conf, &self.cache_dir));
        self.output.print(&findings, || {
            let mut table = Table::new(&[("CHECK", Left), ("STATE", Left), ("FOUND", Left)]);
            for Finding { check, state, found } in &findings {
                let state = match state {
                    State::Ok => "ok",
                    State::Warn => "warn",
                    State::Missing => "MISSING",
                };
                table.row(vec![check.clone(), state.to_owned(), found.clone()]);
            }
            table.whole_text()
        })?;
        let is_missing = findings.iter().any(|finding| finding.state == State::Missing);
        Ok(if is_missing { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn kernel() -> Vec<Finding> {
    let bpffs = Path::new(BPFFS);
    let run = |otherwise: State| {
        move |(name, check): &probe::Check| match check(bpffs) {
            Ok(found) => Finding::new(*name, State::Ok, found),
            Err(error) => Finding::new(*name, otherwise, error.to_string()),
        }
    };
    let needs = probe::NEEDS.iter().map(run(State::Missing));
    needs.chain(probe::WISHES.iter().map(run(State::Warn))).collect()
}

/// Whether the node's systemd has the units that `podshaper install` writes.
fn units(not_enabled: &[&str]) -> Option<Finding> {
    let text = format!(
        "{}: not enabled, so that podshaper stays out of a conflist that its network writes anew, and annotations of running pods are not \
         followed: podshaper install",
        not_enabled.join(", ")
    );
    (!not_enabled.is_empty()).then(|| Finding::new("units", State::Warn, text))
}

/// The failures of the last `podshaper sync`.
fn last_sync(run: LastRun) -> Vec<Finding> {
    let finding = |text| Finding::new("sync", State::Missing, text);
    let pods = run.failures.iter().map(|failure| finding(format!("{}: {}", failure.name(), failure.error)));
    pods.chain(run.error.map(finding)).collect()
}

/// The pods that asked for a limit when they were made and have none, unless a `sync` has just checked them.
fn unlimited(conf_dir: &Path, cache_dir: &Path) -> Vec<Finding> {
    let finding = |text| Finding::new("pods", State::Missing, text);
    match sync::unlimited(conf_dir, cache_dir) {
        Ok(names) if names.is_empty() => Vec::new(),
        Ok(names) => vec![finding(format!(
            "{} without the limit that they ask for: podshaper sync gives it to them: {}",
            names.len(),
            names.join(", ")
        ))],
        Err(error) => vec![finding(error.to_string())],
    }
}

/// The attachments, and leftovers that should be gone.
fn pinned() -> Result<Vec<Finding>> {
    let (mut all, unfinished) = attachments::read_all()?;
    attachments::look_whether_held(&mut all);
    let old = all.iter().filter(|attachment| !pins::is_current(&attachment.directory)).count();
    let (dead, live): (Vec<_>, Vec<_>) = all.iter().partition(|attachment| attachment.links.are_dead());
    let partial = live.iter().filter(|attachment| !attachment.links.faults().is_empty()).count();
    let mut findings = vec![Finding::new("attachments", State::Ok, format!("{} live", live.len()))];
    let mut warn = |count: usize, text: &str| {
        if count > 0 {
            findings.push(Finding::new("attachments", State::Warn, format!("{count} {text}")));
        }
    };
    warn(dead.len(), "dead, their cgroups gone: podshaper gc removes them");
    warn(
        partial,
        "with programs that are not attached, which do not limit as they should: podshaper show says which; restart the pod",
    );
    let not_held: Vec<_> = live.iter().filter_map(|attachment| attachment.not_held.as_deref()).collect();
    let first = not_held.first().copied().unwrap_or_default();
    warn(not_held.len(), &format!("not held as they were made: podshaper sync puts back what is gone: {first}"));
    let moved: Vec<_> = live.iter().filter(|attachment| attachment.has_lost_namespace()).collect();
    warn(
        moved.len(),
        "whose network namespace is gone or another one by now, and whose cgroup is there: nothing of that namespace is changed for \
         them; podshaper show says which, and podshaper detach takes them off",
    );
    warn(old, "of another podshaper's layout: they limit, and a new sandbox of the pod replaces them");
    warn(
        below_others(&live),
        "below a limit of podshaper attach, or of another pod's cgroup: what they send and get has to pass both",
    );
    warn(unfinished, "unfinished, left by calls that were killed (or at work just now): podshaper gc removes them");
    findings.extend(displaced(&live));
    Ok(findings)
}

/// How many attachments have a cgroup below that of another one, whose programs run for their sockets as well.
fn below_others(live: &[&Attachment]) -> usize {
    let cgroups: BTreeSet<&Path> = live.iter().map(|attachment| Path::new(&attachment.owner.cgroup)).collect();
    let is_below = |cgroup: &Path| cgroup.ancestors().skip(1).any(|above| cgroups.contains(above));
    live.iter().filter(|attachment| is_below(Path::new(&attachment.owner.cgroup))).count()
}

/// Programs of other tools that no longer run for some cgroups below their own, since podshaper has attached its
/// programs there.
fn displaced(live: &[&Attachment]) -> Vec<Finding> {
    let above = live.iter().flat_map(|attachment| Path::new(&attachment.owner.cgroup).ancestors().skip(1));
    let above: BTreeSet<&Path> = above.collect();
    let found = above.into_iter().filter_map(|path| {
        let hooks = shaper::displaced(File::open(path).ok()?.as_fd());
        let text = format!(
            "the programs of others on {} ({hooks:?}) do not run for the limited pods below: they were attached so that another one displaces \
             them (allow_override). Their owner can attach them with allow_multi",
            path.display()
        );
        (!hooks.is_empty()).then(|| Finding::new("attachments", State::Warn, text))
    });
    found.collect()
}
