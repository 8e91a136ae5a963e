//! `podshaper sync`: brings the pods of this node to the limits that are asked for now, once. No process stays; the
//! node's units or a person call it again.
//!
//! What is asked for comes from the results that the runtime keeps of its ADDs ([`sandboxes`]) and, with a kubeconfig,
//! from the pods' annotations on the API server. The limits in force are pinned. [`decide`] compares the two. The
//! changes are then made in the same way as by an ADD, a `set` and a `detach`. If a pod cannot be limited, the run
//! reports it and goes on with the other pods.

mod answer;
mod decide;
mod host_network;
mod memory;
mod networks;
mod report;
mod task;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{
    attachments::{self, Attachment},
    directories::Directories,
    gc,
    output::Output,
};
use crate::{
    attachment, cni,
    delegate::record,
    error::{Code, Error, Result},
    owner::Owner,
    pins::Place,
    request::{Endpoint, Limits, Namespaces, Request, Subject},
    sandboxes::{self, Sandbox},
};
use answer::Answer;
use decide::{InForce, Step, decide};
pub use memory::{Failure, LastRun};
use networks::Networks;
use report::{Done, FORGET, HOLD, Report};
use task::{Interface, Target, Task, perform};

/// The directory in which libcni keeps its results, unless a runtime sets another one.
pub const CACHE_DIR: &str = "/var/lib/cni";
/// The interface that a pod's annotations are about: every runtime for Kubernetes gives it this name.
const DEFAULT_INTERFACE: &str = "eth0";

#[derive(Args)]
#[command(after_help = AFTER)]
pub struct Arguments {
    /// Whom to ask for the annotations of this node's pods [default: the "kubeconfig" of podshaper's configuration,
    /// else nobody]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster [default: the host's name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Directory of the runtime's network configurations [default: what containerd, k3s or RKE2 says, else
    /// /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    conf_dir: Option<PathBuf>,
    /// Directory in which the runtime's CNI library keeps the results of its calls
    #[arg(long, value_name = "DIR", default_value = CACHE_DIR)]
    cache_dir: PathBuf,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

const AFTER: &str = "\
One run, a line for each change. It
  - limits pods that were made while podshaper was not in the conflist, or before it was installed;
  - follows an annotation that was changed, added or removed on a running pod (with a kubeconfig), and a \"max\" or
    a default that was changed in the conflist;
  - leaves what `podshaper set` has set until something else is asked for;
  - limits pods in the node's own network namespace (hostNetwork) that carry the annotation (with a kubeconfig);
  - puts back filters, queues and the waiting room that somebody has taken off (podshaper list: not held);
  - removes what no pod has any more, as `podshaper gc` does.

    podshaper sync --dry-run --kubeconfig /etc/kubernetes/kubelet.conf

Connections that exist already when a pod gets its first limit in a direction are counted but not paced.
`podshaper install` has systemd run it every 8 seconds and whenever a network writes its conflist.
Exit status: 0 if every pod has what it asks for, 1 if not; stderr, `podshaper doctor` and `podshaper metrics` say which.";

/// An interface of a sandbox in one of podshaper's networks, with the attachment on it.
struct Candidate {
    interface: Interface,
    place: Place,
    found: Option<Attachment>,
}

impl Arguments {
    /// The arguments of a run that the units start.
    pub fn of_units(kubeconfig: Option<PathBuf>, node: Option<String>, conf_dir: PathBuf, cache_dir: PathBuf) -> Self {
        let (conf_dir, output) = (Some(conf_dir), Output::default());
        Self { kubeconfig, node, conf_dir, cache_dir, dry_run: false, output }
    }

    /// The exit status says whether every pod has the limit that it asks for.
    pub fn run(self) -> Result<ExitCode> {
        let mut report = Report { dry_run: self.dry_run, ..Report::default() };
        let networks = Networks::read(&Directories::of_this_node(self.conf_dir.as_deref(), None).conf)?;
        let (sandboxes, unreadable) = sandboxes::read(&self.cache_dir)?;
        unreadable.iter().for_each(|error| report.know_less(error));
        let (mut found, unfinished) = attachments::read_all()?;
        attachments::look_whether_held(&mut found);
        self.hold_again(&found, &mut report);
        let kubeconfig = self.kubeconfig.as_deref().or(networks.kubeconfig());
        let mut answer = Answer::about_pods(kubeconfig, self.node.as_deref(), &mut report);
        let (candidates, mut others) = candidates(&networks, &answer, sandboxes, found, &mut report);
        if candidates.iter().any(|candidate| candidate.interface.request.asks_for_namespaces()) {
            answer.ask_for_namespaces(&mut report);
        }
        let uids: Vec<String> = candidates.iter().map(|candidate| candidate.place.pod.clone()).collect();
        let uids: BTreeSet<&str> = uids.iter().map(String::as_str).collect();
        answer.check_node(&uids, &mut report);
        let mut tasks = host_network::tasks(&networks, &answer, &uids, &mut others, &mut report);
        tasks.extend(candidates.into_iter().filter_map(|candidate| candidate.task(&answer, &mut report)));
        if self.dry_run {
            report.changes.extend(tasks.iter().map(Task::done));
        } else {
            perform(tasks, &mut report);
        }
        self.clear(others.iter().filter(|other| gc::is_stale(other)), unfinished > 0, &mut report);
        self.forget(&mut report).unwrap_or_else(|error| report.know_less(&error));
        self.end(report)
    }

    /// Restores the filters and queues of attachments that another program has removed.
    fn hold_again(&self, found: &[Attachment], report: &mut Report) {
        for found in found.iter().filter(|found| found.not_held.is_some()) {
            match if self.dry_run { Ok(true) } else { attachment::hold_again(&found.place) } {
                Ok(true) => report.changes.push(Done::to(HOLD, found, &found.limits())),
                Ok(false) => {}
                Err(error) => report.fail(Failure::of(found, &error)),
            }
        }
    }

    /// Removes the attachments that no pod has any longer, and the leftovers of killed calls.
    fn clear<'a>(&self, stale: impl Iterator<Item = &'a Attachment>, is_any_unfinished: bool, report: &mut Report) {
        for found in stale {
            match if self.dry_run { Ok(true) } else { gc::remove(found) } {
                Ok(true) => report.changes.push(Done::to("clear", found, &Limits::default())),
                Ok(false) => {}
                Err(error) => report.fail(Failure::of(found, &error)),
            }
        }
        if !self.dry_run && is_any_unfinished {
            let settled = attachment::lock().and_then(|pins| pins.map_or(Ok(()), |pins| attachment::settle_all(&pins)));
            settled.unwrap_or_else(|error| report.know_less(&error));
        }
    }

    /// Removes the records that delegated ADDs (`install --delegate`) have left of sandboxes that are gone.
    fn forget(&self, report: &mut Report) -> Result<()> {
        for stale in record::stale(&self.cache_dir)? {
            if !self.dry_run {
                stale.remove()?;
            }
            let place = Place { pod: stale.container_id, interface: stale.interface };
            report.changes.push(Done::at(FORGET, &place, &Limits::default(), &Limits::default()));
        }
        Ok(())
    }

    fn end(&self, report: Report) -> Result<ExitCode> {
        let has_failed = !report.failures.is_empty() || report.error.is_some();
        if !self.dry_run {
            LastRun::now(report.failures.clone(), report.error.clone()).keep();
        }
        self.output.print(&report, || report.text())?;
        Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// The interfaces in podshaper's networks, each with its attachment, and all other attachments.
fn candidates(
    networks: &Networks,
    answer: &Answer<'_>,
    sandboxes: Vec<Sandbox>,
    found: Vec<Attachment>,
    report: &mut Report,
) -> (Vec<Candidate>, Vec<Attachment>) {
    if networks.are_none() && !sandboxes.is_empty() {
        log::warn!("podshaper is in no conflist, so that new pods are not limited: podshaper install puts it there");
    }
    let mut newest: BTreeMap<(String, String), (Sandbox, Result<Request>)> = BTreeMap::new();
    for sandbox in sandboxes {
        // The annotations on the API server replace those that the runtime was told, which may be long.
        let has_newer = sandbox.ifname == DEFAULT_INTERFACE && answer.pod_of(&sandbox).is_some();
        let Some(request) = networks.request(&sandbox, !has_newer) else { continue };
        let key = (sandbox.pod().to_owned(), sandbox.ifname.clone());
        if newest.get(&key).is_none_or(|(other, _)| sandbox.is_newer_than(other)) {
            newest.insert(key, (sandbox, request));
        }
    }
    let mut by_place: BTreeMap<(String, String), Attachment> = BTreeMap::new();
    for found in found {
        by_place.insert((found.place.pod.clone(), found.place.interface.clone()), found);
    }
    let mut candidates = Vec::new();
    for (key, (sandbox, request)) in newest {
        match request.and_then(|request| Ok((endpoint(&request)?, request))) {
            Ok((endpoint, request)) => {
                let (place, found) = (cni::place(&endpoint), by_place.remove(&key));
                candidates.push(Candidate { interface: Interface { sandbox, request, endpoint }, place, found });
            }
            Err(error) => report.fail(Failure::of_sandbox(&sandbox, &error)),
        }
    }
    (candidates, by_place.into_values().collect())
}

/// The interfaces of pods that asked for a limit, according to the runtime's results of their ADDs, and have none. If
/// a sync has just run, these are the pods that the sync could not limit: the sync may also have asked the API server.
///
/// # Errors
/// A directory or file that cannot be read.
pub fn unlimited(conf_dir: &Path, cache_dir: &Path) -> Result<Vec<String>> {
    if let Some(run) = LastRun::recall().filter(LastRun::is_recent) {
        return Ok(run.failures.iter().map(Failure::name).collect());
    }
    // Without a directory there are no networks; this is reported elsewhere.
    let Ok(networks) = Networks::read(conf_dir) else { return Ok(Vec::new()) };
    let (found, (sandboxes, _)) = (attachments::read()?, sandboxes::read(cache_dir)?);
    let is_there = |sandbox: &Sandbox| {
        found.iter().any(|found| found.place.pod == sandbox.pod() && found.place.interface == sandbox.ifname)
    };
    let is_unlimited = |sandbox: &&Sandbox| {
        let limits = networks.request(sandbox, true).map(|request| request?.limits_of_call(&Namespaces::new()));
        // A pod whose limit is malformed does not have the limit that it asks for either.
        !is_there(sandbox) && limits.is_some_and(|limits| limits.map_or(true, |limits| !limits.is_empty()))
    };
    let failure = |sandbox: &Sandbox| Failure::of_sandbox(sandbox, &Error::new(Code::Mismatch, "no limit")).name();
    Ok(sandboxes.iter().filter(is_unlimited).map(failure).collect())
}

fn endpoint(request: &Request) -> Result<Endpoint> {
    match &request.subject {
        Subject::Endpoint(endpoint) => Ok(endpoint.clone()),
        Subject::NeverAdded(_) | Subject::Node => {
            Err(Error::new(Code::Environment, "it names no container and interface"))
        }
    }
}

impl Candidate {
    /// The limits that are asked for now; `None` if they are not known, and the limits in force are to stay.
    fn asked(&self, answer: &Answer<'_>) -> Result<Option<Limits>> {
        let Interface { sandbox, request, endpoint } = &self.interface;
        let has_uid = endpoint.key.uid().is_some();
        match answer.pod_of(sandbox) {
            Some(pod) => {
                let are_its_annotations = sandbox.ifname == DEFAULT_INTERFACE;
                request.limits_now(pod, are_its_annotations, &answer.namespaces).map(Some)
            }
            // The server gave no answer, or the pod is being deleted, or another pod has this name now, or several pods
            // claim to be the mirror of this static pod.
            None if self.found.is_some() && has_uid && !answer.is_of_nobody() => Ok(None),
            // This includes a runtime that passes no UID: the pod of this name on the server may be another one.
            None => request.limits_of_call(&answer.namespaces).map(Some),
        }
    }

    fn task(self, answer: &Answer<'_>, report: &mut Report) -> Option<Task> {
        let asked = match self.asked(answer) {
            Ok(asked) => asked?,
            Err(error) => {
                report.fail(Failure::of_sandbox(&self.interface.sandbox, &error));
                return None;
            }
        };
        let Self { interface, place, found } = self;
        let step = decide(&asked, found.as_ref().map(|found| in_force(found, &interface)).as_ref());
        let target = Target::Interface(Box::new(interface));
        (step != Step::Keep).then_some(Task { target, place, found, asked, step })
    }
}

fn in_force(found: &Attachment, Interface { request, endpoint, .. }: &Interface) -> InForce {
    let Owner { asked, changed, list, interface: record, .. } = &found.owner;
    // If other packets cannot be limited though they should be, a new attachment would be no better.
    let are_others_as_wanted =
        if request.config.other_paths { !record.leaves_others } else { record.held_at.is_none() };
    InForce {
        limits: found.problem.is_none().then(|| found.limits()),
        asked: *asked,
        by_hand: *changed,
        is_of_sandbox: found.owner.is_of(&endpoint.container_id, &endpoint.ifname),
        is_whole: found.is_whole() && *list == request.config.subnets.number() && are_others_as_wanted,
    }
}
