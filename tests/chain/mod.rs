//! Traffic from real pods: made by the real bridge and host-local plugins, limited by the podshaper of this build.
//!
//! The machine may be small and busy, so the bounds are wide, and each message has the measured number. `tests/run
//! bench` has the narrow bounds.

/// Calls and DNS look-ups beside bulk flows, which must not delay them.
mod beside;
/// Bytes and packets: the programs count the same numbers as a receiver gets.
mod counters;
/// Unusual flows: very many, very slow, with small segments, with traffic against the stream.
mod flows;
/// What a pod may do against its limit, and what must still work in the pod.
mod foes;
/// Traffic that a pod receives.
mod ingress;
/// Interfaces that are no veth, and packets of other sizes.
mod links;
/// Multipath TCP.
mod mptcp;
/// Traffic by other paths than the sockets of the pod's cgroup.
mod paths;
/// TCP: rate, first second, retransmits, fairness, latency.
mod rate;
/// Which traffic belongs to an attachment, and which traffic podshaper leaves alone.
pub mod scope;
/// Remote addresses that are exempt.
mod subnets;
/// UDP and ICMP.
mod unpaced;
/// Short connections.
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

/// A node of its own. No measurement of another test runs while it exists.
pub struct Bed {
    pub host: Host,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl Bed {
    pub fn new() -> Self {
        let alone = measure::alone();
        Self { host: Host::new().unwrap(), _alone: Some(alone) }
    }

    /// One of several nodes of a test that measures on all of them at the same time. The test has [`measure::alone`].
    fn one_of_several(_alone: &MutexGuard<'static, ()>) -> Self {
        Self { host: Host::new().unwrap(), _alone: None }
    }

    pub fn pod(&self, limiter: Limiter, rate: u64) -> Pod<'_> {
        self.pod_by(limiter, Limits { egress: Some(rate), ingress: None })
    }

    /// A pod with these limits, limited by any of the limiters.
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

    /// A pod in another network than the bridge's, or with other keys in podshaper's configuration.
    pub fn pod_of(&self, network: Chain, keys: Value, limits: Limits) -> Pod<'_> {
        let mut pod = Pod::new(&self.host, "chain").unwrap();
        let mut podshaper = podshaper_plugin();
        podshaper.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let directory = podshaper_program().unwrap().parent().unwrap().to_owned();
        pod.offer_bandwidth(limits.egress, limits.ingress, None);
        pod.add(&network.then(podshaper).with_dir(directory)).unwrap();
        pod
    }

    /// Sets a sysctl at both ends.
    fn set(&self, pod: &Pod, key: &str, value: u64) {
        for netns in [&self.host.netns, &pod.netns] {
            netns.run("sysctl", &["-q", &format!("{key}={value}")]).unwrap();
        }
    }
}

/// `tc qdisc add dev VETH root netem delay 20ms` at the node's end: delays packets to the pod. Kernels with fq also
/// have netem.
pub fn move_away(pod: &Pod) {
    let links = pod.host.netns.run("ip", &["-br", "link", "show", "type", "veth"]).unwrap();
    let veth = links.split(['@', ' ']).next().unwrap_or_default();
    let netem = ["qdisc", "replace", "dev", veth, "root", "netem", "delay", "20ms", "limit", "100000"];
    pod.host.netns.run("tc", &netem).unwrap();
}

/// Whether podshaper found fq in the kernel. With fq, packets that no socket paces wait for their departure time.
pub fn has_fq(pod: &Pod) -> bool {
    pod.netns.run("tc", &["qdisc", "show", "dev", INTERFACE]).unwrap().contains("qdisc fq ")
}

/// Whether packets whose sender has not waited have a queue in the pod: fq, or htb where the kernel has no fq.
fn has_queue(pod: &Pod) -> bool {
    has_fq(pod) || pod.netns.run("tc", &["qdisc", "show", "dev", INTERFACE]).unwrap().contains("qdisc htb ")
}

/// An attachment that was not made by a chain of the harness; removed on drop.
pub struct Attachment {
    del: Cni,
}

impl Attachment {
    /// Makes the call, which is an ADD. The DEL is the same call with another verb, since a runtime may pass
    /// `prevResult` or not.
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

/// The part of a rate that may be missing on a busy machine: pacing timers fire late there, and time that is late by
/// more than the burst is lost. A virtual machine that its host stopped for some milliseconds lost up to 0.12. A busy
/// machine never increases a rate.
const BUSY: f64 = 0.15;

/// Panics unless `measured` is within `tolerance` of `wanted`, both in bits per second. Below that range, another
/// [`BUSY`] is allowed.
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

/// The part of the limit that one second may have above the limit: packets that were sent shortly before the second,
/// or that arrive shortly after.
const SECOND_TOLERANCE: f64 = 0.08;
/// The part of the limit that the seconds after the first may have above the limit together.
const ALL_TOLERANCE: f64 = 0.05;

/// Like [`assert_rate`], but for each second after the first: a mean hides a pod that stands still in one second and
/// catches up in the next.
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
