use std::fs;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};

use super::mounts;
use crate::harness::cni::Cni;
use crate::harness::pod::container_id;
use crate::harness::process;
use crate::sandbox::{LINKS, RATE, Sandbox, netns_with, netns_with_host_end, ok, refused};

const CONFIG: u64 = 7;
const UNAVAILABLE: u64 = 50;
const MISMATCH: u64 = 102;

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn check_names_what_is_not_as_asked_for() {
    let pod = Sandbox::new();
    let (uid, directory) = (&pod.uid, pod.pod_directory().join("eth0").display().to_string());
    let links = pod.pod_directory().join(LINKS.0).display().to_string();
    let nothing = format!("eth0 of pod {uid} has no shaper, but a limit was asked for");
    assert_eq!(refused(&pod.cni("CHECK")), (MISMATCH, nothing.clone()));
    ok(&pod.cni("CHECK").stdin(pod.stdin_with(json!({ "runtimeConfig": null }))));

    pod.call("ADD");
    assert_eq!(pod.call("CHECK").stdout, "");
    let differ = format!(
        "{directory} limits egress to 10000000 bit/s with a burst of 12000000 ns, but 20000000 bit/s and 6000000 ns were asked \
         for (0: no limit)"
    );
    assert_eq!(refused(&pod.cni("CHECK").stdin(pod.stdin_at(2 * RATE))), (MISMATCH, differ));
    let stranger = container_id().unwrap();
    let another = |network: &str| {
        format!("eth0 of pod {uid} is shaped for container {} of network {network}, not for this one", pod.container_id)
    };
    assert_eq!(refused(&pod.cni_of("CHECK", &stranger)), (MISMATCH, another(&pod.network)));
    let other_network = pod.stdin_with(json!({ "name": "another" }));
    assert_eq!(refused(&pod.cni("CHECK").stdin(other_network)), (MISMATCH, another(&pod.network)));

    for name in ["count_egress", "note_setsockopt", "pace_tcp"] {
        fs::remove_file(format!("{links}/{name}")).unwrap();
        let missing = format!("open the link {links}/{name}: No such file or directory (os error 2)");
        assert_eq!(refused(&pod.cni("CHECK")), (MISMATCH, missing));
        pod.call("ADD");
        pod.call("CHECK");
    }

    pod.cgroup.remove().unwrap();
    let cgroup = pod.cgroup.path().display();
    let gone = format!("find the cgroup {cgroup}: No such file or directory (os error 2)");
    assert_eq!(refused(&pod.cni("CHECK")), (MISMATCH, gone));
    pod.cgroup.make().unwrap();
    let (code, details) = refused(&pod.cni("CHECK"));
    let dead = format!("the link {links}/count_egress is dead: its cgroup is gone");
    // The kernel detaches a link a moment after the removal of its cgroup.
    let elsewhere = format!("the link {links}/count_egress is on the cgroup with id ");
    assert!(code == MISMATCH && (details == dead || details.starts_with(&elsewhere)), "{details}");
    pod.call("DEL");
    assert_eq!(refused(&pod.cni("CHECK")), (MISMATCH, nothing));
}

/// A limit needs qdiscs as well as programs, and another tool may remove a qdisc with `tc`.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn check_misses_a_qdisc_that_was_taken_off() {
    let (netns, host_end) = netns_with_host_end();
    let pod = Sandbox::with_netns(Arc::new(netns));
    let path = &pod.stdin["runtimeConfig"]["cgroupPath"];
    for direction in ["ingressRate", "egressRate"] {
        let asked = json!({ "bandwidth": { direction: RATE }, "cgroupPath": path });
        let stdin = pod.stdin_with(json!({ "runtimeConfig": asked }));
        ok(&pod.cni("ADD").stdin(&stdin));
        ok(&pod.cni("CHECK").stdin(&stdin));
        let owner = pod.owner("eth0");
        let delete = ["qdisc", "del", "root", "dev"];
        let inside = ["fq", "htb"].into_iter().find(|queue| owner[queue] == true);
        let what = match inside {
            Some(queue) => {
                pod.netns.run("tc", &[&delete[..], &["eth0"]].concat()).unwrap();
                queue
            }
            None if owner["ingressBy"] == "tbf" => {
                process::run(Command::new("tc").args(delete).arg(&host_end)).unwrap();
                "tbf, at the host's end,"
            }
            None => continue,
        };
        let gone = format!("{what} has been taken off eth0 of {}: podshaper put it there", pod.netns.path().display());
        assert_eq!(refused(&pod.cni("CHECK").stdin(&stdin)), (MISMATCH, gone));
        ok(&pod.cni("ADD").stdin(&stdin));
        ok(&pod.cni("CHECK").stdin(&stdin));
    }
    pod.call("DEL");
}

/// A runtime calls STATUS every few seconds. The second calls run without any capability, so they would fail if they
/// tried anything again.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn status_finds_out_what_a_limit_needs_once_and_remembers() {
    let may_not = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let status = |keys: &str, wrapper: &[&str]| {
        let stdin = format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "podshaper"{keys}}}"#);
        let call = ok(&Cni::new(env!("CARGO_BIN_EXE_podshaper"), "STATUS").stdin(stdin).through(wrapper));
        assert_eq!(call.stdout, "");
        call.stderr
    };
    mounts::with_own(|| {
        mounts::without_memory();
        assert_eq!(status("", &[]), "");
        let all_limited = r#", "egress": "10M", "ingress": "10M""#;
        assert_eq!((status("", &may_not), status(all_limited, &may_not)), (String::new(), String::new()));
        // The memory of an earlier version of the program.
        process::run(Command::new("touch").args(["--date", "1990-01-01", "/run/podshaper/status"])).unwrap();
        assert!(status("", &may_not).contains("[WARN] this node cannot limit pods"));
    });
}

/// A configuration with which every pod's ADD fails.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn status_is_not_fine_where_the_configuration_fails_every_add() {
    let status = |keys: &str| {
        let stdin = format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "podshaper", {keys}}}"#);
        Cni::new(env!("CARGO_BIN_EXE_podshaper"), "STATUS").stdin(stdin)
    };
    let unreadable = |key: &str| format!("configuration key \"{key}\": \"fast\" is not a rate");
    for (keys, expected, text) in [
        (r#""egress": "fast""#, CONFIG, unreadable("egress")),
        (r#""max": {"ingress": "fast"}"#, CONFIG, unreadable("max.ingress")),
        (r#""kubeconfig": "/nowhere/kubeconfig""#, UNAVAILABLE, "open the kubeconfig /nowhere/kubeconfig".to_owned()),
    ] {
        let (code, details) = refused(&status(keys));
        assert!(code == expected && details.starts_with(&text), "{keys}: {code} {details}");
    }
    mounts::with_own(|| {
        mounts::without_memory();
        let forgiving = status(r#""kubeconfig": "/nowhere/kubeconfig", "onApiError": "ignore""#);
        assert_eq!(ok(&forgiving).stderr, "");
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn gc_removes_what_is_of_its_network_and_not_named() {
    let mut pods: Vec<Sandbox> = (0..4).map(|_| Sandbox::with_netns(Arc::new(netns_with(&["eth0", "net1"])))).collect();
    let network = pods[0].network.clone();
    // The last pod is in another network.
    pods[..3].iter_mut().for_each(|pod| drop(pod.stdin.insert("name".into(), json!(network))));
    pods.iter().for_each(|pod| drop(pod.call("ADD")));
    ok(&pods[0].cni("ADD").env("CNI_IFNAME", "net1"));
    let objects = pods[2].objects();

    let gc = |keys: Value| {
        let mut stdin = json!({ "cniVersion": "1.1.0", "name": network, "type": "podshaper" });
        stdin.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let call = Cni::new(env!("CARGO_BIN_EXE_podshaper"), "GC").env("CNI_PATH", "/opt/cni/bin");
        ok(&call.stdin(stdin.to_string()))
    };
    let kept = || pods.iter().map(|pod| pod.interfaces().join(" ")).collect::<Vec<_>>();
    let named = |pod: usize, interface| json!({ "containerID": pods[pod].container_id, "ifname": interface });
    for keys in [json!({}), json!({ "cni.dev/valid-attachments": null })] {
        gc(keys);
        assert_eq!(kept(), ["eth0 net1", "eth0", "eth0", "eth0"]);
    }
    let stale = gc(json!({ "cni.dev/valid-attachments": [named(0, "eth0"), named(1, "eth0"), named(2, "net1")] }));
    assert_eq!(stale.stdout, "");
    assert_eq!(kept(), ["eth0", "eth0", "", "eth0"]);
    objects.assert_freed();
    pods[0].call("CHECK");
    gc(json!({ "cni.dev/valid-attachments": [] }));
    assert_eq!(kept(), ["", "", "", "eth0"]);
    pods[3].call("CHECK");
    pods[3].call("DEL");
    pods.iter().for_each(Sandbox::assert_unlimited);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_log_file_takes_the_lines_and_one_that_cannot_be_opened_costs_no_pod() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("podshaper.log");
    let pod = Sandbox::new();
    let logging = |verb, file: &str, level| {
        ok(&pod.cni(verb).stdin(pod.stdin_with(json!({ "logFile": file, "logLevel": level, "otherPaths": false }))))
    };
    let add = logging("ADD", file.to_str().unwrap(), "info");
    assert_eq!(add.stderr, "");
    let lines = || fs::read_to_string(&file).unwrap().lines().map(str::to_owned).collect::<Vec<_>>();
    let first = lines();
    let said = format!("[INFO] default/web ({}) eth0: egress 10Mbit/s", pod.uid);
    assert!(first.len() == 1 && first[0].contains(&said), "{first:?}");
    logging("DEL", file.to_str().unwrap(), "off");
    assert_eq!(lines(), first);
    logging("DEL", file.to_str().unwrap(), "debug");
    assert!(
        lines().len() == 2 && lines()[0] == first[0] && lines()[1].contains("[DEBUG] podshaper::cni: DEL of network"),
        "{:?}",
        lines()
    );

    for unwritable in ["/proc/podshaper.log".to_owned(), directory.path().display().to_string()] {
        let add = logging("ADD", &unwritable, "info");
        assert!(add.stderr.contains(&format!("open logFile {unwritable}: ")) && add.stderr.contains(&said), "{add}");
        pod.assert_limited(&pod.container_id, RATE);
    }
    let failed = pod.cni("ADD").env("CNI_NETNS", "/run/netns/podshaper-nowhere");
    refused(&failed.stdin(pod.stdin_with(json!({ "logFile": file }))));
    assert!(lines()[2].contains("[ERROR] enter the pod's netns /run/netns/podshaper-nowhere"), "{:?}", lines());
    pod.call("DEL");
}
