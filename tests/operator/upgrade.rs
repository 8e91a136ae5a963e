//! A node that was upgraded: older pods have pins of an older layout, whose maps this podshaper cannot read. New pins
//! are made beside them. Only OWNER, in JSON, is the same in all layouts.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podshaper_abi::Counters;
use serde_json::{Value, json};

use super::set::Meters;
use super::{alone, listed, says};
use crate::chain::{Bed, MBIT};
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::limiter::Limiter;
use crate::harness::measure::{self, Bulk};
use crate::harness::pod::{INTERFACE, container_id};
use crate::harness::{meter, process, unique};
use crate::sandbox::{LINKS, NODE, PROGRAMS, RATE, Sandbox, bpftool, netns_with_host_end, ok};

/// A node whose pods run with the programs of another podshaper of the same layout. One call replaces the programs,
/// without effect on the traffic.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn running_pods_get_new_programs_and_notice_nothing() {
    const RATE: u64 = 50 * MBIT;
    alone(|| {
        let bed = Bed::new();
        let pod = bed.pod(Limiter::Podshaper, RATE);
        let links = meter::directory(&pod, INTERFACE).with_file_name(LINKS.0);
        let programs = || {
            let pins = fs::read_dir(&links).unwrap().map(|pin| pin.unwrap().path());
            let ids =
                pins.map(|pin| bpftool(&["link", "show", "pinned", pin.to_str().unwrap()]).unwrap()["prog_id"].clone());
            ids.collect::<Vec<_>>()
        };
        let counters = Meters::of(meter::directory(&pod, INTERFACE));
        let bulk = Bulk { flows: 8, seconds: 16.0, ..Bulk::default() };
        let another = PodCgroup::new(cgroup::mount().unwrap().join(unique("another"))).unwrap();
        let another = another.path().to_str().unwrap();
        // Loads programs for another attachment, and replaces none.
        let load = || {
            says(&["attach", "--cgroup", another, "--egress", "1M", "--ingress", "1M"]);
            says(&["detach", "--cgroup", another]);
        };
        let upgrade = || {
            let before = programs();
            assert!(says(&["upgrade"]).starts_with("the node's programs are this podshaper's already"));
            assert_eq!(programs(), before);
            // Makes the programs look like those of another podshaper.
            fs::remove_file(format!("{NODE}/%object")).unwrap();
            assert_eq!(says(&["upgrade"]), "3 programs on pods' cgroups are this podshaper's now\n");
            assert!(programs().iter().all(|id| !before.contains(id)), "{before:?}");
        };
        let (result, loading, upgrading) = std::thread::scope(|scope| {
            let sending = scope.spawn(|| measure::bulk(&pod, &bulk).unwrap());
            std::thread::sleep(Duration::from_millis(1500));
            let loading = most_in_a_window(&counters, load);
            let upgrading = most_in_a_window(&counters, upgrade);
            (sending.join().unwrap(), loading, upgrading)
        });
        let allowed = RATE / 8 / 20 + RATE / 8 / 200;
        let Counters { drops, bytes, .. } = counters.read();
        let retransmits = result.retransmits;
        eprintln!(
            "{drops} drops, {retransmits} retransmits, at most {upgrading} bytes in 50 ms, of {allowed}; while others load \
             programs {loading}"
        );
        // A single CPU sends nothing while it loads programs. A flow may then send its last segment again (loss
        // probe), and packets whose departure time has passed meanwhile leave at once.
        assert!(drops == 0 && retransmits <= 8, "{drops} drops, {retransmits} retransmits");
        assert!(upgrading > allowed / 2, "{upgrading} bytes in 50 ms: the flows were not there");
        assert!(upgrading < allowed.max(loading) * 11 / 10, "{upgrading} bytes in 50 ms, {loading} without an upgrade");
        assert!(bytes * 8 > RATE * 16 * 9 / 10, "{bytes} bytes in 16 s");
    });
}

const WINDOW: Duration = Duration::from_millis(50);

/// The most bytes within a window while `act` runs four times.
fn most_in_a_window(counters: &Meters, act: impl Fn() + Sync) -> u64 {
    std::thread::scope(|scope| {
        let acting = scope.spawn(|| {
            for _ in 0..4 {
                std::thread::sleep(Duration::from_millis(300));
                act();
            }
        });
        // When a reading began and ended: a machine with one CPU may do something else in between.
        let reading = || {
            let begin = Instant::now();
            let bytes = counters.read().bytes;
            (begin, bytes, Instant::now())
        };
        let mut readings = vec![reading()];
        let mut most = 0;
        while !acting.is_finished() {
            std::thread::sleep(Duration::from_millis(2));
            let now @ (begin, bytes, end) = reading();
            let then = readings.iter().rev().find(|(.., end)| begin - *end >= WINDOW);
            if let Some((begin, before, _)) = then {
                // A late reading has a longer window.
                let window = (end - *begin).as_secs_f64() / WINDOW.as_secs_f64();
                most = most.max(((bytes - before) as f64 / window) as u64);
            }
            readings.push(now);
        }
        acting.join().unwrap();
        most
    })
}

const OLD: &str = "/sys/fs/bpf/podshaper/v0";

/// Converts the pod's attachment to layout 0: with a smaller record, and with a map of limits of another size.
fn age(pod: &Sandbox) {
    let (new, old) = (pod.pod_directory().join("eth0"), format!("{OLD}/{}/eth0", pod.uid));
    let owner = pod.owner("eth0").to_string();
    fs::create_dir_all(format!("{OLD}/{}", pod.uid)).unwrap();
    fs::rename(pod.pod_directory().join(LINKS.0), &old).unwrap();
    fs::remove_file(new.join("OWNER")).unwrap();
    fs::remove_dir(&new).unwrap();
    fs::remove_dir(pod.pod_directory()).unwrap();
    for (name, size) in [("OWNER", 1000), ("LIMITS", 24)] {
        let path = format!("{old}/{name}");
        let size = size.to_string();
        let map = ["type", "array", "key", "4", "value", &size, "entries", "1", "name", name];
        process::run(Command::new("bpftool").args(["map", "create", &path]).args(map)).unwrap();
    }
    let mut bytes: Vec<String> = owner.bytes().map(|byte| byte.to_string()).collect();
    bytes.resize(1000, "0".to_owned());
    let path = format!("{old}/OWNER");
    let update = ["map", "update", "pinned", &path, "key", "0", "0", "0", "0", "value"];
    process::run(Command::new("bpftool").args(update).args(&bytes)).unwrap();
}

fn is_old(pod: &Sandbox) -> bool {
    fs::exists(format!("{OLD}/{}", pod.uid)).unwrap()
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_older_layout_is_listed_deleted_and_collected() {
    alone(|| {
        let pods: Vec<Sandbox> = (0..3).map(|_| Sandbox::new()).collect();
        for pod in &pods {
            pod.call("ADD");
            age(pod);
            let entry = listed(&pod.uid).unwrap();
            assert_eq!((&entry["name"], &entry["links"]), (&json!("default/web"), &json!("live")));
            assert!(entry["problem"].as_str().unwrap().contains("layout v0"), "{entry}");
            assert!(says(&["list", "--sample", "0"]).contains("live, unread"));
            assert!(says(&["show", &pod.uid, "--sample", "0"]).contains("layout v0"));
            assert_eq!(pod.attached().len(), 3);
        }
        let (_, doctor, _) = super::call(&["doctor"]);
        assert!(doctor.contains("3 of another podshaper's layout"), "{doctor}");

        // A DEL of another sandbox removes nothing, as with the current layout.
        ok(&pods[0].cni_of("DEL", &container_id().unwrap()));
        assert!(is_old(&pods[0]));
        pods[0].call("DEL");
        pods[0].assert_unlimited();
        assert!(!is_old(&pods[0]));

        pods[1].cgroup.remove().unwrap();
        let gone: Value = serde_json::from_str(&says(&["gc", "-o", "json"])).unwrap();
        assert!(gone.as_array().unwrap().len() == 1 && gone[0]["key"] == pods[1].uid.as_str(), "{gone}");
        assert!(!is_old(&pods[1]) && is_old(&pods[2]));

        // The runtime's GC without valid attachments in this network.
        let gc = json!({ "cniVersion": "1.1.0", "name": pods[2].network, "type": "podshaper", "cni.dev/valid-attachments": [] });
        ok(&pods[2].cni("GC").stdin(gc.to_string()));
        pods[2].assert_unlimited();
        assert!(!is_old(&pods[2]));
    });
}

/// The packets of a pod of an older layout wait in the same room as those of other pods.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_waiting_room_stays_for_a_pod_of_an_older_layout() {
    let is_there = || process::run(Command::new("ip").args(["link", "show", "podshaper-wait"])).is_ok();
    alone(|| {
        let [old, new] = [(); 2].map(|()| Sandbox::with_netns(Arc::new(netns_with_host_end().0)));
        old.call("ADD");
        age(&old);
        new.call("ADD");
        new.call("DEL");
        assert!(is_there());
        says(&["gc"]);
        assert!(is_there());
        old.call("DEL");
        assert!(!is_there());
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_new_add_moves_a_pod_to_the_new_layout_and_it_is_never_unlimited() {
    alone(|| {
        let pod = Sandbox::new();
        for _ in 0..10 {
            pod.call("ADD");
            let (id, old) = (container_id().unwrap(), pod.program("count_egress"));
            age(&pod);
            std::thread::scope(|scope| {
                let adding = scope.spawn(|| ok(&pod.cni_of("ADD", &id).stdin(pod.stdin_at(2 * RATE))));
                while !adding.is_finished() {
                    // bpftool does not read all links at the same moment: a link that disappears meanwhile may hide a
                    // new one.
                    let mut looks = [pod.attached(), pod.attached()];
                    looks.sort_by_key(Vec::len);
                    assert!(looks[1].len() >= PROGRAMS.len(), "unlimited for a moment: {looks:?}");
                }
            });
            pod.assert_limited(&id, 2 * RATE);
            assert!(!is_old(&pod) && pod.program("count_egress") != old);
            ok(&pod.cni_of("DEL", &id));
            pod.assert_unlimited();
        }
    });
}

/// An ADD adds the new attachment before it removes the attachment of the older layout. If it is killed in between,
/// both are left.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_late_del_does_not_take_the_new_limit_for_the_old_layouts() {
    alone(|| {
        let pod = Sandbox::new();
        pod.call("ADD");
        age(&pod);
        let [left, aside] = [pod.uid.as_str(), "aside"].map(|name| format!("{OLD}/{name}"));
        fs::rename(&left, &aside).unwrap();
        let id = container_id().unwrap();
        ok(&pod.cni_of("ADD", &id).stdin(pod.stdin_at(2 * RATE)));
        fs::rename(&aside, &left).unwrap();
        // The DEL of the earlier sandbox.
        pod.call("DEL");
        assert_eq!(pod.owner("eth0")["containerId"], id.as_str());
        assert!(!is_old(&pod));
        pod.assert_limited(&id, 2 * RATE);
        ok(&pod.cni_of("DEL", &id));
        pod.assert_unlimited();
    });
}
