//! Changes beside a pod's rates that sync follows: namespaces, bursts, lists of subnets, and pods for which no
//! runtime calls podshaper.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::sync::{EGRESS, INGRESS, Node, list, on_a_node};
use super::{call, listed, says};
use crate::api::{ApiServer, Reply};
use crate::chain::MBIT;
use crate::harness::measure;
use crate::harness::process;
use crate::sandbox::{Sandbox, netns_with_host_end, ok, refused, within};

/// An API server with these pods in the namespace "default", and with the labels of that namespace.
fn server(pods: &[(&str, Value)], labels: &Value) -> ApiServer {
    let namespace = json!({ "metadata": { "name": "default", "uid": "n-1", "labels": labels } });
    let namespaces = json!({ "metadata": {}, "items": [namespace] });
    let pod = pods.first().map(|(uid, annotations)| Reply::pod(uid, &Value::Null, annotations));
    let mut replies = vec![
        ("/api/v1/pods?", Reply::json("200 OK", &list(pods))),
        ("/api/v1/namespaces?", Reply::json("200 OK", &namespaces)),
    ];
    replies.extend(pod.map(|pod| ("/api/v1/namespaces/default/pods/", pod)));
    replies.push(("/api/v1/namespaces/default", Reply::json("200 OK", &namespace)));
    ApiServer::start(Reply::ByPath(replies)).unwrap()
}

fn kubeconfig(server: &ApiServer) -> Value {
    json!(server.kubeconfig(&json!({}), &json!({})).unwrap())
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn rates_of_a_namespace_hold_at_add_and_are_followed() {
    on_a_node(|| {
        let (mut node, pod) = (Node::new(json!({})), Sandbox::new());
        let rules = |egress: &str| json!([{ "labels": { "tier": "free" }, "max": { "egress": egress } }]);
        let labelled = |tier: &str| server(&[(&pod.uid, json!({ EGRESS: "10M" }))], &json!({ "tier": tier }));
        let api = labelled("free");
        let keys = json!({ "kubeconfig": kubeconfig(&api), "namespaces": rules("5M") });
        ok(&pod.cni("ADD").stdin(pod.stdin_with(keys.clone())));
        pod.assert_rates([5 * MBIT, 0]);
        let asked =
            api.requests().iter().map(|request| request.split(' ').nth(1).unwrap().to_owned()).collect::<Vec<_>>();
        assert_eq!(asked, ["/api/v1/namespaces/default/pods/web", "/api/v1/namespaces/default"]);
        assert_eq!(pod.owner("eth0")["maxEgress"], 5 * MBIT, "what set does not go beyond");
        node.keep(&pod);
        node.configure(keys);
        node.server = Some(api);
        assert_eq!(node.syncs(), "");
        // The administrator's rule for the namespace, then another label of the namespace.
        let api = labelled("free");
        node.configure(json!({ "kubeconfig": kubeconfig(&api), "namespaces": rules("4M") }));
        node.server = Some(api);
        assert_eq!(node.syncs(), "default/web eth0: egress 4Mbit/s, burst 120kbit (was 5Mbit/s, burst 120kbit)\n");
        node.server = Some(labelled("paid"));
        assert_eq!(node.syncs(), "default/web eth0: egress 10Mbit/s, burst 120kbit (was 4Mbit/s, burst 120kbit)\n");
        // Where podshaper may not read the labels, all limits stay.
        let pods = Reply::json("200 OK", &list(&[(&pod.uid, json!({ EGRESS: "20M" }))]));
        let refusal = Reply::status("403 Forbidden", "no namespaces for you");
        let replies = vec![("/api/v1/pods?", pods), ("/api/v1/namespaces", refusal)];
        node.server = Some(ApiServer::start(Reply::ByPath(replies)).unwrap());
        let (code, stdout, stderr) = node.sync(&[]);
        assert!(
            code == 1
                && stdout.is_empty()
                && stderr.contains("for the namespaces: it answered 403 \"no namespaces for you\""),
            "{stdout}{stderr}"
        );
        pod.assert_rates([10 * MBIT, 0]);
        pod.call("DEL");
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_burst_by_annotation_is_in_force_and_followed_and_a_misspelt_one_is_told() {
    on_a_node(|| {
        let (mut node, mut pod) = (Node::new(json!({})), Sandbox::new());
        // As passed by kubelet and containerd: no burst in the runtime's bandwidth.
        pod.stdin["runtimeConfig"]["io.kubernetes.cri.pod-annotations"] =
            json!({ EGRESS: "10M", "podshaper.io/egress-burst": "800k" });
        pod.call("ADD");
        let burst = |pod: &Sandbox| listed(&pod.uid).unwrap()["egress"]["burstBits"].clone();
        assert_eq!(burst(&pod), 800_000);
        pod.call("CHECK");
        node.keep(&pod);
        node.ask(&[(&pod.uid, json!({ EGRESS: "10M", "podshaper.io/egress-burst": "400k" }))]);
        assert_eq!(node.syncs(), "default/web eth0: egress 10Mbit/s, burst 400kbit (was 10Mbit/s, burst 800kbit)\n");
        // The runtime's own burst takes precedence.
        let mut runtime = pod.stdin["runtimeConfig"].clone();
        runtime["bandwidth"]["egressBurst"] = json!(160_000);
        ok(&pod.cni("ADD").stdin(pod.stdin_with(json!({ "runtimeConfig": runtime }))));
        assert_eq!(burst(&pod), 160_000);
        let misspelt = json!({ EGRESS: "10M", "podshaper.io/egress-brust": "400k" });
        let right = "those are podshaper.io/egress-burst, podshaper.io/ingress-burst";
        node.ask(&[(&pod.uid, misspelt.clone())]);
        let (code, _, stderr) = node.sync(&[]);
        assert!(
            code == 1
                && stderr.contains("\"podshaper.io/egress-brust\" is none of podshaper's")
                && stderr.contains(right),
            "{stderr}"
        );
        pod.stdin["runtimeConfig"]["io.kubernetes.cri.pod-annotations"] = misspelt;
        let (code, details) = refused(&pod.cni("ADD"));
        assert!(code == 7 && details.contains(right), "{code} {details}");
        pod.call("DEL");
        pod.assert_unlimited();
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_list_of_subnets_reaches_running_pods_and_counters_go_on() {
    on_a_node(|| {
        let (mut node, pod) = (Node::new(json!({})), Sandbox::with_netns(Arc::new(netns_with_host_end().0)));
        pod.call("ADD");
        node.keep(&pod);
        send_within(&pod);
        let counted = |pod: &Sandbox| listed(&pod.uid).unwrap()["egress"]["bytes"].as_u64().unwrap();
        let before = counted(&pod);
        assert!(before > 0);
        node.configure(json!({ "exemptSubnets": ["10.97.0.0/16"] }));
        assert_eq!(node.syncs(), "default/web eth0: attached anew\n");
        assert_eq!(node.syncs(), "");
        assert_eq!(counted(&pod), before, "what was counted stays");
        // The destination is exempt from now on.
        send_within(&pod);
        assert_eq!(counted(&pod), before);
        node.configure(json!({}));
        assert_eq!(node.syncs(), "default/web eth0: attached anew\n");
        send_within(&pod);
        assert_eq!(counted(&pod), 2 * before);
        // A limit for the other direction does not reset the counters of this direction either.
        node.ask(&[(&pod.uid, json!({ EGRESS: "10M", INGRESS: "20M" }))]);
        assert_eq!(node.syncs(), "default/web eth0: ingress 20Mbit/s, burst 120kbit (was no limit)\n");
        assert_eq!(counted(&pod), 2 * before);
        // A limit that ends and is set again begins with new counters.
        node.ask(&[(&pod.uid, json!({ INGRESS: "20M" }))]);
        node.syncs();
        node.ask(&[(&pod.uid, json!({ EGRESS: "10M", INGRESS: "20M" }))]);
        node.syncs();
        assert_eq!(counted(&pod), 0);
        pod.call("DEL");
    });
}

/// Sends a datagram from the pod's cgroup and namespace to an address without a host.
fn send_within(pod: &Sandbox) {
    for words in [
        "addr replace 10.97.0.2/24 dev eth0",
        "link set eth0 up",
        "route replace default via 10.97.0.1",
        "neigh replace 10.97.0.1 lladdr 02:00:00:00:00:01 dev eth0",
    ] {
        pod.netns.run("ip", &words.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let container = pod.cgroup.container("c1").unwrap();
    let send = format!("echo $$ >{}/cgroup.procs; echo hello >/dev/udp/10.97.0.1/9", container.display());
    pod.netns.run("bash", &["-c", &send]).unwrap();
}

/// A process in a pod, which ends when this is dropped.
struct Process(std::process::Child);

impl Process {
    fn start(pod: &Sandbox, mut command: Command) -> Self {
        let procs = pod.cgroup.container("c1").unwrap().join("cgroup.procs");
        let script = format!("echo $$ >{}; exec sleep 60", procs.display());
        let child = command.args(["bash", "-c", &script]).stdin(Stdio::null()).spawn().unwrap();
        let is_there = || fs::read_to_string(&procs).is_ok_and(|text| !text.is_empty());
        assert!(within(Duration::from_secs(5), is_there));
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_pod_of_the_nodes_own_network_is_limited_by_its_annotation_alone() {
    let _alone = measure::alone();
    on_a_node(|| {
        let mut node = Node::new(json!({ "max": { "egress": "50M" } }));
        let (host_pod, quiet, other) = (Sandbox::new(), Sandbox::new(), Sandbox::new());
        // An interface of the node, without a host behind it.
        let (_netns, host_end) = netns_with_host_end();
        for words in [
            format!("addr add 10.96.0.1/24 dev {host_end}"),
            format!("link set {host_end} up"),
            format!("neigh replace 10.96.0.2 lladdr 02:00:00:00:00:01 dev {host_end}"),
        ] {
            process::run(Command::new("ip").args(words.split(' '))).unwrap();
        }
        let _processes = [
            Process::start(&host_pod, Command::new("env")),
            Process::start(&quiet, Command::new("env")),
            // A pod of a runtime that stores no results.
            Process::start(&other, enter(&other)),
        ];
        let asked = |annotations: Value| {
            [
                (host_pod.uid.clone(), annotations),
                (quiet.uid.clone(), json!({ "app": "dns" })),
                (other.uid.clone(), json!({ EGRESS: "10M" })),
            ]
        };
        let ask = |node: &mut Node, annotations: Value| {
            let pods = asked(annotations);
            node.ask(&pods.each_ref().map(|(uid, annotations)| (uid.as_str(), annotations.clone())));
        };
        ask(&mut node, json!({ EGRESS: "100M", INGRESS: "20M" }));
        let (code, said, stderr) = node.sync(&[]);
        // The rate is bounded by the configuration's max. The other pods get no limit.
        let lines = "default/web *: egress 50Mbit/s, burst 250kbit (was no limit)\ndefault/web *: ingress 20Mbit/s, burst 120kbit (was no limit)\n";
        assert_eq!((code, said.as_str()), (0, lines), "{stderr}");
        assert!(stderr.contains("receives is limited by drops"), "{stderr}");
        assert!(listed(&quiet.uid).is_none() && listed(&other.uid).is_none());
        let found = listed(&host_pod.uid).unwrap();
        assert_eq!(
            (&found["interface"], &found["name"], &found["ingress"]["by"]),
            (&json!("*"), &json!("default/web"), &json!("drops"))
        );
        // The table agrees: on every interface, and ingress above the limit is dropped.
        let table = says(&["list", "--sample", "0"]);
        let line = table.lines().find(|line| line.contains(" ingress ")).unwrap();
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>()[..6],
            ["default/web", "*", "ingress", "20M", "120k", "drops"]
        );
        assert_eq!(node.syncs(), "");
        // Traffic on every interface except loopback is counted.
        let procs = host_pod.cgroup.path().join("c1/cgroup.procs");
        let send = |address: &str| {
            let script = format!("echo $$ >{}; echo hello >/dev/udp/{address}/9", procs.display());
            process::run(Command::new("bash").args(["-c", &script])).unwrap();
        };
        let counted = || listed(&host_pod.uid).unwrap()["egress"]["packets"].as_u64().unwrap();
        send("127.0.0.1");
        assert_eq!(counted(), 0);
        send("10.96.0.2");
        assert!(within(Duration::from_secs(5), || counted() == 1), "{}", counted());
        // The limit follows the pod's annotation, and a limit that was set by hand stays, as with any pod.
        ask(&mut node, json!({ EGRESS: "5M" }));
        let said = node.syncs();
        assert!(said.contains("egress 5Mbit/s") && said.contains("ingress no limit (was 20Mbit/s"), "{said}");
        assert_eq!(counted(), 1);
        says(&["set", &host_pod.uid, "--egress", "7M"]);
        assert_eq!(node.syncs(), "");
        ask(&mut node, json!({}));
        assert_eq!(node.syncs(), "default/web *: egress no limit (was 7Mbit/s, burst 120kbit)\n");
        assert!(listed(&host_pod.uid).is_none());
        // The limit is removed together with its pod.
        ask(&mut node, json!({ EGRESS: "5M" }));
        node.syncs();
        host_pod.cgroup.remove().unwrap();
        node.ask(&[(&other.uid, json!({}))]);
        assert_eq!(node.syncs(), "default/web *: cleared, its cgroup is gone\n");
        process::run(Command::new("ip").args(["link", "del", &host_end])).unwrap();
    });
}

fn enter(pod: &Sandbox) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", pod.netns.path().display()));
    command
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_cgroup_that_two_pods_are_said_to_have_is_refused() {
    on_a_node(|| {
        let (first, mut second) = (Sandbox::new(), Sandbox::new());
        first.call("ADD");
        second.stdin["runtimeConfig"]["cgroupPath"] = first.stdin["runtimeConfig"]["cgroupPath"].clone();
        let (code, details) = refused(&second.cni("ADD"));
        assert!(
            code == 100 && details.contains("is that of web as well") && details.contains("{containerID}"),
            "{code} {details}"
        );
        second.assert_unlimited();
        first.assert_rates([crate::sandbox::RATE, 0]);
        first.call("DEL");
        second.call("ADD");
        second.call("DEL");
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn doctor_and_metrics_see_what_is_not_as_it_should_be() {
    on_a_node(|| {
        let (node, pod) = (Node::new(json!({})), Sandbox::new());
        node.keep(&pod);
        let [conf, cache] = ["net.d", "cni"].map(|name| node.path(name).display().to_string());
        let directories = ["--conf-dir", &conf, "--cache-dir", &cache];
        let doctor = || call(&[&["doctor"], &directories[..]].concat()).1;
        let metrics = || says(&[&["metrics"], &directories[..]].concat());
        let text = doctor();
        assert!(text.contains("1 without the limit that they ask for") && text.contains("default/web eth0"), "{text}");
        let text = metrics();
        assert!(
            text.contains("\npodshaper_unlimited_pods 1\n") && text.contains("\npodshaper_in_conflist 1\n"),
            "{text}"
        );
        pod.call("ADD");
        assert!(metrics().contains("\npodshaper_unlimited_pods 0\n") && !doctor().contains("without the limit"));
        let live = |is: u8| {
            metrics()
                .lines()
                .any(|line| line.starts_with("podshaper_attachment_live{") && line.ends_with(&format!(" {is}")))
        };
        assert!(live(1));
        // The namespace's path names another namespace now, as /proc/PID/ns/net may.
        let mut owner = pod.owner("eth0");
        owner["netns"] = json!("/proc/self/ns/net");
        pod.write_owner(&owner.to_string());
        assert!(live(0));
        assert!(doctor().contains("1 whose network namespace is gone or another one by now"), "{}", doctor());
        // The network writes a new conflist.
        let plain = json!({ "cniVersion": "1.0.0", "name": "cbr0", "plugins": [{ "type": "bridge" }] }).to_string();
        fs::write(node.path("net.d/05-new.conflist"), plain).unwrap();
        assert!(metrics().contains("\npodshaper_in_conflist 0\n"));
        let text = doctor();
        assert!(text.contains("05-new.conflist: podshaper is not in it, and it is what runtimes read"), "{text}");
        pod.call("DEL");
    });
}
