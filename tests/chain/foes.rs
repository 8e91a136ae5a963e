use std::time::Duration;

use serde_json::Value;

use super::{Bed, MBIT, assert_each_second, assert_rate, has_fq, has_queue, move_away};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Udp, Way};
use crate::harness::meter;
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::process::Running;
use crate::harness::traffic_program;

/// Applications may pace themselves. The lower of the two rates is in force.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_applications_own_lower_rate_holds() {
    const OWN_BYTES_PER_S: u64 = 1_000_000;
    const OWN: u64 = OWN_BYTES_PER_S * 8;
    let bed = Bed::new();
    for limiter in [Limiter::Bare, Limiter::Podshaper] {
        let pod = bed.pod(limiter, 100 * MBIT);
        let bulk = Bulk { max_pacing_rate: Some(OWN_BYTES_PER_S), seconds: 2.5, ..Bulk::default() };
        let connected = measure::bulk(&pod, &bulk).unwrap().timeline;
        assert_rate(&format!("{limiter:?}, set before connect()"), connected.payload_rate(1.0, 2.5), OWN, 0.05);
        let accepted = measure::served(&pod, OWN_BYTES_PER_S, 2.5).unwrap();
        assert_rate(&format!("{limiter:?}, inherited from listen()"), accepted.payload_rate(1.0, 2.5), OWN, 0.05);
    }
}

/// A remote of which the pod knows need not complete a connection to send: its segments pass before the pod's sockets
/// see them, and a process with CAP_NET_RAW reads them.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_comes_for_a_connection_that_never_opens_is_held() {
    const RATE: u64 = 10 * MBIT;
    const SECONDS: f64 = 3.0;
    // Such packets and the others have the limit each, with fq.
    const MOST: f64 = 1.1;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(RATE) });
    let came =
        measure::watched(&pod.netns, INTERFACE, SECONDS, || measure::segments_of_a_request(&pod, SECONDS)).unwrap();
    let part = came.wire_rate(1.0, SECONDS) / RATE as f64;
    eprintln!("{part:.3} of the limit");
    // Too little would mean that the connection was refused.
    assert!((0.5..=MOST).contains(&part), "{part:.3} of the limit");
}

/// Applications may limit their receive window. The smaller of the two windows is in force.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_applications_own_window_clamp_holds() {
    const OWN_BYTES: u32 = 8192;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(100 * MBIT) });
    let bulk = Bulk { way: Way::In, window_clamp: Some(OWN_BYTES), seconds: 2.0, ..Bulk::default() };
    // The receiving end fails where another clamp is in force.
    let rate = measure::bulk(&pod, &bulk).unwrap().timeline.steady_rate();
    assert!((1e6..105e6).contains(&rate), "{rate} bit/s");
}

/// Applications may limit their receive buffer (SO_RCVBUF): here to 32 KiB at most in 20 ms.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_applications_own_receive_buffer_holds() {
    const OWN_BYTES: usize = 16 << 10;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(100 * MBIT) });
    let is_far = has_fq(&pod);
    if is_far {
        move_away(&pod);
    }
    let [limited, own] = [None, Some(OWN_BYTES)].map(|receive_buffer| {
        let bulk = Bulk { way: Way::In, receive_buffer, seconds: 4.0, ..Bulk::default() };
        measure::bulk(&pod, &bulk).unwrap().timeline.wire_rate(2.0, 4.0) / 1e6
    });
    let what = format!("{limited:.1} Mbit/s of 100, {own:.1} with a receive buffer of {OWN_BYTES} bytes");
    eprintln!("{what}");
    // On a short path any buffer has room for 100 Mbit/s.
    assert!(!is_far || (limited > 60.0 && own < 20.0), "{what}");
    assert!(own > 1.0 && own < 108.0, "{what}");
}

/// Applications may set the departure time of a packet (SO_TXTIME). The later of the two times is in force. Only fq
/// reads the application's time.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_applications_own_departure_times_hold() {
    const AFTER: Duration = Duration::from_millis(600);
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    let [at_once, later] = [None, Some(AFTER)].map(|after| measure::departs(&pod, after).unwrap());
    let what = format!("a packet left after {at_once:?}, and one with a departure time after {later:?}");
    eprintln!("{what}");
    assert!(at_once < AFTER, "{what}");
    assert_eq!(later >= AFTER, has_fq(&pod), "{what}");
}

/// An application can forbid pacing for one segment at a time only: podshaper then sets the pacing rate of the socket
/// again, and the clock counts that segment.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_application_that_forbids_pacing_is_limited() {
    /// Many times the backlog of a few flows that do not resist.
    const MOST_BACKLOG_NS: u64 = 300_000_000;
    for (rate, flows, pause_ms) in [(10 * MBIT, 1, 10), (100 * MBIT, 4, 10), (100 * MBIT, 4, 0)] {
        let bed = Bed::new();
        let pod = bed.pod(Limiter::Podshaper, rate);
        let bulk = Bulk { unpace_every: Some(Duration::from_millis(pause_ms)), flows, seconds: 3.0, ..Bulk::default() };
        let result = measure::bulk(&pod, &bulk).unwrap();
        let what = format!("{flows} flows, SO_MAX_PACING_RATE every {pause_ms} ms, {} retransmits", result.retransmits);
        assert_rate(&what, result.timeline.steady_rate(), rate, 0.10);
        // The horizon alone would hold the rate as well, but by drops, and only after two seconds without a limit.
        let counters = meter::egress(&pod).unwrap();
        assert!(counters.drops == 0 && counters.max_backlog_ns < MOST_BACKLOG_NS, "{what}: {counters:?}");
    }
}

/// A new socket is a sparse flow. All sparse flows that are not TCP share a quarter of the rate ahead of the backlog,
/// so a pod of nothing but new sockets gains nothing: packets above that share wait or are dropped, as if they came
/// from one socket.
///
/// With fq these packets wait, and since such a sender never fills a socket buffer, they wait up to the horizon.
/// Sparse packets that left before them in that time came on top of the rate: an additional quarter, until the first
/// of the waiting packets have left.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_socket_for_each_packet_gets_no_more_than_one_for_all() {
    const RATE: u64 = 10 * MBIT;
    const HORIZON_SECONDS: f64 = 2.0;
    const MOST_AT_FIRST: f64 = 1.25;
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, RATE);
    let (from, most_backlog_ms) =
        if has_queue(&pod) { (HORIZON_SECONDS + 1.0, HORIZON_SECONDS * 1e3) } else { (1.0, 400.0) };
    let udp = Udp { rate: 4 * RATE, seconds: from + 2.0, fresh_sockets: true, ..Udp::default() };
    let result = measure::udp(&pod, &udp).unwrap();
    let backlog_ms = meter::egress(&pod).unwrap().max_backlog_ns as f64 / 1e6;
    eprintln!("first second {:.2} Mbit/s, backlog {backlog_ms:.1} ms", result.timeline.first_second() / 1e6);
    assert!(result.errors.is_empty(), "{:?}", result.errors);
    assert_rate("UDP from new sockets", result.timeline.wire_rate(from, f64::INFINITY), RATE, 0.05);
    let first_second = result.timeline.first_second();
    assert!(first_second < RATE as f64 * MOST_AT_FIRST, "{first_second:.0} bit/s at first");
    assert!(backlog_ms <= most_backlog_ms + 10.0, "a backlog of {backlog_ms} ms");
}

/// TCP, then UDP at four times the limit, out of a pod that may change anything in its namespace.
#[track_caller]
fn assert_sends_the_limit(what: &str, pod: &Pod, rate: u64, mark: Option<u32>) {
    const SECONDS: f64 = 3.0;
    let tcp = measure::bulk(pod, &Bulk { flows: 4, seconds: SECONDS, mark, ..Bulk::default() }).unwrap();
    assert_each_second(&format!("{what}, TCP"), &tcp.timeline, SECONDS, rate);
    let udp = Udp { rate: 4 * rate, seconds: SECONDS, mark, ..Udp::default() };
    let udp = measure::udp(pod, &udp).unwrap();
    assert_each_second(&format!("{what}, UDP"), &udp.timeline, SECONDS, rate);
}

/// Without a queue in the pod, packets wait at their sender's socket or at the host end. The limit holds
/// nevertheless.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_pod_that_takes_its_queue_off_is_held() {
    for rate in [10 * MBIT, 100 * MBIT] {
        let bed = Bed::new();
        let pod = bed.pod(Limiter::Podshaper, rate);
        if has_queue(&pod) {
            pod.netns.run("tc", &["qdisc", "del", "dev", INTERFACE, "root"]).unwrap();
        }
        assert!(!has_queue(&pod));
        assert_sends_the_limit(&format!("without a queue, {} Mbit/s", rate / MBIT), &pod, rate, None);
    }
}

/// The host end recognises packets that have waited by a mark (`bpf/src/other_paths.rs`). A pod may write that mark
/// on its packets as well.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_pod_that_marks_its_packets_is_held() {
    const RATE: u64 = 20 * MBIT;
    /// `IS_BACK`, `IS_BACK_TO_BE_CHARGED`, `IS_REQUEST_BACK`.
    const BACK: [u32; 3] = [0x7064_6261, 0x7064_6262, 0x7064_6263];
    /// An interface to which packets go back: out of the pod, and with `INTO_POD`.
    const PLACES: [u32; 2] = [2, 1 << 31 | 2];
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, RATE);
    for mark in BACK.into_iter().chain(PLACES) {
        assert_sends_the_limit(&format!("marked {mark:#x}"), &pod, RATE, Some(mark));
    }
}

/// Programs at the setsockopt() hook see one page of an option. An option of two pages must reach the kernel as if
/// these programs were not there: iptables in a pod (a service mesh's init container) sets such options. Linux 6.5
/// and later tolerates programs that do not take care of this (29ebbba7d461), so this test can only fail on earlier
/// kernels.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn an_option_longer_than_a_page_is_as_without_podshaper() {
    let bed = Bed::new();
    let set = |pod: &Pod| -> Value {
        let mut command = pod.command(traffic_program().unwrap()).unwrap();
        command.args(["sources", "--interface", &pod.addresses()[0].to_string()]);
        Running::start(&mut command).unwrap().json(Duration::from_secs(10)).unwrap()
    };
    for most_sources in [10, 10_000] {
        let answers = [Limiter::Bare, Limiter::Podshaper].map(|limiter| {
            let pod = bed.pod(limiter, 10 * MBIT);
            pod.netns.run("sysctl", &["-q", &format!("net.ipv4.igmp_max_msf={most_sources}")]).unwrap();
            set(&pod)
        });
        eprintln!("{answers:?}");
        assert_eq!(answers[0], answers[1], "without podshaper, with it");
        assert!(answers[0]["bytes"].as_u64().unwrap() > 4096);
        let (error, kept) = if most_sources == 10 { (Value::from("ENOBUFS"), 0) } else { (Value::Null, 2_000) };
        assert_eq!((&answers[0]["error"], answers[0]["kept"].as_u64()), (&error, Some(kept)));
    }
}
