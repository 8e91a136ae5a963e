//! The pod as the API server knows it: its labels and annotations, where the configuration names a `kubeconfig`.
//!
//! No runtime passes labels, so this is the only way to them. One GET within [`TIME`], of the pod the call is about and of no other:
//! a pod deleted and made again under its name is told by the UID. An ADD that needs none of this starts none of it.
//!
//! `podshaper sync` asks for all the pods of a node at once ([`pods_of`]).
//!
//! The request is ureq's (`kube/client.rs`); what it asks and whom is here.

mod client;
mod kubeconfig;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::error::{Code, Error, Result, quoted};
use client::{Answer, Question};
use kubeconfig::Server;

/// All the time there is for an answer, name, handshake and body included: kubelet starts no other container of the pod meanwhile.
const TIME: Duration = Duration::from_secs(2);
/// The same for all the pods of a node, with nobody waiting.
const TIME_FOR_ALL: Duration = Duration::from_secs(8);
/// Most that is read of an answer about a pod. etcd takes no object above 1.5 MiB.
const MAX_POD_BYTES: u64 = 2 << 20;
/// The same about a node's pods.
const MAX_PODS_BYTES: u64 = 64 << 20;
/// Only metadata is asked for; an API server too old to select it (before 1.15) sends the whole pod.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, application/json";
const METADATA_OF_ALL: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1, application/json";
/// How a kubelet tells the API server which static pod an object mirrors: the UID the runtime knows it by.
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

/// What people write on a pod.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// `metadata.labels`
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`
    pub annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Object {
    metadata: ObjectMeta,
}

#[derive(Deserialize)]
struct Objects {
    /// An API server writes null for none.
    items: Option<Vec<Object>>,
}

#[derive(Deserialize)]
struct ObjectMeta {
    uid: String,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

/// Asks the API server that the kubeconfig names.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn metadata(kubeconfig: &Path, pod: Pod<'_>) -> Result<Metadata> {
    let start = Instant::now();
    let server = Server::read(kubeconfig)?;
    let asked = || format!("ask {} for pod {}/{}", server.url, pod.namespace, pod.name);
    let path = format!("/api/v1/namespaces/{}/pods/{}", pod.namespace, pod.name);
    let question = Question { path: &path, accept: METADATA, max_body_bytes: MAX_POD_BYTES, time: TIME };
    let answer = client::get(&server, &question).map_err(|error| Error::because(Code::ApiServer, asked(), error))?;
    let found =
        understand(&answer, pod.uid).map_err(|text| Error::new(Code::ApiServer, format!("{}: {text}", asked())));
    log::debug!("{} took {:?}", asked(), start.elapsed());
    found
}

/// Asks it for the pods of a node, which are told apart by the UID that the runtime was told: a static pod's is its mirror's.
///
/// # Errors
/// [`Code::Config`] for the kubeconfig, [`Code::ApiServer`] for everything after it.
pub fn pods_of(kubeconfig: &Path, node: &str) -> Result<BTreeMap<String, Metadata>> {
    let server = Server::read(kubeconfig)?;
    let asked = || format!("ask {} for the pods of node {node}", server.url);
    // From the server's memory, which is enough for what is asked every few seconds.
    let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}&resourceVersion=0");
    let question =
        Question { path: &path, accept: METADATA_OF_ALL, max_body_bytes: MAX_PODS_BYTES, time: TIME_FOR_ALL };
    let answer = client::get(&server, &question).map_err(|error| Error::because(Code::ApiServer, asked(), error))?;
    understand_all(&answer).map_err(|text| Error::new(Code::ApiServer, format!("{}: {text}", asked())))
}

fn understand_all(answer: &Answer) -> Result<BTreeMap<String, Metadata>, String> {
    if answer.status != 200 {
        return Err(refusal(answer));
    }
    let objects: Objects =
        serde_json::from_slice(&answer.body).map_err(|cause| format!("its answer is no list of pods: {cause}"))?;
    let by_uid =
        objects.items.into_iter().flatten().map(|Object { metadata: ObjectMeta { uid, labels, annotations } }| {
            let (labels, annotations) = (labels.unwrap_or_default(), annotations.unwrap_or_default());
            (annotations.get(MIRROR).cloned().unwrap_or(uid), Metadata { labels, annotations })
        });
    Ok(by_uid.collect())
}

/// The metadata in an answer, if it is about this very pod.
fn understand(answer: &Answer, uid: &str) -> Result<Metadata, String> {
    if answer.status != 200 {
        return Err(refusal(answer));
    }
    let object: Object =
        serde_json::from_slice(&answer.body).map_err(|cause| format!("its answer is no pod: {cause}"))?;
    let ObjectMeta { uid: found, labels, annotations } = object.metadata;
    let (labels, annotations) = (labels.unwrap_or_default(), annotations.unwrap_or_default());
    if found != uid && annotations.get(MIRROR).is_none_or(|mirrored| mirrored != uid) {
        return Err(format!(
            "it has another pod of this name by now: UID {}, and the runtime makes {uid}; kubelet will give it up or try again",
            quoted(&found)
        ));
    }
    Ok(Metadata { labels, annotations })
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
        403 => "its user must be allowed to get pods, and for sync to list them (install/labels-rbac.yaml)",
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
            understand_all(&Answer { status: 200, body: body.into() })
        };
        for none in ["null", "[]"] {
            assert_eq!(all(none), Ok(BTreeMap::new()), "{none}");
        }
        let mirror = format!(r#"{{"{MIRROR}": "static"}}"#);
        let pods = all(&format!(
            r#"[{{"metadata": {{"uid": "u-1", "labels": {{"a": "b"}}}}}}, {{"metadata": {{"uid": "u-2", "annotations": {mirror}}}}}]"#
        ));
        let pods = pods.unwrap();
        assert_eq!(pods.keys().collect::<Vec<_>>(), ["static", "u-1"]);
        assert_eq!(pods["u-1"].labels["a"], "b");
        assert_eq!(all("{}").unwrap_err().split(':').next(), Some("its answer is no list of pods"));
        let refused = understand_all(&Answer { status: 403, body: b"{}".to_vec() }).unwrap_err();
        assert!(refused.contains("for sync to list them"), "{refused}");
    }
}
