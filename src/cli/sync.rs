//! `podshaper sync`: brings this node's pods to what is asked of them now, once. Nothing of it stays: what is to recur, the node calls.
//!
//! What is asked comes from the results that the runtime keeps of its ADDs ([`sandboxes`]) and, with a kubeconfig, from the pods'
//! annotations as the API server has them. What is in force is pinned. [`decide`] compares the two; what is to be done goes the way of
//! an ADD, a `set` and a `detach`. A pod that cannot be limited is told of, and does not keep the others from it.

mod decide;
mod memory;
mod networks;
mod report;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use clap::Args;

use super::{
    attachments::{self, Attachment},
    detach,
    directories::Directories,
    gc,
    output::Output,
};
use crate::{
    attachment::{self, Change},
    cni,
    direction::Direction,
    error::{Code, Error, Result},
    kube::{self, Metadata},
    pins::Place,
    pod::{Asked, Owner},
    request::{Endpoint, Limits, Request, Subject},
    sandboxes::{self, Sandbox},
};
use decide::{InForce, Step, decide};
pub use memory::{Failure, LastRun};
use networks::Networks;
use report::{Done, Report};

/// Where libcni has its results, unless a runtime says otherwise.
pub const CACHE_DIR: &str = "/var/lib/cni";
/// The interface that a pod's annotations are about: every runtime for Kubernetes calls it so.
const DEFAULT_INTERFACE: &str = "eth0";

#[derive(Args)]
#[command(after_help = AFTER)]
pub struct Arguments {
    /// Whom to ask for the annotations of this node's pods [default: the "kubeconfig" of podshaper's configuration, else nobody]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster [default: the host's name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Directory of the runtime's network configurations [default: what containerd, k3s or RKE2 says, else /etc/cni/net.d]
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
  - removes what no pod has any more, as `podshaper gc` does.

    podshaper sync --dry-run --kubeconfig /etc/kubernetes/kubelet.conf

Connections that exist already when a pod gets its first limit in a direction are counted but not paced.
`podshaper install` has systemd run it every 10 seconds and whenever a network writes its conflist.
Exit status: 0 if every pod has what it asks for, 1 if not; stderr, `podshaper doctor` and `podshaper metrics` say which.";

/// What was asked of the API server.
enum Answer {
    /// There is nobody to ask.
    Nobody,
    /// It gave none.
    None,
    /// The pods of the node of this name.
    Pods { node: String, of: BTreeMap<String, Metadata> },
}

impl Answer {
    fn pod(&self, uid: &str) -> Option<&Metadata> {
        match self {
            Self::Pods { of, .. } => of.get(uid),
            Self::Nobody | Self::None => None,
        }
    }

    /// Whether it is about this node at all.
    fn check_node(&self, interfaces: &[Interface], report: &mut Report) {
        let Self::Pods { node, .. } = self else { return };
        let mut known = interfaces.iter().filter_map(|interface| interface.sandbox.arg("K8S_POD_UID"));
        if !interfaces.is_empty() && !known.any(|uid| self.pod(uid).is_some()) {
            let text = format!(
                "the API server has none of this node's pods on node {node}: name the node as it does with --node"
            );
            report.know_less(&Error::new(Code::ApiServer, text));
        }
    }
}

/// One interface of a pod in a network of podshaper's.
struct Interface {
    sandbox: Sandbox,
    request: Request,
    endpoint: Endpoint,
    place: Place,
    found: Option<Attachment>,
}

/// What is to be done for one.
struct Task {
    interface: Interface,
    asked: Limits,
    step: Step,
}

impl Arguments {
    /// Those of a run that the units start.
    pub fn of_units(kubeconfig: Option<PathBuf>, node: Option<String>, conf_dir: PathBuf, cache_dir: PathBuf) -> Self {
        let (conf_dir, output) = (Some(conf_dir), Output::default());
        Self { kubeconfig, node, conf_dir, cache_dir, dry_run: false, output }
    }

    /// The exit status says whether every pod has what it asks for.
    pub fn run(self) -> Result<ExitCode> {
        let mut report = Report { dry_run: self.dry_run, ..Report::default() };
        let networks = Networks::read(&Directories::of_this_node(self.conf_dir.as_deref(), None).conf)?;
        let (sandboxes, unreadable) = sandboxes::read(&self.cache_dir)?;
        unreadable.iter().for_each(|error| report.know_less(error));
        let (found, unfinished) = attachments::read_all()?;
        let answer = self.ask(&networks, &mut report);
        let (interfaces, others) = interfaces(&networks, &answer, sandboxes, found, &mut report);
        answer.check_node(&interfaces, &mut report);
        let tasks: Vec<Task> =
            interfaces.into_iter().filter_map(|interface| interface.task(&answer, &mut report)).collect();
        if self.dry_run {
            report.changes.extend(tasks.iter().map(Task::done));
        } else {
            perform(tasks, &mut report);
        }
        self.clear(others.iter().filter(|other| gc::is_stale(other)), unfinished > 0, &mut report);
        self.end(report)
    }

    /// The API server's answer, if there is one to be asked.
    fn ask(&self, networks: &Networks, report: &mut Report) -> Answer {
        let Some(kubeconfig) = self.kubeconfig.as_deref().or(networks.kubeconfig()) else { return Answer::Nobody };
        let asked = self.node().and_then(|node| Ok(Answer::Pods { of: kube::pods_of(kubeconfig, &node)?, node }));
        asked.unwrap_or_else(|error| {
            report.know_less(&error);
            Answer::None
        })
    }

    /// kubelet calls a node by the name of its host in lower case, unless it is told another one.
    fn node(&self) -> Result<String> {
        const HOSTNAME: &str = "/proc/sys/kernel/hostname";
        let own = || {
            let name = fs::read_to_string(HOSTNAME);
            name.map_err(|cause| Error::because(Code::Io, format!("read this host's name in {HOSTNAME}"), cause))
        };
        let name = self.node.clone().map_or_else(own, Ok)?;
        crate::pod::object_name(&name.trim().to_lowercase())
    }

    /// Removes what no pod has any more, and what killed calls left.
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

    fn end(&self, report: Report) -> Result<ExitCode> {
        let has_failed = !report.failures.is_empty() || report.error.is_some();
        if !self.dry_run {
            LastRun::now(report.failures.clone(), report.error.clone()).keep();
        }
        self.output.print(&report, || report.text())?;
        Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// The interfaces in podshaper's networks, each with what is in force on it, and the attachments of none of them.
fn interfaces(
    networks: &Networks,
    answer: &Answer,
    sandboxes: Vec<Sandbox>,
    found: Vec<Attachment>,
    report: &mut Report,
) -> (Vec<Interface>, Vec<Attachment>) {
    if networks.are_none() && !sandboxes.is_empty() {
        log::warn!("podshaper is in no conflist, so that new pods are not limited: podshaper install puts it there");
    }
    let mut newest: BTreeMap<(String, String), (Sandbox, Result<Request>)> = BTreeMap::new();
    for sandbox in sandboxes {
        // What the API server has of a pod's annotations takes the place of what the runtime was told, which may be long.
        let has_newer = sandbox.ifname == DEFAULT_INTERFACE && answer.pod(sandbox.pod()).is_some();
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
    let mut interfaces = Vec::new();
    for (key, (sandbox, request)) in newest {
        match request.and_then(|request| Ok((endpoint(&request)?, request))) {
            Ok((endpoint, request)) => {
                let place = cni::place(&endpoint);
                interfaces.push(Interface { sandbox, request, endpoint, place, found: by_place.remove(&key) });
            }
            Err(error) => report.fail(Failure::of_sandbox(&sandbox, &error)),
        }
    }
    (interfaces, by_place.into_values().collect())
}

fn endpoint(request: &Request) -> Result<Endpoint> {
    match &request.subject {
        Subject::Endpoint(endpoint) => Ok(endpoint.clone()),
        Subject::NeverAdded(_) | Subject::Node => {
            Err(Error::new(Code::Environment, "it names no container and interface"))
        }
    }
}

impl Interface {
    /// What is asked for now; `None` where nobody knows, and what is in force stays.
    fn asked(&self, answer: &Answer) -> Result<Option<Limits>> {
        let uid = self.endpoint.key.uid().map(crate::pod::PodUid::as_str);
        match (answer, uid.and_then(|uid| answer.pod(uid))) {
            (_, Some(pod)) => self.now(pod).map(Some),
            // It gave no answer, or the pod is being deleted, or another pod of this name is there by now.
            (Answer::None | Answer::Pods { .. }, None) if self.found.is_some() && uid.is_some() => Ok(None),
            // Also of a runtime that tells no UID: a pod of this name may be another one.
            (_, None) => self.request.limits_of_call().map(Some),
        }
    }

    fn now(&self, pod: &Metadata) -> Result<Limits> {
        self.request.limits_now(pod, self.sandbox.ifname == DEFAULT_INTERFACE)
    }

    fn task(self, answer: &Answer, report: &mut Report) -> Option<Task> {
        let asked = match self.asked(answer) {
            Ok(asked) => asked?,
            Err(error) => {
                report.fail(Failure::of_sandbox(&self.sandbox, &error));
                return None;
            }
        };
        let in_force = self.found.as_ref().map(|found| in_force(found, &self.endpoint));
        let step = decide(&asked, in_force.as_ref());
        (step != Step::Keep).then_some(Task { interface: self, asked, step })
    }
}

fn in_force(found: &Attachment, endpoint: &Endpoint) -> InForce {
    let owner = &found.owner;
    InForce {
        limits: found.problem.is_none().then(|| found.limits()),
        asked: owner.asked,
        by_hand: owner.changed,
        is_of_sandbox: owner.is_of(&endpoint.container_id, &endpoint.ifname),
        is_whole: !found.links.are_dead() && found.links.faults().is_empty(),
    }
}

/// Does all of them, whatever becomes of each. What is to lose its limit is let go of first, all at once: the kernel keeps a socket's
/// pace when the programs go.
fn perform(tasks: Vec<Task>, report: &mut Report) {
    let has_lifted: Vec<bool> =
        tasks.iter().map(|task| task.lift().unwrap_or_else(|error| task.note(&error))).collect();
    if has_lifted.contains(&true) {
        thread::sleep(detach::LET_GO);
    }
    for task in tasks {
        match task.perform() {
            Ok(()) => report.changes.push(task.done()),
            // It went away meanwhile, or another sandbox came in its place: the next run knows more.
            Err(error) if !task.interface.sandbox.is_there() => log::debug!("{error}"),
            Err(error) => report.fail(Failure::of_sandbox(&task.interface.sandbox, &error)),
        }
    }
}

impl Task {
    /// What it is to have.
    fn wanted(&self) -> Limits {
        match self.step {
            Step::Attach(limits) | Step::Change(limits) => limits,
            Step::Keep | Step::Remove => Limits::default(),
        }
    }

    /// Lifts the limits of the directions that are to have none; whether there are any.
    fn lift(&self) -> Result<bool> {
        let Some(found) = self.interface.found.as_ref().filter(|found| !found.links.are_dead()) else {
            return Ok(false);
        };
        let (now, wanted) = (found.limits(), self.wanted());
        let ends = |direction: &Direction| now.of(*direction).is_some() && wanted.of(*direction).is_none();
        let ending: Vec<Direction> = Direction::BOTH.into_iter().filter(ends).collect();
        if ending.is_empty() {
            return Ok(false);
        }
        attachment::lift(&found.place, &ending, |directory, owner| found.is_still(directory, Some(owner)))
            .map(|()| true)
    }

    /// A pace that stays with some connections is not worth leaving a limit where none is asked for.
    fn note(&self, error: &Error) -> bool {
        log::warn!("connections of {} may keep their pace: {error}", self.interface.sandbox.pod());
        false
    }

    fn perform(&self) -> Result<()> {
        let Interface { request, endpoint, found, .. } = &self.interface;
        match (self.step, found) {
            (Step::Keep, _) | (Step::Remove, None) => Ok(()),
            (Step::Attach(limits), _) => cni::limit(request, endpoint, limits, |owner| self.record(owner)),
            (Step::Change(_), None) => Ok(()),
            (Step::Change(limits), Some(found)) => self.change(found, |owner| {
                // What the administrator allows may have changed with it.
                let Owner { max_egress, max_ingress, .. } = request.owner(endpoint, Path::new(&owner.cgroup));
                Change { limits, owner: self.record(Owner { max_egress, max_ingress, ..owner.clone() }) }
            }),
            (Step::Remove, Some(found)) => detach::remove(found),
        }
    }

    /// The record, with what was asked for.
    fn record(&self, owner: Owner) -> Owner {
        let asked = Asked::of(&self.asked);
        Owner { asked: Some(asked), changed: Asked::of(&self.wanted()) != asked, followed: true, ..owner }
    }

    /// Changes the attachment that was found, and no other one.
    fn change(&self, found: &Attachment, to: impl FnOnce(&Owner) -> Change) -> Result<()> {
        attachment::change(&found.place, |present| {
            if found.is_still(&present.directory, Some(&present.owner)) {
                return Ok(to(&present.owner));
            }
            let text =
                format!("change the limits of {}: it has just been replaced; the next run looks again", found.name());
            Err(Error::new(Code::Mismatch, text))
        })
    }

    fn done(&self) -> Done {
        let Interface { request, place, found, .. } = &self.interface;
        let action = match self.step {
            Step::Keep => "keep",
            Step::Attach(_) => "attach",
            Step::Change(_) => "change",
            Step::Remove => "remove",
        };
        let was = found.as_ref().map(Attachment::limits).unwrap_or_default();
        Done::at(action, place, &was, &self.wanted()).of(request.pod_namespace.clone(), request.pod_name.clone())
    }
}
