use std::process::Stdio;
use std::thread;
use std::time::Duration;

use super::{Bed, MBIT, assert_rate, has_queue};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Udp, Way};
use crate::harness::meter;
use crate::harness::pod::Pod;

/// The summary that `ping` prints for 100 requests in 2 s.
#[derive(Debug)]
struct Ping {
    lost_percent: f64,
    average_ms: f64,
}

const PINGS: &str = "100";

fn ping(pod: &Pod) -> Ping {
    let mut command = pod.command("ping").unwrap();
    command.args(["-q", "-c", PINGS, "-i", "0.02", "-W", "1"]).arg(pod.host.gateway_v4().to_string());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |marker: &str, end: bool| -> f64 {
        let (before, after) = text.split_once(marker).unwrap_or_else(|| panic!("no {marker:?} in {text} {output:?}"));
        let field = if end { before.rsplit(' ').next() } else { after.split('/').nth(1) };
        field.and_then(|field| field.parse().ok()).unwrap_or_else(|| panic!("no number at {marker:?} in {text}"))
    };
    Ping { lost_percent: number("% packet loss", true), average_ms: number("mdev = ", false) }
}

fn ping_beside<T: Send>(pod: &Pod, traffic: impl FnOnce() -> T + Send) -> (Ping, T) {
    thread::scope(|scope| {
        let traffic = scope.spawn(traffic);
        thread::sleep(Duration::from_millis(500));
        let ping = ping(pod);
        (ping, traffic.join().unwrap())
    })
}

/// The sender sees no error, the link has the rate, and the ping of another process goes on. Packets above the limit
/// are dropped and counted. Where fq can hold them, they are not even sent: the sender waits for room in its socket's
/// buffer.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn udp_above_the_limit_gets_the_limit_and_no_error() {
    assert_udp_is_held(10 * MBIT);
}

/// The queue is empty at one moment and not at the next, as with QUIC. A datagram that finds the queue empty must not
/// overtake a datagram that has just left the queue, since QUIC takes that for a loss.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn datagrams_of_a_flow_stay_in_order() {
    const FLOWS: usize = 4;
    const LIMIT: u64 = 100 * MBIT;
    let bed = Bed::new();
    for way in [Way::Out, Way::In] {
        let pod = bed.limited(Limits { egress: Some(LIMIT), ingress: Some(LIMIT) });
        let rate = LIMIT * 98 / 100 / FLOWS as u64;
        let udp = Udp { way, rate, seconds: 4.0, at_once: 16, ..Udp::default() };
        let results: Vec<_> = thread::scope(|scope| {
            let flows: Vec<_> = (0..FLOWS).map(|_| scope.spawn(|| measure::udp(&pod, &udp).unwrap())).collect();
            flows.into_iter().map(|flow| flow.join().unwrap()).collect()
        });
        let (sent, overtaken) =
            results.iter().fold((0, 0), |(sent, overtaken), flow| (sent + flow.sent, overtaken + flow.overtaken));
        eprintln!("{way:?}: {overtaken} of {sent} overtaken");
        assert!(overtaken * 1000 <= sent, "{way:?}: {overtaken} of {sent} overtaken");
    }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn udp_above_a_hundred_mbit_gets_a_hundred() {
    assert_udp_is_held(100 * MBIT);
}

/// UDP at twice the limit.
#[track_caller]
fn assert_udp_is_held(rate: u64) {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, rate);
    let udp = Udp { rate: 2 * rate, seconds: 3.0, large_buffer: rate > 10 * MBIT, ..Udp::default() };
    let (ping, result) = ping_beside(&pod, || measure::udp(&pod, &udp).unwrap());
    eprintln!("beside UDP at {} Mbit/s: {ping:?}, sent {}", rate / MBIT, result.sent);
    assert!(result.errors.is_empty(), "{:?} of {}", result.errors, result.sent);
    assert_rate("UDP", result.timeline.steady_rate(), rate, 0.05);
    let counters = meter::egress(&pod).unwrap();
    let dropped = counters.drops as f64 / result.sent as f64;
    eprintln!("dropped {dropped:.3}");
    let expected = if has_queue(&pod) { 0.0..=0.0 } else { 0.4..=0.6 };
    assert!(expected.contains(&dropped), "of {} packets at twice the rate: {counters:?}", result.sent);
    assert!(ping.lost_percent <= 2.0, "ping beside UDP at {rate} bit/s: {ping:?}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn ping_passes_beside_tcp() {
    /// A tenth of the delay that the queue of a token bucket causes at this rate.
    const MOST_AVERAGE_MS: f64 = 1.0;
    let bed = Bed::new();
    // Slow enough that 8 flows have a backlog beyond the bound for packets that no socket paces: only packets of
    // sparse flows pass.
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    let bulk = Bulk { flows: 8, seconds: 3.0, ..Bulk::default() };
    let (ping, _) = ping_beside(&pod, || measure::bulk(&pod, &bulk).unwrap());
    eprintln!("beside TCP: {ping:?}");
    let backlog_ns = meter::egress(&pod).unwrap().max_backlog_ns;
    assert!(backlog_ns > 10_000_000, "a backlog of {backlog_ns} ns is too short to show anything");
    assert!(ping.lost_percent <= 2.0 && ping.average_ms < MOST_AVERAGE_MS, "beside 8 flows: {ping:?}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn ecn_capable_packets_are_marked_before_others_are_dropped() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    // Measured first: packets that a sender leaves in fq still arrive while the next sender is measured.
    let before = meter::egress(&pod).unwrap();
    let udp = Udp { rate: 20 * MBIT, seconds: 1.0, ..Udp::default() };
    let result = measure::udp(&pod, &udp).unwrap();
    let marks = meter::egress(&pod).unwrap().marks - before.marks;
    assert_eq!((marks, result.timeline.marked), (0, 0), "packets that are not ECN-capable");
    for ipv6 in [false, true] {
        let before = meter::egress(&pod).unwrap();
        let udp = Udp { rate: 20 * MBIT, seconds: 1.5, ipv6, ecn: true, ..Udp::default() };
        let result = measure::udp(&pod, &udp).unwrap();
        let after = meter::egress(&pod).unwrap();
        let (marks, marked) = (after.marks - before.marks, result.timeline.marked);
        let text = format!("IPv6 {ipv6}: {marks} marked, {marked} of them arrived in time, {} sent", result.sent);
        eprintln!("{text}");
        // The sender goes on for 0.2 s after the last sample of arrivals.
        assert!(marked > 500 && marked <= marks && marks <= marked + marked / 3, "{text}");
    }
}

/// A QUIC download, for example, in the backlog of many TCP flows. That backlog is longer than the bound for packets
/// that no socket paces.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn udp_beside_many_tcp_flows_has_a_share() {
    const LIMIT: u64 = 10 * MBIT;
    const FLOWS: usize = 8;
    /// As a part of an even share.
    const LEAST: f64 = 0.25;
    for way in [Way::Out, Way::In] {
        let bed = Bed::new();
        let (egress, ingress) = if way == Way::Out { (Some(LIMIT), None) } else { (None, Some(LIMIT)) };
        let pod = bed.limited(Limits { egress, ingress });
        let bulk = Bulk { way, flows: FLOWS, seconds: 5.0, ..Bulk::default() };
        let udp = Udp { way, rate: LIMIT / 2, seconds: 3.0, ..Udp::default() };
        let (udp, tcp) = thread::scope(|scope| {
            let tcp = scope.spawn(|| measure::bulk(&pod, &bulk).unwrap());
            thread::sleep(Duration::from_secs(1));
            (measure::udp(&pod, &udp).unwrap(), tcp.join().unwrap())
        });
        let udp_share = udp.timeline.steady_rate() / LIMIT as f64;
        // For the time in which there was UDP as well.
        let tcp_share = tcp.timeline.payload_rate(1.5, 3.5) / LIMIT as f64;
        let text = format!("{way:?}: {udp_share:.3} of the limit to UDP, {tcp_share:.3} to {FLOWS} TCP flows");
        eprintln!("{text}");
        assert!(udp_share > LEAST / (FLOWS + 1) as f64 && udp_share < 0.55, "{text}");
        assert!(tcp_share > 0.4, "{text}");
    }
}
