//! The API server's answer about this node's pods and their namespaces, if it was asked and has answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::{
    error::{Code, Error, Result},
    kube::{self, Metadata},
    pod::object_name,
    request::Namespaces,
    sandboxes::Sandbox,
};

use super::report::Report;

/// The content of the answer.
pub struct Answer<'a> {
    kubeconfig: Option<&'a Path>,
    pods: Pods,
    /// The labels of the namespaces.
    pub namespaces: Namespaces,
}

/// The answer about the pods.
enum Pods {
    /// No API server is configured.
    OfNobody,
    /// The API server has not answered.
    Unknown,
    /// The pods of the node of this name, by the UIDs that the runtime knows.
    Of { node: String, by_uid: BTreeMap<String, Metadata> },
}

impl<'a> Answer<'a> {
    /// Asks for the pods of a node, if an API server is configured.
    pub fn about_pods(kubeconfig: Option<&'a Path>, node: Option<&str>, report: &mut Report) -> Self {
        let namespaces = Namespaces::new();
        let Some(path) = kubeconfig else { return Self { kubeconfig, pods: Pods::OfNobody, namespaces } };
        let pods = node_name(node).and_then(|node| Ok(Pods::Of { by_uid: kube::pods_of(path, &node)?, node }));
        let pods = pods.unwrap_or_else(|error| {
            report.know_less(&error);
            Pods::Unknown
        });
        Self { kubeconfig, pods, namespaces }
    }

    /// Asks for the labels of the namespaces. If the server does not answer, the limits of all pods count as unknown.
    pub fn ask_for_namespaces(&mut self, report: &mut Report) {
        let (Some(kubeconfig), Pods::Of { .. }) = (self.kubeconfig, &self.pods) else { return };
        match kube::labels_of_namespaces(kubeconfig) {
            Ok(namespaces) => self.namespaces = namespaces,
            Err(error) => {
                report.know_less(&error);
                self.pods = Pods::Unknown;
            }
        }
    }

    /// The pod of a sandbox. A pod with another name is not the sandbox's: a tenant can make a pod that claims to
    /// mirror the sandbox's UID.
    pub fn pod_of(&self, sandbox: &Sandbox) -> Option<&Metadata> {
        let Pods::Of { by_uid, .. } = &self.pods else { return None };
        let pod = by_uid.get(sandbox.arg("K8S_POD_UID")?)?;
        let is_named = |key, name: &str| sandbox.arg(key).is_none_or(|own| own == name);
        (is_named("K8S_POD_NAMESPACE", &pod.namespace) && is_named("K8S_POD_NAME", &pod.name)).then_some(pod)
    }

    /// All pods, with their UIDs.
    pub fn pods(&self) -> impl Iterator<Item = (&str, &Metadata)> {
        let by_uid = match &self.pods {
            Pods::Of { by_uid, .. } => Some(by_uid),
            Pods::OfNobody | Pods::Unknown => None,
        };
        by_uid.into_iter().flatten().map(|(uid, pod)| (uid.as_str(), pod))
    }

    /// Whether no API server is configured.
    pub fn is_of_nobody(&self) -> bool {
        matches!(self.pods, Pods::OfNobody)
    }

    /// Checks that the answer is about this node, whose runtime has pods with these UIDs.
    pub fn check_node(&self, uids: &BTreeSet<&str>, report: &mut Report) {
        let Pods::Of { node, by_uid } = &self.pods else { return };
        if !uids.is_empty() && !uids.iter().any(|uid| by_uid.contains_key(*uid)) {
            let text = format!(
                "the API server has none of this node's pods on node {node}: name the node as it does with --node"
            );
            report.know_less(&Error::new(Code::ApiServer, text));
        }
    }
}

/// The name of this node. kubelet takes the host's name in lower case, unless another name is configured.
fn node_name(given: Option<&str>) -> Result<String> {
    const HOSTNAME: &str = "/proc/sys/kernel/hostname";
    let own = || {
        let name = fs::read_to_string(HOSTNAME);
        name.map_err(|cause| Error::because(Code::Io, format!("read this host's name in {HOSTNAME}"), cause))
    };
    let name = given.map_or_else(own, |given| Ok(given.to_owned()))?;
    object_name(&name.trim().to_lowercase())
}
