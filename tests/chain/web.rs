use std::time::Duration;

use super::{Bed, MBIT, assert_each_second};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::Way;
use crate::harness::web::{self, Web, WebResult};

/// Pause between a reply and the next request, on the one long-lived and quiet connection beside the clients.
const PAUSE: Duration = Duration::from_millis(2);
/// As a multiple of the time that clients wait with the bandwidth plugin, whose queue is short. A stall would be a
/// hundred times.
const MAX_OF_PLUGIN: f64 = 2.5;
const MAX_OF_PLUGIN_BESIDE: f64 = 4.0;
/// The delay that a busy machine, or a virtual one that its host stops, may cause anywhere.
const BUSY_US: f64 = 30_000.0;

/// Clients that open a new connection for each request: checks the rate in each second, and the times that they and
/// others wait.
fn assert_served(way: Way, rate: u64, clients: usize) {
    let options = Web { way, clients, ask: Some(PAUSE), ..Web::default() };
    let limits = match way {
        Way::In => Limits { egress: None, ingress: Some(rate) },
        Way::Out | Way::Within => Limits { egress: Some(rate), ingress: None },
    };
    let what = format!("{clients} clients {way:?} at {} Mbit/s", rate / MBIT);
    let bed = Bed::new();
    let [queue, ours] = [Limiter::Bandwidth, Limiter::Podshaper].map(|limiter| {
        let result = web::web(&bed.pod_by(limiter, limits), &options).unwrap();
        let seconds: Vec<f64> = result.timeline.each_second(options.seconds).iter().map(|rate| rate / 1e6).collect();
        let WebResult { clients, retransmits, latency, .. } = &result;
        eprintln!(
            "{what}, {limiter:?}: {seconds:.1?} Mbit/s, {clients:?}, beside {latency:?}, {retransmits} retransmits"
        );
        result
    });
    assert_each_second(&what, &ours.timeline, options.seconds, rate);
    assert!(ours.clients.failures.is_empty(), "{what}: {:?}", ours.clients.failures);
    for (which, ours, queue, most) in [
        ("p99 of a response", ours.clients.from_connect.p99_us, queue.clients.from_connect.p99_us, MAX_OF_PLUGIN),
        ("the longest wait", ours.longest_us(), queue.longest_us(), MAX_OF_PLUGIN),
        ("p99 of a reply beside", ours.latency.unwrap().p99_us, queue.latency.unwrap().p99_us, MAX_OF_PLUGIN_BESIDE),
    ] {
        assert!(ours <= most * queue + BUSY_US, "{what}, {which}: {ours} us, {queue} us with the bandwidth plugin");
    }
}

/// An emulated CPU beside other work can open connections for 2 Mbit/s, and not for 10 Mbit/s.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn short_connections_at_two_mbit_are_served_in_every_second() {
    assert_served(Way::Out, 2 * MBIT, 8);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn short_connections_at_ten_mbit_are_served_in_every_second() {
    assert_served(Way::Out, 10 * MBIT, 8);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn many_short_connections_at_ten_mbit_are_served_in_every_second() {
    assert_served(Way::Out, 10 * MBIT, 64);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn short_connections_at_a_hundred_mbit_are_served_in_every_second() {
    assert_served(Way::Out, 100 * MBIT, 8);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn many_short_connections_at_a_hundred_mbit_are_served_in_every_second() {
    assert_served(Way::Out, 100 * MBIT, 64);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_short_connections_bring_is_held_in_every_second() {
    assert_served(Way::In, 10 * MBIT, 8);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_many_short_connections_bring_is_held_in_every_second() {
    assert_served(Way::In, 10 * MBIT, 64);
}

/// Posts of 300 bytes are more connection set-up than data. The packet that completes a connection is not dropped,
/// and podshaper charges the connection together with its data.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn small_posts_are_held_and_come_once() {
    const RATE: u64 = 10 * MBIT;
    const MOST_RETRANSMITS: u64 = 50;
    let bed = Bed::new();
    let pod = bed.pod_by(Limiter::Podshaper, Limits { egress: None, ingress: Some(RATE) });
    let options = Web { way: Way::In, clients: 64, bytes: 300, ..Web::default() };
    let WebResult { timeline, clients, retransmits, .. } = web::web(&pod, &options).unwrap();
    let seconds: Vec<f64> = timeline.each_second(options.seconds).iter().map(|rate| rate / 1e6).collect();
    let text = format!("{seconds:.1?} Mbit/s, {retransmits} retransmits, {clients:?}");
    eprintln!("{text}");
    assert!(timeline.busiest_second(options.seconds) <= 1.05 * RATE as f64, "{text}");
    assert!(retransmits <= MOST_RETRANSMITS, "{text}");
}

/// A node's probe opens a connection each time, and kubelet waits one second for the answer. Connections of the many
/// remote clients that post wait for their turn.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn probes_of_the_node_do_not_wait_behind_those_that_post() {
    const PROBED_EACH: Duration = Duration::from_millis(400);
    const MOST_P50_US: f64 = 100_000.0;
    const KUBELET_WAITS_US: f64 = 1_000_000.0;
    let bed = Bed::new();
    let pod = bed.pod_by(Limiter::Podshaper, Limits { egress: None, ingress: Some(10 * MBIT) });
    let probe = Some(PROBED_EACH);
    let options = Web { way: Way::In, clients: 64, bytes: 30_000, probe, away: true, ..Web::default() };
    let WebResult { probes, clients, .. } = web::web(&pod, &options).unwrap();
    let probes = probes.unwrap();
    let text = format!("{probes:?} beside {clients:?}");
    eprintln!("{text}");
    assert!(clients.from_connect.p50_us > 4.0 * MOST_P50_US, "too few to wait: {text}");
    assert!(probes.count >= 5 && probes.p50_us <= MOST_P50_US && probes.max_us < KUBELET_WAITS_US, "{text}");
}

/// A scan or a flood of connection requests that carry no data takes nothing of the link, so it does not delay
/// others.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn requests_that_bring_nothing_delay_nobody() {
    const PAUSE: Duration = Duration::from_millis(100);
    const MOST_P50_US: f64 = 100_000.0;
    let bed = Bed::new();
    let pod = bed.pod_by(Limiter::Podshaper, Limits { egress: None, ingress: Some(10 * MBIT) });
    let latency = web::ask_beside_knocks(&pod, 200, 6.0, PAUSE).unwrap();
    eprintln!("{latency:?}");
    assert!(latency.count >= 15 && latency.p50_us <= MOST_P50_US, "{latency:?}");
}

/// Bulk flows and as many short connections share the link: each kind must have a fair part of the rate.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn bulk_flows_and_short_connections_both_get_on() {
    const RATE: u64 = 10 * MBIT;
    const LEAST: f64 = 0.15;
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, RATE);
    let options = Web { clients: 8, bulk_flows: 8, seconds: 6.0, ..Web::default() };
    let result = web::web(&pod, &options).unwrap();
    let share = |bits_per_s: f64| bits_per_s / RATE as f64;
    let (short, bulk) = (result.timeline.payload_rate(1.0, 5.5), result.bulk.unwrap().timeline.payload_rate(1.0, 5.5));
    let text = format!("{:.3} of the limit to clients, {:.3} to bulk flows", share(short), share(bulk));
    eprintln!("{text}");
    assert!(share(short) > LEAST && share(bulk) > LEAST, "{text}");
    assert_each_second("clients and bulk flows", &result.timeline, options.seconds, RATE);
}
