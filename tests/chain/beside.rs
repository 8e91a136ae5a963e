use std::time::Duration;

use super::{Bed, MBIT};
use crate::harness::beside::{self, Calls, Flows, Names};
use crate::harness::limiter::Limits;
use crate::harness::measure::Way;

const RATE: u64 = 10 * MBIT;
const LIMITS: Limits = Limits { egress: Some(RATE), ingress: Some(RATE) };
/// Bulk flows each way. A packet of each flow takes 10 ms of the link in total.
const FLOWS: Flows = Flows { out: 8, into: 8 };

/// The audio of a call is a packet every 20 ms, both ways.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn calls_beside_bulk_flows_are_neither_lost_nor_late() {
    const MOST_JITTER_US: f64 = 5_000.0;
    // A tenth of the delay that the queue of a token bucket causes at this rate.
    const MOST_P99_US: f64 = 12_000.0;
    for way in [Way::Out, Way::In] {
        let bed = Bed::new();
        let pod = bed.limited(LIMITS);
        let result = beside::calls(&pod, &Calls { way, calls: 1, beside: FLOWS, seconds: 4.0 }).unwrap();
        let text = format!("{way:?}: {result:?}");
        eprintln!("{text}");
        for streams in [result.out, result.into] {
            assert!(streams.sent > 150 && streams.lost == 0, "{text}");
            assert!(streams.delay.p99_us < MOST_P99_US && streams.jitter_us < MOST_JITTER_US, "{text}");
        }
    }
}

/// A resolver waits five seconds before it asks again, so a lost packet is expensive.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn names_are_answered_at_once_beside_bulk_flows() {
    const MOST_P50_US: f64 = 5_000.0;
    // A quarter of the delay that the queue of a token bucket causes at this rate. User Mode Linux, with all of these
    // flows on one CPU, takes up to 10 ms.
    const MOST_P99_US: f64 = 20_000.0;
    const EACH: Duration = Duration::from_millis(10);
    for way in [Way::Out, Way::In] {
        let bed = Bed::new();
        let pod = bed.limited(LIMITS);
        let result = beside::names(&pod, &Names { way, pause: EACH, beside: FLOWS, seconds: 4.0 }).unwrap();
        let (text, answers) = (format!("{way:?}: {result:?}"), result.answers);
        eprintln!("{text}");
        assert!(answers.count > 100 && answers.lost == 0, "{text}");
        assert!(answers.p50_us < MOST_P50_US && answers.p99_us < MOST_P99_US, "{text}");
    }
}
