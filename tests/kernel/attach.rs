use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::links::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{SchedClassifier, TcAttachType};
use serde_json::{Value, json};

use crate::harness::cgroup::{self, Driver, PodCgroup};
use crate::harness::netns::Netns;
use crate::harness::pod::{container_id, uuid};
use crate::harness::process::{self, Running};
use crate::harness::traffic_program;
use crate::operator::{limited_both_ways, listed};
use crate::sandbox::{
    ATTACHMENT, LINKS, PINS, PROGRAMS, RATE, Sandbox, builds_large_packets, links_on, netns_with, netns_with_host_end,
    ok, own_qdiscs, sizes, sysctl, within,
};

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_pins_and_attaches_what_it_says_and_a_del_leaves_nothing() {
    let pod = Sandbox::new();
    let sizes = sizes(&pod.netns);
    let [least_segments, rtt_log] = ["tcp_min_tso_segs", "tcp_tso_rtt_log"].map(|name| sysctl(&pod.netns, name));
    let add = pod.call("ADD");
    assert_eq!(add.stdout, r#"{"cniVersion":"1.1.0","ips":[]}"#);
    pod.assert_limited(&pod.container_id, RATE);
    // Kernels with and without fq pass. The record must agree with the qdiscs on the interface.
    let qdisc = pod.netns.run("tc", &["qdisc", "show", "dev", "eth0"]).unwrap();
    let [has_fq, has_htb] = ["fq", "htb"].map(|kind| qdisc.starts_with(&format!("qdisc {kind} ")));
    let mut owner = json!({
        "containerId": pod.container_id,
        "fq": has_fq,
        "network": pod.network,
        "ifname": "eth0",
        "netns": pod.netns.path(),
        "podNamespace": "default",
        "podName": "web",
        "uid": pod.uid,
        "cgroup": pod.cgroup.path(),
        "asked": { "egress": { "rateBitsPerS": RATE, "burstNs": 12_000_000 } },
    });
    owner["netnsInode"] = std::fs::metadata(pod.netns.path()).unwrap().ino().into();
    if has_htb {
        owner["htb"] = true.into();
    }
    owner["tcpMinTsoSegs"] = least_segments.into();
    if builds_large_packets() {
        owner["gsoMaxSize"] = sizes.0.into();
        owner["tcpTsoRttLog"] = rtt_log.into();
        if let Some(ipv4) = sizes.1 {
            owner["gsoIpv4MaxSize"] = ipv4.into();
        }
    }
    let mut recorded = pod.owner("eth0");
    for number in ["slot", "ifindex", "namespace"] {
        assert!(recorded.as_object_mut().unwrap().remove(number).is_some_and(|number| number != 0));
    }
    assert_eq!(recorded, owner);
    let expected = format!(
        "default/web ({}) eth0: egress 10Mbit/s, burst 15000 bytes, by pacing and {}, from runtimeConfig.bandwidth; ",
        pod.uid,
        match (has_fq, has_htb) {
            (true, _) => "fq",
            (_, true) => "htb",
            _ => "drops",
        }
    );
    assert!(add.stderr.contains(&expected), "{add}");

    let objects = pod.objects();
    assert_eq!(pod.call("DEL").stdout, "");
    pod.assert_unlimited();
    objects.assert_freed();
    assert!(links_on(pod.cgroup.path()).is_empty());
    for _ in 0..3 {
        let again = ok(&pod.cni("DEL").env("CNI_NETNS", "").stdin(pod.stdin_with(json!({ "prevResult": null }))));
        assert_eq!((again.stdout.as_str(), again.stderr.as_str()), ("", ""));
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_attachment_ends_with_its_pins_even_when_the_pods_cgroup_went_first() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let objects = pod.objects();
    pod.cgroup.remove().unwrap();
    ok(&pod.cni("DEL").env("CNI_NETNS", ""));
    assert!(!pod.pod_directory().exists());
    objects.assert_freed();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_from_a_stranger_removes_nothing_and_succeeds() {
    let pod = Sandbox::new();
    pod.call("ADD");
    for stranger in [
        pod.cni_of("DEL", &container_id().unwrap()),
        pod.cni("DEL").env("CNI_IFNAME", "net1"),
        // A UID of another pod.
        pod.cni("DEL").env("CNI_ARGS", format!("K8S_POD_UID={}", uuid().unwrap())),
        pod.cni("DEL").env("CNI_ARGS", ""),
    ] {
        assert_eq!(ok(&stranger).stdout, "");
        pod.assert_limited(&pod.container_id, RATE);
    }
    pod.call("DEL");
    pod.assert_unlimited();
}

/// containerd makes such a call if a node's configuration was replaced by one with another name while the pod ran.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_under_the_networks_new_name_removes_the_limit() {
    let pod = Sandbox::new();
    pod.call("ADD");
    ok(&pod.cni("DEL").stdin(pod.stdin_with(json!({ "name": "another" }))));
    pod.assert_unlimited();
}

/// Kubelet makes these calls when a pause container has ended.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_restarted_sandbox_keeps_the_limit_whatever_the_old_ones_dels_do() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let old = pod.objects();
    ok(&pod.cni("DEL"));
    let successor = container_id().unwrap();
    ok(&pod.cni_of("ADD", &successor).stdin(pod.stdin_at(2 * RATE)));
    old.assert_freed();
    for _ in 0..2 {
        ok(&pod.cni("DEL").env("CNI_NETNS", ""));
        pod.assert_limited(&successor, 2 * RATE);
    }

    // The same if all DELs of the old sandbox come too late.
    let third = container_id().unwrap();
    let old = pod.objects();
    ok(&pod.cni_of("ADD", &third).stdin(pod.stdin_at(3 * RATE)));
    old.assert_freed();
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| ok(&pod.cni_of("DEL", &successor)));
        }
    });
    pod.assert_limited(&third, 3 * RATE);
    ok(&pod.cni_of("DEL", &third));
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_sandbox_without_a_limit_ends_that_of_the_one_before() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let next = container_id().unwrap();
    let add = ok(&pod.cni_of("ADD", &next).stdin(pod.stdin_with(json!({ "runtimeConfig": {} }))));
    assert_eq!(add.stdout, r#"{"cniVersion":"1.1.0","ips":[]}"#);
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn each_interface_of_a_pod_has_its_own_attachment() {
    let pod = Sandbox::with_netns(Arc::new(netns_with(&["eth0", "eth0.100"])));
    let second = |verb: &str| pod.cni(verb).env("CNI_IFNAME", "eth0.100").stdin(pod.stdin_at(2 * RATE));
    pod.call("ADD");
    ok(&second("ADD"));
    let whole = ATTACHMENT.map(String::from).to_vec();
    // bpffs allows no dot in a name.
    let both = [("eth0".to_owned(), whole.clone()), ("eth0%2e100".to_owned(), whole.clone())];
    let links = (LINKS.0.to_owned(), LINKS.1.map(String::from).to_vec());
    assert_eq!(pod.pins(), BTreeMap::from(both).into_iter().chain([links.clone()]).collect());
    assert_eq!((pod.rates("eth0"), pod.rates("eth0%2e100")), ([RATE, 0], [2 * RATE, 0]));
    // Each program is attached once, so no packet passes it twice.
    assert_eq!(pod.attached().len(), PROGRAMS.len());
    pod.call("CHECK");
    ok(&second("CHECK"));

    pod.call("DEL");
    assert_eq!(pod.pins(), BTreeMap::from([("eth0%2e100".to_owned(), whole), links]));
    assert_eq!(pod.attached().len(), PROGRAMS.len());
    ok(&second("CHECK"));
    ok(&second("DEL"));
    pod.assert_unlimited();
}

/// podman and containerd 1.4 pass no UID.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn without_a_uid_the_container_is_the_key_and_the_configuration_names_the_cgroup() {
    let id = container_id().unwrap();
    let path = format!("/podshaper-test.slice/libpod-{id}.scope");
    let cgroup = PodCgroup::new(cgroup::mount().unwrap().join(&path[1..])).unwrap();
    // The pins are looked for under the UID, which is the container's id here.
    let mut pod = Sandbox::of(cgroup, id.clone(), Arc::new(netns_with(&["eth0"])));
    pod.container_id = id;
    pod.stdin.insert("cgroupPath".into(), json!("/podshaper-test.slice/libpod-{containerID}.scope"));
    ok(&pod.cni("ADD").env("CNI_ARGS", "IgnoreUnknown=1"));
    pod.assert_limited(&pod.container_id, RATE);
    assert_eq!(pod.owner("eth0").get("uid"), None);
    ok(&pod.cni("CHECK").env("CNI_ARGS", ""));
    ok(&pod.cni("DEL").env("CNI_ARGS", ""));
    pod.assert_unlimited();
}

/// The interface is made as the bridge plugin makes it: its other end is on the host.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn no_qdisc_outlives_the_limit_it_was_put_there_for() {
    let (netns, host_end) = netns_with_host_end();
    let pod = Sandbox::with_netns(Arc::new(netns));
    let qdiscs = || own_qdiscs(&pod.netns, &host_end);
    let with = |bandwidth: Value| {
        let path = &pod.stdin["runtimeConfig"]["cgroupPath"];
        pod.stdin_with(json!({ "runtimeConfig": { "bandwidth": bandwidth, "cgroupPath": path } }))
    };
    let ingress = with(json!({ "ingressRate": RATE }));
    let none = with(json!({}));
    let ends: [(&str, bool, &dyn Fn()); 3] = [
        ("DEL", false, &|| drop(pod.call("DEL"))),
        ("an ADD with an egress limit only", true, &|| drop(pod.call("ADD"))),
        ("an ADD without limits", false, &|| drop(ok(&pod.cni("ADD").stdin(&none)))),
    ];
    for (what, sends, end) in ends {
        ok(&pod.cni("ADD").stdin(&ingress));
        pod.assert_rates([0, RATE]);
        let by = pod.owner("eth0")["ingressBy"].clone();
        assert_eq!(qdiscs(), usize::from(by == "held-acks"), "{by}");
        end();
        // fq also paces egress; htb serves egress only.
        let serves = || ["fq", "htb"].iter().any(|queue| pod.owner("eth0")[queue] == true);
        assert_eq!(qdiscs(), usize::from(sends && serves()), "after {what}: {by}");
    }
    pod.call("DEL");
}

/// A qdisc `ingress` of another tool at the host end, where clsact would have room for filters of both directions.
/// The qdisc stays, and the log says which traffic is not held.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn plain_ingress_at_the_hosts_end_has_no_room_for_what_goes_into_the_pod() {
    for exempt in [json!([]), json!(["10.99.0.0/16"])] {
        let (netns, host_end) = netns_with_host_end();
        let mut pod = Sandbox::with_netns(Arc::new(netns));
        let tc = |words: [&str; 2], last: &[&str]| {
            process::run(Command::new("tc").args(words).args(["dev", &host_end]).args(last)).unwrap()
        };
        tc(["qdisc", "add"], &["ingress"]);
        let filters = || tc(["filter", "show"], &["ingress"]);
        pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": RATE, "ingressRate": RATE });
        pod.stdin.insert("exemptSubnets".to_owned(), exempt.clone());
        let add = pod.call("ADD");
        let by = pod.owner("eth0")["ingressBy"].clone();
        // tbf cannot exempt any traffic.
        let without_fq = if exempt == json!([]) { "tbf" } else { "drops" };
        assert!(by == "held-acks" || by == without_fq, "{exempt}: {by}");
        // tbf limits all ingress by itself, and the filter for egress has room in the `ingress` qdisc.
        let by_tbf = by == "tbf";
        let held_data = "cannot wait its turn at the host's end";
        assert_eq!(add.stderr.contains(held_data), by != "held-acks", "{exempt}: {add}");
        assert_eq!(add.stderr.contains("is not held"), !by_tbf, "{exempt}: {add}");
        assert!(add.stderr.contains("it has the qdisc ingress"), "{exempt}: {add}");
        assert_eq!(pod.owner("eth0").get("heldAt").is_some(), by_tbf, "{exempt}");
        let programs = ["out_of_pod", "into_pod"].map(|program| filters().contains(program));
        assert_eq!(programs, [by_tbf, false], "{exempt}: {}", filters());
        pod.assert_rates([RATE, RATE]);
        pod.call("CHECK");
        pod.call("DEL");
        assert!(tc(["qdisc", "show"], &[]).contains("qdisc ingress"));
        assert_eq!((filters().as_str(), own_qdiscs(&pod.netns, &host_end)), ("", 0), "{exempt}");
    }
}

/// Programs of tcx run before all tc filters, and packets that they decide on never reach the filters.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn behind_programs_of_tcx_other_paths_are_not_said_to_be_held() {
    if !fs::read_to_string("/proc/kallsyms").is_ok_and(|symbols| symbols.contains(" tcx_prog_attach\n")) {
        return;
    }
    let (netns, host_end) = netns_with_host_end();
    let (first, pod) = (limited_both_ways(None), Sandbox::with_netns(Arc::new(netns)));
    first.call("ADD");
    let program = Path::new(PINS).join("%node/wait_here");
    let mut program = SchedClassifier::from_pin(program).unwrap();
    let options = || TcAttachOptions::TcxOrder(LinkOrder::default());
    let theirs = program.attach_with_options(&host_end, TcAttachType::Ingress, options()).unwrap();
    let call = pod.call("ADD");
    assert!(call.stderr.contains("is not held") && call.stderr.contains("it has programs of tcx"), "{call}");
    assert_eq!(listed(&pod.uid).unwrap()["egress"]["otherPaths"]["held"], false);
    let filters = || process::run(Command::new("tc").args(["filter", "show", "dev", &host_end, "ingress"])).unwrap();
    assert!(!filters().contains("podshaper"), "{}", filters());
    program.detach(theirs).unwrap();
    pod.call("ADD");
    assert_eq!(listed(&pod.uid).unwrap()["egress"]["otherPaths"]["held"], true);
    pod.call("DEL");
    first.call("DEL");
}

/// podshaper adds the qdiscs before it loads the programs, since the qdiscs decide which programs it loads. The refusal
/// comes between the two steps.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_that_fails_while_loading_leaves_no_qdisc() {
    let (netns, host_end) = netns_with_host_end();
    let pod = Sandbox::with_netns(Arc::new(netns));
    let path = &pod.stdin["runtimeConfig"]["cgroupPath"];
    let asked = json!({ "bandwidth": { "ingressRate": RATE }, "cgroupPath": path });
    let too_long = format!("{}{}", "/./".repeat(1200), pod.netns.path().display());
    let stdin = pod.stdin_with(json!({ "runtimeConfig": asked, "name": "n".repeat(255) }));
    let call = pod.cni("ADD").env("CNI_NETNS", too_long).stdin(stdin).call().unwrap();
    assert_eq!(call.error_code(), Some(7), "{call}");
    assert_eq!(own_qdiscs(&pod.netns, &host_end), 0);
    pod.assert_unlimited();
}

/// A pod whose interface ends in a third namespace: the number of that end is the number of another pod's interface
/// here.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn another_pods_interface_is_never_taken_for_this_ones() {
    let (bystanders, host_end) = netns_with_host_end();
    let index = |path: &str| std::fs::read_to_string(path).unwrap().trim().to_owned();
    let number = index(&format!("/sys/class/net/{host_end}/ifindex"));
    let (third, pods) = (netns_with(&[]), Arc::new(netns_with(&[])));
    // Both interfaces have the first free number of their namespace, as in every pod.
    let words = ["link", "add", "far", "index", &number, "type", "veth", "peer", "name", "eth0", "netns", pods.name()];
    third.run("ip", &words).unwrap();
    // "2: eth0@if7: .."
    let eth0 = |netns: &Netns| netns.run("ip", &["-o", "link", "show", "eth0"]).unwrap();
    let number_of_eth0 = |netns: &Netns| eth0(netns).split(':').next().unwrap().to_owned();
    assert_eq!(number_of_eth0(&bystanders), number_of_eth0(&pods));
    let pod = Sandbox::with_netns(pods);
    let both = json!({ "bandwidth": { "egressRate": RATE, "ingressRate": RATE } });
    let call = |verb| ok(&pod.cni(verb).stdin(pod.stdin_with(json!({ "runtimeConfig": both }))));
    call("ADD");
    pod.assert_rates([RATE, RATE]);
    assert_eq!(own_qdiscs(&bystanders, &host_end), 0);
    assert_ne!(pod.owner("eth0")["ingressBy"], "tbf");
    call("DEL");
    pod.assert_unlimited();
}

/// While the attachment is replaced again and again, nothing is sent faster than the limit: the test counts every
/// packet where it leaves. A sender at full speed would put hundreds of packets through a gap of a millisecond.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_replaced_attachment_leaves_no_unshaped_moment() {
    const REPLACEMENTS: u64 = 50;
    let mut pod = Sandbox::new();
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": 8_000, "egressBurst": 12_000 });
    let netns = Arc::clone(&pod.netns);
    for arguments in [
        "link set peer0 up",
        "link set eth0 up",
        "address add 10.9.9.1/24 dev eth0",
        "neigh add 10.9.9.2 lladdr 02:00:00:00:00:01 dev eth0",
    ] {
        netns.run("ip", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let sent = || -> u64 {
        let text = netns.run("cat", &["/proc/net/dev"]).unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap().to_owned();
        // Eight columns of received traffic, then the sent bytes and packets.
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    };
    pod.call("ADD");

    let container = pod.cgroup.container("c1").unwrap();
    let mut flood = std::process::Command::new("sh");
    flood.args(["-c", "echo $$ >\"$1\" && shift && exec \"$@\"", "sh"]).arg(container.join("cgroup.procs"));
    flood.arg("nsenter").arg(format!("--net={}", netns.path().display())).arg("--").arg(traffic_program().unwrap());
    flood.args(["udp-send", "--to", "10.9.9.2:9", "--rate", "20000000000", "--seconds", "600"]);
    let flood = Running::start(&mut flood).unwrap();
    assert!(within(Duration::from_secs(5), || sent() > 0), "nothing is sent");
    // Until the first burst is over.
    thread::sleep(Duration::from_millis(300));

    let (before, started) = (sent(), Instant::now());
    let stop = AtomicBool::new(false);
    let mut fewest = usize::MAX;
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut fewest = usize::MAX;
            while !stop.load(Ordering::Relaxed) {
                fewest = fewest.min(pod.attached().len());
            }
            fewest
        });
        for _ in 0..REPLACEMENTS {
            ok(&pod.cni_of("ADD", &container_id().unwrap()));
        }
        stop.store(true, Ordering::Relaxed);
        fewest = watch.join().unwrap();
    });
    let passed = sent() - before;
    let seconds = started.elapsed().as_secs();
    drop(flood);
    assert!(fewest >= PROGRAMS.len() && fewest != usize::MAX, "seen on the cgroup: {fewest} programs");
    // The clock is kept, so a new attachment has no burst of its own. The rate permits a packet every 1.4 s, and an
    // emulated CPU takes minutes for the replacements. A few packets are the kernel's own (IPv6).
    let most = seconds + 20;
    assert!(passed <= most, "{passed} packets passed in {REPLACEMENTS} replacements, {seconds} s");
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_limits_of_every_source_reach_the_map() {
    let netns = Arc::new(netns_with(&["eth0"]));
    let uid = uuid().unwrap();
    let pod = Sandbox::at(&Driver::Systemd.path(&uid), uid.clone(), netns);
    let annotations = |annotations| json!({ "io.kubernetes.cri.pod-annotations": annotations });
    for (keys, arguments, rates) in [
        (
            json!({ "runtimeConfig": { "bandwidth": { "EgressRate": 1_000_000, "IngressRate": 2_000_000 } } }),
            "",
            [1, 2],
        ),
        (json!({ "runtimeConfig": annotations(json!({ "kubernetes.io/egress-bandwidth": "3M" })) }), "", [3, 0]),
        (json!({ "runtimeConfig": annotations(json!({ "rate": "1M" })) }), "", [8, 0]),
        (json!({ "runtimeConfig": null, "args": { "cni": { "kubernetes.io/ingress-bandwidth": "4M" } } }), "", [0, 4]),
        (json!({ "runtimeConfig": null }), ";kubernetes.io/egress-bandwidth=5M", [5, 0]),
        (json!({ "runtimeConfig": null, "egress": "6M", "ingress": 7_000_000 }), "", [6, 7]),
        (json!({ "runtimeConfig": null, "egress": "6M", "max": { "egress": "2M" } }), "", [2, 0]),
    ] {
        let arguments = format!("K8S_POD_UID={}{arguments}", pod.uid);
        let call = |verb| pod.cni(verb).env("CNI_ARGS", &arguments).stdin(pod.stdin_with(keys.clone()));
        let add = ok(&call("ADD"));
        pod.assert_rates(rates.map(|megabits: u64| megabits * 1_000_000));
        for (direction, megabits) in ["egress", "ingress"].into_iter().zip(rates) {
            assert_eq!(add.stderr.contains(&format!("eth0: {direction} {megabits}Mbit/s")), megabits > 0, "{add}");
        }
        ok(&call("CHECK"));
    }
    pod.call("DEL");
    pod.assert_unlimited();
}
