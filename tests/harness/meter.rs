//! What podshaper has pinned for a pod, read by somebody else's eyes: bpftool, by the types the maps describe themselves with.

use std::path::{Path, PathBuf};
use std::process::Command;

use podshaper_abi::{EGRESS, INGRESS, LAYOUT};
use serde::Deserialize;
use serde_json::Value;

use super::pod::{INTERFACE, Pod};
use super::process::run;
use super::{Context, Failure, Result};

/// The counters of one direction, as far as tests look at them.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Counters {
    /// At layer 3.
    pub bytes: u64,
    pub packets: u64,
    pub drops: u64,
    pub marks: u64,
    pub max_backlog_ns: u64,
}

/// A limit that is in force.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct PinnedLimit {
    pub rate_bits_per_s: u64,
    pub burst_ns: u64,
}

/// Where the attachment of one of the pod's interfaces is pinned.
pub fn directory(pod: &Pod, interface: &str) -> PathBuf {
    Path::new("/sys/fs/bpf/podshaper").join(format!("v{LAYOUT}")).join(&pod.uid).join(interface)
}

/// What the pod has sent by its first interface.
pub fn egress(pod: &Pod) -> Result<Counters> {
    egress_by(pod, INTERFACE)
}

pub fn egress_by(pod: &Pod, interface: &str) -> Result<Counters> {
    counters(&directory(pod, interface), EGRESS)
}

/// What the pod has received by its first interface.
pub fn ingress(pod: &Pod) -> Result<Counters> {
    counters(&directory(pod, INTERFACE), INGRESS)
}

fn counters(directory: &Path, direction: u32) -> Result<Counters> {
    let meter = entry(&directory.join("METERS"), direction)?;
    let counters = meter.get("counters").cloned().unwrap_or_default();
    serde_json::from_value(counters).context(format_args!("read the counters in {meter}"))
}

pub fn egress_limit(pod: &Pod, interface: &str) -> Result<PinnedLimit> {
    let limit = entry(&directory(pod, interface).join("LIMITS"), EGRESS)?;
    serde_json::from_value(limit).context("read the limit")
}

/// The entry of a direction, which is its key.
fn entry(map: &Path, direction: u32) -> Result<Value> {
    let mut bpftool = Command::new("bpftool");
    let key = direction.to_ne_bytes().map(|byte| byte.to_string());
    bpftool.args(["-j", "map", "lookup", "pinned"]).arg(map).arg("key").args(key);
    let text = run(&mut bpftool)?;
    let entry: Value = serde_json::from_str(&text).context(format_args!("read bpftool's answer {text:?}"))?;
    let formatted = entry.get("formatted").and_then(|entry| entry.get("value")).cloned();
    formatted.ok_or_else(|| Failure::new(format_args!("bpftool says nothing of types in {text}")))
}
