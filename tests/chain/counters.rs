use super::{Bed, GBIT, MBIT};
use crate::harness::limiter::Limiter;
use crate::harness::measure::{self, Bulk, Udp, received};
use crate::harness::meter::{self, Counters};
use crate::harness::pod::Pod;

/// Packets that the pod's kernel sends by itself, which are not counted as the pod's: neighbour discovery and
/// multicast reports, about 80 bytes each.
const OF_THE_KERNEL_PACKETS: u64 = 30;
const OF_THE_KERNEL_BYTES: u64 = OF_THE_KERNEL_PACKETS * 90;

/// Sends bulk TCP and compares podshaper's counters with the bytes that the node's kernel received: they must be
/// equal, except for packets that belong to no socket.
fn agrees(bed: &Bed, pod: &Pod, what: &str, ipv6: bool) {
    let (before, received_before) = (meter::egress(pod).unwrap(), received(&bed.host).unwrap());
    measure::bulk(pod, &Bulk { flows: 3, seconds: 1.2, ipv6, ..Bulk::default() }).unwrap();
    let (after, received_after) = (meter::egress(pod).unwrap(), received(&bed.host).unwrap());
    let (bytes, packets) = (after.bytes - before.bytes, after.packets - before.packets);
    let (received_bytes, received_packets) =
        (received_after.0 - received_before.0, received_after.1 - received_before.1);
    let text = format!(
        "{what}, IPv6 {ipv6}: counted {bytes} bytes in {packets} packets, arrived {received_bytes} bytes in {received_packets} packets"
    );
    eprintln!("{text}: {}, {}", bytes as i64 - received_bytes as i64, packets as i64 - received_packets as i64);
    assert!(bytes > 1_000_000, "{text}");
    assert!(bytes <= received_bytes && received_bytes <= bytes + OF_THE_KERNEL_BYTES, "{text}");
    assert!(packets <= received_packets && received_packets <= packets + OF_THE_KERNEL_PACKETS, "{text}");
}

fn agrees_in_both_families(bed: &Bed, pod: &Pod, what: &str) {
    agrees(bed, pod, what, false);
    agrees(bed, pod, what, true);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn every_byte_of_tcp_is_counted() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 100 * MBIT);
    agrees_in_both_families(&bed, &pod, "100 Mbit/s");
    bed.set(&pod, "net.ipv4.tcp_timestamps", 0);
    agrees_in_both_families(&bed, &pod, "100 Mbit/s without timestamps");
}

/// At 1 Gbit/s most packets hold dozens of segments.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn every_byte_of_large_packets_is_counted() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, GBIT);
    agrees_in_both_families(&bed, &pod, "1 Gbit/s");
    bed.set(&pod, "net.ipv4.tcp_timestamps", 0);
    agrees_in_both_families(&bed, &pod, "1 Gbit/s without timestamps");
}

/// Without GSO, podshaper sees this pod as it sees a pod whose kernel has no offloads.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn every_byte_of_small_packets_is_counted() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 100 * MBIT);
    pod.netns.run("ip", &["link", "set", "eth0", "gso_max_segs", "1"]).unwrap();
    agrees_in_both_families(&bed, &pod, "100 Mbit/s without GSO");
}

/// UDP packets, given to the kernel one by one and, as QUIC does, many at once.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn every_byte_of_udp_is_counted() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 100 * MBIT);
    for (ipv6, wire_bytes) in [(false, 1428), (true, 1448)] {
        for at_once in [1, 10] {
            let before = meter::egress(&pod).unwrap();
            let udp = Udp { rate: 20 * MBIT, seconds: 1.0, ipv6, at_once, ..Udp::default() };
            let result = measure::udp(&pod, &udp).unwrap();
            let after = meter::egress(&pod).unwrap();
            let (bytes, packets) = (after.bytes - before.bytes, after.packets - before.packets);
            let text = format!("IPv6 {ipv6}, {at_once} at once: {} packets sent, {packets} counted", result.sent);
            assert_eq!((packets, bytes), (result.sent, result.sent * wire_bytes), "{text}");
            let last = *result.timeline.wire_bytes.last().unwrap();
            assert!(last > 0 && last <= bytes, "{text}, {last} bytes of {bytes} arrived");
            let Counters { drops, marks, .. } = after;
            assert_eq!((drops, marks), (0, 0), "{text}");
        }
    }
}
