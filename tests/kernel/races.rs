use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::mounts;
use crate::harness::cni::Cni;
use crate::harness::netns::Netns;
use crate::harness::pod::container_id;
use crate::sandbox::{ATTACHMENT, LINKS, NODE, Objects, PROGRAMS, RATE, Sandbox, netns_with, ok, within};

/// The names of an attachment's directory while it is made, and while it is replaced before Linux 5.17.
const UNFINISHED: [&str; 2] = ["eth0%new", "eth0%old"];

/// Starts a call and kills it after a moment. Returns whether the call had finished successfully before.
fn kill_after(cni: &Cni, stdin: &str, moment: Duration) -> bool {
    let mut command: Command = cni.command();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap().success()
}

/// Moments at equal distances, from before main() on: after `count` of them, a call of this undisturbed duration has
/// ended. The series goes on.
fn moments(count: u32, undisturbed: Duration) -> impl Iterator<Item = Duration> {
    (0..).map(move |n| undisturbed * n * 5 / (count * 4))
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_that_is_killed_anywhere_is_repaired_by_the_next() {
    const CALLS: u32 = 100;
    let pod = Sandbox::new();
    let (mut calls, mut finished, mut left) = (0, 0, 0);
    for moment in moments(CALLS, pod.call("ADD").elapsed) {
        // If the machine is busier now than at the undisturbed call, later moments are needed.
        if calls >= CALLS && finished > 0 || calls == 10 * CALLS {
            break;
        }
        calls += 1;
        let id = container_id().unwrap();
        finished += u32::from(kill_after(&pod.cni_of("ADD", &id), &pod.stdin_at(RATE), moment));
        let pins = pod.pins();
        left += u32::from(pins.contains_key(UNFINISHED[0]));
        let known = ["eth0", LINKS.0];
        assert!(pins.keys().all(|name| known.iter().chain(&UNFINISHED).any(|known| name == known)), "{pins:?}");
        // An attachment with its final name is complete.
        if pins.contains_key("eth0") {
            assert_eq!(pins["eth0"], ATTACHMENT);
        }
    }
    assert!(
        finished > 0 && finished < calls,
        "{finished} of {calls} finished, {left} left something: they were not killed in the middle"
    );
    let id = container_id().unwrap();
    ok(&pod.cni_of("ADD", &id).stdin(pod.stdin_at(2 * RATE)));
    pod.assert_limited(&id, 2 * RATE);
    let objects = pod.objects();
    ok(&pod.cni_of("DEL", &id));
    pod.assert_unlimited();
    objects.assert_freed();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_removes_what_a_killed_call_left() {
    let pod = Sandbox::new();
    let (add, del) = (pod.call("ADD").elapsed, pod.call("DEL").elapsed);
    for moment in moments(60, add).take(60) {
        kill_after(&pod.cni("ADD"), &pod.stdin_at(RATE), moment);
        pod.call("DEL");
        pod.assert_unlimited();
    }
    for moment in moments(60, del).take(60) {
        pod.call("ADD");
        kill_after(&pod.cni("DEL"), &pod.stdin_at(RATE), moment);
        pod.call("DEL");
        pod.assert_unlimited();
    }
}

/// All states in which a call can be killed, made by hand: the moments between two system calls are hard to hit.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn every_unfinished_state_is_cleared_by_a_del_and_by_an_add() {
    // With a second pod, the node's programs and their state outlive each attachment of the first.
    let beside = Sandbox::new();
    beside.call("ADD");
    let pod = Sandbox::new();
    let directory = pod.pod_directory();
    let at = |name: &str| directory.join(name);
    let remove_link = |name: &str| fs::remove_file(at(LINKS.0).join(name)).unwrap();
    let states: [(&str, &dyn Fn()); 9] = [
        ("ADD: the pod's directory is made", &|| fs::create_dir_all(&directory).unwrap()),
        ("ADD: the staging directory is made", &|| fs::create_dir_all(at("eth0%new")).unwrap()),
        ("ADD: some links are made", &|| {
            pod.call("ADD");
            remove_link("pace_tcp");
            fs::rename(at("eth0"), at("eth0%new")).unwrap();
        }),
        ("ADD: the node's programs are half pinned", &|| fs::create_dir_all(format!("{NODE}%new")).unwrap()),
        ("ADD: all pins are made", &|| {
            pod.call("ADD");
            fs::rename(at("eth0"), at("eth0%new")).unwrap();
        }),
        ("ADD before Linux 5.17: the old attachment is aside, the new one not yet in its place", &|| {
            pod.call("ADD");
            fs::rename(at("eth0"), at("eth0%old")).unwrap();
        }),
        ("DEL: the links are removed", &|| {
            pod.call("ADD");
            PROGRAMS.iter().for_each(|(_, name)| remove_link(name));
        }),
        ("DEL: the links and their directory are removed", &|| {
            pod.call("ADD");
            fs::remove_dir_all(at(LINKS.0)).unwrap();
        }),
        ("DEL: the record is removed", &|| {
            pod.call("ADD");
            fs::remove_dir_all(at(LINKS.0)).unwrap();
            fs::remove_file(at("eth0/OWNER")).unwrap();
        }),
    ];
    for (what, make) in states {
        // Shown when the test fails.
        eprintln!("{what}");
        make();
        pod.call("DEL");
        pod.assert_unlimited();

        make();
        let next = container_id().unwrap();
        ok(&pod.cni_of("ADD", &next).stdin(pod.stdin_at(2 * RATE)));
        pod.assert_limited(&next, 2 * RATE);
        ok(&pod.cni_of("DEL", &next));
        pod.assert_unlimited();

        make();
        ok(&Cni::new(env!("CARGO_BIN_EXE_podshaper"), "GC")
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(pod.stdin_with(json!({ "cni.dev/valid-attachments": [] }))));
        pod.assert_unlimited();
    }
    // A live attachment under the other name still belongs to its owner.
    states[5].1();
    let objects = pod.objects();
    ok(&pod.cni_of("DEL", &container_id().unwrap()));
    pod.assert_limited(&pod.container_id, RATE);
    pod.call("CHECK");
    pod.call("DEL");
    pod.assert_unlimited();
    beside.assert_limited(&beside.container_id, RATE);
    beside.call("DEL");
    objects.assert_freed();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn of_calls_for_one_pod_at_the_same_time_one_wins_whole() {
    let pod = Sandbox::new();
    // Each has a network namespace of its own, like the sandboxes of a pod: a runtime never makes two calls for one
    // sandbox at a time.
    let sandboxes: Vec<_> = (0..12).map(|_| (container_id().unwrap(), netns_with(&["eth0"]))).collect();
    let (first, next) = sandboxes.split_at(8);
    let rate = |id: &str| RATE + sandboxes.iter().position(|(other, _)| other == id).unwrap() as u64;
    let call = |verb, (id, netns): &(String, Netns)| {
        let netns = netns.path().display().to_string();
        ok(&pod.cni_of(verb, id).env("CNI_NETNS", netns).stdin(pod.stdin_at(rate(id))));
    };
    let assert_one_wins = |of: &[(String, Netns)]| {
        let owner = pod.owner("eth0");
        let winner = of.iter().find(|(id, _)| owner["containerId"] == **id).unwrap();
        pod.assert_limited(&winner.0, rate(&winner.0));
        call("CHECK", winner);
    };
    for _ in 0..10 {
        let call = &call;
        thread::scope(|scope| first.iter().for_each(|sandbox| drop(scope.spawn(move || call("ADD", sandbox)))));
        assert_one_wins(first);
        thread::scope(|scope| {
            first.iter().for_each(|sandbox| drop(scope.spawn(move || call("DEL", sandbox))));
            next.iter().for_each(|sandbox| drop(scope.spawn(move || call("ADD", sandbox))));
        });
        assert_one_wins(next);
        next.iter().for_each(|sandbox| call("DEL", sandbox));
        pod.assert_unlimited();
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn two_hundred_pods_come_and_go_eight_at_a_time_and_nothing_is_left() {
    let netns: Arc<Netns> = Arc::new(netns_with(&["eth0"]));
    let mut all = Objects::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|worker| {
                let netns = &netns;
                scope.spawn(move || {
                    let mut objects = Objects::default();
                    for n in 0..25 {
                        let pod = Sandbox::with_netns(Arc::clone(netns));
                        pod.call("ADD");
                        if n % 5 == worker % 5 {
                            pod.assert_limited(&pod.container_id, RATE);
                            objects.extend(pod.objects());
                        }
                        // Some pods' cgroups are removed before the DEL.
                        if n % 2 == 0 {
                            pod.cgroup.remove().unwrap();
                        }
                        pod.call("DEL");
                        assert!(!pod.pod_directory().exists());
                        assert!(within(Duration::from_secs(2), || pod.attached().is_empty()));
                    }
                    objects
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| all.extend(worker.join().unwrap()));
    });
    all.assert_freed();
}

/// At boot, before bpffs is mounted. A second bpffs mounted over the first would hide the first one's pins for ever.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn pods_that_find_no_bpffs_mount_it_once() {
    let bpffs = Path::new("/sys/fs/bpf");
    let netns = Arc::new(netns_with(&["eth0"]));
    let pods: Vec<Sandbox> = (0..8).map(|_| Sandbox::with_netns(Arc::clone(&netns))).collect();
    for _ in 0..5 {
        mounts::with_own(|| {
            mounts::without(bpffs);
            assert_eq!(mounts::count_at(bpffs), 0);
            let calls: Vec<_> = pods.iter().map(|pod| start(&pod.cni("ADD"), &pod.stdin_at(RATE))).collect();
            for (call, pod) in calls.into_iter().zip(&pods) {
                let output = call.wait_with_output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
                assert_eq!(mounts::count_at(bpffs), 1);
                pod.assert_limited(&pod.container_id, RATE);
            }
            pods.iter().for_each(|pod| drop(pod.call("DEL")));
        });
    }
}

/// Starts a call on this thread, and so in this thread's mounts.
fn start(cni: &Cni, stdin: &str) -> std::process::Child {
    let mut child = cni.command().spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child
}
