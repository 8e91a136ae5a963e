use std::fs;
use std::mem;
use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::{Bed, GBIT, MBIT, assert_rate};
use crate::harness::host::{BRIDGE, bandwidth_plugin, podshaper_plugin};
use crate::harness::limiter::Limits;
use crate::harness::measure::{self, Bulk, Timeline, Udp, Way};
use crate::harness::meter;
use crate::harness::paths::{self, Ends, Load, Path};
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::{podshaper_program, process};
use crate::kernel::mounts;

const SECONDS: f64 = 3.0;
/// The most that any second after the first, and their mean, may have, as a part of the limit at layer 3.
const MOST: f64 = 1.03;
/// TCP needs time to find its rate.
const LEAST: f64 = 0.92;
/// The largest packet that a sender gives to its interface. The whole packet counts at one moment, and so in one of
/// two seconds: at 10 Mbit/s it is a twentieth of each.
const LARGEST_PACKET_BITS: f64 = 65_536.0 * 8.0;
/// A busy machine lowers a rate, and moves bytes from a second to the next one: packets that wait leave when the
/// machine goes on. So a rate that is too low is measured again, and so is a second that has too much. A mean that is
/// too high fails at once.
const TRIES: usize = 3;
/// UDP costs CPU time for each packet, here of 1428 bytes. Above this rate the CPU of a busy machine is the limit.
const MOST_OF_UDP: u64 = 10 * MBIT;

fn both(rate: u64) -> Limits {
    Limits { egress: Some(rate), ingress: Some(rate) }
}

/// An emulated CPU encrypts 2 Mbit/s for WireGuard. Less than this is a path that does not work.
const LEAST_OF_AN_EMULATED_CPU: f64 = 0.05;

/// Whether this is QEMU without KVM.
fn is_emulated() -> bool {
    fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG")
}

/// The limits that a path is measured with. With an emulated CPU, the CPU is the limit above 10 Mbit/s.
/// User Mode Linux is faster, so paths that this machine's kernel lacks are measured there at 100 Mbit/s as well.
fn limits(path: Path) -> &'static [u64] {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap();
    let is_elsewhere = matches!(path, Path::Gre | Path::Ipip | Path::Ipvlan);
    match cpu.contains("User Mode Linux") {
        true if is_elsewhere => &[10 * MBIT, 100 * MBIT],
        false if !is_emulated() => &[10 * MBIT, 100 * MBIT, GBIT],
        _ => &[10 * MBIT],
    }
}

/// The rates on the wire, as parts of the limit.
struct Parts {
    /// Each second after the first.
    seconds: Vec<f64>,
    mean: f64,
}

impl Parts {
    fn of(timeline: &Timeline, rate: u64) -> Self {
        let part = |from: f64, to: f64| timeline.wire_rate(from, to) / rate as f64;
        let seconds = (1..SECONDS as u32).map(|second| part(second.into(), f64::from(second + 1))).collect();
        Self { seconds, mean: part(1.0, SECONDS) }
    }

    /// Whether no second after the first is above the limit.
    ///
    /// # Panics
    /// Their mean is.
    #[track_caller]
    fn are_held(&self, what: &str, rate: u64) -> bool {
        assert!(self.mean <= MOST, "{}", self.said(what, rate));
        let most_of_a_second = MOST + LARGEST_PACKET_BITS / rate as f64;
        self.seconds.iter().all(|part| *part <= most_of_a_second)
    }

    fn said(&self, what: &str, rate: u64) -> String {
        let Self { seconds, mean } = self;
        format!("{what}: {mean:.3} of {} Mbit/s after the first second, {seconds:.3?}", rate / MBIT)
    }

    /// For a table: the mean and the largest second.
    fn cell(&self) -> String {
        format!("{:.3} ({:.2})", self.mean, self.seconds.iter().copied().fold(0.0, f64::max))
    }
}

/// Asserts that no second after the first has more than the limit on the wire, and that their mean has no less.
#[track_caller]
fn assert_held(what: &str, timeline: &Timeline, rate: u64) {
    let parts = Parts::of(timeline, rate);
    eprintln!("{}", parts.said(what, rate));
    let is_held = parts.are_held(what, rate) && parts.mean >= LEAST - super::BUSY;
    assert!(is_held, "{}", parts.said(what, rate));
}

/// Asserts the same for one load, which is sent again if the machine was busy.
#[track_caller]
fn assert_load_is_held(path: Path, pod: &Pod, ends: Ends, load: &Load) -> Parts {
    let Load { way, is_udp, limit, .. } = *load;
    let what = format!("{}, {way:?}, {}", path.title(), if is_udp { "UDP" } else { "TCP" });
    let least = match is_udp {
        _ if is_emulated() => LEAST_OF_AN_EMULATED_CPU,
        false => LEAST,
        true if limit <= MOST_OF_UDP => LEAST - super::BUSY,
        true => 0.0,
    };
    let mut parts = Parts { seconds: vec![], mean: 0.0 };
    for _ in 0..TRIES {
        parts = Parts::of(&path.send(pod, ends, load).unwrap(), limit);
        eprintln!("{}", parts.said(&what, limit));
        if parts.are_held(&what, limit) && parts.mean >= least {
            return parts;
        }
    }
    panic!("{} in the last of {TRIES} tries: above the limit, or less than {least}", parts.said(&what, limit));
}

/// TCP and UDP, as far as the path carries them, UDP at more than the limit. Prints a row of the table.
#[track_caller]
fn assert_all_held(path: Path, pod: &Pod, ends: Ends, ways: &[Way], limit: u64) {
    let mut row = format!("| {} | {} Mbit/s |", path.title(), limit / MBIT);
    for (way, is_udp) in BOTH_WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let is_sent = ways.contains(&way) && path.carries(way, is_udp);
        let cell = is_sent
            .then(|| assert_load_is_held(path, pod, ends, &Load { way, is_udp, limit, seconds: SECONDS }).cell());
        row += &format!(" {} |", cell.unwrap_or_default());
    }
    eprintln!("| path | limit | out, TCP | out, UDP | in, TCP | in, UDP |\n{row}");
}

const BOTH_WAYS: [Way; 2] = [Way::Out, Way::In];

/// Asserts the same for a fresh pod whose traffic takes a path.
#[track_caller]
fn assert_path_is_held(bed: &Bed, path: Path, limit: u64, and_then: impl FnOnce(&Pod)) {
    path.must_be_had().unwrap();
    let mut pod = bed.limited(both(limit));
    let held = path.with(&mut pod, |pod, ends| {
        assert_all_held(path, pod, ends, &BOTH_WAYS, limit);
        Ok(())
    });
    held.unwrap();
    and_then(&pod);
}

/// At each limit, for paths whose traffic is counted apart from the traffic of the pod's sockets.
fn assert_held_and_counted(paths: &[Path]) {
    assert_each_is_held(paths, assert_counted);
}

/// At each limit, for paths whose traffic need not be counted apart.
fn assert_paths_are_held(paths: &[Path]) {
    assert_each_is_held(paths, |_| ());
}

/// Measures two limits at the same time, each on a node of its own: with a network namespace and a bpffs.
fn assert_each_is_held(paths: &[Path], and_then: impl Fn(&Pod) + Sync) {
    let (and_then, alone) = (&and_then, &measure::alone());
    let on_a_node = |path: Path, limit: u64| {
        mounts::with_own(|| {
            mounts::empty_bpffs();
            assert_path_is_held(&Bed::one_of_several(alone), path, limit, and_then);
        });
    };
    for (path, limits) in paths.iter().flat_map(|path| limits(*path).chunks(2).map(move |limits| (*path, limits))) {
        thread::scope(|scope| {
            for limit in limits {
                scope.spawn(move || on_a_node(path, *limit));
            }
        });
    }
}

/// Asserts that the traffic was counted apart from the traffic of the pod's sockets.
#[track_caller]
fn assert_counted(pod: &Pod) {
    let [out, into] = meter::others(pod).unwrap();
    let sent = meter::egress(pod).unwrap();
    assert!(out.bytes > 10 * sent.bytes && out.packets > 0, "{out:?} beside {sent:?}");
    assert!(into.bytes > 0, "{into:?}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_tunnel_made_in_the_pod_is_held() {
    assert_held_and_counted(&[Path::Vxlan]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with ip_gre"]
fn a_tunnel_by_gre_is_held() {
    assert_held_and_counted(&[Path::Gre]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with ipip"]
fn a_tunnel_by_ipip_is_held() {
    assert_held_and_counted(&[Path::Ipip]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with WireGuard"]
fn a_tunnel_by_wireguard_is_held() {
    assert_held_and_counted(&[Path::Wireguard]);
}

/// The packets of a VPN program in the pod belong to the pod's own sockets. They wait at the program's socket, or at
/// the host end, and TCP within the tunnel has the limit.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_tunnel_of_a_program_in_the_pod_is_held() {
    assert_path_is_held(&Bed::new(), Path::Tun, 10 * MBIT, |_| ());
}

/// Both share one clock: their sum is the limit, and neither starves.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn other_paths_and_the_pods_sockets_share_the_limit() {
    const RATE: u64 = 20 * MBIT;
    let bed = Bed::new();
    let mut pod = bed.limited(both(RATE));
    let tunnel = Path::Vxlan.with(&mut pod, |_, ends| Ok(ends.node)).unwrap();
    let send = |to: Option<IpAddr>| {
        let bulk = Bulk { to, flows: 2, seconds: SECONDS, ..Bulk::default() };
        measure::bulk(&pod, &bulk).unwrap().timeline.payload_rate(1.0, SECONDS) / RATE as f64
    };
    let mut parts = (0.0, 0.0);
    let wire = measure::watched(&bed.host.netns, BRIDGE, SECONDS, || {
        parts = thread::scope(|scope| {
            let others = scope.spawn(|| send(tunnel));
            (send(None), others.join().unwrap())
        });
        Ok(())
    });
    assert_held("both", &wire.unwrap(), RATE);
    let (own, others) = parts;
    let text = format!("{own:.3} of the limit by the pod's sockets, {others:.3} by a tunnel");
    eprintln!("{text}");
    assert!(own >= 0.1 && others >= 0.1, "{text}");
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_socket_of_another_cgroup_is_held() {
    assert_held_and_counted(&[Path::AnotherCgroup]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn frames_are_held() {
    assert_paths_are_held(&[Path::AfPacket, Path::AfPacketPastTheQueue]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with AF_XDP"]
fn frames_of_af_xdp_are_held() {
    assert_paths_are_held(&[Path::AfXdp]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_a_pod_forwards_is_held() {
    assert_held_and_counted(&[Path::Forwarded, Path::ForwardedWithNat]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with macvlan"]
fn a_macvlan_above_the_pods_interface_is_held() {
    assert_held_and_counted(&[Path::Macvlan]);
}

#[test]
#[ignore = "needs root, the CNI plugins and a kernel with ipvlan"]
fn an_ipvlan_above_the_pods_interface_is_held() {
    assert_held_and_counted(&[Path::Ipvlan]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn multicast_is_held() {
    assert_paths_are_held(&[Path::Multicast]);
}

/// Answers that the pod's kernel sends belong to no socket of the pod.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn answers_of_the_pods_kernel_are_held() {
    assert_paths_are_held(&[Path::Answers]);
}

/// The hook of the cgroup takes the forwarded traffic for the pod's own, since the interface numbers are equal. The
/// traffic must not be charged both there and at the host end.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_nested_interface_with_the_number_of_the_pods_is_charged_once() {
    assert_held_and_counted(&[Path::SameNumber]);
}

/// Traffic that a process sends in another pod's namespace is charged to that pod, and not to the process's own pod,
/// though the interfaces of both pods have the same number.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_daemon_in_another_pods_namespace_is_charged_to_that_pod() {
    const RATE: u64 = 10 * MBIT;
    let bed = Bed::new();
    let mut daemon = bed.limited(both(2 * MBIT));
    let mut pod = bed.limited(both(RATE));
    assert_eq!(paths::number(&daemon).unwrap(), paths::number(&pod).unwrap());
    mem::swap(&mut pod.cgroup, &mut daemon.cgroup);
    assert_all_held(Path::AnotherCgroup, &pod, Ends::of(&pod), &BOTH_WAYS, RATE);
    mem::swap(&mut pod.cgroup, &mut daemon.cgroup);
    let [sent, received] = [meter::egress(&daemon).unwrap(), meter::ingress(&daemon).unwrap()];
    assert!(sent.bytes < 20_000 && received.bytes < 20_000, "{sent:?}, {received:?}");
}

/// The host end cannot tell the socket of a fragment, so it charges the fragments, and the hook of the cgroup does
/// not.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn datagrams_that_come_in_fragments_are_charged_once() {
    assert_paths_are_held(&[Path::Fragments]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_comes_to_a_raw_socket_is_charged_once() {
    const PINGS: u64 = 100;
    const BYTES: u64 = 1000;
    let bed = Bed::new();
    let pod = bed.limited(both(100 * MBIT));
    let mut ping = pod.command("ping").unwrap();
    let (count, size, to) = (PINGS.to_string(), (BYTES - 28).to_string(), pod.host.gateway_v4().to_string());
    process::run(ping.args(["-q", "-i", "0.01", "-c", &count, "-s", &size, &to])).unwrap();
    let charged = meter::ingress(&pod).unwrap().bytes + meter::others(&pod).unwrap()[1].bytes;
    assert!((PINGS * BYTES..PINGS * BYTES * 5 / 4).contains(&charged), "{charged} bytes");
}

/// A program at the hook of the cgroup sees such traffic on the bridge, and not on the pod's interface.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_bridge_above_the_pods_interface_is_held() {
    assert_held_and_counted(&[Path::Bridge]);
}

/// Traffic of the pod's own sockets passes the host end unaffected: nearly nothing of it is charged there. (The
/// kernel itself sends ARP and IPv6 neighbour discovery, and the first packet of a socket is not recognised yet.)
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
    // UDP packets still come into the pod after their receiver has ended. Those belong to no socket.
    let udp = Udp { way: Way::In, rate: RATE / 2, seconds: 2.0, ..Udp::default() };
    let sent = measure::udp(&pod, &udp).unwrap().sent;
    let later = counted()[1].packets - into.packets;
    assert!(later < sent / 4, "{later} of {sent} packets of UDP");
    assert_eq!(counted().map(|others| others.drops), [0, 0]);
}

/// Packets that have waited come back to the place from which they were taken, so all filters there see them. With an
/// `ifb` they would bypass these filters, and with them a network's policies.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn filters_of_others_see_what_has_waited() {
    let bed = Bed::new();
    let mut pod = bed.limited(both(10 * MBIT));
    let host_end = &host_end(&bed);
    let seen = paths::as_another_cgroup(&mut pod, |pod| {
        let arrives = || {
            let udp = Udp { rate: 50 * MBIT, seconds: 1.0, ..Udp::default() };
            measure::udp(pod, &udp).is_ok()
        };
        assert!(arrives());
        // A filter that drops packets without a mark.
        let drops = meter::directory(pod, INTERFACE).ancestors().nth(2).unwrap().join("%node/go_back");
        let filter = ["filter", "add", "dev", host_end, "ingress", "prio", "99", "bpf", "da", "object-pinned"];
        bed.host.netns.run("tc", &[&filter[..], &[drops.to_str().unwrap()]].concat()).unwrap();
        assert!(!arrives());
        bed.host.netns.run("tc", &["filter", "del", "dev", host_end, "ingress", "prio", "99"]).unwrap();
        assert!(arrives());
    });
    seen.unwrap();
}

/// A list may have both plugins. The bandwidth plugin redirects all packets from the pod to its `ifb`, in the place
/// that podshaper's filter takes. So traffic by other paths has the bandwidth plugin's limit, and podshaper logs that
/// it limits the pod's own sockets only.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn beside_the_bandwidth_plugin_each_path_is_held_by_one_of_them() {
    let bed = Bed::new();
    let mut pod = Pod::new(&bed.host, "chain").unwrap();
    pod.offer_bandwidth(Some(20 * MBIT), None, Some(MBIT));
    let mut podshaper = podshaper_plugin();
    podshaper["max"] = json!({ "egress": "10M" });
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    podshaper["logFile"] = json!(log);
    let network = bed.host.bridge_chain().unwrap().then(bandwidth_plugin()).then(podshaper);
    pod.add(&network.with_dir(podshaper_program().unwrap().parent().unwrap())).unwrap();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("is not held") && log.contains("as the bandwidth plugin's has"), "{log}");
    let own = measure::bulk(&pod, &Bulk { seconds: SECONDS, ..Bulk::default() }).unwrap().timeline;
    assert_held("its own sockets", &own, 10 * MBIT);
    let held = Path::AnotherCgroup.with(&mut pod, |pod, ends| {
        assert_all_held(Path::AnotherCgroup, pod, ends, &[Way::Out], 20 * MBIT);
        Ok(())
    });
    held.unwrap();
    pod.check().unwrap();
    pod.del().unwrap();
}

/// A pod with NET_ADMIN gives its interface's name to another interface. An ADD that limited the other interface
/// would end the limit of the first one.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_pod_that_renames_its_interface_stays_limited() {
    let bed = Bed::new();
    let mut pod = bed.limited(Limits { egress: Some(10 * MBIT), ingress: None });
    let address = pod.addresses()[0];
    let config = |pod: &Pod, egress: u64| {
        let (plugin, offers) = (podshaper_plugin(), json!({ "egressRate": egress, "ingressRate": egress }));
        let mut all = pod.offers.clone();
        all.insert("bandwidth".into(), offers);
        let chain = bed.host.bridge_chain().unwrap().with_dir(podshaper_program().unwrap().parent().unwrap());
        pod.environment(chain.call(plugin.as_object().unwrap(), "ADD", &all, Some(&json!({}))).unwrap())
    };
    for command in [
        "ip link set eth0 down",
        "ip link set eth0 name real",
        "ip link set real up",
        "ip link add eth0 type veth peer name peer0",
        &format!("ip route replace {}/24 dev real src {address}", bed.host.gateway_v4()).replace(".1/24", ".0/24"),
    ] {
        paths::run(&pod.netns, command).unwrap();
    }
    // As sync calls it when the pod asks for another direction.
    let answer = config(&pod, 20 * MBIT).call_in(&bed.host.netns).unwrap();
    assert!(!answer.status.success() && answer.stdout.contains("whose name has been changed in the pod"), "{answer}");
    let send = |pod: &Pod| {
        let bulk = Bulk { seconds: SECONDS, flows: 2, ..Bulk::default() };
        assert_held("after that", &measure::bulk(pod, &bulk).unwrap().timeline, 10 * MBIT);
    };
    send(&pod);
    // The new name does not keep an administrator from setting another limit.
    paths::run(&pod.netns, "ip link del eth0").unwrap();
    let mut set = Command::new(podshaper_program().unwrap());
    set.args(["set", &pod.uid, "--egress", "5M"]);
    bed.host.netns.inside(|| process::run(&mut set)).unwrap().unwrap();
    let bulk = Bulk { seconds: SECONDS, flows: 2, ..Bulk::default() };
    let rate = measure::bulk(&pod, &bulk).unwrap().timeline.wire_rate(1.0, SECONDS);
    assert_rate("the administrator's", rate, 5 * MBIT, 0.08);
    paths::run(&pod.netns, "ip link set real down").unwrap();
    paths::run(&pod.netns, "ip link set real name eth0").unwrap();
    pod.del().unwrap();
}

/// Several pods in one network namespace: when the limit of the first pod ends, the limit of the next pod holds
/// traffic by other paths.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn of_two_limits_of_an_interface_the_second_takes_over() {
    let bed = Bed::new();
    let mut pod = Pod::new(&bed.host, "chain").unwrap();
    let bridge = bed.host.bridge_chain().unwrap();
    let result = pod.add(&bridge).unwrap();
    let podshaper = bridge.then(podshaper_plugin()).with_dir(podshaper_program().unwrap().parent().unwrap());
    let plugin = podshaper.plugins.last().unwrap().clone();
    let others = [0, 1].map(|_| Pod::new(&bed.host, "chain").unwrap());
    let netns = pod.netns.path().display().to_string();
    let call = |of: &Pod, verb: &str, rate: u64| {
        let mut offers = of.offers.clone();
        offers.insert("bandwidth".into(), json!({ "egressRate": rate, "ingressRate": rate }));
        let call = of.environment(podshaper.call(&plugin, verb, &offers, Some(&result)).unwrap());
        call.env("CNI_NETNS", &netns).call_in(&bed.host.netns).unwrap().success().unwrap();
    };
    let rates = [20 * MBIT, 10 * MBIT, 5 * MBIT];
    call(&pod, "ADD", rates[0]);
    for (other, rate) in others.iter().zip(&rates[1..]) {
        // The age of an attachment is compared by a clock with a resolution of four milliseconds.
        thread::sleep(Duration::from_millis(20));
        call(other, "ADD", *rate);
    }
    for (index, rate) in rates.into_iter().enumerate() {
        let held = Path::AnotherCgroup.with(&mut pod, |pod, ends| {
            assert_all_held(Path::AnotherCgroup, pod, ends, &BOTH_WAYS, rate);
            Ok(())
        });
        held.unwrap();
        if let Some(other) = others.get(index) {
            call(other, "CHECK", rates[index + 1]);
        }
        call(if index == 0 { &pod } else { &others[index - 1] }, "DEL", 0);
    }
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_changed_limit_is_that_of_other_paths_too() {
    let bed = Bed::new();
    let mut pod = bed.limited(both(10 * MBIT));
    let mut set = Command::new(podshaper_program().unwrap());
    set.args(["set", &pod.uid, "--egress", "30M"]);
    // In the node's namespace, as the ADD was.
    pod.host.netns.inside(|| process::run(&mut set)).unwrap().unwrap();
    let held = Path::AnotherCgroup.with(&mut pod, |pod, ends| {
        assert_all_held(Path::AnotherCgroup, pod, ends, &[Way::Out], 30 * MBIT);
        Ok(())
    });
    held.unwrap();
}

/// With `otherPaths: false` other paths are not limited. After the last pod's DEL nothing of podshaper is left on the
/// node.
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
        let send = |pod: &Pod| measure::bulk(pod, &bulk).unwrap().timeline.wire_rate(0.5, 2.0);
        let rate = paths::as_another_cgroup(&mut pod, send).unwrap();
        assert_eq!(rate < 12e6, held, "{rate} bit/s");
        pod.check().unwrap();
        pod.del().unwrap();
        assert!(!interfaces().contains(ROOM), "{}", interfaces());
    }
}

/// The host end of the only pod of a node.
fn host_end(bed: &Bed) -> String {
    let links = bed.host.netns.run("ip", &["-o", "link", "show", "type", "veth"]).unwrap();
    let names = links.lines().filter_map(|line| line.split([' ', '@']).nth(1));
    names.map(|name| name.trim_end_matches(':')).find(|name| name.starts_with("veth")).unwrap().to_owned()
}

/// A veth may outlive the DEL (another plugin may have to remove it). The DEL leaves nothing of podshaper on the
/// veth, and leaves everything of others.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn nothing_is_left_on_a_veth_that_stays_but_what_is_of_others() {
    for has_others in [false, true] {
        let bed = Bed::new();
        let mut pod = Pod::new(&bed.host, "chain").unwrap();
        let bridge = bed.host.bridge_chain().unwrap();
        let result = pod.add(&bridge).unwrap();
        let veth = host_end(&bed);
        let tc = |command: &str| paths::run(&bed.host.netns, &format!("tc {command}")).unwrap();
        let before = tc(&format!("qdisc show dev {veth}"));
        pod.offer_bandwidth(Some(10 * MBIT), Some(10 * MBIT), None);
        let podshaper = bridge.then(podshaper_plugin()).with_dir(podshaper_program().unwrap().parent().unwrap());
        let plugin = podshaper.plugins.last().unwrap().clone();
        let call = |verb: &str| pod.environment(podshaper.call(&plugin, verb, &pod.offers, Some(&result)).unwrap());
        let [add, del] = ["ADD", "DEL"].map(call);
        pod.call(&add).unwrap().success().unwrap();
        // A second ADD, as for a new sandbox in the same namespace.
        pod.call(&add).unwrap().success().unwrap();
        assert!(tc(&format!("qdisc show dev {veth}")).contains("clsact"));
        let theirs = format!("filter add dev {veth} ingress prio 50 protocol ip u32 match u32 0 0 flowid 1:1");
        if has_others {
            tc(&theirs);
        }
        pod.call(&del).unwrap().success().unwrap();
        let after = tc(&format!("qdisc show dev {veth}"));
        let filters = tc(&format!("filter show dev {veth} ingress"));
        assert!(!filters.contains("podshaper"), "{filters}");
        assert_eq!((after == before, filters.contains("u32")), (!has_others, has_others), "{before}{after}{filters}");
    }
}
