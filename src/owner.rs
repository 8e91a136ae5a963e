//! The record of an attachment, which other calls read: whose it is, what was changed for it, what was asked for.

use std::path::Path;

use podshaper_abi::Scope;
use rscni_plugin::types::{ContainerId, InterfaceName};
use serde::{Deserialize, Serialize};

use crate::{
    direction::Direction,
    interface::{Record, is_zero},
    pod::NetworkName,
    request::{Endpoint, Limit, Limits, Request},
    units::Rate,
};

/// Who made an attachment, as recorded beside it.
///
/// Another version of podshaper may read a record of this one. It ignores keys that it does not know, and a key that is
/// missing reads as empty. So keys are only ever added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Owner {
    /// `CNI_CONTAINERID` of the ADD.
    pub container_id: String,
    /// Name of the CNI network.
    pub network: String,
    /// The interface, and what was changed on it.
    #[serde(flatten)]
    pub interface: Record,
    /// Namespace of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_namespace: Option<String>,
    /// Name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// UID of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The cgroup directory the programs are attached to.
    pub cgroup: String,
    /// The first of four numbers by which the programs know the attachment (`podshaper_abi::Scope`): the interface's
    /// number in the pod's network namespace. 0: every interface.
    #[serde(skip_serializing_if = "is_zero")]
    pub ifindex: u32,
    /// The key of its limits and meters.
    #[serde(skip_serializing_if = "is_zero")]
    pub slot: u32,
    /// The number of its list of subnets.
    #[serde(skip_serializing_if = "is_zero")]
    pub list: u64,
    /// The number (nsid) that the pod's network namespace has for itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub namespace: u64,
    /// The administrator's `max` for egress at ADD, in bits per second. `set` does not go beyond it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_egress: Option<u64>,
    /// The administrator's `max` for ingress at ADD, in bits per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ingress: Option<u64>,
    /// The limits that were asked for when the attachment last followed them, at ADD or by `sync`. Earlier versions
    /// recorded nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// Whether `set` has changed the limits since: they are no longer those that the pod asked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub changed: bool,
    /// Whether `sync` has changed the limits to those that were asked for after the ADD.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub followed: bool,
}

/// The limits that are asked for, in a form to be recorded and compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Asked {
    /// For egress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Amount>,
    /// For ingress.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Amount>,
}

/// Rate and burst of a limit, in the units of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amount {
    /// Bits per second.
    pub rate_bits_per_s: u64,
    /// The time that the burst takes at that rate, in nanoseconds.
    pub burst_ns: u64,
}

impl Asked {
    /// The amounts of these limits.
    pub fn of(limits: &Limits) -> Self {
        Self { egress: limits.egress.map(Amount::of), ingress: limits.ingress.map(Amount::of) }
    }

    /// The amount for a direction.
    pub fn in_direction(&self, direction: Direction) -> Option<Amount> {
        match direction {
            Direction::Egress => self.egress,
            Direction::Ingress => self.ingress,
        }
    }
}

impl Amount {
    /// The amount of a limit.
    pub fn of(limit: Limit) -> Self {
        Self { rate_bits_per_s: limit.rate.as_bits_per_s(), burst_ns: limit.burst.as_ns_at(limit.rate) }
    }
}

impl Owner {
    /// The record to keep beside an attachment that is made for a request.
    pub fn of(request: &Request, endpoint: &Endpoint, cgroup: &Path) -> Self {
        Self {
            container_id: endpoint.container_id.to_string(),
            network: request.network.to_string(),
            interface: Record {
                ifname: endpoint.ifname.to_string(),
                netns: request.netns.as_ref().map(|netns| netns.to_string_lossy().into_owned()),
                ..Record::default()
            },
            pod_namespace: request.pod_namespace.clone(),
            pod_name: request.pod_name.clone(),
            uid: endpoint.key.uid().map(|uid| uid.to_string()),
            cgroup: cgroup.to_string_lossy().into_owned(),
            ..Self::default()
        }
    }

    /// Whether the limits are no longer those of the ADD.
    pub fn has_other_limits(&self) -> bool {
        self.changed || self.followed
    }

    /// The entry by which the programs find the attachment on its cgroup.
    pub fn scope(&self) -> Scope {
        Scope { ifindex: self.ifindex, slot: self.slot, list: self.list, namespace: self.namespace }
    }

    /// The administrator's `max` at ADD.
    pub fn max(&self, direction: Direction) -> Option<Rate> {
        let max = match direction {
            Direction::Egress => self.max_egress,
            Direction::Ingress => self.max_ingress,
        };
        max.and_then(|max| Rate::bits_per_s(max).ok())
    }

    /// The record of an attachment whose limits follow what is asked for.
    pub fn asked_for(self, asked: &Limits) -> Self {
        let max = |limit: Option<Limit>| limit.and_then(|limit| limit.max).map(Rate::as_bits_per_s);
        let (max_egress, max_ingress) = (max(asked.egress), max(asked.ingress));
        Self { asked: Some(Asked::of(asked)), max_egress, max_ingress, ..self }
    }

    /// The record after `set`. It keeps what was asked for, so that limits that were set by hand stay until something
    /// else is asked for.
    pub fn by_hand(&self, now: &Limits) -> Self {
        Self { asked: self.asked.or(Some(Asked::of(now))), changed: true, ..self.clone() }
    }

    /// Whether a call for this container and interface means the attachment recorded here. A DEL that means another one
    /// is a late DEL for a sandbox that has been replaced, and must remove nothing.
    ///
    /// The network's name is not compared: containerd deletes by the configuration that it has at that time, in which
    /// the network may have another name than at ADD. No two networks can give a container an interface of the same
    /// name.
    pub fn is_of(&self, container_id: &ContainerId, ifname: &InterfaceName) -> bool {
        self.container_id == **container_id && self.interface.ifname == **ifname
    }

    /// Like [`Self::is_of`], and for the network of that name.
    pub fn is(&self, network: &NetworkName, container_id: &ContainerId, ifname: &InterfaceName) -> bool {
        self.network == network.as_str() && self.is_of(container_id, ifname)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::{container_id, interface_name};

    #[test]
    fn owners_of_other_versions_are_readable() {
        let newer = r#"{"containerId":"c1","ifname":"eth0","cgroup":"/a","invented":{"later":[1]},"netns":null}"#;
        let interface = Record { ifname: "eth0".into(), ..Record::default() };
        let expected = Owner { container_id: "c1".into(), interface, cgroup: "/a".into(), ..Owner::default() };
        assert_eq!(serde_json::from_str::<Owner>(newer).unwrap(), expected);
        let written = serde_json::to_string(&expected).unwrap();
        assert_eq!(written, r#"{"containerId":"c1","network":"","ifname":"eth0","fq":false,"cgroup":"/a"}"#);
    }

    #[test]
    fn only_the_same_sandbox_is_the_owner() {
        let interface = Record { ifname: "eth0".into(), ..Record::default() };
        let owner = Owner { container_id: "c1".into(), network: "net".into(), interface, ..Owner::default() };
        for (network, id, ifname, same_sandbox, same_network_too) in [
            ("net", "c1", "eth0", true, true),
            ("net", "c2", "eth0", false, false),
            ("other", "c1", "eth0", true, false),
            ("net", "c1", "eth1", false, false),
        ] {
            let call = format!("{network} {id} {ifname}");
            let (network, id, ifname) =
                (network.parse().unwrap(), container_id(id).unwrap(), interface_name(ifname).unwrap());
            assert_eq!(owner.is_of(&id, &ifname), same_sandbox, "{call}");
            assert_eq!(owner.is(&network, &id, &ifname), same_network_too, "{call}");
        }
    }
}
