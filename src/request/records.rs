//! Replays every recorded call of tests/records: podshaper understands what runtimes really send.

use std::path::{Path, PathBuf};

use rscni_plugin::types::Cmd;
use rscni_plugin::version::SpecVersion;
use serde_json::Value;

use super::{Env, Request, Subject};

/// What all calls of one pod have in common: directory, infix of the file names, version, network, name, UID, whether
/// the runtime passes the pod's cgroup, egress and ingress as printed.
type Pod = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    Option<&'static str>,
    [&'static str; 2],
);

const PODS: &[Pod] = &[
    (
        "cluster-ctd1.7-flannel",
        "-web-6bfc9cf6b8-lhnrl",
        "0.3.1",
        "cbr0",
        "web-6bfc9cf6b8-lhnrl",
        "b210522c-ecca-47e2-908a-76691272b43d",
        Some("/kubepods/besteffort/podb210522c-ecca-47e2-908a-76691272b43d"),
        ["10M 15000", ""],
    ),
    (
        "cluster-ctd1.7-flannel",
        "-g1",
        "0.3.1",
        "cbr0",
        "g1",
        "fed96d4f-f91f-443b-af22-0dc55b084250",
        Some("/kubepods/podfed96d4f-f91f-443b-af22-0dc55b084250"),
        ["", "5M 15000"],
    ),
    ("ctd1.6", "", "0.4.0", "recnet", "web-0", "0b6a007d-d280-486c-b9ae-687f857aa333", None, ["10M 15000", ""]),
    (
        "ctd1.7",
        "",
        "0.4.0",
        "recnet",
        "web-0",
        "dc9b34a8-bebf-45b2-ac72-70e9e6e96f33",
        Some("/kubepods/burstable/poddc9b34a8-bebf-45b2-ac72-70e9e6e96f33"),
        ["10M 15000", ""],
    ),
    (
        "ctd2.1-cni1.1",
        "",
        "1.1.0",
        "recnet11",
        "web-0",
        "56467ace-c5a6-499a-a16d-fb0eb27fa19a",
        Some("/kubepods/burstable/pod56467ace-c5a6-499a-a16d-fb0eb27fa19a"),
        ["10M 15000", ""],
    ),
    (
        "noann-ctd2.1",
        "-web-0",
        "0.4.0",
        "recnet",
        "web-0",
        "fd48c0cd-4981-4b22-8e35-0ffd04d94aa5",
        Some("/kubepods/burstable/podfd48c0cd-4981-4b22-8e35-0ffd04d94aa5"),
        ["", ""],
    ),
    (
        "node1.20-ctd1.6",
        "",
        "0.4.0",
        "recnet",
        "web-node1",
        "6c9b65a97e5b6608241b55bb2f041b71",
        None,
        ["10M 15000", "20M 15000"],
    ),
];

/// The recorded calls, by file name without suffix.
fn calls(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut calls: Vec<PathBuf> = entries.filter(|path| path.extension().unwrap() == "env").collect();
    calls.sort();
    calls
}

fn env(path: &Path) -> Env {
    let text = std::fs::read_to_string(path).unwrap();
    let get = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Some(line.unwrap().into())
    };
    Env {
        command: get("CNI_COMMAND"),
        container_id: get("CNI_CONTAINERID"),
        netns: get("CNI_NETNS"),
        ifname: get("CNI_IFNAME"),
        args: get("CNI_ARGS"),
        path: get("CNI_PATH"),
    }
}

#[test]
fn every_recorded_call_is_understood() {
    let records = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records");
    let mut replayed = 0;
    for (directory, infix, version, network, name, uid, cgroup, limits) in PODS {
        for path in calls(&records.join(directory)) {
            let shown = path.display();
            let stem = path.file_stem().unwrap().to_str().unwrap();
            if !stem.ends_with(infix) {
                continue;
            }
            replayed += 1;
            let env = env(&path);
            let cmd = env.command().unwrap().unwrap();
            let stdin = std::fs::read(path.with_file_name(format!("{stem}.stdin.json"))).unwrap();
            let request = Request::parse(cmd, &env, &stdin).unwrap_or_else(|error| panic!("{shown}: {error}"));
            let whole: Value = serde_json::from_slice(&stdin).unwrap();

            assert!(request.forgiven.is_empty(), "{shown}: {:?}", request.forgiven);
            assert_eq!(request.version, version.parse::<SpecVersion>().unwrap(), "{shown}");
            assert_eq!(request.network.as_str(), *network, "{shown}");
            let prev_result = request.prev_result.as_ref().map(|raw| {
                let text = std::str::from_utf8(&stdin).unwrap();
                assert!(text.contains(raw.get()), "{shown}: prevResult is not byte for byte");
                serde_json::from_str(raw.get()).unwrap()
            });
            assert_eq!(prev_result.as_ref(), whole.get("prevResult"), "{shown}");
            if cmd == Cmd::Status {
                assert!(matches!(request.subject, Subject::Node), "{shown}");
                continue;
            }
            let Subject::Endpoint(endpoint) = &request.subject else { panic!("{shown}: {:?}", request.subject) };
            assert_eq!(endpoint.key.uid().unwrap().as_str(), *uid, "{shown}");
            assert_eq!(&*endpoint.ifname, "eth0", "{shown}");
            assert_eq!(endpoint.container_id.len(), 64, "{shown}");
            assert_eq!(request.pod_name.as_deref(), Some(*name), "{shown}");
            assert_eq!(request.pod_namespace.as_deref(), Some("default"), "{shown}");
            assert_eq!(request.cgroup_hint(), cgroup.map(Path::new), "{shown}");
            let netns = env.netns.filter(|netns| !netns.is_empty()).map(PathBuf::from);
            assert_eq!(request.netns, netns, "{shown}");
            let found = request.limits().unwrap_or_else(|error| panic!("{shown}: {error}"));
            let print = |limit: super::Limit| format!("{} {}", limit.rate, limit.burst.as_bytes());
            assert_eq!(
                [found.egress, found.ingress].map(|limit| limit.map(print).unwrap_or_default()),
                *limits,
                "{shown}"
            );
        }
    }
    let directories =
        std::fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let recorded: usize = directories.map(|directory| calls(&directory).len()).sum();
    assert_eq!(replayed, recorded, "a record is in no row of the table");
}
