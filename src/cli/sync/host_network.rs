//! Pods in the node's own network namespace (`hostNetwork`). No runtime calls a CNI plugin for them, so only sync can
//! follow their annotations. The limit is on the pod's cgroup, on every interface but loopback, as with
//! `podshaper attach`: the node's interfaces stay unchanged, and received packets are limited by drops.
//!
//! Only a pod with the annotation gets a limit. The `max` and the defaults of the configuration apply to the pod
//! network: pods in the node's namespace are most often needed by the node itself.

use std::{collections::BTreeSet, path::Path};

use super::{
    super::{attachments::Attachment, gc},
    answer::Answer,
    decide::{InForce, Step, decide},
    memory::Failure,
    networks::Networks,
    report::Report,
    task::{Target, Task},
};
use crate::{
    attachment::{self, Directory, EVERY_INTERFACE, Interfaces, Plan},
    cgroup::{self, Hierarchies, PodCgroup, Wanted, network_namespace_of, network_namespaces},
    error::{Error, Result},
    interface::Record,
    kube::Metadata,
    owner::Owner,
    pins::Place,
    request::{Limits, Request},
};

/// A host-network pod that asks for a limit, or has one.
pub struct HostPod {
    /// The pod's request, as if a runtime had called.
    pub request: Request,
    uid: String,
    cgroup: PodCgroup,
}

/// The tasks for these pods. Their attachments are taken out of `others`; stale attachments stay in `others`.
pub fn tasks(
    networks: &Networks,
    answer: &Answer<'_>,
    with_sandbox: &BTreeSet<&str>,
    others: &mut Vec<Attachment>,
    report: &mut Report,
) -> Vec<Task> {
    let Ok(hierarchies) = Hierarchies::of_this_host() else { return Vec::new() };
    let mut tasks = Vec::new();
    for (uid, pod) in answer.pods().filter(|(uid, _)| !with_sandbox.contains(uid)) {
        let is_its = |found: &Attachment| found.place.pod == uid && found.place.interface == EVERY_INTERFACE;
        let found = others.iter().position(|found| is_its(found) && !gc::is_stale(found));
        let found = found.map(|index| others.swap_remove(index));
        match task(networks, answer, &hierarchies, (uid, pod), found) {
            Ok(task) => tasks.extend(task),
            Err(error) => report.fail(failure(uid, pod, &error)),
        }
    }
    tasks
}

fn task(
    networks: &Networks,
    answer: &Answer<'_>,
    hierarchies: &Hierarchies,
    (uid, pod): (&str, &Metadata),
    found: Option<Attachment>,
) -> Result<Option<Task>> {
    let Some(request) = networks.request_of_host_pod(uid, pod) else { return Ok(None) };
    let request = request?;
    let asked = request.limits_by_annotation(pod, &answer.namespaces)?;
    // Most pods ask for no limit, and the search for their cgroups is saved.
    if asked.is_empty() && found.is_none() {
        return Ok(None);
    }
    let Ok(cgroup) = cgroup::find(hierarchies, Wanted::Uid(uid)) else { return Ok(None) };
    if found.is_none() && !is_of_host(&cgroup.path) {
        return Ok(None);
    }
    let in_force = found.as_ref().map(|found| InForce {
        limits: found.problem.is_none().then(|| found.limits()),
        asked: found.owner.asked,
        by_hand: found.owner.changed,
        is_of_sandbox: Path::new(&found.owner.cgroup) == cgroup.path,
        is_whole: found.is_whole() && found.owner.list == request.config.subnets.number(),
    });
    let step = decide(&asked, in_force.as_ref());
    let place = Place { pod: uid.to_owned(), interface: EVERY_INTERFACE.to_owned() };
    let target = Target::HostPod(Box::new(HostPod { request, uid: uid.to_owned(), cgroup }));
    Ok((step != Step::Keep).then_some(Task { target, place, found, asked, step }))
}

/// Whether a pod has processes in the node's own network namespace, which is that of this process. A pod that is
/// starting or ending may have no process.
fn is_of_host(cgroup: &Path) -> bool {
    network_namespace_of("self").is_some_and(|own| network_namespaces(cgroup).contains_key(&own))
}

fn failure(uid: &str, pod: &Metadata, error: &Error) -> Failure {
    Failure {
        namespace: Some(pod.namespace.clone()),
        pod: Some(pod.name.clone()),
        uid: uid.to_owned(),
        interface: EVERY_INTERFACE.to_owned(),
        error: error.to_string(),
    }
}

impl HostPod {
    /// Whether the pod's cgroup exists.
    pub fn is_there(&self) -> bool {
        self.cgroup.path.exists()
    }

    /// The failure to give the pod its limit.
    pub fn failure(&self, error: &Error) -> Failure {
        let Request { pod_namespace, pod_name, .. } = &self.request;
        Failure {
            namespace: pod_namespace.clone(),
            pod: pod_name.clone(),
            uid: self.uid.clone(),
            interface: EVERY_INTERFACE.to_owned(),
            error: error.to_string(),
        }
    }

    /// Limits the pod. Connections that exist already are counted and not paced.
    ///
    /// # Errors
    /// The kernel's error. No part of the attachment is left then.
    pub fn limit(&self, limits: Limits, record: impl FnOnce(Owner) -> Owner) -> Result<()> {
        if limits.ingress.is_some() {
            log::warn!(
                "what the pod {} receives is limited by drops, being in the node's network namespace; TCP may get much less than the limit",
                self.uid
            );
        }
        let owner = record(Owner {
            container_id: self.uid.clone(),
            interface: Record { ifname: EVERY_INTERFACE.to_owned(), ..Record::default() },
            pod_namespace: self.request.pod_namespace.clone(),
            pod_name: self.request.pod_name.clone(),
            uid: Some(self.uid.clone()),
            cgroup: self.cgroup.path.to_string_lossy().into_owned(),
            // The attachment belongs to no network, and a runtime's GC does not name it.
            ..Owner::default()
        });
        let plan = Plan {
            place: Place { pod: self.uid.clone(), interface: EVERY_INTERFACE.to_owned() },
            cgroup: Directory::Pod(&self.cgroup),
            interfaces: Interfaces::OfNode { index: 0 },
            limits,
            subnets: &self.request.config.subnets,
            // The interfaces are the node's.
            other_paths: false,
            owner,
        };
        attachment::attach(&plan).map(drop)
    }
}
