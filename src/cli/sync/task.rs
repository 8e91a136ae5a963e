//! Carries out the decision of `sync` for one attachment, in the same way as an ADD, a `set` or a `detach`.

use std::thread;

use super::{
    super::{attachments::Attachment, detach},
    decide::Step,
    host_network::HostPod,
    memory::Failure,
    report::{Done, Report},
};
use crate::{
    attachment::{self, Change},
    cni,
    direction::Direction,
    error::{Code, Error, Result},
    owner::{Asked, Owner},
    pins::Place,
    request::{Endpoint, Limits, Request},
    sandboxes::Sandbox,
};

/// One attachment to make, change or remove.
pub struct Task {
    /// The interface or pod to limit.
    pub target: Target,
    /// The place of the pins.
    pub place: Place,
    /// The present attachment.
    pub found: Option<Attachment>,
    /// The limits that are asked for.
    pub asked: Limits,
    /// The decision.
    pub step: Step,
}

/// What a task limits.
pub enum Target {
    /// An interface of a sandbox.
    Interface(Box<Interface>),
    /// A pod in the node's own network namespace.
    HostPod(Box<HostPod>),
}

/// An interface of a sandbox.
pub struct Interface {
    pub sandbox: Sandbox,
    pub request: Request,
    pub endpoint: Endpoint,
}

/// Performs all tasks; an error in one does not stop the others. Limits that are to be removed are lifted first, all at
/// once, since the kernel keeps a socket's pacing rate when the programs are removed.
pub fn perform(tasks: Vec<Task>, report: &mut Report) {
    let has_lifted: Vec<bool> =
        tasks.iter().map(|task| task.lift().unwrap_or_else(|error| task.note(&error))).collect();
    if has_lifted.contains(&true) {
        thread::sleep(detach::LET_GO);
    }
    for task in tasks {
        match task.perform() {
            Ok(()) => report.changes.push(task.done()),
            // The sandbox ended meanwhile, or another one has replaced it. The next run will see it.
            Err(error) if !task.target.is_there() => log::debug!("{error}"),
            Err(error) => report.fail(task.target.failure(&error)),
        }
    }
}

impl Target {
    fn is_there(&self) -> bool {
        match self {
            Self::Interface(interface) => interface.sandbox.is_there(),
            Self::HostPod(pod) => pod.is_there(),
        }
    }

    /// The failure to give the interface or pod its limit.
    pub fn failure(&self, error: &Error) -> Failure {
        match self {
            Self::Interface(interface) => Failure::of_sandbox(&interface.sandbox, error),
            Self::HostPod(pod) => pod.failure(error),
        }
    }

    fn request(&self) -> &Request {
        match self {
            Self::Interface(interface) => &interface.request,
            Self::HostPod(pod) => &pod.request,
        }
    }

    fn limit(&self, limits: Limits, record: impl FnOnce(Owner) -> Owner) -> Result<()> {
        match self {
            Self::Interface(interface) => cni::limit(&interface.request, &interface.endpoint, limits, record),
            Self::HostPod(pod) => pod.limit(limits, record),
        }
    }
}

impl Task {
    /// The limits after the task.
    fn wanted(&self) -> Limits {
        match self.step {
            Step::Attach(limits) | Step::Change(limits) => limits,
            Step::Keep | Step::Remove => Limits::default(),
        }
    }

    /// Lifts the limits of the directions that are to have none. Returns whether there are any.
    fn lift(&self) -> Result<bool> {
        let Some(found) = self.found.as_ref().filter(|found| !found.links.are_dead()) else {
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

    /// Logs that some connections may keep their pacing rate. This is no reason to keep a limit that is no longer asked
    /// for.
    fn note(&self, error: &Error) -> bool {
        log::warn!("connections of {} may keep their pace: {error}", self.place.pod);
        false
    }

    fn perform(&self) -> Result<()> {
        match (self.step, &self.found) {
            (Step::Keep, _) | (Step::Remove | Step::Change(_), None) => Ok(()),
            (Step::Attach(limits), _) => self.target.limit(limits, |owner| self.record(owner)),
            (Step::Change(limits), Some(found)) => {
                self.change(found, |owner| Change { limits, owner: self.record(owner.clone()) })
            }
            (Step::Remove, Some(found)) => detach::remove(found),
        }
    }

    /// The record with what was asked for, and with the administrator's `max`, which may have changed as well.
    fn record(&self, owner: Owner) -> Owner {
        let changed = Asked::of(&self.wanted()) != Asked::of(&self.asked);
        Owner { changed, followed: true, ..owner.asked_for(&self.asked) }
    }

    /// Changes the attachment that was found, but not one that has replaced it.
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

    /// The report of the task.
    pub fn done(&self) -> Done {
        let action = match self.step {
            Step::Keep => "keep",
            Step::Attach(_) => "attach",
            Step::Change(_) => "change",
            Step::Remove => "remove",
        };
        let was = self.found.as_ref().map(Attachment::limits).unwrap_or_default();
        let Request { pod_namespace, pod_name, .. } = self.target.request();
        Done::at(action, &self.place, &was, &self.wanted()).of(pod_namespace.clone(), pod_name.clone())
    }
}
