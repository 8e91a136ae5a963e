use std::mem;
use std::net::IpAddr;
use std::process::Command;
use std::thread;

use serde_json::json;

use super::{Bed, MBIT, assert_rate, has_fq};
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::limiter::Limits;
use crate::harness::measure::{self, Bulk, Timeline, Udp, Way};
use crate::harness::meter;
use crate::harness::netns::Netns;
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::{podshaper_program, process, unique};

const SECONDS: f64 = 4.0;
/// Addresses of a tunnel's ends: the node's, the pod's.
const TUNNEL: [[u8; 4]; 2] = [[10, 77, 0, 1], [10, 77, 0, 2]];
/// The address of a namespace that a pod has made.
const NESTED: [u8; 4] = [10, 78, 0, 2];
/// What may have come up to any second's end, beside the limit: a late look at the counters, and the burst.
const AHEAD_SECONDS: f64 = 0.1;
/// Payload of a full packet in VXLAN, of 1500 bytes: the least of these paths; and what TCP needs to find its rate.
const LEAST: f64 = 0.93 - 0.08;

fn both(rate: u64) -> Limits {
    Limits { egress: Some(rate), ingress: Some(rate) }
}

fn run(netns: &Netns, command: &str) {
    let words: Vec<&str> = command.split(' ').collect();
    netns.run(words[0], &words[1..]).unwrap();
}

/// Payload up to the end of each second, as parts of the limit. TCP hands over at once what was behind a lost segment: a second alone
/// would tell little.
#[track_caller]
fn assert_held(what: &str, timeline: &Timeline, rate: u64) {
    let parts: Vec<f64> =
        (1..=SECONDS as u32).map(|end| timeline.payload_rate(0.0, f64::from(end)) / rate as f64).collect();
    let text = format!("{what}: {parts:.3?} of {} Mbit/s up to each second", rate / MBIT);
    eprintln!("{text}");
    assert!((1..).map(f64::from).zip(&parts).all(|(end, part)| part * end <= 1.05 * end + AHEAD_SECONDS), "{text}");
    // A machine that is busy takes from a rate.
    assert!(parts.last().is_some_and(|part| *part >= LEAST - super::BUSY), "{text}");
}

/// TCP and UDP, the latter at twice the limit.
#[track_caller]
fn assert_all_held(what: &str, pod: &Pod, way: Way, to: Option<IpAddr>, rate: u64) {
    let tcp = measure::bulk(pod, &Bulk { way, to, flows: 2, seconds: SECONDS, ..Bulk::default() }).unwrap();
    assert_held(&format!("{what}, {way:?}, TCP"), &tcp.timeline, rate);
    let udp = Udp { way, to, rate: 2 * rate, seconds: SECONDS, large_buffer: true, ..Udp::default() };
    assert_held(&format!("{what}, {way:?}, UDP"), &measure::udp(pod, &udp).unwrap().timeline, rate);
}

/// Where it is not a tbf that holds all alike, it was counted apart.
#[track_caller]
fn assert_counted(pod: &Pod) {
    let [out, into] = meter::others(pod).unwrap();
    let sent = meter::egress(pod).unwrap();
    assert!(out.bytes > 10 * sent.bytes && out.packets > 0, "{out:?} beside {sent:?}");
    assert!(!has_fq(pod) || into.bytes > 0, "{into:?}");
}

/// A VXLAN between pod and node, of which the pod has made its end.
fn tunnel(pod: &Pod) {
    let [node, own] = [pod.host.gateway_v4(), pod.addresses()[0]];
    for (netns, local, remote, address) in [(&pod.netns, own, node, TUNNEL[1]), (&pod.host.netns, node, own, TUNNEL[0])]
    {
        run(netns, &format!("ip link add t0 type vxlan id 7 dstport 4789 local {local} remote {remote}"));
        run(netns, &format!("ip addr add {}/24 dev t0", IpAddr::from(address)));
        run(netns, "ip link set t0 up");
    }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_tunnel_made_in_the_pod_is_held() {
    for rate in [10 * MBIT, 100 * MBIT] {
        let bed = Bed::new();
        let pod = bed.limited(both(rate));
        tunnel(&pod);
        assert_all_held("VXLAN", &pod, Way::Out, Some(TUNNEL[0].into()), rate);
        assert_all_held("VXLAN", &pod, Way::In, Some(TUNNEL[1].into()), rate);
        assert_counted(&pod);
    }
}

/// One clock for both: the sum is the limit, and neither starves.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn other_paths_and_the_pods_sockets_share_the_limit() {
    const RATE: u64 = 20 * MBIT;
    let bed = Bed::new();
    let pod = bed.limited(both(RATE));
    tunnel(&pod);
    let send = |to: Option<IpAddr>| {
        let bulk = Bulk { to, flows: 2, seconds: SECONDS, ..Bulk::default() };
        measure::bulk(&pod, &bulk).unwrap().timeline.payload_rate(1.0, SECONDS) / RATE as f64
    };
    let (own, others) = thread::scope(|scope| {
        let others = scope.spawn(|| send(Some(TUNNEL[0].into())));
        (send(None), others.join().unwrap())
    });
    let text = format!("{own:.3} of the limit by the pod's sockets, {others:.3} by a tunnel");
    eprintln!("{text}");
    assert!(own + others <= 1.05 && own + others >= LEAST - super::BUSY, "{text}");
    assert!(own >= 0.1 && others >= 0.1, "{text}");
}

/// The pod's traffic is that of another cgroup's processes meanwhile, as of a service mesh's proxy on the node.
fn as_another_cgroup<T>(pod: &mut Pod, work: impl FnOnce(&Pod) -> T) -> T {
    let other = PodCgroup::new(cgroup::mount().unwrap().join(unique("mesh"))).unwrap();
    let own = mem::replace(&mut pod.cgroup, other);
    let done = work(pod);
    pod.cgroup = own;
    done
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_socket_of_another_cgroup_is_held() {
    for rate in [10 * MBIT, 100 * MBIT] {
        let bed = Bed::new();
        let mut pod = bed.limited(both(rate));
        as_another_cgroup(&mut pod, |pod| {
            for way in [Way::Out, Way::In] {
                assert_all_held("another cgroup", pod, way, None, rate);
            }
        });
        assert_counted(&pod);
    }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn frames_of_af_packet_are_held() {
    const RATE: u64 = 10 * MBIT;
    let bed = Bed::new();
    let pod = bed.limited(both(RATE));
    let link = bed.host.netns.run("ip", &["-o", "link", "show", "cni0"]).unwrap();
    let next_hop = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    for bypass in [false, true] {
        let timeline = measure::frames(&pod, next_hop, bypass, SECONDS).unwrap();
        assert_held(&format!("AF_PACKET, past the qdisc: {bypass}"), &timeline, RATE);
    }
}

/// A namespace in the pod, as docker in docker makes it.
fn nest(pod: &Pod) -> Netns {
    let nested = Netns::new(&unique("nested")).unwrap();
    // So that its eth0 has another number than the pod's.
    run(&nested, "ip link add b0 type bridge");
    run(&pod.netns, &format!("ip link add n0 type veth peer eth0 netns {}", nested.name()));
    for command in ["ip addr add 10.78.0.1/24 dev n0", "ip link set n0 up", "sysctl -q net.ipv4.ip_forward=1"] {
        run(&pod.netns, command);
    }
    for command in ["ip addr add 10.78.0.2/24 dev eth0", "ip link set eth0 up", "ip route add default via 10.78.0.1"] {
        run(&nested, command);
    }
    run(&pod.host.netns, &format!("ip route add 10.78.0.0/24 via {}", pod.addresses()[0]));
    nested
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_a_pod_forwards_is_held() {
    const RATE: u64 = 10 * MBIT;
    let bed = Bed::new();
    let mut pod = bed.limited(both(RATE));
    let own = nest(&pod);
    let own = mem::replace(&mut pod.netns, own);
    assert_all_held("forwarded", &pod, Way::Out, None, RATE);
    assert_all_held("forwarded", &pod, Way::In, Some(NESTED.into()), RATE);
    let _nested = mem::replace(&mut pod.netns, own);
    assert_counted(&pod);
}

/// To a program at the hook of the cgroup what passes is the bridge's.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_bridge_above_the_pods_interface_is_held() {
    const RATE: u64 = 10 * MBIT;
    let bed = Bed::new();
    let pod = bed.limited(both(RATE));
    let address = pod.addresses()[0];
    for command in [
        "ip link add br0 type bridge",
        "ip link set br0 up",
        "ip link set eth0 master br0",
        &format!("ip addr del {address}/24 dev eth0"),
        &format!("ip addr add {address}/24 dev br0"),
    ] {
        run(&pod.netns, command);
    }
    for way in [Way::Out, Way::In] {
        assert_all_held("a bridge above eth0", &pod, way, None, RATE);
    }
    assert_counted(&pod);
}

/// What the pod's own sockets send and receive passes the host's end as if nothing were there: next to nothing of it is charged there. (ARP and
/// IPv6's neighbours are the kernel's, and a socket's first packet is not known yet.)
#[test]
#[ignore = "needs root and the CNI plugins"]
fn sockets_of_the_pod_do_not_notice() {
    const RATE: u64 = 20 * MBIT;
    const MAX_PACKETS: u64 = 100;
    let bed = Bed::new();
    let pod = bed.limited(both(RATE));
    for ipv6 in [false, true] {
        for way in [Way::Out, Way::In] {
            let bulk = Bulk { way, ipv6, flows: 4, seconds: SECONDS, ..Bulk::default() };
            let result = measure::bulk(&pod, &bulk).unwrap();
            assert_rate(&format!("{way:?}"), result.timeline.wire_rate(1.0, SECONDS), RATE, 0.08);
        }
        for at_once in [1, 20] {
            let udp = Udp { ipv6, at_once, rate: RATE / 2, seconds: 1.5, ..Udp::default() };
            measure::udp(&pod, &udp).unwrap();
        }
    }
    let counted = || meter::others(&pod).unwrap();
    let [out, into] = counted();
    eprintln!("by other paths: {out:?}, {into:?}");
    assert!(out.packets <= MAX_PACKETS && into.packets <= MAX_PACKETS, "{out:?}, {into:?}");
    // Into the pod UDP goes on when its receiver has gone, and that is nobody's.
    let udp = Udp { way: Way::In, rate: RATE / 2, seconds: 2.0, ..Udp::default() };
    let sent = measure::udp(&pod, &udp).unwrap().sent;
    let later = counted()[1].packets - into.packets;
    assert!(later < sent / 4, "{later} of {sent} packets of UDP");
    assert_eq!(counted().map(|others| others.drops), [0, 0]);
}

/// What has waited comes back to where it was taken from, and all filters there see it: an `ifb` would send it past them, and past the
/// policies of a network.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn filters_of_others_see_what_has_waited() {
    let bed = Bed::new();
    let mut pod = bed.limited(both(10 * MBIT));
    let links = bed.host.netns.run("ip", &["-o", "link", "show", "type", "veth"]).unwrap();
    let names = links.lines().filter_map(|line| line.split([' ', '@']).nth(1));
    let host_end = names.map(|name| name.trim_end_matches(':')).find(|name| name.starts_with("veth")).unwrap();
    as_another_cgroup(&mut pod, |pod| {
        let arrives = || {
            let udp = Udp { rate: 50 * MBIT, seconds: 1.0, ..Udp::default() };
            measure::udp(pod, &udp).is_ok()
        };
        assert!(arrives());
        // One that drops what has no mark.
        let drops = meter::directory(pod, INTERFACE).ancestors().nth(2).unwrap().join("%node/go_back");
        let filter = ["filter", "add", "dev", host_end, "ingress", "prio", "99", "bpf", "da", "object-pinned"];
        bed.host.netns.run("tc", &[&filter[..], &[drops.to_str().unwrap()]].concat()).unwrap();
        assert!(!arrives());
        bed.host.netns.run("tc", &["filter", "del", "dev", host_end, "ingress", "prio", "99"]).unwrap();
        assert!(arrives());
    });
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_changed_limit_is_that_of_other_paths_too() {
    let bed = Bed::new();
    let mut pod = bed.limited(both(10 * MBIT));
    let mut set = Command::new(podshaper_program().unwrap());
    set.args(["set", &pod.uid, "--egress", "30M"]);
    // In the node's namespace, as ADD was.
    pod.host.netns.inside(|| process::run(&mut set)).unwrap().unwrap();
    as_another_cgroup(&mut pod, |pod| {
        assert_all_held("another cgroup, after set", pod, Way::Out, None, 30 * MBIT);
    });
}

/// By the configuration they are left alone; and with the last pod nothing of podshaper's is on the node.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn they_are_held_unless_the_configuration_says_otherwise() {
    const ROOM: &str = "podshaper-wait";
    let bed = Bed::new();
    let interfaces = || bed.host.netns.run("ip", &["-o", "link"]).unwrap();
    for held in [true, false] {
        let mut pod = bed.pod_of(bed.host.bridge_chain().unwrap(), json!({ "otherPaths": held }), both(10 * MBIT));
        assert_eq!(interfaces().contains(ROOM), held, "{}", interfaces());
        let bulk = Bulk { seconds: 2.0, ..Bulk::default() };
        let rate = as_another_cgroup(&mut pod, |pod| measure::bulk(pod, &bulk).unwrap().timeline.wire_rate(0.5, 2.0));
        assert_eq!(rate < 12e6, held, "{rate} bit/s");
        pod.check().unwrap();
        pod.del().unwrap();
        assert!(!interfaces().contains(ROOM), "{}", interfaces());
    }
}
