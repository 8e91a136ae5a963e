//! What the last `sync` could not do, for `metrics` and `doctor`, which look at a node between two of them.

use std::{
    fs, io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::probe;

/// The file in [`probe::MEMORY`].
const FILE: &str = "sync";

/// A pod that is not limited as it asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// Namespace and name, where it has them.
    pub namespace: Option<String>,
    /// The same.
    pub pod: Option<String>,
    /// UID, or the container's id.
    pub uid: String,
    /// The interface.
    pub interface: String,
    /// Why.
    pub error: String,
}

/// What a run left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastRun {
    /// When it ended, in seconds since 1970.
    pub ended_at_s: u64,
    /// What it could not do.
    pub failures: Vec<Failure>,
    /// Why it knows too little: an API server that does not answer.
    pub error: Option<String>,
}

impl Failure {
    /// What a person calls it.
    pub fn name(&self) -> String {
        let pod = match (&self.namespace, &self.pod) {
            (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
            _ => self.uid.clone(),
        };
        format!("{pod} {}", self.interface)
    }
}

impl LastRun {
    /// One that ends now.
    pub fn now(failures: Vec<Failure>, error: Option<String>) -> Self {
        let ended_at_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { ended_at_s, failures, error }
    }

    /// Whether it was so lately that pods are now as it left them: the units have one every eight seconds.
    pub fn is_recent(&self) -> bool {
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        (self.ended_at_s..self.ended_at_s + 30).contains(&now_s)
    }

    /// `None` if there was none since boot.
    pub fn recall() -> Option<Self> {
        Self::recall_from(Path::new(probe::MEMORY))
    }

    /// Leaves it for [`LastRun::recall`].
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
        // Renamed, so that nobody reads a part of it.
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
