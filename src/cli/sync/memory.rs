//! The failures of the last `sync`, kept for `metrics` and `doctor`, which run between two syncs.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::probe;

/// The file in [`probe::MEMORY`].
const FILE: &str = "sync";

/// A pod that does not have the limit that it asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The namespace of the pod, if known.
    pub namespace: Option<String>,
    /// The name of the pod, if known.
    pub pod: Option<String>,
    /// The UID, or the id of the container.
    pub uid: String,
    /// The interface.
    pub interface: String,
    /// The reason.
    pub error: String,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastRun {
    /// When the run ended, in seconds since 1970.
    pub ended_at_s: u64,
    /// The pods that the run could not limit.
    pub failures: Vec<Failure>,
    /// Why the run lacks information: for example an API server that does not answer.
    pub error: Option<String>,
}

impl Failure {
    /// The name for a person.
    pub fn name(&self) -> String {
        let pod = match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            _ => self.uid.clone(),
        };
        format!("{pod} {}", self.interface)
    }
}

impl LastRun {
    /// The result of a run that ends now.
    pub fn now(failures: Vec<Failure>, error: Option<String>) -> Self {
        let ended_at_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { ended_at_s, failures, error }
    }

    /// Whether the run is so recent that its result still holds: the units start a run every eight seconds.
    pub fn is_recent(&self) -> bool {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        (self.ended_at_s..self.ended_at_s + 30).contains(&now_s)
    }

    /// The last run's result; `None` if there was no run since boot.
    pub fn recall() -> Option<Self> {
        Self::recall_from(Path::new(probe::MEMORY))
    }

    /// Keeps the result for [`LastRun::recall`].
    pub fn keep(&self) {
        let memory = Path::new(probe::MEMORY);
        if let Err(cause) = self.keep_in(memory) {
            log::warn!("metrics and doctor will not know of this run: write {}: {cause}", memory.join(FILE).display());
        }
    }

    fn recall_from(memory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(memory.join(FILE)).ok()?).ok()
    }

    fn keep_in(&self, memory: &Path) -> io::Result<()> {
        probe::make_memory(memory)?;
        // The file is renamed into place, so that no reader sees a part of it.
        let beside = memory.join(format!("{FILE}.{}", std::process::id()));
        fs::write(&beside, serde_json::to_vec(self)?)?;
        fs::rename(&beside, memory.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_leaves_is_there_for_the_next_reader() {
        let directory = tempfile::tempdir().unwrap();
        let memory = directory.path().join("podshaper");
        assert_eq!(LastRun::recall_from(&memory), None);
        let failure = Failure { uid: "u".into(), interface: "eth0".into(), error: "no".into(), ..Failure::default() };
        let run = LastRun::now(vec![failure], Some("no answer".into()));
        run.keep_in(&memory).unwrap();
        assert_eq!(LastRun::recall_from(&memory), Some(run));
        assert_eq!(fs::read_dir(&memory).unwrap().count(), 1);
        fs::write(memory.join(FILE), "").unwrap();
        assert_eq!(LastRun::recall_from(&memory), None);
    }
}
