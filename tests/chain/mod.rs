//! Traffic from real pods: made by the real bridge and host-local plugins, limited by the podshaper of this build.
//!
//! The machine may be small and busy: the bounds are wide and each message has the number that was measured. `tests/run bench`
//! holds the narrow ones.

/// Calls and names beside bulk flows, which may not wait for these.
mod beside;
/// Bytes and packets: what the programs count is what a receiver gets.
mod counters;
/// Flows that are not the usual ones: very many, very slow, with small segments, with traffic against the stream.
mod flows;
/// What a pod may do against its limit, and what it must still be able to do.
mod foes;
/// What a pod receives.
mod ingress;
/// Interfaces that are no veth, and packets of other sizes.
mod links;
/// Multipath TCP.
mod mptcp;
/// What passes by other paths than the sockets of the pod's cgroup.
mod paths;
/// Rate, first second, retransmits, fairness, latency of TCP.
mod rate;
/// Which traffic is this attachment's, and what is not touched at all.
pub mod scope;
/// Remote addresses that are exempt.
mod subnets;
/// UDP and ICMP.
mod unpaced;
/// Connections that are short.
mod web;

use std::sync::MutexGuard;
use std::thread;

use serde_json::{Value, json};

use super::harness::cni::{Chain, Cni};
use super::harness::host::{Host, podshaper_plugin};
use super::harness::limiter::{Limiter, Limits, Programs};
use super::harness::measure::{self, Timeline};
use super::harness::pod::{INTERFACE, Pod};
use super::harness::podshaper_program;

pub const MBIT: u64 = 1_000_000;
const GBIT: u64 = 1_000 * MBIT;

/// A node of its own, and no other measurement meanwhile.
pub struct Bed {
    pub host: Host,
    _alone: MutexGuard<'static, ()>,
}

impl Bed {
    pub fn new() -> Self {
        let alone = measure::alone();
        Self { host: Host::new().unwrap(), _alone: alone }
    }

    pub fn pod(&self, limiter: Limiter, rate: u64) -> Pod<'_> {
        self.pod_by(limiter, Limits { egress: Some(rate), ingress: None })
    }

    /// A pod with these limits by any of the limiters.
    pub fn pod_by(&self, limiter: Limiter, limits: Limits) -> Pod<'_> {
        let mut pod = Pod::new(&self.host, "chain").unwrap();
        let programs = Programs::find(None, &[limiter]).unwrap();
        limiter.add(&mut pod, limits, &programs).unwrap();
        pod
    }

    /// A pod with these limits by podshaper.
    pub fn limited(&self, limits: Limits) -> Pod<'_> {
        self.pod_of(self.host.bridge_chain().unwrap(), json!({}), limits)
    }

    /// A pod of another network than the bridge's, or with other keys in podshaper's configuration.
    pub fn pod_of(&self, network: Chain, keys: Value, limits: Limits) -> Pod<'_> {
        let mut pod = Pod::new(&self.host, "chain").unwrap();
        let mut podshaper = podshaper_plugin();
        podshaper.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let directory = podshaper_program().unwrap().parent().unwrap().to_owned();
        pod.offer_bandwidth(limits.egress, limits.ingress, None);
        pod.add(&network.then(podshaper).with_dir(directory)).unwrap();
        pod
    }

    /// Sets a sysctl of both ends.
    fn set(&self, pod: &Pod, key: &str, value: u64) {
        for netns in [&self.host.netns, &pod.netns] {
            netns.run("sysctl", &["-q", &format!("{key}={value}")]).unwrap();
        }
    }
}

/// `tc qdisc add dev VETH root netem delay 20ms`, at the node's end: what goes to the pod is late. Kernels that have fq have netem, too.
pub fn move_away(pod: &Pod) {
    let links = pod.host.netns.run("ip", &["-br", "link", "show", "type", "veth"]).unwrap();
    let veth = links.split(['@', ' ']).next().unwrap_or_default();
    let netem = ["qdisc", "replace", "dev", veth, "root", "netem", "delay", "20ms", "limit", "100000"];
    pod.host.netns.run("tc", &netem).unwrap();
}

/// Whether podshaper found fq in the kernel: packets that no socket paces then wait for their departure time.
pub fn has_fq(pod: &Pod) -> bool {
    pod.netns.run("tc", &["qdisc", "show", "dev", INTERFACE]).unwrap().contains("qdisc fq ")
}

/// Whether packets whose sender has not waited have a queue to wait in: fq, or htb where there is none.
fn has_queue(pod: &Pod) -> bool {
    has_fq(pod) || pod.netns.run("tc", &["qdisc", "show", "dev", INTERFACE]).unwrap().contains("qdisc htb ")
}

/// An attachment that no chain of the harness made; removed on drop.
pub struct Attachment {
    del: Cni,
}

impl Attachment {
    /// Makes the call, an ADD. DEL is the same call with another verb: a runtime may pass `prevResult` then or not.
    pub fn add(call: Cni) -> Self {
        call.call().unwrap().success().unwrap();
        Self { del: call.env("CNI_COMMAND", "DEL") }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let removed = self.del.call().and_then(|call| call.success().map(drop));
        assert!(thread::panicking() || removed.is_ok(), "{removed:?}");
    }
}

/// What a machine that is busy with something else may take from a rate: its pacing timers fire late, and what is late by more
/// than the burst is lost. A virtual one that its host stops for some milliseconds lost up to 0.12. Nothing adds to a rate.
const BUSY: f64 = 0.15;

/// Panics unless `measured` is within `tolerance` of `wanted`, both in bits per second, or [`BUSY`] below that.
#[track_caller]
pub fn assert_rate(what: &str, measured: f64, wanted: u64, tolerance: f64) {
    let share = measured / wanted as f64;
    let allowed = 1.0 - tolerance - BUSY..=1.0 + tolerance;
    eprintln!("{what}: {:.2} Mbit/s, {:.2} %", measured / 1e6, share * 100.0);
    assert!(
        allowed.contains(&share),
        "{what}: {:.3} Mbit/s are {:.1} % of {:.3}, not within {allowed:.2?}",
        measured / 1e6,
        share * 100.0,
        wanted as f64 / 1e6
    );
}

/// What a second may have above the limit: packets that were sent a little before it, or that come a little after.
const SECOND_TOLERANCE: f64 = 0.08;
/// What all seconds after the first may have above the limit.
const ALL_TOLERANCE: f64 = 0.05;

/// The same for each second after the first: a mean hides that a pod stands still in one and makes good in the next.
#[track_caller]
pub fn assert_each_second(what: &str, timeline: &Timeline, seconds: f64, wanted: u64) {
    let shares: Vec<f64> = timeline.each_second(seconds).iter().map(|rate| rate / wanted as f64).collect();
    eprintln!("{what}: {shares:.3?} of {:.3} Mbit/s, second by second", wanted as f64 / 1e6);
    let allowed = 1.0 - SECOND_TOLERANCE - BUSY..=1.0 + SECOND_TOLERANCE;
    let after_the_first = shares.get(1..).unwrap_or_default();
    assert!(after_the_first.len() >= 2, "{what}: {shares:?} are too few seconds");
    let all = after_the_first.iter().sum::<f64>() / after_the_first.len() as f64;
    assert!(all <= 1.0 + ALL_TOLERANCE, "{what}: {shares:.3?}, {all:.3} of the limit after the first second");
    assert!(
        after_the_first.iter().all(|share| allowed.contains(share)),
        "{what}: {shares:.3?} of {:.3} Mbit/s, second by second; after the first not within {allowed:.2?}",
        wanted as f64 / 1e6
    );
}
