//! The mechanisms that hold the limits of a pod's interface. Which one it is depends on the kernel and on the
//! interface. It is recorded with the attachment and logged, never chosen silently.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de::IntoDeserializer};

use super::record::Record;

/// Where packets wait whose senders have not waited: see `turn` in the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Queue {
    /// There is no queue: packets pass, or are dropped.
    #[default]
    None,
    /// In fq, until their departure time.
    Fq,
    /// In a class of htb.
    Htb,
}

impl Queue {
    /// The queue on the interface of a recorded attachment.
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
    /// The pod's acknowledgements leave at the limit's pace, by fq on the pod's interface. Receive windows follow the
    /// backlog.
    HeldAcks,
    /// Packets into the pod wait at the host end of the veth, in the waiting room, sparse flows ahead of bulk flows.
    /// Receive windows follow the backlog.
    HeldData,
    /// tbf on the host end of the veth: a queue like the bandwidth plugin's, but a shorter one.
    Tbf,
    /// Packets beyond the limit are dropped. On a short path TCP then gets much less than the limit.
    Drops,
}

impl fmt::Display for IngressBy {
    /// The name that serde writes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Reads a mechanism. A name that only another version knows reads as `None`, because a DEL must be able to read every
/// record.
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
