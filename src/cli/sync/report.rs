//! The report of a `sync` for a person and for programs: what it has done, and what it could not do.

use serde::Serialize;

use super::{
    super::{attachments::Attachment, output},
    memory::Failure,
};
use crate::{
    direction::Direction,
    error::{Error, quoted},
    owner::Owner,
    pins::Place,
    pod::{PodUid, object_name},
    request::{Limit, Limits},
    sandboxes::Sandbox,
};

/// The action: filters and queues of an attachment were restored.
pub const HOLD: &str = "hold";
/// The action: a record that a delegated ADD had left for its DEL was removed.
pub const FORGET: &str = "forget";

/// One action of the run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Done {
    action: &'static str,
    namespace: Option<String>,
    pod: Option<String>,
    uid: String,
    interface: String,
    egress: Difference,
    ingress: Difference,
}

/// The limits of a direction before and after the action.
#[derive(Debug, Default, Serialize)]
pub struct Difference {
    was: Option<Shown>,
    is: Option<Shown>,
}

/// A limit in the JSON output.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    limit_bits_per_s: u64,
    burst_bits: u64,
    #[serde(skip)]
    text: String,
}

/// The report of a run.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether the run changed nothing because of --dry-run.
    pub dry_run: bool,
    /// The actions.
    pub changes: Vec<Done>,
    /// The pods that do not have the limit that they ask for.
    pub failures: Vec<Failure>,
    /// The information that the run lacks.
    pub error: Option<String>,
}

impl Done {
    /// An action on an attachment.
    pub fn to(action: &'static str, found: &Attachment, is: &Limits) -> Self {
        let Owner { pod_namespace, pod_name, .. } = found.owner.clone();
        Self::at(action, &found.place, &found.limits(), is).of(pod_namespace, pod_name)
    }

    /// Adds the names of the pod.
    pub fn of(self, namespace: Option<String>, pod: Option<String>) -> Self {
        Self { namespace, pod, ..self }
    }

    /// An action at a place, with the limits before and after.
    pub fn at(action: &'static str, place: &Place, was: &Limits, is: &Limits) -> Self {
        let difference = |direction| Difference { was: Shown::of(was.of(direction)), is: Shown::of(is.of(direction)) };
        Self {
            action,
            namespace: None,
            pod: None,
            uid: place.pod.clone(),
            interface: place.interface.clone(),
            egress: difference(Direction::Egress),
            ingress: difference(Direction::Ingress),
        }
    }

    /// A line for each direction whose limit has changed.
    fn text(&self) -> String {
        let name = match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            _ => self.uid.clone(),
        };
        let name = format!("{name} {}", self.interface);
        if self.action == "clear" {
            return format!("{name}: cleared, its cgroup is gone\n");
        }
        if self.action == FORGET {
            return format!("{name}: the network's list at its ADD is cleared, the sandbox is gone\n");
        }
        if self.action == HOLD {
            return format!("{name}: held again\n");
        }
        let lines = [(Direction::Egress, &self.egress), (Direction::Ingress, &self.ingress)];
        let lines = lines.into_iter().filter(|(_, Difference { was, is })| was != is);
        let text: String = lines
            .map(|(direction, Difference { was, is })| {
                let show = |shown: &Option<Shown>| shown.as_ref().map_or("no limit", |shown| &shown.text).to_owned();
                format!("{name}: {direction} {} (was {})\n", show(is), show(was))
            })
            .collect();
        match (text.is_empty(), self.action) {
            (false, _) => text,
            // The limits are the same, but were not on this sandbox, or not all programs were attached.
            (true, "attach") => format!("{name}: attached anew\n"),
            (true, _) => format!("{name}: asks for what it has\n"),
        }
    }
}

impl Shown {
    fn of(limit: Option<&Limit>) -> Option<Self> {
        limit.map(|limit| Self {
            limit_bits_per_s: limit.rate.as_bits_per_s(),
            burst_bits: limit.burst.as_bytes().saturating_mul(8),
            text: format!("{}bit/s, burst {}bit", limit.rate, limit.burst),
        })
    }
}

impl Failure {
    /// The failure of an attachment.
    pub fn of(found: &Attachment, error: &Error) -> Self {
        let Owner { pod_namespace: namespace, pod_name: pod, .. } = found.owner.clone();
        let Place { pod: uid, interface } = found.place.clone();
        Self { namespace, pod, uid, interface, error: error.to_string() }
    }

    /// The failure of a sandbox, whose names may hold any character.
    pub fn of_sandbox(sandbox: &Sandbox, error: &Error) -> Self {
        let name = |key| sandbox.arg(key).and_then(|name| object_name(name).ok());
        Self {
            namespace: name("K8S_POD_NAMESPACE"),
            pod: name("K8S_POD_NAME"),
            uid: sandbox.pod().parse::<PodUid>().map_or_else(|_| quoted(sandbox.pod()), |uid| uid.to_string()),
            interface: crate::pod::interface_name(&sandbox.ifname)
                .map_or_else(|_| quoted(&sandbox.ifname), |name| name.to_string()),
            error: error.to_string(),
        }
    }
}

impl Report {
    /// Adds a pod that does not have the limit that it asks for.
    pub fn fail(&mut self, failure: Failure) {
        output::complain(&format!("{}: {}", failure.name(), failure.error));
        self.failures.push(failure);
    }

    /// Adds an error because of which this run lacks information.
    pub fn know_less(&mut self, error: &Error) {
        output::complain(&error.to_string());
        let text = error.to_string();
        self.error = Some(self.error.take().map_or_else(|| text.clone(), |before| format!("{before}; {text}")));
    }

    /// A line for each change.
    pub fn text(&self) -> String {
        let would = if self.dry_run { "would be: " } else { "" };
        let lines: String = self.changes.iter().map(Done::text).collect();
        lines.lines().map(|line| format!("{would}{line}\n")).collect()
    }
}
