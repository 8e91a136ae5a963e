use std::net::{IpAddr, Ipv4Addr};
use std::thread;

use serde_json::json;

use super::{Attachment, Bed, MBIT, assert_rate};
use crate::harness::cni::Cni;
use crate::harness::limiter::{Limiter, Limits};
use crate::harness::measure::{self, Bulk, Way};
use crate::harness::meter;
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::podshaper_program;

/// A rate above this is not limited: it is 10 times the largest limit here. User Mode Linux reaches 1 to 4 Gbit/s,
/// depending on the machine's other load.
const FREE_BITS_PER_S: f64 = 3e8;
const SECOND_INTERFACE: &str = "net1";
const SECOND_NODE: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 1);

fn wire_rate(pod: &Pod, way: Way, to: Option<IpAddr>) -> f64 {
    let bulk = Bulk { way, to, flows: 2, seconds: 1.5, ..Bulk::default() };
    measure::bulk(pod, &bulk).unwrap().timeline.wire_rate(0.3, 1.5)
}

#[track_caller]
fn assert_free(what: &str, bits_per_s: f64) {
    eprintln!("{what}: {:.2} Gbit/s", bits_per_s / 1e9);
    assert!(bits_per_s > FREE_BITS_PER_S, "{what}: {:.1} Mbit/s", bits_per_s / 1e6);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_a_pod_sends_to_itself_is_neither_limited_nor_counted() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    assert_free("over 127.0.0.1", wire_rate(&pod, Way::Within, None));
    // The kernel routes packets to the pod's own address on eth0 over the loopback as well.
    for address in pod.addresses() {
        assert_free("to its own address", wire_rate(&pod, Way::Within, Some(address)));
    }
    let counters = meter::egress(&pod).unwrap();
    assert_eq!((counters.bytes, counters.packets, counters.drops), (0, 0, 0));
}

/// kube-proxy and portmap translate addresses (NodePort, hostPort, a service's address) by such rules.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_comes_and_goes_by_a_translated_address_has_the_rate_and_is_answered_at_once() {
    const LIMIT: u64 = 20 * MBIT;
    const SERVICE: &str = "10.96.0.1";
    let bed = Bed::new();
    let pod = bed.limited(Limits { egress: Some(LIMIT), ingress: Some(LIMIT) });
    let address = pod.addresses().into_iter().find(IpAddr::is_ipv4).unwrap().to_string();
    let gateway = bed.host.gateway_v4().to_string();
    for (chain, behind) in [("OUTPUT", &address), ("PREROUTING", &gateway)] {
        let rule = ["--append", chain, "--destination", SERVICE, "--jump", "DNAT", "--to-destination", behind];
        bed.host.netns.run("iptables", &[&["--wait", "--table", "nat"], &rule[..]].concat()).unwrap();
    }
    // The kernel looks for a route before it translates the address.
    for (netns, via) in [(&bed.host.netns, &address), (&pod.netns, &gateway)] {
        netns.run("ip", &["route", "add", SERVICE, "via", via]).unwrap();
    }
    for way in [Way::In, Way::Out] {
        let ask = Some(measure::ask_pause(LIMIT));
        let by = Some(SERVICE.parse().unwrap());
        let bulk = Bulk { way, flows: 4, seconds: 4.0, ask, by, ..Bulk::default() };
        let result = measure::bulk(&pod, &bulk).unwrap();
        assert_rate(&format!("{way:?} by {SERVICE}"), result.timeline.steady_rate(), LIMIT, 0.05);
        let p50_us = result.latency.unwrap().p50_us;
        eprintln!("{way:?} by {SERVICE}: replies in {p50_us} us");
        assert!(p50_us < 6_000.0, "{way:?}: replies in {p50_us} us");
    }
}

/// Gives the pod an interface that podshaper does not know.
fn link_second(pod: &Pod) {
    let node = &pod.host.netns;
    let peer = ["link", "add", "second", "type", "veth", "peer", SECOND_INTERFACE, "netns", pod.netns.name()];
    node.run("ip", &peer).unwrap();
    for (netns, interface, address) in
        [(node, "second", "10.214.0.1/24"), (&pod.netns, SECOND_INTERFACE, "10.214.0.2/24")]
    {
        netns.run("ip", &["addr", "add", address, "dev", interface]).unwrap();
        netns.run("ip", &["link", "set", interface, "up"]).unwrap();
    }
}

/// Limits that interface in a network of its own, as Multus calls podshaper.
fn limit_second(pod: &Pod, rate: u64) -> Attachment {
    Attachment::add(call_alone(pod, rate).env("CNI_IFNAME", SECOND_INTERFACE))
}

/// An ADD of podshaper without a network plugin before it.
pub fn call_alone(pod: &Pod, rate: u64) -> Cni {
    let config = json!({
        "cniVersion": "1.0.0", "name": "second", "type": "podshaper",
        "runtimeConfig": { "bandwidth": { "egressRate": rate }, "cgroupPath": pod.offers["cgroupPath"] },
        "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": "10.214.0.2/24" }] },
    });
    pod.environment(Cni::new(podshaper_program().unwrap(), "ADD").stdin(config.to_string()))
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_limit_is_for_one_interface() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 10 * MBIT);
    link_second(&pod);
    let to_second = Some(SECOND_NODE.into());
    assert_free("net1 beside a limit of eth0", wire_rate(&pod, Way::Out, to_second));
    assert_eq!(meter::egress(&pod).unwrap().packets, 0, "eth0 counts what leaves by net1");

    let _second = limit_second(&pod, 30 * MBIT);
    assert_rate("net1", wire_rate(&pod, Way::Out, to_second), 30 * MBIT, 0.05);
    assert_eq!(meter::egress(&pod).unwrap().packets, 0, "eth0 counts what leaves by net1");
    let counted = meter::egress_by(&pod, SECOND_INTERFACE).unwrap();
    assert_rate("eth0", wire_rate(&pod, Way::Out, None), 10 * MBIT, 0.05);
    let after = meter::egress_by(&pod, SECOND_INTERFACE).unwrap();
    assert_eq!(after.packets, counted.packets, "net1 counts what leaves by eth0");

    // Both at once, as in one pod.
    let (first, second) = thread::scope(|scope| {
        let second = scope.spawn(|| wire_rate(&pod, Way::Out, to_second));
        (wire_rate(&pod, Way::Out, None), second.join().unwrap())
    });
    // The node's counters see the sum, whichever sink reads them.
    assert_rate("eth0 and net1", first, 40 * MBIT, 0.1);
    assert_rate("net1 and eth0", second, 40 * MBIT, 0.1);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_limit_of_a_second_interface_leaves_the_first_alone() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Bare, 0);
    link_second(&pod);
    let _second = limit_second(&pod, 10 * MBIT);
    assert_free("eth0 beside a limit of net1", wire_rate(&pod, Way::Out, None));
    assert_rate("net1", wire_rate(&pod, Way::Out, Some(SECOND_NODE.into())), 10 * MBIT, 0.05);
    assert!(!meter::directory(&pod, INTERFACE).exists());
}

/// podshaper changes kernel settings of the pod only. Without this setting, packets of 64 KiB leave at any rate
/// (since Linux 5.18).
#[test]
#[ignore = "needs root and the CNI plugins"]
fn large_packets_are_turned_off_in_the_pod_and_nowhere_else() {
    const KEY: &str = "net.ipv4.tcp_tso_rtt_log";
    let bed = Bed::new();
    let read = |pod: &Pod| {
        [&bed.host.netns, &pod.netns].map(|netns| {
            // -e: a kernel without the key prints nothing, and the ADD must succeed nevertheless.
            netns.run("sysctl", &["-n", "-e", KEY]).unwrap().trim().to_owned()
        })
    };
    let [node_before, bare] = read(&bed.pod(Limiter::Bare, 0));
    let [node, limited] = read(&bed.pod(Limiter::Podshaper, 10 * MBIT));
    assert_eq!((&node, &bare), (&node_before, &node_before));
    assert_eq!(limited, if node.is_empty() { "" } else { "0" });
}

/// The first receive window of a connection is small where the traffic is limited, and unchanged where the remote is
/// exempt or is the pod itself. Where podshaper does not hold acknowledgements, it sets no window.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_first_window_is_limited_where_the_limit_is() {
    /// A first window of at least this size is not limited.
    const FREE_BYTES: u64 = 20_000;
    let bed = Bed::new();
    let window = |keys, way| {
        let limits = Limits { egress: None, ingress: Some(MBIT) };
        let pod = bed.pod_of(bed.host.bridge_chain().unwrap(), keys, limits);
        measure::first_window(&pod, way).unwrap()
    };
    for (keys, way, is_limited) in [
        (json!({}), Way::In, true),
        (json!({}), Way::Out, true),
        (json!({}), Way::Within, false),
        (json!({ "exemptSubnets": ["10.213.0.0/16"] }), Way::In, false),
        (json!({ "exemptSubnets": ["10.213.0.0/16"] }), Way::Out, false),
        (json!({ "exemptSubnets": ["10.0.0.0/16"] }), Way::In, true),
    ] {
        let what = format!("{way:?}, {keys}");
        let bytes = window(keys, way);
        eprintln!("{what}: {bytes} bytes");
        assert_eq!(bytes < FREE_BYTES, is_limited, "{what}: {bytes} bytes");
    }
}
