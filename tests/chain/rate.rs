use std::time::Duration;

use serde_json::Value;

use super::{BUSY, Bed, GBIT, MBIT, assert_rate};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Latency, Way};
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::remote::Remote;

const STEADY_TOLERANCE: f64 = 0.05;
const FIRST_SECOND_TOLERANCE: f64 = 0.15;
/// The default burst: time at the rate, and the least number of packets (src/units.rs).
const BURST_SECONDS: f64 = 0.005;
const BURST_LEAST_BITS: f64 = 10.0 * 1500.0 * 8.0;
/// Retransmits on a busy machine, in some seconds: a calm machine has none. The bandwidth plugin has hundreds, and a
/// link whose machine stops for 10 ms drops dozens at 1 Gbit/s, limited or not.
const FEW: u64 = 20;
const FEW_AT_A_GBIT: u64 = 300;

/// Steady rate, first second and retransmits of bulk flows at a limit.
fn holds(rate: u64, bulk: Bulk) {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, rate);
    let what = format!("{} Mbit/s, {} flows of {:?}, IPv6 {}", rate / MBIT, bulk.flows, bulk.congestion, bulk.ipv6);
    let result = measure::bulk(&pod, &bulk).unwrap();
    let ahead = (rate as f64 * BURST_SECONDS).max(BURST_LEAST_BITS);
    let first_second = result.timeline.first_second();
    eprintln!("{what}: first second {:.2} Mbit/s, {} retransmits", first_second / 1e6, result.retransmits);
    assert_rate(&what, result.timeline.steady_rate(), rate, STEADY_TOLERANCE);
    let expected =
        rate as f64 * (1.0 - FIRST_SECOND_TOLERANCE - BUSY)..=rate as f64 * (1.0 + FIRST_SECOND_TOLERANCE) + ahead;
    assert!(
        expected.contains(&first_second),
        "{what}: {first_second:.0} bit/s in the first second, not {expected:.0?}"
    );
    let allowed = if rate > 100 * MBIT { FEW_AT_A_GBIT } else { FEW };
    assert!(result.retransmits <= allowed, "{what}: {} retransmits", result.retransmits);
}

fn flows(flows: usize) -> Bulk {
    Bulk { flows, seconds: 3.0, ..Bulk::default() }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn one_mbit_is_one_mbit() {
    holds(MBIT, flows(1));
    holds(MBIT, flows(8));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn ten_mbit_are_ten_mbit() {
    holds(10 * MBIT, flows(1));
    holds(10 * MBIT, flows(8));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_hundred_mbit_are_a_hundred_mbit() {
    holds(100 * MBIT, flows(1));
    holds(100 * MBIT, flows(8));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_gbit_is_a_gbit() {
    holds(GBIT, flows(1));
    holds(GBIT, flows(8));
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn every_congestion_control_is_paced() {
    for name in ["cubic", "reno", "bbr"] {
        holds(50 * MBIT, Bulk { congestion: Some(name.into()), ..flows(2) });
    }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn ipv6_is_paced_as_ipv4_is() {
    holds(100 * MBIT, Bulk { ipv6: true, ..flows(4) });
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn flows_share_the_limit_evenly() {
    let bed = Bed::new();
    for small_segments in [None, Some(500)] {
        let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
        let result = measure::bulk(&pod, &Bulk { flows: 8, seconds: 4.0, small_segments, ..Bulk::default() }).unwrap();
        let flows = &result.timeline.flows;
        eprintln!("half of the flows with segments of {small_segments:?}: {flows:?}");
        let [least, most] = [flows.iter().min(), flows.iter().max()].map(|payload| *payload.unwrap() as f64);
        assert!(
            most <= least * 2.0,
            "payload of 8 flows in 4 s, half of them with segments of {small_segments:?}: {flows:?}"
        );
    }
}

/// Windows that grew and shrank in proportion to their size kept the shares that they had: one of four flows had most
/// of the limit.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn flows_into_a_pod_share_the_limit_evenly() {
    const LIMIT: u64 = 100 * MBIT;
    const LEAST_JAIN: f64 = 0.93;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(LIMIT) });
    let timeline =
        measure::bulk(&pod, &Bulk { way: Way::In, flows: 4, seconds: 6.0, ..Bulk::default() }).unwrap().timeline;
    let (flows, jain) = (&timeline.flows, timeline.jain());
    eprintln!("Jain's index {jain:.3}: {flows:?}");
    assert!(jain >= LEAST_JAIN, "Jain's index {jain:.3} of the payload of 4 flows in 6 s: {flows:?}");
}

/// Once many flows have left the queue in which they began, each of them could be ahead of the limit by a packet:
/// together a quarter of a second.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn many_flows_have_the_limit_and_no_more() {
    const LIMIT: u64 = 10 * MBIT;
    const MOST: f64 = 1.04;
    let bed = Bed::new();
    for way in [Way::Out, Way::In] {
        let pod = bed.limited(Limits { egress: Some(LIMIT), ingress: Some(LIMIT) });
        let timeline =
            measure::bulk(&pod, &Bulk { way, flows: 128, seconds: 4.0, ..Bulk::default() }).unwrap().timeline;
        let part = timeline.steady_rate() / LIMIT as f64;
        eprintln!("{way:?}: {part:.3} of the limit, {:?}", timeline.each_second(4.0));
        // In User Mode Linux it takes seconds until so many flows reach the limit.
        assert!((0.3..=MOST).contains(&part), "{way:?}: {part:.3} of the limit");
    }
}

/// Each packet into a pod wakes up both ends, so windows must have room for large packets.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_gigabit_into_a_pod_comes_in_large_packets() {
    const LEAST_BYTES: f64 = 15_000.0;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(GBIT) });
    measure::bulk(&pod, &Bulk { way: Way::In, flows: 4, seconds: 3.0, ..Bulk::default() }).unwrap();
    let bytes = mean_packet_bytes(&pod, "rx");
    eprintln!("packets of {bytes:.0} bytes");
    assert!(bytes >= LEAST_BYTES, "packets of {bytes:.0} bytes");
}

/// The mean size of the packets that the pod's interface has sent (`tx`) or received (`rx`).
fn mean_packet_bytes(pod: &Pod, direction: &str) -> f64 {
    let link = pod.netns.run("ip", &["-json", "-stats", "link", "show", "dev", INTERFACE]).unwrap();
    let link: Value = serde_json::from_str(&link).unwrap();
    let count = |what: &str| link[0]["stats64"][direction][what].as_f64().unwrap();
    count("bytes") / count("packets")
}

/// Each packet costs a timer and a way through the stack, whatever its size: a hundred pods with a flow each and
/// packets of two segments cost four times the CPU time of large packets. Many flows build small packets, since each
/// flow waits for one packet of every other flow.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn few_flows_build_large_packets() {
    const SEGMENT_BYTES: f64 = 1500.0;
    let bed = Bed::new();
    for (congestion, limit, flows, allowed) in [
        ("cubic", 10 * MBIT, 1, 12.0..=18.0),
        ("cubic", 10 * MBIT, 8, 1.5..=3.5),
        // With a congestion window that does not open, packets stay at half of the window: ten segments.
        ("cubic", 500 * MBIT, 16, 20.0..=46.0),
        ("bbr", 10 * MBIT, 1, 10.0..=18.0),
        ("bbr", 10 * MBIT, 8, 1.5..=3.5),
    ] {
        let pod = bed.pod(Limiter::Podshaper, limit);
        let bulk = Bulk { flows, seconds: 3.0, congestion: Some(congestion.into()), ..Bulk::default() };
        measure::bulk(&pod, &bulk).unwrap();
        let segments = mean_packet_bytes(&pod, "tx") / SEGMENT_BYTES;
        let what = format!("{flows} flows of {congestion} at {limit} bit/s build packets of {segments:.2} segments");
        eprintln!("{what}");
        assert!(allowed.contains(&segments), "{what}");
    }
}

/// Low latency beside a full link is the purpose of podshaper. The bandwidth plugin is measured in the same minute,
/// and shows the latency of a queue.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_full_pod_answers_like_an_idle_one() {
    const LIMIT: u64 = 100 * MBIT;
    /// An idle pod has about 0.3 ms. Where the machine is busy, the idle pod is the reference.
    const MOST_P99_US: f64 = 2_000.0;
    const MOST_IDLE_P99S: f64 = 4.0;
    /// Replies must be at least this many times faster than behind a token bucket with a burst of 1 Mbit, where they
    /// wait 12 ms.
    const LEAST_GAIN: f64 = 10.0;
    let bed = Bed::new();
    let reply = |limiter| -> Latency {
        let pod = bed.pod(limiter, LIMIT);
        let bulk = Bulk { flows: 4, seconds: 3.0, ask: Some(measure::ask_pause(LIMIT)), ..Bulk::default() };
        measure::bulk(&pod, &bulk).unwrap().latency.unwrap()
    };
    let idle = measure::ask(&bed.pod(Limiter::Bare, 0), measure::Way::Out, 1.0, Duration::from_millis(1)).unwrap();
    let (ours, queue) = (reply(Limiter::Podshaper), reply(Limiter::Bandwidth));
    eprintln!("idle {idle:?}\npodshaper {ours:?}\nbandwidth {queue:?}");
    assert!(queue.p50_us > 5_000.0, "the bandwidth plugin makes no queue here: {queue:?}");
    assert!(ours.p99_us < MOST_P99_US.max(MOST_IDLE_P99S * idle.p99_us), "beside 4 bulk flows {ours:?}, idle {idle:?}");
    assert!(queue.p50_us > LEAST_GAIN * ours.p50_us, "podshaper {ours:?}, the bandwidth plugin {queue:?}");
}

/// Behind a link that is slower than the limit, flows have the rate of the link, as they have without a limit.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn behind_a_slower_link_flows_have_what_it_carries() {
    const LINK: u64 = 1_000 * MBIT;
    const LEAST_SHARE: f64 = 0.95;
    let bed = Bed::new();
    let rate = |limiter, limit| {
        let mut pod = bed.pod(limiter, limit);
        pod.remote = Some(Remote::behind_a_link(LINK, &pod).unwrap());
        let result = measure::bulk(&pod, &Bulk { flows: 2, seconds: 3.0, ..Bulk::default() }).unwrap();
        eprintln!("{limiter:?}: {} retransmits", result.retransmits);
        result.timeline.wire_rate(1.0, 3.0)
    };
    let (without, with) = (rate(Limiter::Bare, 0), rate(Limiter::Podshaper, 100 * GBIT));
    let text = format!("{:.1} Mbit/s of {:.1}", with / 1e6, without / 1e6);
    eprintln!("{text}");
    assert!(with >= LEAST_SHARE * without, "{text}");
}

/// A limit that nothing reaches has no cost that this machine can measure. With cubic, where only the CPUs are slower
/// than the limit, there is a cost (README, "Compared"): a CPU that empties the interface's queue also sends packets
/// that another CPU has put there, and tens of gigabits arrive out of order, which bbr tolerates.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_limit_above_the_link_leaves_it_alone() {
    const LEAST_SHARE: f64 = 0.8;
    let bed = Bed::new();
    // Side by side and in turns, since other load on the machine affects both. The best run of each shows its
    // capacity.
    let (bare, limited) = (bed.pod(Limiter::Bare, 0), bed.pod(Limiter::Podshaper, 100 * GBIT));
    let (mut rates, mut retransmits) = ([0.0f64; 2], [0; 2]);
    for _ in 0..3 {
        for (index, pod) in [&bare, &limited].into_iter().enumerate() {
            let bulk = Bulk { flows: 2, seconds: 1.2, congestion: Some("bbr".into()), ..Bulk::default() };
            let result = measure::bulk(pod, &bulk).unwrap();
            rates[index] = rates[index].max(result.timeline.wire_rate(0.2, 1.2));
            retransmits[index] += result.retransmits;
        }
    }
    let [without, with] = rates;
    let text =
        format!("{:.2} Gbit/s of {:.2}, retransmits without and with: {retransmits:?}", with / 1e9, without / 1e9);
    eprintln!("{text}");
    assert!(with >= LEAST_SHARE * without, "{text}");
    // A bare veth on a machine with two CPUs sometimes drops packets: thousands in one run, none in the next. Of 5
    // million segments.
    assert!(retransmits[1] <= 10 * retransmits[0] + 5_000, "{text}");
}
