//! The pod as the API server knows it: its labels and annotations, where the configuration names a `kubeconfig`.
//!
//! No runtime passes labels, so this is the only way to them. One GET within [`TIME`], of the pod the call is about and of no other:
//! a pod deleted and made again under its name is told by the UID. An ADD that needs none of this starts none of it.
//!
//! `podshaper sync` asks for all the pods of a node at once ([`pods_of`]).
//!
//! The request is ureq's (`kube/client.rs`), a list is read object by object (`kube/list.rs`); what is asked and whom is here.

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
use kept::Kept;
use kubeconfig::Server;

/// All the time there is for an answer, name, handshake and body included: kubelet starts no other container of the pod meanwhile.
const TIME: Duration = Duration::from_secs(2);
/// The same for all the pods of a node, with nobody waiting, until the answer begins.
const TIME_FOR_ALL: Duration = Duration::from_secs(8);
/// The same for the whole of it: 250 pods with all that etcd takes are 400 MB.
const TIME_FOR_A_LIST: Duration = Duration::from_secs(30);
/// Most that is read of an answer about a pod. etcd takes no object above 1.5 MiB.
const MAX_POD_BYTES: u64 = 2 << 20;
/// Only metadata is asked for; an API server too old to select it (before 1.15) sends the whole pod.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";
const METADATA_OF_ALL: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json";
/// How a kubelet tells the API server which static pod an object mirrors: the UID that the runtime knows it by.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Which pod.
#[derive(Clone, Copy, Debug)]
pub struct Pod<'a> {
    /// Its namespace, checked to be no more than a name.
    pub namespace: &'a str,
    /// Its name, likewise.
    pub name: &'a str,
    /// The UID that the runtime was told.
    pub uid: &'a str,
}

/// The labels of an object.
pub type Labels = BTreeMap<String, String>;

/// What people write on a pod, as far as it can matter here: [`kept`] says what is left out.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `metadata.labels`
    pub labels: Labels,
    /// `metadata.annotations`
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Object {
    metadata: ObjectMeta,
}

/// Of a namespace nothing but the labels is of interest.
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

/// Asks the API server that the kubeconfig names.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn metadata(kubeconfig: &Path, pod: Pod<'_>) -> Result<Metadata> {
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
    let question = question(&path);
    let subject = format!("pod {}/{}", pod.namespace, pod.name);
    ask(kubeconfig, &subject, &question, |answer| understand(answer, pod.uid))
}

/// Asks it for the pods of a node, which are told apart by the UID that the runtime was told: a static pod's is its mirror's.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn pods_of(kubeconfig: &Path, node: &str) -> Result<BTreeMap<String, Metadata>> {
    // Those that have ended have no sandbox and no cgroup. From the server's memory, which is enough for what is asked every few seconds.
    const NOT_ENDED: &str = "status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed";
    let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}%2C{NOT_ENDED}&resourceVersion=0");
    let mut pods = BTreeMap::new();
    ask_for_all(kubeconfig, &format!("the pods of node {node}"), &path, "pods", |Object { metadata }| {
        let (uid, pod) = by_uid(metadata);
        pods.insert(uid, pod);
    })?;
    Ok(pods)
}

/// Asks it for the labels of a namespace.
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

/// Asks it for the labels of every namespace, by its name.
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

/// About one object.
fn question(path: &str) -> Question<'_> {
    Question { path, accept: METADATA, max_body_bytes: MAX_POD_BYTES, time_until_body: TIME, time: TIME }
}

/// One question to the server that a kubeconfig names, about what `subject` calls.
fn ask<T>(
    kubeconfig: &Path,
    subject: &str,
    question: &Question<'_>,
    understand: impl FnOnce(&Answer) -> Result<T, String>,
) -> Result<T> {
    asked(kubeconfig, subject, |server| Ok(understand(&client::get(server, question)?)))
}

/// The same about all objects of a kind. Each is taken as it comes, so that a large one costs nobody but itself.
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

/// What a server says, and how long that took.
fn asked<T>(kubeconfig: &Path, subject: &str, ask: impl FnOnce(&Server) -> Result<Result<T, String>>) -> Result<T> {
    let start = Instant::now();
    let server = Server::read(kubeconfig)?;
    let asked = || format!("ask {} for {subject}", server.url);
    let answer = ask(&server).map_err(|error| Error::because(Code::ApiServer, asked(), error))?;
    let found = answer.map_err(|text| Error::new(Code::ApiServer, format!("{}: {text}", asked())));
    log::debug!("{} took {:?}", asked(), start.elapsed());
    found
}

/// A pod under the UID that the runtime knows it by.
fn by_uid(metadata: ObjectMeta) -> (String, Metadata) {
    let uid = metadata.uid.clone();
    let metadata = Metadata::of(metadata);
    (metadata.annotations.get(MIRROR).cloned().unwrap_or(uid), metadata)
}

impl Metadata {
    fn of(ObjectMeta { name, namespace, uid: _, labels, annotations }: ObjectMeta) -> Self {
        let [labels, annotations] = [labels, annotations].map(|kept| kept.unwrap_or_default().0);
        Self { namespace, name, labels, annotations }
    }
}

/// The metadata in an answer, if it is about this very pod.
fn understand(answer: &Answer, uid: &str) -> Result<Metadata, String> {
    let Object { metadata } = decode(answer, "a pod")?;
    let found = metadata.uid.clone();
    let metadata = Metadata::of(metadata);
    if found != uid && metadata.annotations.get(MIRROR).is_none_or(|mirrored| mirrored != uid) {
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

    #[test]
    fn the_pods_of_a_node_are_told_apart_as_the_runtime_does() {
        let all = |items: &str| {
            let body = format!(
                r#"{{"kind": "PartialObjectMetadataList", "metadata": {{"resourceVersion": "1"}}, "items": {items}}}"#
            );
            let mut pods = Vec::new();
            let read = list::read(&mut body.as_bytes(), "pods", &mut |Object { metadata }| pods.push(by_uid(metadata)));
            read.unwrap().unwrap();
            pods
        };
        for none in ["null", "[]"] {
            assert_eq!(all(none), [], "{none}");
        }
        let mirror = format!(r#"{{"{MIRROR}": "static"}}"#);
        let pods = all(&format!(
            r#"[{{"metadata": {{"uid": "u-1", "labels": {{"a": "b"}}}}}}, {{"metadata": {{"uid": "u-2", "annotations": {mirror}}}}}]"#
        ));
        assert_eq!(pods.iter().map(|(uid, _)| uid.as_str()).collect::<Vec<_>>(), ["u-1", "static"]);
        assert_eq!(pods[0].1.labels["a"], "b");
        let refused = refusal(&Answer { status: 403, body: b"{}".to_vec() });
        assert!(refused.contains("kubectl apply -f install/labels-rbac.yaml"), "{refused}");
    }
}
