use std::thread;
use std::time::Duration;

use super::{BUSY, Bed, MBIT, assert_each_second, assert_rate, has_fq};
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Chatter, Udp, Way};
use crate::harness::meter;

const TOLERANCE: f64 = 0.08;
/// The horizon: packets beyond it are dropped, whatever the backlog of a flow may be.
const HORIZON_NS: u64 = 2_000_000_000;

/// Data that the pod sends on a download's connection carries the newest acknowledgement, so podshaper cannot hold
/// that acknowledgement.
fn assert_held_beside(chatter: Chatter, flows: usize) {
    const LIMIT: u64 = 10 * MBIT;
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: None, ingress: Some(LIMIT) });
    let bulk = Bulk { way: Way::In, flows, chatter: Some(chatter), ..Bulk::default() };
    let result = measure::bulk(&pod, &bulk).unwrap();
    let counters = meter::ingress(&pod).unwrap();
    let what = format!("{flows} flows in, {chatter:?} against them");
    eprintln!("{what}: {counters:?}, late {:?}, {} retransmits", result.chatter, result.retransmits);
    assert_each_second(&what, &result.timeline, bulk.seconds, LIMIT);
    assert_eq!(counters.drops, 0, "{what}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn downloads_are_held_on_connections_that_say_a_byte_each_millisecond() {
    let chatter = Chatter { bytes: 1, every: Duration::from_millis(1) };
    assert_held_beside(chatter, 1);
    assert_held_beside(chatter, 8);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn downloads_are_held_on_connections_that_say_a_hundred_bytes_now_and_then() {
    let chatter = Chatter { bytes: 100, every: Duration::from_millis(10) };
    assert_held_beside(chatter, 1);
    assert_held_beside(chatter, 8);
}

/// More flows than the rate has packets in two seconds: no flow is refused, they take turns.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn hundreds_of_flows_at_a_mbit_are_refused_nothing() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, MBIT);
    let result = measure::bulk(&pod, &Bulk { flows: 300, seconds: 10.0, ..Bulk::default() }).unwrap();
    let counters = meter::egress(&pod).unwrap();
    let what = format!("300 flows, {} retransmits, {counters:?}", result.retransmits);
    assert_rate(&what, result.timeline.steady_rate(), MBIT, TOLERANCE);
    assert_eq!(counters.drops, 0, "{what}");
}

/// One packet takes seconds at such limits.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn one_flow_at_some_kbit_is_refused_nothing() {
    const SECONDS: f64 = 12.0;
    const PACKET_BITS: f64 = 1500.0 * 8.0;
    /// The burst may be this many packets at such a rate: they leave at once.
    const MOST_AT_ONCE: f64 = 12.0;
    for rate in [8_000, 5_000] {
        let bed = Bed::new();
        let pod = bed.pod(Limiter::Podshaper, rate);
        let result = measure::bulk(&pod, &Bulk { seconds: SECONDS, ..Bulk::default() }).unwrap();
        let counters = meter::egress(&pod).unwrap();
        let bits = *result.timeline.wire_bytes.last().unwrap() as f64 * 8.0;
        let due = rate as f64 * SECONDS;
        let what =
            format!("{bits} bits in {SECONDS} s at {rate} bit/s, {} retransmits, {counters:?}", result.retransmits);
        eprintln!("{what}");
        let allowed = due * (1.0 - BUSY) - PACKET_BITS..=due + MOST_AT_ONCE * PACKET_BITS;
        assert!(allowed.contains(&bits), "{what}");
        assert_eq!(counters.drops, 0, "{what}");
    }
}

/// A flow's share is a share of the wire: a packet with one byte of payload is nearly all headers.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_flow_of_tiny_segments_has_its_share_of_the_wire_and_no_more() {
    const LIMIT: u64 = 10 * MBIT;
    const BULK_FLOWS: usize = 8;
    const WIRE_OF_PAYLOAD: f64 = 1500.0 / 1448.0;
    /// As a multiple of an even share.
    const MOST: f64 = 2.0;
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, LIMIT);
    let tiny = Bulk { message_bytes: Some(1), ..Bulk::default() };
    let (bulk, tiny) = thread::scope(|scope| {
        let tiny = scope.spawn(|| measure::bulk(&pod, &tiny).unwrap());
        let bulk = measure::bulk(&pod, &Bulk { flows: BULK_FLOWS, ..Bulk::default() }).unwrap();
        (bulk, tiny.join().unwrap())
    });
    let wire = bulk.timeline.wire_rate(1.0, 4.5);
    let of_bulk = bulk.timeline.payload_rate(1.0, 4.5) * WIRE_OF_PAYLOAD;
    let share = (wire - of_bulk) / wire;
    let even = 1.0 / (BULK_FLOWS + 1) as f64;
    let text = format!(
        "{share:.3} of {:.2} Mbit/s to the flow of 1-byte segments, which had {:.0} bytes/s; an even share is {even:.3}",
        wire / 1e6,
        tiny.timeline.payload_rate(1.0, 4.5) / 8.0
    );
    eprintln!("{text}");
    assert_rate("all of them", wire, LIMIT, TOLERANCE);
    assert!(share <= MOST * even, "{text}");
}

/// UDP senders without end stay well below the horizon, beyond which the packets of others would be dropped.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn udp_without_end_leaves_room_below_the_horizon() {
    const RATE: u64 = MBIT;
    const SENDERS: usize = 3;
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, RATE);
    let options = Udp { rate: 20 * RATE, seconds: 6.0, ..Udp::default() };
    thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS).map(|_| scope.spawn(|| measure::udp(&pod, &options).unwrap())).collect();
        senders.into_iter().for_each(|sender| drop(sender.join().unwrap()));
    });
    let counters = meter::egress(&pod).unwrap();
    eprintln!("{SENDERS} senders, fq {}: {counters:?}", has_fq(&pod));
    assert!(counters.max_backlog_ns < HORIZON_NS * 3 / 4, "{counters:?}");
}

/// Packets of sparse flows have their turn at once, however many other flows there are.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn replies_beside_very_many_flows_do_not_wait_for_them() {
    const LIMIT: u64 = 10 * MBIT;
    const MOST_P50_US: f64 = 3_000.0;
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, LIMIT);
    let bulk = Bulk { flows: 128, ask: Some(measure::ask_pause(LIMIT)), ..Bulk::default() };
    let result = measure::bulk(&pod, &bulk).unwrap();
    let latency = result.latency.unwrap();
    eprintln!("beside 128 flows: {latency:?}, {:?}", meter::egress(&pod).unwrap());
    assert_rate("128 flows", result.timeline.steady_rate(), LIMIT, TOLERANCE);
    assert!(latency.p50_us < MOST_P50_US, "beside 128 flows: {latency:?}");
}
