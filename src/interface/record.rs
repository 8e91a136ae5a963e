//! The changes of an attachment on its interface and in its namespace. They are a part of the owner record, so that a
//! call that knows nothing else can put them back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::mechanism::{IngressBy, known};
use crate::request::Limits;

/// The interface of an attachment, and the changes on it.
///
/// Earlier versions wrote only `netns`, `ifname`, `fq`, `htb`, `gsoMaxSize` and `ingressBy`. A key that is missing
/// reads as empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Record {
    /// The interface: `CNI_IFNAME` of the ADD, or `*` for every interface but loopback.
    pub ifname: String,
    /// Path of its network namespace; `None` for the node's own, where nothing is changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// The inode number of the namespace. The path may name another namespace by now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns_inode: Option<u64>,
    /// Whether fq is on the interface, to honour departure times.
    pub fq: bool,
    /// Whether htb is on the interface. Packets wait in htb where there is no fq.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub htb: bool,
    /// What holds the ingress limit, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "known")]
    pub ingress_by: Option<IngressBy>,
    /// The host end of the interface, where packets of other paths than the cgroup's sockets are held; `None`: they are
    /// not held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_at: Option<HeldAt>,
    /// Whether another limit of the interface held other paths when this limit came. When that limit goes, this one
    /// holds them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub takes_over: bool,
    /// Whether other paths are not to be held (`otherPaths` in the configuration).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub leaves_others: bool,
    /// The settings from before podshaper.
    #[serde(flatten)]
    pub found: Found,
}

/// Where packets of other paths are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct HeldAt {
    /// The number of the host end in the node's namespace.
    pub ifindex: u32,
    /// The number of the filters on it.
    pub filter: u16,
    /// The first of the pod's htb classes in the waiting room: that for packets out of the pod, before those for
    /// packets into it. 0: no class, as with fq.
    #[serde(skip_serializing_if = "is_zero")]
    pub class: u16,
    /// Whether podshaper has made clsact, which has the filters. It goes with the last filter.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub clsact: bool,
}

/// Whether a field is zero. Such a field is left out of the record.
pub fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The settings that decide how large packets TCP builds, as they were before podshaper. `None`: podshaper has not
/// changed the setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Found {
    /// `gso_max_size` of the interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gso_max_size: Option<u32>,
    /// `gso_ipv4_max_size` of the interface, since Linux 6.3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gso_ipv4_max_size: Option<u32>,
    /// `net.ipv4.tcp_tso_rtt_log` of the namespace, since Linux 5.18.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_tso_rtt_log: Option<u32>,
    /// `net.ipv4.tcp_min_tso_segs` of the namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_min_tso_segs: Option<u32>,
}

/// What an attachment needs of its interface and namespace.
#[derive(Clone, Debug)]
pub struct Need {
    /// Its record.
    pub record: Record,
    /// Its limits. `None`: its maps have another layout, so the limits cannot be read.
    pub limits: Option<Limits>,
}

impl Record {
    /// The namespace's path; `None` where there is nothing to change.
    pub fn path(&self) -> Option<&Path> {
        self.netns.as_deref().map(Path::new)
    }

    /// Whether tbf, on the host end of the interface, holds the ingress limit.
    pub fn has_tbf(&self) -> bool {
        self.ingress_by == Some(IngressBy::Tbf)
    }

    /// Adds the inode number of the namespace to a record of an earlier version, if the path still names a file.
    pub fn complete(&mut self) {
        if self.netns_inode.is_none() {
            self.netns_inode = self.path().and_then(|path| fs::metadata(path).ok()).map(|found| found.ino());
        }
    }

    /// Whether there is nothing to put back.
    pub fn is_unchanged(&self) -> bool {
        !self.fq && !self.htb && !self.has_tbf() && self.found == Found::default()
    }

    /// Whether both records are of one namespace.
    pub fn shares_namespace(&self, other: &Self) -> bool {
        match (self.netns_inode, other.netns_inode) {
            (Some(own), Some(others)) => own == others,
            // Earlier versions recorded only the path.
            _ => self.netns.is_some() && self.netns == other.netns,
        }
    }

    /// Whether both records are of one interface.
    pub fn shares_interface(&self, other: &Self) -> bool {
        self.ifname == other.ifname && self.shares_namespace(other)
    }

    /// Whether a change of this record would be left if `other` took its place on the same interface.
    pub fn has_more_than(&self, other: &Self) -> bool {
        let is_left = |own: Option<u32>, others: Option<u32>| own.is_some() && others.is_none();
        let Found { gso_max_size, gso_ipv4_max_size: _, tcp_tso_rtt_log, tcp_min_tso_segs } = self.found;
        (self.fq && !other.fq)
            || (self.htb && !other.htb)
            || (self.has_tbf() && !other.has_tbf())
            || is_left(gso_max_size, other.found.gso_max_size)
            || is_left(tcp_tso_rtt_log, other.found.tcp_tso_rtt_log)
            || is_left(tcp_min_tso_segs, other.found.tcp_min_tso_segs)
    }
}

impl Need {
    /// Whether egress is limited.
    pub fn limits_egress(&self) -> bool {
        let recorded = self.record.found != Found::default();
        self.limits.map_or(recorded, |limits| limits.egress.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_earlier_versions_are_readable() {
        let earlier =
            r#"{"netns":"/run/netns/a","ifname":"eth0","fq":true,"gsoMaxSize":65536,"ingressBy":"held-acks"}"#;
        let found = Found { gso_max_size: Some(65536), ..Found::default() };
        let expected = Record {
            ifname: "eth0".into(),
            netns: Some("/run/netns/a".into()),
            netns_inode: None,
            fq: true,
            htb: false,
            ingress_by: Some(IngressBy::HeldAcks),
            held_at: None,
            takes_over: false,
            leaves_others: false,
            found,
        };
        assert_eq!(serde_json::from_str::<Record>(earlier).unwrap(), expected);
        assert_eq!(serde_json::from_str::<Record>("{}").unwrap(), Record::default());
        let newer = r#"{"ifname":"eth0","ingressBy":"teleport","gsoMaxSize":null}"#;
        assert_eq!(
            serde_json::from_str::<Record>(newer).unwrap(),
            Record { ifname: "eth0".into(), ..Record::default() }
        );
    }

    #[test]
    fn a_namespace_is_known_by_its_inode_and_by_its_path_only_without_one() {
        let of = |inode, path: &str| Record { netns_inode: inode, netns: Some(path.into()), ..Record::default() };
        for (one, other, same) in [
            (of(Some(1), "/a"), of(Some(1), "/b"), true),
            (of(Some(1), "/a"), of(Some(2), "/a"), false),
            (of(None, "/a"), of(Some(2), "/a"), true),
            (of(None, "/a"), of(None, "/b"), false),
            (Record::default(), Record::default(), false),
        ] {
            assert_eq!(one.shares_namespace(&other), same, "{one:?} {other:?}");
        }
    }
}
