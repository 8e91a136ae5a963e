//! Parts of a limit that another tool may remove: filters, the waiting room, the pod's queue. The commands report the
//! loss, and sync restores the parts.

use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};

use super::sync::{Node, on_a_node};
use super::{call, listed, says};
use crate::harness::process;
use crate::sandbox::{Sandbox, netns_with_host_end, ok, refused};

const AGAIN: &str = "default/web eth0: held again\n";
const ROOM: &str = "podshaper-wait";
/// A datagram of 1400 bytes takes eleven milliseconds at this rate.
const RATE: u64 = 1_000_000;

fn run(program: &str, words: &str) -> String {
    process::run(Command::new(program).args(words.split(' '))).unwrap()
}

/// A pod with a limit in both directions.
struct Pod {
    sandbox: Sandbox,
    host_end: String,
}

impl Pod {
    fn new(node: &Node) -> Self {
        let (netns, host_end) = netns_with_host_end();
        let mut sandbox = Sandbox::with_netns(Arc::new(netns));
        sandbox.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": RATE, "ingressRate": RATE });
        for words in [
            "addr add 10.97.0.2/24 dev eth0",
            "link set eth0 up",
            "neigh replace 10.97.0.1 lladdr 02:00:00:00:00:01 dev eth0",
        ] {
            sandbox.netns.run("ip", &words.split(' ').collect::<Vec<_>>()).unwrap();
        }
        run("ip", &format!("link set {host_end} up"));
        sandbox.call("ADD");
        node.keep(&sandbox);
        Self { sandbox, host_end }
    }

    /// Sends datagrams from a process in the pod's namespace that is not in the pod's cgroup.
    fn send(&self, packets: u32) {
        // By the shell itself: starting a process for each datagram would take as long as the limit does.
        let script = format!("for ((i = 0; i < {packets}; i++)); do printf %1400s >/dev/udp/10.97.0.1/9; done");
        self.sandbox.netns.run("bash", &["-c", &script]).unwrap();
    }

    /// How many of twenty datagrams come back from the waiting room.
    fn waited(&self) -> u64 {
        let received = || {
            let shown: Value = serde_json::from_str(&run("ip", "-j -s link show podshaper-back")).unwrap();
            shown[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
        };
        let before = received();
        self.send(20);
        std::thread::sleep(std::time::Duration::from_millis(500));
        received() - before
    }

    fn listed(&self) -> Value {
        listed(&self.sandbox.uid).unwrap()
    }

    fn tc(&self, words: &str) -> String {
        self.sandbox.netns.run("tc", &words.split(' ').collect::<Vec<_>>()).unwrap()
    }

    /// Packets that left the pod by other paths.
    fn others(&self) -> u64 {
        self.listed()["egress"]["otherPaths"]["packets"].as_u64().unwrap()
    }

    fn filters(&self) -> String {
        ["ingress", "egress"].map(|hook| run("tc", &format!("filter show dev {} {hook}", self.host_end))).concat()
    }

    #[track_caller]
    fn assert_held(&self) {
        assert_eq!(self.listed()["notHeld"], Value::Null);
        assert!(!says(&["list", "--sample", "0"]).contains("not held"));
        assert!(metrics().contains(&format!("uid=\"{}\",interface=\"eth0\"}} 1\n", self.sandbox.uid)), "{}", metrics());
        assert!(!doctor().contains("not held"), "{}", doctor());
        self.sandbox.call("CHECK");
    }

    /// Asserts that all commands report the loss, with the reason.
    #[track_caller]
    fn assert_not_held(&self, reason: &str) {
        let found = self.listed();
        assert!(found["notHeld"].as_str().is_some_and(|text| text.contains(reason)), "{found:#}");
        let text = says(&["list", "--sample", "0"]);
        assert!(text.contains("default/web eth0: not held: ") && text.contains(reason), "{text}");
        let text = says(&["show", &self.sandbox.uid, "--sample", "0"]);
        assert!(text.contains("Not held    ") && text.contains(reason), "{text}");
        let text = metrics();
        let series = format!("uid=\"{}\",interface=\"eth0\"}} 0\n", self.sandbox.uid);
        assert!(text.contains(&series) && text.contains("podshaper_attachment_held{"), "{text}");
        let text = doctor();
        assert!(text.contains("not held as they were made") && text.contains(reason), "{text}");
        let (_, details) = refused(&self.sandbox.cni("CHECK"));
        assert!(details.contains(reason), "{details}");
    }
}

/// The metrics that tell whether attachments are held.
fn metrics() -> String {
    let text = says(&["metrics"]);
    let lines = text.lines().filter(|line| line.starts_with("podshaper_attachment_held{"));
    lines.map(|line| format!("{line}\n")).collect()
}

fn doctor() -> String {
    call(&["doctor"]).1
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn filters_that_somebody_took_off_are_put_back() {
    on_a_node(|| {
        let node = Node::new(json!({}));
        let pod = Pod::new(&node);
        let before = pod.filters();
        // The count may include packets that the kernel sends by itself.
        pod.send(5);
        assert!(pod.others() >= 5);
        pod.assert_held();
        assert_eq!(node.syncs(), "");
        run("tc", &format!("qdisc del dev {} clsact", pod.host_end));
        let counted = pod.others();
        pod.send(5);
        assert_eq!(pod.others(), counted);
        pod.assert_not_held("the program out_of_pod has been taken off the host's end of eth0");
        let found = pod.listed();
        assert_eq!(found["egress"]["otherPaths"]["held"], false);
        assert_eq!(node.sync(&["--dry-run"]).1, format!("would be: {AGAIN}"));
        assert_eq!(node.syncs(), AGAIN);
        assert_eq!(pod.filters(), before);
        pod.send(5);
        assert!(pod.others() >= counted + 5);
        pod.assert_held();
        assert_eq!(node.syncs(), "");
        // Only one of the filters is removed, beside another tool's filter.
        run("tc", &format!("filter add dev {} egress prio 50 protocol ip u32 match u32 0 0 flowid 1:1", pod.host_end));
        run("tc", &format!("filter del dev {} ingress prio 1", pod.host_end));
        assert_eq!(node.syncs(), AGAIN);
        assert!(pod.filters().contains("u32"), "{}", pod.filters());
        pod.assert_held();
        // A qdisc of another tool in the place of podshaper's stays, and sync reports the reason.
        run("tc", &format!("qdisc del dev {} clsact", pod.host_end));
        run("tc", &format!("qdisc add dev {} ingress", pod.host_end));
        let (code, stdout, stderr) = node.sync(&[]);
        assert!(code == 1 && stdout.is_empty() && stderr.contains("it has the qdisc ingress"), "{stdout}{stderr}");
        pod.assert_not_held("has been taken off the host's end");
        run("tc", &format!("qdisc del dev {} ingress", pod.host_end));
        assert_eq!(node.syncs(), AGAIN);
        pod.assert_held();
        // The DEL removes the clsact qdisc that podshaper has made.
        pod.sandbox.call("DEL");
        assert!(!run("tc", &format!("qdisc show dev {}", pod.host_end)).contains("clsact"));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_waiting_room_that_is_gone_is_made_anew_for_all() {
    on_a_node(|| {
        let node = Node::new(json!({}));
        let pods = [Pod::new(&node), Pod::new(&node)];
        let classes = || run("tc", &format!("class show dev {ROOM}")).lines().count();
        let before = classes();
        assert!(pods[0].waited() > 2);
        // A sync restores the waiting room, and packets of each pod wait in it again.
        run("ip", &format!("link del {ROOM}"));
        pods.iter().for_each(|pod| pod.assert_not_held("the waiting room podshaper-wait of the node is gone"));
        assert_eq!(node.syncs(), AGAIN.repeat(2));
        for pod in &pods {
            pod.assert_held();
            assert!(pod.waited() > 2);
        }
        assert_eq!(classes(), before);
        assert_eq!(node.syncs(), "");
        // An ADD restores the waiting room for the other pods as well.
        run("ip", &format!("link del {ROOM}"));
        let third = Pod::new(&node);
        for pod in pods.iter().chain([&third]) {
            pod.assert_held();
            assert!(pod.waited() > 2);
        }
        assert_eq!(node.syncs(), "");
        // Damage to the waiting room's programs, to its queue, and an interface that is down.
        for damage in [
            "tc qdisc del dev podshaper-back clsact",
            "tc qdisc del dev podshaper-wait root",
            "ip link set podshaper-wait down",
        ] {
            let (program, words) = damage.split_once(' ').unwrap();
            run(program, words);
            pods.iter().for_each(|pod| pod.assert_not_held("the waiting room podshaper-wait of the node"));
            assert_eq!(node.syncs(), AGAIN.repeat(3), "{damage}");
            pods.iter().for_each(|pod| {
                pod.assert_held();
                let waited = pod.waited();
                assert!(
                    waited > 2,
                    "{damage}: {waited}\n{}\n{}",
                    run("tc", "-s class show dev podshaper-wait"),
                    run("tc", "qdisc show")
                );
            });
        }
        pods.iter().chain([&third]).for_each(|pod| drop(pod.sandbox.call("DEL")));
        assert!(!run("ip", "-o link").contains(ROOM));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_queue_that_the_pod_took_off_is_put_back() {
    on_a_node(|| {
        let node = Node::new(json!({}));
        let pod = Pod::new(&node);
        // Without the handles that the kernel assigns, from 8000: on (`qdisc_alloc_handle`).
        let is_assigned = |word: &&str| {
            let handle = word.strip_suffix(':').and_then(|handle| u16::from_str_radix(handle, 16).ok());
            handle.is_some_and(|handle| handle >= 0x8000)
        };
        let queue = || {
            let shown = pod.tc("qdisc show dev eth0") + &pod.tc("class show dev eth0");
            shown.split_whitespace().filter(|word| !is_assigned(word)).collect::<Vec<_>>().join(" ")
        };
        let before = queue();
        assert!(before.contains(" 7064: root"), "{before}");
        let kind = if before.contains("fq 7064:") { "fq" } else { "htb" };
        pod.assert_held();
        pod.tc("qdisc del dev eth0 root");
        pod.assert_not_held(&format!("{kind} has been taken off eth0"));
        assert_eq!(node.syncs(), AGAIN);
        assert_eq!(queue(), before);
        pod.assert_held();
        assert_eq!(node.syncs(), "");
        // Another queue that the pod has added stays.
        pod.tc("qdisc replace dev eth0 root handle 5: pfifo");
        let (code, stdout, stderr) = node.sync(&[]);
        assert!(
            code == 1 && stdout.is_empty() && stderr.contains("it has the qdisc pfifo already"),
            "{stdout}{stderr}"
        );
        assert!(queue().contains("pfifo 5: root"), "{}", queue());
        pod.assert_not_held(&format!("{kind} has been taken off eth0"));
        pod.tc("qdisc del dev eth0 root");
        assert_eq!(node.syncs(), AGAIN);
        assert_eq!(queue(), before);
        // A pod that renames its interface is still limited by the same queue.
        for words in ["link set eth0 down", "link set eth0 name eth1", "link set eth1 up"] {
            pod.sandbox.netns.run("ip", &words.split(' ').collect::<Vec<_>>()).unwrap();
        }
        assert_eq!(pod.listed()["notHeld"], Value::Null);
        assert_eq!(node.syncs(), "");
        pod.sandbox.netns.run("ip", &["link", "set", "eth1", "down"]).unwrap();
        pod.sandbox.netns.run("ip", &["link", "set", "eth1", "name", "eth0"]).unwrap();
        ok(&pod.sandbox.cni("DEL"));
    });
}

/// A removed interface does not reserve its name: the network may make it again in the same sandbox.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_interface_that_was_made_anew_is_held_by_the_next_add() {
    on_a_node(|| {
        let node = Node::new(json!({}));
        let pod = Pod::new(&node);
        pod.sandbox.netns.run("ip", &["link", "del", "eth0"]).unwrap();
        assert_eq!(pod.listed()["notHeld"], Value::Null, "nothing passes it");
        assert_eq!(node.syncs(), "");
        let netns = pod.sandbox.netns.name();
        run("ip", &format!("link add {} type veth peer name eth0 netns {netns}", pod.host_end));
        pod.sandbox.call("ADD");
        pod.assert_held();
        pod.sandbox.call("DEL");
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn whether_other_paths_are_held_follows_the_configuration() {
    on_a_node(|| {
        let node = Node::new(json!({ "otherPaths": false }));
        let mut pod = Pod::new(&node);
        pod.sandbox.call("DEL");
        pod.sandbox.stdin.insert("otherPaths".into(), json!(false));
        pod.sandbox.call("ADD");
        let is_held = || pod.listed()["egress"]["otherPaths"]["held"].clone();
        assert_eq!((is_held(), node.syncs()), (json!(false), String::new()));
        for held in [true, false, true] {
            node.configure(json!({ "otherPaths": held }));
            assert_eq!(node.syncs(), "default/web eth0: attached anew\n");
            assert_eq!((is_held(), node.syncs()), (json!(held), String::new()));
        }
        pod.sandbox.call("DEL");
    });
}
