use std::time::Duration;

use serde_json::json;

use super::{Workload, limits, towards};
use crate::harness::Result;
use crate::harness::cpu::while_measuring;
use crate::harness::host::Host;
use crate::harness::limiter::{Limiter, Limits, Programs};
use crate::harness::measure::{self, Bulk, BulkResult, Latency, Way};
use crate::harness::pod::Pod;
use crate::harness::remote::{Path, Remote};
use crate::record::Found;

/// Shorter measurements have no time between the first second and the last.
const LEAST_FOR_CPU: f64 = 3.0;
/// The steps of the first seconds, for a line that shows how a limiter begins.
const STEP: f64 = 0.2;

/// Replies of an idle pod: the delay that the machine itself causes.
pub fn idle(seconds: f64) -> Workload {
    let measure = move |pod: &mut Pod, _| {
        let mut found = Found::default();
        replies_of(&mut found, &measure::ask(pod, Way::Out, seconds, Duration::from_millis(1))?);
        Ok(found)
    };
    Workload::of_pod("idle", json!({}), Limits::default(), seconds, measure).peers(&[Limiter::Bare])
}

/// A small request every millisecond beside bulk flows.
pub fn replies(way: Way, limit: u64, flows: usize, seconds: f64) -> Workload {
    let bulk = Bulk { way, flows, seconds, ask: Some(measure::ask_pause(limit)), ..Bulk::default() };
    let parameters = json!({ "direction": towards(way), "limit": limit, "flows": flows });
    of_bulk("replies", parameters, limit, bulk)
}

/// The share of the limit that four flows have.
pub fn by_limit(way: Way, limit: u64, seconds: f64) -> Workload {
    let bulk = Bulk { way, flows: 4, seconds, ask: Some(measure::ask_pause(limit)), ..Bulk::default() };
    of_bulk("by-limit", json!({ "direction": towards(way), "limit": limit }), limit, bulk)
}

pub fn by_flows(limit: u64, flows: usize, seconds: f64) -> Workload {
    let bulk = Bulk { flows, seconds, ..Bulk::default() };
    of_bulk("by-flows", json!({ "limit": limit, "flows": flows }), limit, bulk)
}

pub fn by_congestion_control(name: &str, seconds: f64) -> Workload {
    const LIMIT: u64 = 100 * super::MBIT;
    let congestion = Some(name.to_owned());
    let bulk = Bulk { flows: 4, seconds, congestion, ask: Some(measure::ask_pause(LIMIT)), ..Bulk::default() };
    of_bulk("congestion-control", json!({ "limit": LIMIT, "control": name }), LIMIT, bulk)
}

/// Like [`by_congestion_control`] with cubic, where both ends negotiate ECN.
pub fn with_ecn(seconds: f64) -> Workload {
    const LIMIT: u64 = 100 * super::MBIT;
    let bulk = Bulk { flows: 4, seconds, ask: Some(measure::ask_pause(LIMIT)), ..Bulk::default() };
    let parameters = json!({ "limit": LIMIT, "control": "cubic with ECN" });
    Workload::of_pod("congestion-control", parameters, limits(Way::Out, LIMIT), seconds, move |pod, limiter| {
        pod.negotiate_ecn()?;
        found(pod, limiter, LIMIT, &bulk)
    })
}

/// A pod without a limit, beside a pod that has limits in both directions and sends nothing.
pub fn unlimited(seconds: f64) -> Workload {
    const LIMIT: u64 = 100 * super::MBIT;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let host = Host::new()?;
        let mut limited = Pod::new(&host, "report")?;
        limiter.add(&mut limited, Limits { egress: Some(LIMIT), ingress: Some(LIMIT) }, programs)?;
        let mut pod = Pod::new(&host, "report")?;
        Limiter::Bare.add(&mut pod, Limits::default(), programs)?;
        let bulk = Bulk { flows: 4, seconds, ask: Some(Duration::from_millis(1)), ..Bulk::default() };
        let (cpus, result) = while_measuring(seconds, || measure::bulk(&pod, &bulk))?;
        let rate = result.timeline.steady_rate();
        let mut found = Found::default();
        found.put("gbit_per_s", rate / 1e9);
        found.put("cpu_ms_per_gbit", cpus / (rate / 1e9) * 1e3);
        result.latency.iter().for_each(|latency| replies_of(&mut found, latency));
        Ok(found)
    };
    Workload::of_node("unlimited", json!({}), seconds + 1.5, measure)
}

pub fn mptcp(way: Way, limit: u64, seconds: f64) -> Workload {
    let bulk = Bulk { way, flows: 4, seconds, mptcp: true, ask: Some(measure::ask_pause(limit)), ..Bulk::default() };
    of_bulk("mptcp", json!({ "direction": towards(way), "limit": limit }), limit, bulk)
}

/// Flows to a machine at the end of a long path.
pub fn far(limit: u64, rtt_ms: u32, loss_percent: f64, seconds: f64) -> Workload {
    let bulk = Bulk { flows: 4, seconds, ask: Some(Duration::from_millis(5)), ..Bulk::default() };
    let parameters = json!({ "limit": limit, "rtt_ms": rtt_ms, "loss_percent": loss_percent });
    let path = Path { rtt_ms, loss_percent };
    Workload::of_pod("far", parameters, limits(Way::Out, limit), seconds, move |pod, limiter| {
        pod.remote = Some(Remote::at_the_end_of(path, pod)?);
        found(pod, limiter, limit, &bulk)
    })
}

fn of_bulk(name: &'static str, parameters: serde_json::Value, limit: u64, bulk: Bulk) -> Workload {
    Workload::of_pod(name, parameters, limits(bulk.way, limit), bulk.seconds, move |pod, limiter| {
        found(pod, limiter, limit, &bulk)
    })
}

fn found(pod: &Pod, limiter: Limiter, limit: u64, bulk: &Bulk) -> Result<Found> {
    let max_pacing_rate = (limiter == Limiter::Senders).then(|| measure::pacing_rate(limit, bulk.flows));
    let bulk = Bulk { max_pacing_rate, ..bulk.clone() };
    let (cpus, result) = while_measuring(bulk.seconds, || measure::bulk(pod, &bulk))?;
    let mut found = Found::default();
    rates(&mut found, &result, limit, bulk.seconds);
    found.put("retransmits", result.retransmits as f64);
    if bulk.seconds >= LEAST_FOR_CPU {
        found.put("cpu_ms_per_gbit", cpus / (result.timeline.steady_rate() / 1e9) * 1e3);
    }
    if let Some(latency) = &result.latency {
        replies_of(&mut found, latency);
        let requests = latency.count as f64 * measure::REQUEST_WIRE_BITS as f64 / bulk.seconds;
        found.put("requests_percent", requests / limit as f64 * 100.0);
    }
    Ok(found)
}

fn rates(found: &mut Found, result: &BulkResult, limit: u64, seconds: f64) {
    let timeline = &result.timeline;
    let percent = |rate: f64| rate / limit as f64 * 100.0;
    found.put("rate", timeline.steady_rate());
    found.put("percent", percent(timeline.steady_rate()));
    found.put("first_second_percent", percent(timeline.first_second()));
    let later: Vec<f64> = timeline.each_second(seconds).into_iter().skip(1).map(percent).collect();
    found.put("least_second_percent", later.iter().copied().fold(f64::INFINITY, f64::min));
    found.put("most_second_percent", later.iter().copied().fold(f64::NEG_INFINITY, f64::max));
    found.put("jain", timeline.jain());
    let steps = (0..(seconds / STEP) as u32).map(|step| f64::from(step) * STEP);
    found.put_series("percent_by_step", steps.map(|from| percent(timeline.wire_rate(from, from + STEP))));
}

pub fn replies_of(found: &mut Found, latency: &Latency) {
    for (name, us) in [("p50", latency.p50_us), ("p99", latency.p99_us), ("longest", latency.max_us)] {
        found.put(&format!("reply_{name}_ms"), us / 1e3);
    }
    found.put_series("reply_percentiles_ms", latency.percentiles_us.iter().map(|us| us / 1e3));
}
