//! What on a pod's interface holds its limits. Which it is depends on the kernel and on the interface; it is recorded with the
//! attachment and logged, never silent.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de::IntoDeserializer};

use super::record::Record;

/// Where packets wait whose senders have not waited: see `turn` in the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Queue {
    /// Nowhere: they pass, or are dropped.
    #[default]
    None,
    /// In fq, for their departure time.
    Fq,
    /// In a class of htb.
    Htb,
}

impl Queue {
    /// What is on the interface of a recorded attachment.
    pub fn of(record: &Record) -> Self {
        match record {
            Record { fq: true, .. } => Self::Fq,
            Record { htb: true, .. } => Self::Htb,
            _ => Self::None,
        }
    }
}

/// What holds ingress, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IngressBy {
    /// The pod's acknowledgements leave at the limit's pace, by fq on the pod's interface, and windows follow the backlog.
    HeldAcks,
    /// What comes waits at the host's end of the veth, in the waiting room, sparse flows ahead of bulk ones, and windows follow the backlog.
    HeldData,
    /// tbf on the host's end of the veth: a queue, as the bandwidth plugin makes it, but a short one.
    Tbf,
    /// What is over the limit is dropped: TCP gets much less than the limit on a short path.
    Drops,
}

impl fmt::Display for IngressBy {
    /// The name that serde writes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A mechanism that only another version knows reads as none: the record that has it must be readable by a DEL.
pub fn known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IngressBy>, D::Error> {
    let name = Option::<String>::deserialize(deserializer)?;
    let read = |name: String| IngressBy::deserialize(name.into_deserializer()).map_err(|_: serde::de::value::Error| ());
    Ok(name.and_then(|name| read(name).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_record() {
        for (mechanism, name) in [
            (IngressBy::HeldAcks, "held-acks"),
            (IngressBy::HeldData, "held-data"),
            (IngressBy::Tbf, "tbf"),
            (IngressBy::Drops, "drops"),
        ] {
            assert_eq!(mechanism.to_string(), name);
            assert_eq!(known(&serde_json::json!(name)).unwrap(), Some(mechanism));
        }
        for unknown in [serde_json::json!("teleport"), serde_json::json!(null)] {
            assert_eq!(known(&unknown).unwrap(), None);
        }
    }
}
