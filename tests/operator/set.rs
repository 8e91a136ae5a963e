use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use podshaper_abi::{Counters, EGRESS, Meters as AbiMeters};
use serde_json::json;

use super::{limited_both_ways, listed, refuses, says};
use crate::chain::{Bed, MBIT};
use crate::harness::limiter::Limiter;
use crate::harness::measure::{self, Bulk};
use crate::harness::meter;
use crate::harness::pod::{INTERFACE, container_id};
use crate::harness::process;
use crate::sandbox::{NODE, RATE, Sandbox, builds_large_packets, netns_with_host_end, ok};

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn limits_change_and_say_what_they_were() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    let said = says(&["set", &pod.uid, "--egress", "50M", "--ingress", "1G"]);
    assert_eq!(
        said,
        "default/web eth0: egress 50Mbit/s, burst 250kbit (was 10Mbit/s, burst 120kbit)\n\
         default/web eth0: ingress 1Gbit/s, burst 5Mbit (was 20Mbit/s, burst 120kbit)\n"
    );
    pod.assert_rates([50 * MBIT, 1000 * MBIT]);
    assert_eq!(listed(&pod.uid).unwrap()["changed"], true);
    // Only a burst, for the directions that are limited.
    let said = says(&["set", &pod.uid, "--burst", "400k"]);
    assert!(
        said.contains("egress 50Mbit/s, burst 400kbit") && said.contains("ingress 1Gbit/s, burst 400kbit"),
        "{said}"
    );
    // The operator's change is no mismatch for CHECK, so the runtime does not make the pod again.
    assert_eq!(pod.call("CHECK").stdout, "");

    // A new sandbox has the pod's own limits again.
    let id = container_id().unwrap();
    ok(&pod.cni_of("ADD", &id));
    pod.assert_rates([RATE, 2 * RATE]);
    assert_eq!(listed(&pod.uid).unwrap()["changed"], false);
    ok(&pod.cni_of("DEL", &id));
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_administrators_max_binds_unless_forced() {
    let pod = limited_both_ways(Some(30 * MBIT));
    pod.call("ADD");
    assert_eq!(
        refuses(&["set", &pod.uid, "--egress", "50M"]),
        "podshaper: set egress of default/web to 50M: the configuration's \"max\" was 30M when the pod was made; --force goes \
         beyond it\n"
    );
    pod.assert_rates([RATE, 2 * RATE]);
    says(&["set", &pod.uid, "--egress", "30M"]);
    says(&["set", &pod.uid, "--ingress", "50M", "--force"]);
    pod.assert_rates([30 * MBIT, 50 * MBIT]);
    pod.call("DEL");
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_direction_without_a_limit_gets_none_and_the_reason() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let text = refuses(&["set", &pod.uid, "--egress", "20M", "--ingress", "20M"]);
    assert_eq!(
        text,
        "podshaper: set ingress of default/web: it had no such limit when it was made, so none of its connections is paced and \
         nothing is attached that could hold it; annotate it with kubernetes.io/ingress-bandwidth: `podshaper sync` \
         follows (with a kubeconfig), and paces new connections\n"
    );
    // All directions are changed, or none.
    pod.assert_rates([RATE, 0]);
    pod.call("DEL");
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn where_a_queue_of_the_nodes_holds_ingress_it_is_changed_too() {
    // tbf and htb have a higher rate than the limit, since they count Ethernet headers.
    let has_rate = |text: &str| text.contains("rate 30279") || text.contains("rate 30280");
    for (other_paths, without_fq) in [(true, "held-data"), (false, "tbf")] {
        let (netns, host_end) = netns_with_host_end();
        let mut pod = Sandbox::with_netns(std::sync::Arc::new(netns));
        pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "ingressRate": RATE });
        pod.stdin.insert("otherPaths".into(), json!(other_paths));
        pod.call("ADD");
        let tc = |words: &[&str]| process::run(std::process::Command::new("tc").args(words)).unwrap();
        let by = pod.owner("eth0")["ingressBy"].clone();
        assert!(by == "held-acks" || by == without_fq, "{by}");
        let tbf = || tc(&["qdisc", "show", "dev", &host_end]);
        assert_eq!(by == "tbf", tbf().contains("tbf 7064:"), "{}", tbf());
        says(&["set", &pod.uid, "--ingress", "30M"]);
        pod.assert_rates([0, 30 * MBIT]);
        assert_eq!(by == "tbf", has_rate(&tbf()), "{}", tbf());
        if by == "held-data" {
            let classes = tc(&["class", "show", "dev", "podshaper-wait"]);
            assert!(has_rate(&classes), "{classes}");
        }
        pod.call("DEL");
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn where_htb_has_egress_it_is_changed_too() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let is_htb = pod.owner("eth0")["htb"] == true;
    let classes = || pod.netns.run("tc", &["class", "show", "dev", "eth0"]).unwrap();
    // htb has a higher rate than the limit, since it counts Ethernet headers.
    assert_eq!(is_htb, classes().contains("htb 7064:1 root rate 1009"), "{}", classes());
    says(&["set", &pod.uid, "--egress", "30M"]);
    pod.assert_rates([30 * MBIT, 0]);
    assert_eq!(is_htb, classes().contains("htb 7064:1 root rate 302"), "{}", classes());
    pod.call("DEL");
}

/// As long as there is a limit, it determines the largest packet that TCP may build.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn packets_are_as_large_as_the_limit_asks_for_and_as_before_without_one() {
    let pod = Sandbox::new();
    let before = pod.gso_max_size();
    let expect = |bytes: u32, when: &str| {
        assert_eq!(pod.gso_max_size(), if builds_large_packets() { bytes } else { before }, "{when}");
    };
    pod.call("ADD");
    expect(25_512, "twenty milliseconds of 10 Mbit/s");
    for (rate, bytes) in [("20M", 50_512), ("1G", before), ("500k", 3_512)] {
        says(&["set", &pod.uid, "--egress", rate]);
        expect(bytes, rate);
    }
    pod.call("DEL");
    expect(before, "without a limit");
}

/// A change is in force at once: the programs read the limit for every packet.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn a_change_is_in_force_at_once_on_live_flows_and_drops_nothing() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 20 * MBIT);
    let counters = Meters::of(meter::directory(&pod, INTERFACE));
    let result = std::thread::scope(|scope| {
        let sending = scope.spawn(|| measure::bulk(&pod, &Bulk { flows: 4, seconds: 6.0, ..Bulk::default() }).unwrap());
        std::thread::sleep(Duration::from_millis(1500));
        for (rate, text) in [(100 * MBIT, "100M"), (10 * MBIT, "10M"), (50 * MBIT, "50M")] {
            says(&["set", &pod.uid, "--egress", text]);
            let after = counters.time_to(rate);
            eprintln!("set to {text}: in force after {after:?}");
            assert!(after < Duration::from_millis(300), "{text} only after {after:?}");
            std::thread::sleep(Duration::from_millis(700));
        }
        sending.join().unwrap()
    });
    let Counters { drops, .. } = counters.read();
    eprintln!("{drops} drops, {} retransmits", result.retransmits);
    assert_eq!((drops, result.retransmits), (0, 0));
}

/// The counters of a pod's egress, read faster than bpftool can be called.
pub(super) struct Meters {
    map: HashMap<MapData, u32, AbiMeters>,
    slot: u32,
}

impl Meters {
    pub(super) fn of(directory: PathBuf) -> Self {
        let slot = meter::owner(&directory).unwrap()["slot"].as_u64().unwrap() as u32;
        let map = MapData::from_pin(Path::new(NODE).join("METERS")).unwrap();
        Self { map: HashMap::try_from(Map::HashMap(map)).unwrap(), slot }
    }

    pub(super) fn read(&self) -> Counters {
        self.map.get(&self.slot, 0).unwrap().of[EGRESS as usize].counters
    }

    /// The time until the first window of 50 ms whose rate is within a fifth of `rate`.
    fn time_to(&self, rate: u64) -> Duration {
        const WINDOW: Duration = Duration::from_millis(50);
        let start = Instant::now();
        let mut readings = vec![(Instant::now(), self.read().bytes)];
        while start.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(2));
            let (now, bytes) = (Instant::now(), self.read().bytes);
            readings.push((now, bytes));
            let before = readings.iter().rev().find(|(at, _)| now - *at >= WINDOW);
            let Some((at, then)) = before else { continue };
            let measured = (bytes - then) as f64 * 8.0 / (now - *at).as_secs_f64();
            if (0.8..1.2).contains(&(measured / rate as f64)) {
                return *at - start;
            }
        }
        Duration::MAX
    }
}
