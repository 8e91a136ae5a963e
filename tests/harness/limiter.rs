//! The limiters that are compared: none, podshaper, and the alternatives to podshaper.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::cni::Chain;
use super::host::{bandwidth_plugin, podshaper_plugin};
use super::peers;
use super::pod::Pod;
use super::{Context, Failure, Result, podshaper_program};

/// The bandwidth plugin's own default burst, 2^31-1 bits, is two seconds at 1 Gbit/s. With this burst it limits from
/// the start.
const BANDWIDTH_BURST_BITS: u64 = 1_000_000;

/// The way in which a pod is limited, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Limiter {
    Bare,
    Podshaper,
    /// podshaper that leaves other paths than the pod's sockets alone.
    OwnSockets,
    Bandwidth,
    /// The same with the burst of a pod that asks for none, 2^31-1 bits.
    BandwidthAsKubelet,
    /// The plugin of a newer version, as [`Programs::newer_bandwidth`] has it.
    BandwidthNewer,
    /// The same with the burst of a pod that asks for none.
    BandwidthNewerAsKubelet,
    /// Cilium's bandwidth manager: departure times and fq; what comes in is dropped beyond a bucket.
    Edt,
    /// htb with fq_codel below.
    FqCodel,
    Cake,
    /// A token bucket at the hooks of the pod's cgroup, which drops.
    Policer,
    /// None: each bulk flow's own SO_MAX_PACING_RATE is its share of the limit. What replies wait for then is the
    /// machine.
    Senders,
}

/// Limits in bits per second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    pub egress: Option<u64>,
    pub ingress: Option<u64>,
}

impl Limiter {
    /// The limiters that are plugins of a chain, and none.
    pub const ALL: [Self; 3] = [Self::Bare, Self::Podshaper, Self::Bandwidth];

    /// All limiters that are compared.
    pub const PEERS: [Self; 11] = [
        Self::Bare,
        Self::Podshaper,
        Self::Bandwidth,
        Self::BandwidthAsKubelet,
        Self::BandwidthNewer,
        Self::BandwidthNewerAsKubelet,
        Self::Edt,
        Self::FqCodel,
        Self::Cake,
        Self::Policer,
        Self::Senders,
    ];

    /// Its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::Bare => "no limit",
            Self::Podshaper => "podshaper",
            Self::OwnSockets => "podshaper, otherPaths false",
            Self::Bandwidth => "bandwidth plugin, burst 1 Mbit",
            Self::BandwidthAsKubelet => "bandwidth plugin, no burst given",
            Self::BandwidthNewer => "bandwidth plugin of Debian sid, burst 1 Mbit",
            Self::BandwidthNewerAsKubelet => "bandwidth plugin of Debian sid, no burst given",
            Self::Edt => "Cilium's scheme: departure times, fq",
            Self::FqCodel => "htb + fq_codel",
            Self::Cake => "cake",
            Self::Policer => "policer in cgroup_skb",
            Self::Senders => "none, senders pace themselves",
        }
    }

    /// The plugin that this limiter adds to the chain.
    pub fn plugin(self) -> Option<&'static str> {
        match self {
            Self::Bare | Self::Senders | Self::Edt | Self::FqCodel | Self::Cake | Self::Policer => None,
            Self::Podshaper | Self::OwnSockets => Some("podshaper"),
            Self::Bandwidth | Self::BandwidthAsKubelet | Self::BandwidthNewer | Self::BandwidthNewerAsKubelet => {
                Some("bandwidth")
            }
        }
    }

    /// Adds the pod to its node's network, limited in this way.
    pub fn add(self, pod: &mut Pod, limits: Limits, programs: &Programs) -> Result<()> {
        let bridge = pod.host.bridge_chain()?;
        let burst = matches!(self, Self::Bandwidth | Self::BandwidthNewer).then_some(BANDWIDTH_BURST_BITS);
        pod.offer_bandwidth(limits.egress, limits.ingress, burst);
        let chain: Chain = match self {
            Self::Bare | Self::Senders | Self::Edt | Self::FqCodel | Self::Cake | Self::Policer => bridge,
            Self::Podshaper => bridge.then(podshaper_plugin()).with_dir(programs.directory()?),
            Self::OwnSockets => {
                let mut plugin = podshaper_plugin();
                plugin["otherPaths"] = json!(false);
                bridge.then(plugin).with_dir(programs.directory()?)
            }
            Self::Bandwidth | Self::BandwidthAsKubelet => bridge.then(bandwidth_plugin()),
            Self::BandwidthNewer | Self::BandwidthNewerAsKubelet => {
                bridge.then(bandwidth_plugin()).with_dir(programs.newer_bandwidth()?)
            }
        };
        pod.add(&chain)?;
        peers::limit(self, pod, limits)
    }

    /// What this limiter needs and this machine lacks.
    pub fn missing(self, programs: &Programs) -> Option<String> {
        match self {
            Self::BandwidthNewer | Self::BandwidthNewerAsKubelet => {
                programs.newer_bandwidth().err().map(|error| error.to_string())
            }
            _ => peers::missing(self),
        }
    }
}

/// The directories of the plugins to measure.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    podshaper_dir: Option<PathBuf>,
    newer_bandwidth_dir: Option<PathBuf>,
}

impl Programs {
    /// The directory of the podshaper that is measured.
    pub fn directory(&self) -> Result<&Path> {
        let directory = self.podshaper_dir.as_deref();
        directory.ok_or_else(|| Failure::new("podshaper was not among the limiters looked for"))
    }

    /// The directory of a bandwidth plugin other than the installed one.
    pub fn newer_bandwidth(&self) -> Result<&Path> {
        let directory = self.newer_bandwidth_dir.as_deref();
        directory.ok_or_else(|| Failure::new("no bandwidth plugin of another version was fetched"))
    }

    /// Adds another bandwidth plugin beside the installed one.
    pub fn with_newer_bandwidth(self, newer_bandwidth_dir: Option<PathBuf>) -> Self {
        Self { newer_bandwidth_dir, ..self }
    }

    /// Finds what these limiters need before anything is measured: the given `podshaper`, or the one of this build.
    pub fn find(podshaper: Option<&Path>, limiters: &[Limiter]) -> Result<Self> {
        if !limiters.contains(&Limiter::Podshaper) {
            return Ok(Self::default());
        }
        let program = match podshaper {
            Some(path) => path.canonicalize().context(format_args!("find {}", path.display()))?,
            None => podshaper_program()?,
        };
        if program.file_name().is_none_or(|name| name != "podshaper") {
            return Err(Failure::new(format_args!(
                "use {}: a plugin is found by its name, podshaper",
                program.display()
            )));
        }
        Ok(Self { podshaper_dir: program.parent().map(PathBuf::from), ..Self::default() })
    }
}
