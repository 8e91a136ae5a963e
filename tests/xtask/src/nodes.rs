//! The stages of tests/node: real kubelets and container runtimes, two nodes, a cluster.

use std::time::Instant;

use crate::lane::{Lane, Tests};
use crate::processes::command;
use crate::stages::{Session, need};
use crate::summary::Outcome;

const NODES: &str = "nodes in User Mode Linux";
const CLUSTER: &str = "a whole cluster on this machine's kernel";

const OF_A_NODE: &[&str] = &["kubelet", "containerd-1.7", "runc", "cni", "cni-0.9", "image"];
const OF_ALL_NODES: &[&str] = &["kubelet-cri-v1", "containerd-1.6", "containerd-2.1", "cni-1.9", "podman", "cri"];
const OF_AN_API_SERVER: &[&str] = &["kube-apiserver", "kubectl", "etcd"];
const OF_A_CLUSTER: &[&str] =
    &["kube-apiserver", "kube-scheduler", "kube-controller-manager", "kubectl", "etcd", "helm"];

/// containerd and kubelet's cgroup driver. All drivers and all containerd versions, but not all pairs.
const CONFIGURATIONS: &[[&str; 2]] = &[["1.7", "cgroupfs"], ["1.6", "systemd"], ["2.1", "cgroupfs"]];

/// Programs that the scripts of tests/node call.
const PROGRAMS: &[&str] = &[
    "jq:jq",
    "curl:curl",
    "openssl:openssl",
    "busybox:busybox-static",
    "linux.uml:user-mode-linux",
    "modprobe:kmod",
    "mkfs.ext4:e2fsprogs",
    "lsns:util-linux",
    "/lib/systemd/systemd:systemd",
];

/// Fetches and builds the parts for a stage. Fails if that is not possible, or if it takes longer than a machine with
/// two cores needs for the slowest part. Compilers use all cores, so they give way to the tests that run beside them.
fn get(lane: &mut Lane, parts: &[&str]) -> Result<(), String> {
    need(lane, PROGRAMS)?;
    let limited = ["-n", "19", "timeout", "--kill-after", "10", "1800", "tests/node/parts"];
    match lane.run(command("nice").args(limited).args(parts)) {
        (0, _) => Ok(()),
        _ => {
            Err("what it takes could not be fetched or built (see tests/node/README.md); the messages are above".into())
        }
    }
}

/// Kubelets with each containerd, sandboxes by version 1 of the CRI, two nodes, the units with systemd, podman.
pub fn nodes(session: &Session, lane: &mut Lane) {
    let Some(built) = session.built(lane, NODES) else { return };
    let start = Instant::now();
    if let Err(why) = get(lane, &[OF_A_NODE, OF_ALL_NODES].concat()) {
        return lane.note(NODES, Outcome::NotRun(why), start);
    }
    lane.note("the parts of nodes", Outcome::Passed("there".into()), start);
    let programs = [built.podshaper.as_str(), built.traffic.as_str()];
    let uml = |seconds| ["tests/lab/uml", "--seconds", seconds, "--memory", "2560", "--"];
    for configuration in CONFIGURATIONS {
        let name = format!("a kubelet in User Mode Linux (containerd, cgroup driver: {})", configuration.join(" "));
        let command = [&uml("900"), &["tests/node/standalone"][..], &programs, configuration].concat();
        lane.tests(&Tests { name, command: &command, arguments: vec![] });
    }
    let sandboxes = [&uml("400"), &["tests/node/sandboxes"][..], &programs].concat();
    lane.tests(&Tests {
        name: "sandboxes by version 1 of the CRI in User Mode Linux".into(),
        command: &sandboxes,
        arguments: vec![],
    });
    let two = [&["tests/node/vxlan"][..], &programs].concat();
    lane.tests(&Tests {
        name: "two nodes in User Mode Linux, flannel over VXLAN".into(),
        command: &two,
        arguments: vec![],
    });
    units(lane, &[&uml("600"), &["tests/node/systemd"][..], &programs].concat());
    let podman = [&uml("300"), &["tests/node/podman"][..], &programs].concat();
    lane.tests(&Tests { name: "podman in User Mode Linux".into(), command: &podman, arguments: vec![] });
}

/// The units with systemd and an API server.
fn units(lane: &mut Lane, command: &[&str]) {
    let (name, start) = ("the units below a systemd in User Mode Linux", Instant::now());
    match get(lane, OF_AN_API_SERVER) {
        Ok(()) => lane.tests(&Tests { name: name.into(), command, arguments: vec![] }),
        Err(why) => lane.note(name, Outcome::NotRun(why), start),
    }
}

/// The parts of all nodes and of the cluster. A stage that uses one core runs beside this.
pub fn parts(_: &Session, lane: &mut Lane) {
    let start = Instant::now();
    let outcome = match get(lane, &[OF_A_NODE, OF_ALL_NODES, OF_A_CLUSTER].concat()) {
        Ok(()) => Outcome::Passed("there".into()),
        Err(why) => Outcome::NotRun(why),
    };
    lane.note("the parts of nodes and of a cluster", outcome, start);
}

pub fn cluster(session: &Session, lane: &mut Lane) {
    let Some(built) = session.built(lane, CLUSTER) else { return };
    let start = Instant::now();
    if let Err(why) = get(lane, &[OF_A_NODE, OF_A_CLUSTER].concat()) {
        return lane.note(CLUSTER, Outcome::NotRun(why), start);
    }
    let command = ["tests/node/cluster", "--seconds", "1200", &built.podshaper, &built.traffic];
    lane.tests(&Tests { name: CLUSTER.into(), command: &command, arguments: vec![] });
}
