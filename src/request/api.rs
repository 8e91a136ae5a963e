//! When the API server is asked, and what a call makes of no answer; asking is [`crate::kube`]'s.

use super::config::OnApiError;
use super::{Endpoint, Request, Subject};
use crate::error::{Code, Error, Result};
use crate::kube::{self, Metadata, Pod};

impl Request {
    /// The pod as the API server has it; None if nobody is to be asked, or, with `onApiError: ignore`, nobody answered.
    pub(super) fn ask_api_server(&self) -> Result<Option<Metadata>> {
        let Some(kubeconfig) = &self.config.kubeconfig else { return Ok(None) };
        // Other than Kubernetes name no pod.
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
