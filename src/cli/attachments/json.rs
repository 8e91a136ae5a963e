//! Attachments as JSON for programs: `-o json`. The keys are stable.

use podshaper_abi::Counters;
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{Attachment, Measured, OtherPaths};
use crate::{cli::chart, interface::Record, owner::Owner};

impl Serialize for Attachment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The interface is part of `place`, the mechanisms are part of the directions.
        let Owner {
            container_id,
            network,
            interface: Record { netns, .. },
            pod_namespace,
            pod_name,
            uid,
            cgroup,
            max_egress,
            max_ingress,
            changed,
            ..
        } = &self.owner;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name())?;
        map.serialize_entry("namespace", pod_namespace)?;
        map.serialize_entry("pod", pod_name)?;
        map.serialize_entry("uid", uid)?;
        map.serialize_entry("key", &self.place.pod)?;
        map.serialize_entry("interface", &self.place.interface)?;
        map.serialize_entry("containerId", container_id)?;
        map.serialize_entry("network", network)?;
        map.serialize_entry("netns", netns)?;
        map.serialize_entry("cgroup", cgroup)?;
        map.serialize_entry("ageSeconds", &self.age().map(|age| age.as_secs()))?;
        map.serialize_entry("links", &self.links.text())?;
        map.serialize_entry("linkFaults", self.links.faults())?;
        map.serialize_entry("maxEgressBitsPerS", max_egress)?;
        map.serialize_entry("maxIngressBitsPerS", max_ingress)?;
        map.serialize_entry("changed", changed)?;
        map.serialize_entry("pins", &self.directory)?;
        map.serialize_entry("notHeld", &self.not_held)?;
        map.serialize_entry("problem", &self.problem)?;
        map.serialize_entry("egress", &self.egress)?;
        map.serialize_entry("ingress", &self.ingress)?;
        map.end()
    }
}

impl Serialize for OtherPaths {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("held", &self.are_held())?;
        let counted = self.counted();
        map.serialize_entry("bytes", &counted.map(|others| others.bytes))?;
        map.serialize_entry("packets", &counted.map(|others| others.packets))?;
        map.serialize_entry("drops", &counted.map(|others| others.drops))?;
        map.end()
    }
}

impl Serialize for Measured {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Counters { bytes, packets, drops, marks, max_backlog_ns, backlog } = &self.counters;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("limitBitsPerS", &self.rate.as_bits_per_s())?;
        map.serialize_entry("burstBits", &self.burst.as_bytes().saturating_mul(8))?;
        map.serialize_entry("by", &self.by)?;
        map.serialize_entry("currentBitsPerS", &self.passing.as_ref().map(|passing| passing.bits_per_s.round()))?;
        map.serialize_entry("utilisation", &self.used())?;
        map.serialize_entry("bytes", bytes)?;
        map.serialize_entry("packets", packets)?;
        map.serialize_entry("drops", drops)?;
        map.serialize_entry("marks", marks)?;
        map.serialize_entry("otherPaths", &self.others)?;
        map.serialize_entry("maxBacklogNs", max_backlog_ns)?;
        map.serialize_entry("backlogP99Ns", &chart::percentile_ns(backlog, 0.99))?;
        map.serialize_entry("backlogPackets", backlog)?;
        map.end()
    }
}
