//! What podshaper changes on a pod's interface and in its namespace: shared between limits, restored, and left alone
//! where it belongs to others.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

use super::mounts;
use crate::harness::pod::container_id;
use crate::harness::process;
use crate::sandbox::{
    RATE, Sandbox, builds_large_packets, netns_with, netns_with_host_end, ok, own_qdiscs, refused, set_sizes, sizes,
    sysctl,
};

/// 20 ms of 10 Mbit/s and the headers.
const SMALL: u32 = 25_512;

/// Kubelet repeats an ADD whose answer was lost, without regard to the earlier use of the namespace.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_second_add_in_the_same_namespace_keeps_the_size_of_before_podshaper() {
    let pod = Sandbox::new();
    let before = sizes(&pod.netns);
    for rate in [RATE, 2 * RATE, 1_000] {
        let id = container_id().unwrap();
        ok(&pod.cni_of("ADD", &id).stdin(pod.stdin_at(rate)));
        if builds_large_packets() {
            assert_eq!(pod.owner("eth0")["gsoMaxSize"], before.0, "at {rate} bit/s");
        }
    }
    let last = pod.owner("eth0")["containerId"].as_str().unwrap().to_owned();
    ok(&pod.cni_of("DEL", &last));
    assert_eq!(sizes(&pod.netns), before);
}

/// A veth with BIG TCP: the kernel lowers the size for IPv4 together with gso_max_size, but does not raise it again
/// above 64 KiB.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_size_for_ipv4_comes_back_as_it_was() {
    if !builds_large_packets() {
        return;
    }
    let pod = Sandbox::new();
    for (max, ipv4) in [(131_072, 131_072), (131_072, 65_536), (65_536, 40_000)] {
        set_sizes(&pod.netns, max, ipv4);
        let before = sizes(&pod.netns);
        pod.call("ADD");
        assert_eq!(sizes(&pod.netns), (SMALL, before.1.map(|_| SMALL)));
        pod.call("DEL");
        assert_eq!(sizes(&pod.netns), before);
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn settings_of_the_namespace_come_back_as_they_were() {
    let pod = Sandbox::new();
    let settings = || ["tcp_min_tso_segs", "tcp_tso_rtt_log"].map(|name| sysctl(&pod.netns, name));
    let before = settings();
    ok(&pod.cni("ADD").stdin(pod.stdin_at(100_000)));
    assert_eq!(settings(), [Some(1), before[1].map(|_| 0)]);
    // From 1.2 Mbit/s on, the least is two segments, or two milliseconds of the limit if that is more.
    for (rate, segments) in [(2_000_000, 2), (RATE, 2), (100_000_000, 17)] {
        ok(&pod.cni("ADD").stdin(pod.stdin_at(rate)));
        assert_eq!(settings(), [Some(segments), before[1].map(|_| 0)]);
    }
    pod.call("DEL");
    assert_eq!(settings(), before);
}

/// The failing ADD asks for a lower limit, and for names that do not fit into the record.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_failed_add_leaves_the_interface_to_the_attachment_that_stays() {
    let (netns, host_end) = netns_with_host_end();
    let mut pod = Sandbox::with_netns(Arc::new(netns));
    let before = sizes(&pod.netns);
    let limits = |rate| json!({ "egressRate": rate, "ingressRate": rate });
    pod.stdin["runtimeConfig"]["bandwidth"] = limits(100_000_000);
    pod.call("ADD");
    let qdiscs = || {
        let outside = process::run(Command::new("tc").args(["qdisc", "show", "dev", &host_end])).unwrap();
        let inside = ["qdisc", "class"].map(|what| pod.netns.run("tc", &[what, "show", "dev", "eth0"]).unwrap());
        outside + &inside.concat()
    };
    let limited = (sizes(&pod.netns), qdiscs());
    let too_long = format!("{}{}", "/./".repeat(1200), pod.netns.path().display());
    let runtime = json!({ "bandwidth": limits(RATE), "cgroupPath": pod.stdin["runtimeConfig"]["cgroupPath"] });
    let stdin = pod.stdin_with(json!({ "runtimeConfig": runtime, "name": "n".repeat(255) }));
    assert_eq!(refused(&pod.cni("ADD").env("CNI_NETNS", too_long).stdin(stdin)).0, 7);
    assert_eq!((sizes(&pod.netns), qdiscs()), limited);
    pod.call("CHECK");
    pod.call("DEL");
    assert_eq!((sizes(&pod.netns), own_qdiscs(&pod.netns, &host_end)), (before, 0));
}

/// The kernel refuses a size above the interface's maximum. The DEL removes the qdiscs nevertheless, which would
/// otherwise keep limiting.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_goes_on_where_a_size_cannot_be_put_back() {
    let (netns, host_end) = netns_with_host_end();
    let mut pod = Sandbox::with_netns(Arc::new(netns));
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": RATE, "ingressRate": RATE });
    pod.call("ADD");
    let there = own_qdiscs(&pod.netns, &host_end);
    assert_eq!(there == 0, pod.owner("eth0")["ingressBy"] == "drops");
    let mut owner = pod.owner("eth0");
    owner["gsoMaxSize"] = (1_u32 << 30).into();
    pod.write_owner(&owner.to_string());
    let del = pod.call("DEL");
    assert_eq!(own_qdiscs(&pod.netns, &host_end), 0);
    let says = "not all that was changed on the pod's interface could be put back: set the gso_max_size";
    assert_eq!(del.stderr.contains(says), builds_large_packets(), "{del}");
    pod.assert_unlimited();
}

/// A path in /proc may name another namespace after its process has ended, and a path in /run after a runtime has
/// used the name again.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_path_that_names_another_namespace_by_now_is_left_alone() {
    let pod = Sandbox::new();
    let stranger = netns_with(&["eth0"]);
    set_sizes(&stranger, 20_000, 20_000);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("netns");
    fs::write(&path, "").unwrap();
    let bind = |netns: &Path| mount(Some(netns), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    mounts::with_own(|| {
        bind(pod.netns.path());
        let call = |verb| pod.cni(verb).env("CNI_NETNS", path.display().to_string());
        ok(&call("ADD"));
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
        bind(stranger.path());
        ok(&call("DEL"));
    });
    assert_eq!(sizes(&stranger).0, 20_000);
    pod.assert_unlimited();
}

/// Two limits on one interface: whichever ends first, the other one keeps what it needs. After the last one, the
/// interface is as before.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_interface_is_shared_until_the_last_limit_goes() {
    let (netns, host_end) = netns_with_host_end();
    let netns = Arc::new(netns);
    let pods = [0, 1].map(|_| Sandbox::with_netns(Arc::clone(&netns)));
    let before = sizes(&netns);
    let fast = pods[1].stdin_at(20_000_000);
    let expect = |bytes: u32| {
        if builds_large_packets() {
            assert_eq!(sizes(&netns).0, bytes);
        }
    };
    for (first, last, then) in [(0, 1, 50_512), (1, 0, SMALL)] {
        pods[0].call("ADD");
        let qdiscs = own_qdiscs(&netns, &host_end);
        ok(&pods[1].cni("ADD").stdin(&fast));
        if builds_large_packets() {
            assert_eq!(pods[1].owner("eth0")["gsoMaxSize"], before.0);
        }
        expect(SMALL);
        pods[first].call("DEL");
        expect(then);
        // htb belongs to the first limit only.
        let stays = qdiscs > 0 && (last == 0 || pods[last].owner("eth0")["fq"] == true);
        assert_eq!(own_qdiscs(&netns, &host_end), usize::from(stays));
        if last == 0 {
            pods[0].call("CHECK");
        }
        pods[last].call("DEL");
        assert_eq!((sizes(&netns), own_qdiscs(&netns, &host_end)), (before, 0));
    }
}

/// A DEL that failed would keep the pod in Terminating for ever.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_removes_what_has_a_record_that_nobody_can_read() {
    let pod = Sandbox::new();
    pod.call("ADD");
    let objects = pod.objects();
    pod.write_owner("{\"containerId\": ");
    let del = pod.call("DEL");
    assert!(del.stderr.contains("whose record cannot be read"), "{del}");
    pod.assert_unlimited();
    objects.assert_freed();
}
