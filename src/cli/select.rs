//! Finds the attachments that a command line means.

use clap::Args;

use super::attachments::{self, Attachment};
use crate::error::{Code, Error, Result, quoted};

/// A pod, as it is named on the command line.
#[derive(Args)]
pub struct Selector {
    /// Name, namespace/name, UID or container id of the pod, or the beginning of one; or the cgroup's path
    pod: String,
    /// Only this interface of the pod
    #[arg(short, long, value_name = "NAME")]
    interface: Option<String>,
    /// Whether the name is the whole path of a cgroup.
    #[arg(skip)]
    is_cgroup: bool,
}

impl Selector {
    pub fn new(pod: String, interface: Option<String>) -> Self {
        Self { pod, interface, is_cgroup: false }
    }

    /// The attachments of one cgroup, by its whole path.
    pub fn of_cgroup(path: String, interface: Option<String>) -> Self {
        Self { pod: path, interface, is_cgroup: true }
    }

    /// The attachments of the one pod that is meant.
    ///
    /// # Errors
    /// No pod matches, or several do; the error names them.
    pub fn select(&self, all: Vec<Attachment>) -> Result<Vec<Attachment>> {
        let wanted =
            |attachment: &Attachment| self.interface.as_ref().is_none_or(|name| *name == attachment.place.interface);
        let (exact, begins): (Vec<_>, Vec<_>) = all
            .into_iter()
            .filter(|attachment| wanted(attachment) && self.begins(attachment))
            .partition(|attachment| self.is(attachment));
        let found = if exact.is_empty() { begins } else { exact };
        let mut pods: Vec<_> = found.iter().map(|found| format!("{} ({})", found.name(), found.place.pod)).collect();
        pods.dedup();
        let text = match pods.len() {
            0 => format!("find {}: no such pod is limited (podshaper list shows all)", self.shown()),
            1 => return Ok(found),
            _ => format!("find {}: it may be {}; write more of it", self.shown(), pods.join(" or ")),
        };
        Err(Error::new(Code::Config, text))
    }

    /// The attachment of the one interface that is meant.
    ///
    /// # Errors
    /// Those of [`Selector::select`]; also if the pod has several interfaces and none is named.
    pub fn select_one(&self, all: Vec<Attachment>) -> Result<Attachment> {
        let mut found = self.select(all)?;
        match (found.pop(), found.is_empty()) {
            (Some(attachment), true) => Ok(attachment),
            (last, _) => {
                let names: Vec<_> = found.iter().chain(&last).map(|found| found.place.interface.as_str()).collect();
                let text =
                    format!("{} is limited on {}: say which with --interface", self.shown(), names.join(" and "));
                Err(Error::new(Code::Config, text))
            }
        }
    }

    fn shown(&self) -> String {
        let interface = self.interface.as_ref().map(|name| format!(" on {name}")).unwrap_or_default();
        quoted(&self.pod) + &interface
    }

    fn names<'a>(attachment: &'a Attachment, joined: &'a [String; 2]) -> [&'a str; 6] {
        let owner = &attachment.owner;
        let pod_name = owner.pod_name.as_deref().unwrap_or_default();
        let [name, cgroup] = joined;
        [&attachment.place.pod, &owner.container_id, &owner.cgroup, pod_name, name, cgroup]
    }

    fn any(&self, attachment: &Attachment, is_meant: impl Fn(&str) -> bool) -> bool {
        let joined = [attachment.name(), attachments::below_mount(&attachment.owner.cgroup)];
        let is_meant = |name: &str| !name.is_empty() && is_meant(name);
        if self.is_cgroup {
            return [&attachment.owner.cgroup, &joined[1]].into_iter().any(|name| is_meant(name));
        }
        Self::names(attachment, &joined).into_iter().any(is_meant)
    }

    fn is(&self, attachment: &Attachment) -> bool {
        let meant = self.pod.trim_end_matches('/');
        self.any(attachment, |name| name == meant || name.trim_start_matches('/') == meant)
    }

    fn begins(&self, attachment: &Attachment) -> bool {
        let begins = |name: &str| name.starts_with(&self.pod) || name.trim_start_matches('/').starts_with(&self.pod);
        self.is(attachment) || (!self.is_cgroup && !self.pod.is_empty() && self.any(attachment, begins))
    }
}
