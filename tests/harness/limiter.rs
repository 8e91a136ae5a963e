//! What is compared: a pod without a limit, one with podshaper, one with the bandwidth plugin, one whose senders limit themselves.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::json;

use super::cni::Chain;
use super::host::{bandwidth_plugin, podshaper_plugin};
use super::pod::Pod;
use super::{Context, Failure, Result, podshaper_program};

/// The bandwidth plugin's own default burst, 2^31-1 bits, is two seconds at 1 Gbit/s: this one makes it limit at all.
const BANDWIDTH_BURST_BITS: u64 = 1_000_000;

/// What follows the bridge in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Limiter {
    Bare,
    Podshaper,
    /// podshaper that leaves other paths than the pod's sockets alone.
    OwnSockets,
    Bandwidth,
    /// None: each bulk flow's own SO_MAX_PACING_RATE is its share of the limit. What replies wait for then is the machine.
    Senders,
}

/// Limits in bits per second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    pub egress: Option<u64>,
    pub ingress: Option<u64>,
}

impl Limiter {
    /// Those that stand in a chain, and none.
    pub const ALL: [Self; 3] = [Self::Bare, Self::Podshaper, Self::Bandwidth];

    /// As a table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Bare => "no limit",
            Self::Podshaper => "podshaper",
            Self::OwnSockets => "podshaper, otherPaths false",
            Self::Bandwidth => "bandwidth plugin, burst 1 Mbit",
            Self::Senders => "none, senders pace themselves",
        }
    }

    /// The plugin this adds to the chain.
    pub fn plugin(self) -> Option<&'static str> {
        match self {
            Self::Bare | Self::Senders => None,
            Self::Podshaper | Self::OwnSockets => Some("podshaper"),
            Self::Bandwidth => Some("bandwidth"),
        }
    }

    /// Adds the pod to its node's network, limited this way.
    pub fn add(self, pod: &mut Pod, limits: Limits, programs: &Programs) -> Result<()> {
        let bridge = pod.host.bridge_chain()?;
        let burst = (self == Self::Bandwidth).then_some(BANDWIDTH_BURST_BITS);
        pod.offer_bandwidth(limits.egress, limits.ingress, burst);
        let chain: Chain = match self {
            Self::Bare | Self::Senders => bridge,
            Self::Podshaper => bridge.then(podshaper_plugin()).with_dir(programs.directory()?),
            Self::OwnSockets => {
                let mut plugin = podshaper_plugin();
                plugin["otherPaths"] = json!(false);
                bridge.then(plugin).with_dir(programs.directory()?)
            }
            Self::Bandwidth => bridge.then(bandwidth_plugin()),
        };
        pod.add(&chain).map(drop)
    }
}

/// Where the plugin to measure is.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    podshaper_dir: Option<PathBuf>,
}

impl Programs {
    /// The directory of the podshaper that is measured.
    pub fn directory(&self) -> Result<&Path> {
        let directory = self.podshaper_dir.as_deref();
        directory.ok_or_else(|| Failure::new("podshaper was not among the limiters looked for"))
    }

    /// Looks for what these limiters need before anything is measured: the `podshaper` named, or the one of this build.
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
        Ok(Self { podshaper_dir: program.parent().map(PathBuf::from) })
    }
}
