//! The pod's labels and annotations from the API server, if the configuration names a `kubeconfig`.
//!
//! No runtime passes labels, so the API server is the only source of labels. A call makes one GET within [`TIME`], for
//! its own pod only. The UID tells whether a pod was deleted and made again under the same name. An ADD that needs
//! neither labels nor annotations from the server makes no GET.
//!
//! `podshaper sync` asks for all pods of a node at once ([`pods_of`]).
//!
//! ureq makes the request (`kube/client.rs`); a list is read object by object (`kube/list.rs`). This file decides which
//! server is asked for which objects.

mod client;
mod kept;
mod kubeconfig;
mod list;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Code, Error, Result, quoted};
use client::{Answer, Question};
pub use kept::{Kept, LeftOut, MAX_BYTES};
use kubeconfig::Server;

/// The time limit for an answer, including name lookup, handshake and body. kubelet starts no other container of the
/// pod in this time.
const TIME: Duration = Duration::from_secs(2);
/// The time limit for all pods of a node, until the answer begins. No pod waits for this answer.
const TIME_FOR_ALL: Duration = Duration::from_secs(8);
/// The time limit for the whole of that answer. 250 pods of the largest size that etcd accepts are 400 MB.
const TIME_FOR_A_LIST: Duration = Duration::from_secs(30);
/// How much is read of an answer about one pod. etcd accepts no object above 1.5 MiB.
const MAX_POD_BYTES: u64 = 2 << 20;
/// Only metadata is asked for. An API server that cannot select it (before 1.15) sends the whole pod.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";
const METADATA_OF_ALL: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json";
/// The annotation with which kubelet tells the API server which static pod an object mirrors. Its value is the UID that
/// the runtime knows.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod to ask for.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// Its namespace, already checked to be a plain name.
    pub namespace: &'a str,
    /// Its name, already checked to be a plain name.
    pub name: &'a str,
    /// The UID that the runtime has for the pod.
    pub uid: &'a str,
}

/// The labels of an object.
pub type Labels = BTreeMap<String, String>;

/// The names, labels and annotations of a pod, as far as podshaper can need them: [`kept`] says which are left out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `metadata.labels`
    pub labels: Kept,
    /// `metadata.annotations`
    pub annotations: Kept,
}

/// The pods of a node. A tenant can write the UID of any pod into [`MIRROR`], so a mirror never replaces a pod that has
/// the UID itself, nor another mirror.
#[derive(Default)]
struct Pods {
    by_own_uid: BTreeMap<String, Metadata>,
    /// `None` if several pods claim to mirror the UID: nothing tells which of them kubelet has made.
    by_mirrored_uid: BTreeMap<String, Option<Metadata>>,
}

#[derive(Deserialize)]
struct Object {
    metadata: ObjectMeta,
}

/// The part of a namespace that is read: only the labels matter.
#[derive(Deserialize)]
struct Namespace {
    metadata: NamespaceMeta,
}

#[derive(Deserialize)]
struct NamespaceMeta {
    #[serde(default)]
    name: String,
    labels: Option<Labels>,
}

#[derive(Deserialize)]
struct ObjectMeta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    uid: String,
    labels: Option<Kept>,
    annotations: Option<Kept>,
}

/// Asks the API server that the kubeconfig names for the metadata of a pod.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn metadata(kubeconfig: &Path, pod: Pod<'_>) -> Result<Metadata> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
    let question = question(&path);
    let subject = format!("pod {}/{}", pod.namespace, pod.name);
    ask(kubeconfig, &subject, &question, |answer| understand(answer, pod.uid))
}

/// Asks the API server for the pods of a node, by the UID that the runtime knows. A static pod's UID is that in the
/// annotation of its mirror pod.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn pods_of(kubeconfig: &Path, node: &str) -> Result<BTreeMap<String, Metadata>> {
    // Pods that have ended have no sandbox and no cgroup. `resourceVersion=0` answers from the server's memory, which
    // is good enough for a question that is repeated every few seconds.
    const NOT_ENDED: &str = "status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed";
    let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}%2C{NOT_ENDED}&resourceVersion=0");
    let mut pods = Pods::default();
    let subject = format!("the pods of node {node}");
    ask_for_all(kubeconfig, &subject, &path, "pods", |Object { metadata }| pods.add(metadata))?;
    Ok(pods.by_uid())
}

/// Asks the API server for the labels of a namespace.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn labels_of_namespace(kubeconfig: &Path, name: &str) -> Result<Labels> {
    let path = format!("/api/v1/namespaces/{name}");
    let question = question(&path);
    let understand = |answer: &Answer| decode::<Namespace>(answer, "a namespace");
    let found = ask(kubeconfig, &format!("namespace {name}"), &question, understand)?;
    Ok(found.metadata.labels.unwrap_or_default())
}

/// Asks the API server for the labels of all namespaces, by name.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn labels_of_namespaces(kubeconfig: &Path) -> Result<BTreeMap<String, Labels>> {
    let path = "/api/v1/namespaces?resourceVersion=0";
    let mut labels = BTreeMap::new();
    ask_for_all(kubeconfig, "the namespaces", path, "namespaces", |Namespace { metadata }| {
        labels.insert(metadata.name, metadata.labels.unwrap_or_default());
    })?;
    Ok(labels)
}

/// A question about one object.
fn question(path: &str) -> Question<'_> {
    Question { path, accept: METADATA, max_body_bytes: MAX_POD_BYTES, time_until_body: TIME, time: TIME }
}

/// Asks the server of a kubeconfig one question. `subject` names the object for errors and the log.
fn ask<T>(
    kubeconfig: &Path,
    subject: &str,
    question: &Question<'_>,
    understand: impl FnOnce(&Answer) -> Result<T, String>,
) -> Result<T> {
    asked(kubeconfig, subject, |server| Ok(understand(&client::get(server, question)?)))
}

/// Asks for all objects of a kind. Each object is handled as it arrives, so that a large object does not hold up the
/// others.
fn ask_for_all<T: DeserializeOwned>(
    kubeconfig: &Path,
    subject: &str,
    path: &str,
    kind: &str,
    mut take: impl FnMut(T),
) -> Result<()> {
    let question = Question {
        path,
        accept: METADATA_OF_ALL,
        max_body_bytes: MAX_POD_BYTES,
        time_until_body: TIME_FOR_ALL,
        time: TIME_FOR_A_LIST,
    };
    let read = |body: &mut dyn Read| list::read(body, kind, &mut take);
    asked(kubeconfig, subject, |server| {
        Ok(client::get_list(server, &question, read)?.map_err(|answer| refusal(&answer)).flatten())
    })
}

/// Asks the server, logs how long it took, and gives an error its context.
fn asked<T>(kubeconfig: &Path, subject: &str, ask: impl FnOnce(&Server) -> Result<Result<T, String>>) -> Result<T> {
    let start = Instant::now();
    let server = Server::read(kubeconfig)?;
    let asked = || format!("ask {} for {subject}", server.url);
    let answer = ask(&server).map_err(|error| Error::because(Code::ApiServer, asked(), error))?;
    let found = answer.map_err(|text| Error::new(Code::ApiServer, format!("{}: {text}", asked())));
    log::debug!("{} took {:?}", asked(), start.elapsed());
    found
}

impl Pods {
    fn add(&mut self, metadata: ObjectMeta) {
        let uid = metadata.uid.clone();
        let pod = Metadata::of(metadata);
        match pod.annotations.mirrored().map(str::to_owned) {
            None => drop(self.by_own_uid.insert(uid, pod)),
            Some(mirrored) => {
                self.by_mirrored_uid.entry(mirrored).and_modify(|claimed| *claimed = None).or_insert(Some(pod));
            }
        }
    }

    /// The pods by the UID that the runtime knows.
    fn by_uid(self) -> BTreeMap<String, Metadata> {
        let mut by_uid = self.by_own_uid;
        for (uid, mirror) in self.by_mirrored_uid {
            if let Some(mirror) = mirror {
                by_uid.entry(uid).or_insert(mirror);
            }
        }
        by_uid
    }
}

impl Metadata {
    fn of(ObjectMeta { name, namespace, uid: _, labels, annotations }: ObjectMeta) -> Self {
        let [labels, annotations] = [labels, annotations].map(Option::unwrap_or_default);
        Self { namespace, name, labels, annotations }
    }
}

/// The metadata in an answer, if the answer is about the pod with this UID.
fn understand(answer: &Answer, uid: &str) -> Result<Metadata, String> {
    let Object { metadata } = decode(answer, "a pod")?;
    let found = metadata.uid.clone();
    let metadata = Metadata::of(metadata);
    if found != uid && metadata.annotations.mirrored() != Some(uid) {
        return Err(format!(
            "it has another pod of this name by now: UID {}, and the runtime makes {uid}; kubelet will give it up or try again",
            quoted(&found)
        ));
    }
    Ok(metadata)
}

fn decode<'a, T: Deserialize<'a>>(answer: &'a Answer, what: &str) -> Result<T, String> {
    if answer.status != 200 {
        return Err(refusal(answer));
    }
    let none = what.trim_start_matches("a ");
    serde_json::from_slice(&answer.body).map_err(|cause| format!("its answer is no {none}: {cause}"))
}

fn refusal(answer: &Answer) -> String {
    #[derive(Deserialize)]
    struct Status {
        message: String,
    }
    let said = serde_json::from_slice(&answer.body).map(|Status { message }| message).unwrap_or_default();
    let said: String = said.chars().take(200).flat_map(char::escape_default).collect();
    let remedy = match answer.status {
        401 => "the credentials in the kubeconfig are not (or no longer) valid",
        403 => {
            "its user may not; kubectl apply -f install/labels-rbac.yaml makes one who may get and list pods and namespaces, and \
             install/kubeconfig writes its kubeconfig: put that in the place of this one (kubelet's own may get its node's pods alone)"
        }
        404 => "there is no such pod (any more), or it is another cluster's API server",
        _ => "is it an API server, and well?",
    };
    format!("it answered {} \"{said}\": {remedy}", answer.status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(items: &str) -> BTreeMap<String, Metadata> {
        let body = format!(
            r#"{{"kind": "PartialObjectMetadataList", "metadata": {{"resourceVersion": "1"}}, "items": {items}}}"#
        );
        let mut pods = Pods::default();
        let read = list::read(&mut body.as_bytes(), "pods", &mut |Object { metadata }| pods.add(metadata));
        read.unwrap().unwrap();
        pods.by_uid()
    }

    /// The UIDs of pods, each with the pod's name. Each item is a name, a UID and the UID that is mirrored, if any.
    fn names(items: &[[&str; 3]]) -> Vec<String> {
        let item = |[name, uid, mirrored]: &[&str; 3]| {
            let mirror = if mirrored.is_empty() { String::new() } else { format!(r#""{MIRROR}": "{mirrored}""#) };
            format!(r#"{{"metadata": {{"name": "{name}", "uid": "{uid}", "annotations": {{{mirror}}}}}}}"#)
        };
        let items: Vec<String> = items.iter().map(item).collect();
        pods(&format!("[{}]", items.join(","))).iter().map(|(uid, pod)| format!("{uid} {}", pod.name)).collect()
    }

    #[test]
    fn the_pods_of_a_node_are_told_apart_as_the_runtime_does() {
        for none in ["null", "[]"] {
            assert_eq!(pods(none), BTreeMap::new(), "{none}");
        }
        let labelled = pods(r#"[{"metadata": {"uid": "u-1", "labels": {"a": "b"}}}]"#);
        assert_eq!(labelled["u-1"].labels.get("a"), Ok(Some("b")));
        assert_eq!(names(&[["a", "u-1", ""], ["b", "u-2", "static"]]), ["static b", "u-1 a"]);
        let refused = refusal(&Answer { status: 403, body: b"{}".to_vec() });
        assert!(refused.contains("kubectl apply -f install/labels-rbac.yaml"), "{refused}");
    }

    #[test]
    fn a_mirror_replaces_no_pod_that_has_the_uid_itself_and_no_other_mirror() {
        let (victim, foe, kubelets) = (["web", "u-1", ""], ["foe", "u-2", "u-1"], ["etcd", "u-3", "u-1"]);
        for items in [[victim, foe], [foe, victim]] {
            assert_eq!(names(&items), ["u-1 web"], "{items:?}");
        }
        for items in [[foe, kubelets], [kubelets, foe]] {
            assert_eq!(names(&items), [""; 0], "{items:?}");
        }
        // A third one is not the first again.
        assert_eq!(names(&[kubelets, foe, foe]), [""; 0]);
        assert_eq!(names(&[foe, kubelets, victim]), ["u-1 web"]);
    }
}
