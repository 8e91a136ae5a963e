//! Reads podshaper's pins of a pod independently of podshaper: by bpftool, with the types that the maps carry (BTF).

use std::collections::BTreeSet;
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

/// Traffic by other paths than the sockets of the pod's cgroup.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Others {
    pub bytes: u64,
    pub packets: u64,
    pub drops: u64,
}

/// A limit that is in force.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct PinnedLimit {
    pub rate_bits_per_s: u64,
    pub burst_ns: u64,
}

/// Where the attachment of one of the pod's interfaces is pinned.
pub fn directory(pod: &Pod, interface: &str) -> PathBuf {
    layout().join(&pod.uid).join(interface)
}

/// The pod's egress counters of its first interface.
pub fn egress(pod: &Pod) -> Result<Counters> {
    egress_by(pod, INTERFACE)
}

pub fn egress_by(pod: &Pod, interface: &str) -> Result<Counters> {
    counters(&directory(pod, interface), EGRESS)
}

/// The pod's ingress counters of its first interface.
pub fn ingress(pod: &Pod) -> Result<Counters> {
    counters(&directory(pod, INTERFACE), INGRESS)
}

/// Traffic of the first interface by other paths than the sockets of the pod's cgroup: out, in.
pub fn others(pod: &Pod) -> Result<[Others; 2]> {
    let others = numbers(&directory(pod, INTERFACE), "OTHERS")?;
    serde_json::from_value(others["of"].clone()).context(format_args!("read the counters in {others}"))
}

fn counters(directory: &Path, direction: u32) -> Result<Counters> {
    let meters = numbers(directory, "METERS")?;
    let counters = meters["of"][direction as usize].get("counters").cloned().unwrap_or_default();
    serde_json::from_value(counters).context(format_args!("read the counters in {meters}"))
}

pub fn egress_limit(pod: &Pod, interface: &str) -> Result<PinnedLimit> {
    let limits = limits(&directory(pod, interface))?;
    serde_json::from_value(limits[EGRESS as usize].clone()).context("read the limit")
}

/// The limits of an attachment, by direction.
pub fn limits(directory: &Path) -> Result<Value> {
    numbers(directory, "LIMITS")
}

/// The record of an attachment's owner.
pub fn owner(directory: &Path) -> Result<Value> {
    let entry = lookup(&directory.join("OWNER"), 0)?;
    let words: Vec<String> = serde_json::from_value(entry["value"].clone()).context("read the record's bytes")?;
    let bytes = words.iter().filter_map(|word| u8::from_str_radix(word.trim_start_matches("0x"), 16).ok());
    let json: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    serde_json::from_slice(&json).context("read the record")
}

/// The slots with limits in the node's maps.
pub fn slots() -> Result<BTreeSet<u64>> {
    let map = layout().join("%node/LIMITS");
    let text = match run(Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(&map)) {
        // The last pod of the node may belong to another test and go at any moment.
        Err(_) if !map.exists() => return Ok(BTreeSet::new()),
        dumped => dumped?,
    };
    let entries: Vec<Value> = serde_json::from_str(&text).context("read the node's limits")?;
    Ok(entries.iter().filter_map(|entry| entry["formatted"]["key"].as_u64()).collect())
}

/// The values of a map for an attachment: in the node's map, or in a map of the attachment's own.
fn numbers(directory: &Path, map: &str) -> Result<Value> {
    let own = directory.join(map);
    let map = if own.exists() { own } else { layout().join("%node").join(map) };
    let slot = owner(directory)?["slot"].as_u64().unwrap_or_default();
    let entry = lookup(&map, slot as u32)?;
    let formatted = entry.get("formatted").and_then(|entry| entry.get("value")).cloned();
    formatted.ok_or_else(|| Failure::new(format_args!("bpftool says nothing of types in {entry}")))
}

fn layout() -> PathBuf {
    Path::new("/sys/fs/bpf/podshaper").join(format!("v{LAYOUT}"))
}

fn lookup(map: &Path, key: u32) -> Result<Value> {
    let mut bpftool = Command::new("bpftool");
    let key = key.to_ne_bytes().map(|byte| byte.to_string());
    bpftool.args(["-j", "map", "lookup", "pinned"]).arg(map).arg("key").args(key);
    let text = run(&mut bpftool)?;
    serde_json::from_str(&text).context(format_args!("read bpftool's answer {text:?}"))
}
