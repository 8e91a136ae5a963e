use serde_json::json;

use super::{Bed, MBIT};
use crate::harness::limiter::Limits;
use crate::harness::measure::{self, Bulk, Way};
use crate::harness::meter;
use crate::harness::pod::Pod;

const LIMIT: u64 = 10 * MBIT;
/// A rate above this is not limited: it is 30 times the limit. User Mode Linux reaches 1 to 4 Gbit/s, depending on
/// the machine's other load.
const FREE_BITS_PER_S: f64 = 3e8;
/// The node's addresses are in 10.213.0.0/24 and fd00:213::/64.
const LISTED: &str = "10.213.0.0/16";

fn rate(pod: &Pod, way: Way, ipv6: bool) -> f64 {
    let bulk = Bulk { way, ipv6, flows: 2, seconds: 1.5, ..Bulk::default() };
    measure::bulk(pod, &bulk).unwrap().timeline.payload_rate(0.3, 1.5)
}

/// Traffic of a pod with these keys. `free` says for each family (IPv4, IPv6) whether it is exempt in the directions
/// that are limited.
fn assert_free(keys: serde_json::Value, limits: Limits, free: [bool; 2]) {
    let bed = Bed::new();
    let pod = bed.pod_of(bed.host.bridge_chain().unwrap(), keys.clone(), limits);
    for (way, limited) in [(Way::Out, limits.egress), (Way::In, limits.ingress)] {
        for (ipv6, free) in [false, true].into_iter().zip(free) {
            let rate = rate(&pod, way, ipv6);
            let what = format!("{way:?}, IPv6 {ipv6}, {keys}: {:.1} Mbit/s", rate / 1e6);
            eprintln!("{what}");
            match limited {
                Some(limit) if !free => assert!(rate < limit as f64 * 1.05, "{what}, not limited"),
                _ => assert!(rate > FREE_BITS_PER_S, "{what}, limited"),
            }
        }
    }
    let (before, tested) = (meter::egress(&pod).unwrap().packets, rate(&pod, Way::Out, free[1]));
    assert_eq!(meter::egress(&pod).unwrap().packets, before, "exempt traffic at {tested} bit/s is counted");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn exempt_subnets_are_neither_limited_nor_counted_and_all_else_is() {
    let egress = Limits { egress: Some(LIMIT), ingress: None };
    assert_free(json!({ "exemptSubnets": [LISTED] }), egress, [true, false]);
    let both = Limits { egress: Some(LIMIT), ingress: Some(LIMIT) };
    assert_free(json!({ "exemptSubnets": ["fd00::/8"] }), both, [false, true]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn with_shaped_subnets_all_else_is_exempt_and_the_longest_prefix_counts() {
    let egress = Limits { egress: Some(LIMIT), ingress: None };
    assert_free(json!({ "shapedSubnets": [LISTED] }), egress, [false, true]);
    let both = json!({ "shapedSubnets": ["10.0.0.0/8", "::/0"], "exemptSubnets": [LISTED] });
    assert_free(both, egress, [true, false]);
}

/// An ADD of a pod with thousands of listed subnets, before and after the subnet that counts.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn thousands_of_subnets_are_listed_quickly() {
    /// Measured: 14 ms more, in a release build on a calm machine; 340 ms in total in User Mode Linux. A busy machine
    /// takes longer.
    const MOST_MS: f64 = 2_000.0;
    let subnets: Vec<String> = (0..5_000).map(|i| format!("172.{}.{}.0/24", 16 + i / 256, i % 256)).collect();
    let bed = Bed::new();
    let keys = json!({ "shapedSubnets": subnets, "exemptSubnets": ["192.0.2.0/24"] });
    let pod = bed.pod_of(bed.host.bridge_chain().unwrap(), keys, Limits { egress: Some(LIMIT), ingress: None });
    let elapsed_ms = pod.last_call("podshaper", "ADD").unwrap().elapsed.as_secs_f64() * 1e3;
    eprintln!("ADD with {} subnets: {elapsed_ms:.1} ms", subnets.len());
    assert!(elapsed_ms < MOST_MS, "{elapsed_ms} ms");
    let rate = rate(&pod, Way::Out, false);
    assert!(rate > FREE_BITS_PER_S, "{rate} bit/s to a subnet that is not listed");
}
