use super::{Bed, MBIT, assert_each_second, assert_rate};
use crate::harness::limiter::Limiter;
use crate::harness::measure::{self, Bulk};
use crate::harness::meter;

const TOLERANCE: f64 = 0.05;
/// An MPTCP flow that nothing paces begins with two thirds more than its limit.
const FIRST_SECOND_TOLERANCE: f64 = 0.15;

/// The options of MPTCP fill all the space that TCP has for options, so programs that ask to be called for a part of
/// that space are not called.
fn assert_paced(rate: u64, flows: usize) {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, rate);
    let bulk = Bulk { flows, mptcp: true, ask: Some(measure::ask_pause(rate)), ..Bulk::default() };
    let result = measure::bulk(&pod, &bulk).unwrap();
    let what = format!("{flows} flows of MPTCP at {} Mbit/s, {} retransmits", rate / MBIT, result.retransmits);
    eprintln!("{what}: replies beside {:?}", result.latency);
    assert_each_second(&what, &result.timeline, bulk.seconds, rate);
    assert_rate(&what, result.timeline.steady_rate(), rate, TOLERANCE);
    assert_rate(&format!("{what}, at first"), result.timeline.first_second(), rate, FIRST_SECOND_TOLERANCE);
    assert_eq!(meter::egress(&pod).unwrap().drops, 0, "{what}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn one_flow_is_paced_as_tcp_is() {
    assert_paced(10 * MBIT, 1);
    assert_paced(100 * MBIT, 1);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn four_flows_are_paced_as_tcp_is() {
    assert_paced(10 * MBIT, 4);
    assert_paced(100 * MBIT, 4);
}
