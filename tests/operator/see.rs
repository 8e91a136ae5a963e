use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{call, limited_both_ways, listed, podshaper, refuses, says};
use crate::chain::{Bed, MBIT};
use crate::harness::limiter::Limiter;
use crate::harness::measure::{self, Bulk};
use crate::sandbox::{LINKS, RATE};

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_pod_is_listed_with_its_limits_until_it_is_deleted() {
    let pod = limited_both_ways(None);
    assert_eq!(listed(&pod.uid), None);
    pod.call("ADD");
    let entry = listed(&pod.uid).unwrap();
    for (key, value) in [
        ("name", Value::from("default/web")),
        ("interface", "eth0".into()),
        ("containerId", pod.container_id.as_str().into()),
        ("network", pod.network.as_str().into()),
        ("cgroup", pod.cgroup.path().to_str().unwrap().into()),
        ("links", "live".into()),
        ("changed", false.into()),
        ("problem", Value::Null),
    ] {
        assert_eq!(entry[key], value, "{key} in {entry}");
    }
    for (direction, rate) in [("egress", RATE), ("ingress", 2 * RATE)] {
        assert_eq!(entry[direction]["limitBitsPerS"], rate);
        // The least burst of ten packets is more than 5 ms of either rate.
        assert_eq!(entry[direction]["burstBits"], 120_000);
        for key in ["bytes", "packets", "drops", "marks"] {
            assert_eq!(entry[direction][key], 0, "{direction} {key}");
        }
    }
    assert_eq!(Some(entry["ingress"]["by"].as_str().unwrap()), pod.owner("eth0")["ingressBy"].as_str());
    assert!(entry["ageSeconds"].as_u64().unwrap() < 60, "{entry}");

    let table = says(&["list", "--sample", "0"]);
    let lines: Vec<_> = table.lines().filter(|line| line.ends_with(&format!("pod{}", pod.uid))).collect();
    assert!(lines.len() == 2 && lines[0].contains(" egress ") && lines[1].contains(" ingress "), "{table}");
    // A pod is found by its UID, by the UID's beginning, and by the container's id. The name alone is used by many
    // tests.
    for name in [&pod.uid, &pod.uid[..13], &pod.container_id] {
        let shown = says(&["show", name, "--sample", "0"]);
        assert!(shown.contains(&pod.container_id) && shown.contains("10Mbit/s, burst 120kbit, by pacing"), "{shown}");
    }
    pod.call("DEL");
    assert_eq!(listed(&pod.uid), None);
    let unknown = refuses(&["show", &pod.uid]);
    let expected = format!("podshaper: find \"{}\": no such pod is limited (podshaper list shows all)\n", pod.uid);
    assert_eq!(unknown, expected);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn links_that_are_not_live_are_told() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    std::fs::remove_file(pod.pod_directory().join(LINKS.0).join("pace_tcp")).unwrap();
    let entry = listed(&pod.uid).unwrap();
    let (links, faults) = (entry["links"].as_str().unwrap(), entry["linkFaults"].to_string());
    assert!(links.ends_with(" live") && links.contains(" of ") && faults.contains("pace_tcp"), "{links} {faults}");
    pod.cgroup.remove().unwrap();
    assert_eq!(listed(&pod.uid).unwrap()["links"], "dead");
    assert!(says(&["show", &pod.uid, "--sample", "0"]).contains("its cgroup is gone"));
    pod.call("DEL");
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn pods_that_share_the_beginning_of_a_name_are_not_confused() {
    let (one, other) = (limited_both_ways(None), limited_both_ways(None));
    one.call("ADD");
    other.call("ADD");
    let text = refuses(&["set", "default/web", "--egress", "1M"]);
    assert!(text.contains(&one.uid) && text.contains(&other.uid) && text.contains("write more of it"), "{text}");
    assert_eq!(one.rates("eth0"), [RATE, 2 * RATE]);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn what_passes_is_seen_as_it_is() {
    let bed = Bed::new();
    let pod = bed.pod(Limiter::Podshaper, 20 * MBIT);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| measure::bulk(&pod, &Bulk { flows: 4, seconds: 4.0, ..Bulk::default() }).unwrap());
        std::thread::sleep(Duration::from_millis(1500));
        let text = says(&["list", "-o", "json"]);
        let all: Value = serde_json::from_str(&text).unwrap();
        let entry = all.as_array().unwrap().iter().find(|entry| entry["key"] == pod.uid.as_str()).unwrap();
        let now = entry["egress"]["currentBitsPerS"].as_f64().unwrap();
        assert!((10e6..22e6).contains(&now), "{now} bit/s through 20 Mbit/s");
        let shown = says(&["show", &pod.uid, "--sample", "0.5"]);
        assert!(shown.contains('█') && shown.contains("ms"), "{shown}");
        sending.join().unwrap();
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn top_prints_lines_where_there_is_no_terminal() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    let text = says(&["top", "-n", "0.1", "--count", "3"]);
    assert_eq!(text.lines().filter(|line| line.ends_with(&format!("pod{}", pod.uid))).count(), 6, "{text}");
    // top ends when its reader closes the pipe.
    let mut top = podshaper(&["top", "-n", "0.1"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(top.stdout.take());
    let start = Instant::now();
    assert_eq!(top.wait().unwrap().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn top_draws_on_a_terminal_and_leaves_it_as_it_was() {
    let pod = limited_both_ways(None);
    pod.call("ADD");
    // script(1) provides the terminal.
    let program = env!("CARGO_BIN_EXE_podshaper");
    let line = format!("stty rows 200 cols 200; {program} top -n 0.2 --count 2; echo ended $?");
    let output = Command::new("script").args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in ["\u{1b}[?1049h", "\u{1b}[?1049l", "LAST", "default/web", "ended 0"] {
        assert!(text.contains(expected), "no {expected:?} in {text:?}");
    }
    assert_eq!(call(&["top", "--interval", "0.01"]).0, 2);
}
