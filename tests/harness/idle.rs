//! Pods without traffic, to measure the costs of a node with many pods.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::cgroup::{self, Driver, PodCgroup};
use super::cni::Cni;
use super::host::Host;
use super::netns::Netns;
use super::pod::{INTERFACE, container_id, uuid};
use super::{Context, Result, unique};

/// The limit in both directions.
pub const RATE: u64 = 100_000_000;
/// Set explicitly: the bandwidth plugin's own default burst is seconds of the limit.
const BURST_BITS: u64 = 1_000_000;

/// A pod without traffic, with a veth whose other end is on the host.
pub struct Idle<'a> {
    host: &'a Host,
    uid: String,
    container_id: String,
    end: String,
    netns: Netns,
    _cgroup: PodCgroup,
}

impl<'a> Idle<'a> {
    pub fn new(host: &'a Host) -> Result<Self> {
        let netns = Netns::new(&unique("many"))?;
        let uid = uuid()?;
        let end = format!("veth{}", &uid[..8]);
        let peer = ["type", "veth", "peer", "name", INTERFACE, "netns", netns.name()];
        host.netns.run("ip", &[&["link", "add", &end][..], &peer].concat())?;
        let path = cgroup::mount()?.join(&Driver::Cgroupfs.path(&uid)[1..]);
        Ok(Self { host, _cgroup: PodCgroup::new(path)?, container_id: container_id()?, end, netns, uid })
    }

    /// Calls a plugin, podshaper or bandwidth, with a limit for both directions. Returns the time of the call.
    pub fn call(&self, program: &Path, verb: &str) -> Result<Duration> {
        let stdin = json!({
            "cniVersion": "1.0.0", "name": "many", "type": program.file_name().unwrap_or_default().to_string_lossy(),
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{ "name": self.end }, { "name": INTERFACE, "sandbox": self.netns.path() }],
                "ips": [],
            },
            "runtimeConfig": {
                "cgroupPath": Driver::Cgroupfs.path(&self.uid),
                "bandwidth": {
                    "egressRate": RATE, "egressBurst": BURST_BITS, "ingressRate": RATE, "ingressBurst": BURST_BITS,
                },
            },
        });
        let call = Cni::new(program, verb)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", self.netns.path().display().to_string())
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", "/opt/cni/bin")
            .env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_UID={}", self.uid))
            .stdin(stdin.to_string())
            .call_in(&self.host.netns)?;
        call.success()?;
        Ok(call.elapsed)
    }

    /// Removes the qdiscs that the bandwidth plugin's DEL leaves on the host end. Its next ADD would fail because of
    /// them.
    pub fn clear(&self) {
        for place in ["ingress", "root"] {
            // Other plugins leave no qdiscs.
            let _ = self.host.netns.run("tc", &["qdisc", "del", "dev", &self.end, place]);
        }
    }
}

/// The kernel's own memory that grows with the number of objects, in KiB.
pub fn kernel_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default()
    };
    Ok(value("Slab:") + value("Percpu:") + value("VmallocUsed:"))
}
