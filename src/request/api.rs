//! When the API server is asked, and what a call does without an answer. [`crate::kube`] does the asking.

use std::fs::File;

use super::config::{Config, OnApiError};
use super::{Endpoint, Request, Subject};
use crate::error::{Code, Error, Result};
use crate::kube::{self, Labels, Metadata, Pod};

impl Request {
    /// The pod's metadata from the API server. `None` if no server is configured, or if it does not answer and
    /// `onApiError` is `ignore`.
    pub(super) fn ask_api_server(&self) -> Result<Option<Metadata>> {
        let Some(kubeconfig) = &self.config.kubeconfig else { return Ok(None) };
        // Orchestrators other than Kubernetes name no pod.
        let (Some(namespace), Some(name)) = (&self.pod_namespace, &self.pod_name) else { return Ok(None) };
        let answer = self.pod_uid().and_then(|uid| kube::metadata(kubeconfig, Pod { namespace, name, uid }));
        match (answer, self.config.on_api_error) {
            (Err(error), OnApiError::Ignore) => {
                log::warn!("without the pod's labels (\"onApiError\": \"ignore\"): {error}");
                Ok(None)
            }
            (answer, _) => answer.map(Some),
        }
    }

    /// The labels of the pod's namespace. `None` if no server is configured, or if it does not answer and `onApiError`
    /// is `ignore`.
    pub(super) fn ask_for_namespace(&self, namespace: &str) -> Result<Option<Labels>> {
        let Some(kubeconfig) = &self.config.kubeconfig else { return Ok(None) };
        match (kube::labels_of_namespace(kubeconfig, namespace), self.config.on_api_error) {
            (Err(error), OnApiError::Ignore) => {
                log::warn!("without the labels of the pod's namespace (\"onApiError\": \"ignore\"): {error}");
                Ok(None)
            }
            (answer, _) => answer.map(Some),
        }
    }

    /// Whether the kubeconfig exists, if an ADD would fail without it. The content of the kubeconfig, and whether the
    /// server answers, only shows when the server is asked; STATUS must not wait for a server.
    ///
    /// # Errors
    /// [`Code::Unavailable`] with the reason.
    pub fn check_kubeconfig(&self) -> Result<()> {
        let Config { kubeconfig: Some(path), on_api_error: OnApiError::Fail, .. } = &self.config else { return Ok(()) };
        let text = || format!("open the kubeconfig {}, without which every ADD fails (\"onApiError\")", path.display());
        File::open(path).map(drop).map_err(|cause| Error::because(Code::Unavailable, text(), cause))
    }

    /// Whether the API server returns the labels of namespaces, if these labels matter. Not every user may read them,
    /// and kubelet's may not.
    ///
    /// # Errors
    /// Those of every ADD and of each sync.
    pub fn check_namespaces(&self) -> Result<()> {
        /// Every cluster has this namespace.
        const NAMESPACE: &str = "default";
        let Config { kubeconfig: Some(kubeconfig), policy, .. } = &self.config else { return Ok(()) };
        if !policy.asks_for_labels() {
            return Ok(());
        }
        kube::labels_of_namespace(kubeconfig, NAMESPACE)?;
        kube::labels_of_namespaces(kubeconfig).map(drop)
    }

    fn pod_uid(&self) -> Result<&str> {
        let uid = match &self.subject {
            Subject::Endpoint(Endpoint { key, .. }) => key.uid(),
            Subject::NeverAdded(_) | Subject::Node => None,
        };
        let text = "configuration key \"kubeconfig\": this runtime passes no K8S_POD_UID, and a pod of the same name may be another one: \
                    remove the key, or use containerd 1.6 or later, or CRI-O";
        uid.map(crate::pod::PodUid::as_str).ok_or_else(|| Error::new(Code::Environment, text))
    }
}
