use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::harness::cgroup::{self, Driver, PodCgroup};
use super::harness::cni::Cni;
use super::harness::netns::Netns;
use super::sandbox::{RATE, Sandbox, netns_with, ok};

/// A pod of a recorded run: its name in CNI_ARGS, the limits that must be in force while it is added (egress first),
/// and the path of kubelet's cgroup for it, whether the runtime passes that path or not.
type RecordedPod = (&'static str, [u64; 2], fn(&str) -> String);
/// A run, identified by its directory.
type Run = (&'static str, &'static [RecordedPod]);

const RUNS: [Run; 6] = [
    (
        "cluster-ctd1.7-flannel",
        &[
            ("web-6bfc9cf6b8-lhnrl", [10_000_000, 0], |uid| format!("/kubepods/besteffort/pod{uid}")),
            ("g1", [0, 5_000_000], |uid| format!("/kubepods/pod{uid}")),
        ],
    ),
    ("ctd1.6", &[("web-0", [10_000_000, 0], |uid| Driver::Systemd.path(uid))]),
    ("ctd1.7", &[("web-0", [10_000_000, 0], |uid| Driver::Cgroupfs.path(uid))]),
    ("ctd2.1-cni1.1", &[("web-0", [10_000_000, 0], |uid| Driver::Cgroupfs.path(uid))]),
    ("noann-ctd2.1", &[("web-0", [0, 0], |uid| Driver::Cgroupfs.path(uid))]),
    ("node1.20-ctd1.6", &[("web-node1", [10_000_000, 20_000_000], |uid| format!("/kubepods/pod{uid}"))]),
];

/// One recorded call.
struct Recorded {
    name: String,
    env: BTreeMap<String, String>,
    stdin: String,
}

impl Recorded {
    fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let pairs = text.lines().map(|line| line.split_once('=').unwrap());
        Self {
            name: path.display().to_string(),
            env: pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            stdin: fs::read_to_string(path.with_extension("stdin.json")).unwrap(),
        }
    }

    /// The value of a key of CNI_ARGS.
    fn arg(&self, key: &str) -> Option<&str> {
        self.env["CNI_ARGS"].split(';').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
    }

    fn cni(&self) -> Cni {
        let call = Cni::new(env!("CARGO_BIN_EXE_podshaper"), "").stdin(&self.stdin);
        self.env.iter().fold(call, |call, (name, value)| call.env(name, value))
    }

    /// `prevResult` with exactly the bytes that stdin has.
    fn prev_result(&self) -> &str {
        #[derive(serde::Deserialize)]
        struct Stdin<'a> {
            #[serde(borrow, rename = "prevResult")]
            prev_result: &'a serde_json::value::RawValue,
        }
        serde_json::from_str::<Stdin>(&self.stdin).unwrap().prev_result.get()
    }
}

fn records() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records")
}

/// The calls of a run in their order: the file names are numbered.
fn calls(run: &str) -> Vec<Recorded> {
    let entries = fs::read_dir(records().join(run)).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|it| it == "env")).collect();
    paths.sort();
    paths.iter().map(|path| Recorded::read(path)).collect()
}

/// The sandbox of a recorded ADD: its namespace at the recorded path, its cgroup empty, as kubelet leaves it.
fn sandbox(call: &Recorded, place: fn(&str) -> String) -> Sandbox {
    let path = Path::new(&call.env["CNI_NETNS"]);
    // /var/run is a link to /run everywhere. If it is not, the failure is not the plugin's.
    let netns = Netns::new(path.file_name().unwrap().to_str().unwrap()).unwrap();
    assert!(path.exists(), "{} is not where `ip netns` puts it", path.display());
    netns.run("ip", &["link", "add", "eth0", "type", "veth", "peer", "name", "peer0"]).unwrap();
    let uid = call.arg("K8S_POD_UID").unwrap();
    let stdin: Value = serde_json::from_str(&call.stdin).unwrap();
    let expected = place(uid);
    if let Some(given) = stdin["runtimeConfig"].get("cgroupPath") {
        assert_eq!(given, &json!(expected), "{}", call.name);
    }
    let directory = cgroup::mount().unwrap().join(&expected[1..]);
    // If a killed run has left a cgroup with the recorded UID, removing the cgroup also ends its attachments.
    let _ = fs::remove_dir(&directory);
    let cgroup = PodCgroup::new(directory).unwrap();
    Sandbox::of(cgroup, uid.to_owned(), Arc::new(netns))
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn every_recorded_run_leaves_after_each_call_what_it_should() {
    // UIDs and namespaces are the recorded ones, so two test runs at the same time would disturb each other. The lock
    // is on a directory that exists anyway, so it leaves no file.
    let lock = File::open(cgroup::mount().unwrap()).unwrap();
    lock.lock().unwrap();
    let mut recorded: Vec<_> = fs::read_dir(records()).unwrap().map(|entry| entry.unwrap().path()).collect();
    recorded.retain(|path| path.is_dir());
    assert_eq!(recorded.len(), RUNS.len(), "a run is in no row of the table");
    for (run, pods) in RUNS {
        replay(run, pods);
    }
}

fn replay(run: &str, pods: &[RecordedPod]) {
    let mut sandboxes: BTreeMap<String, Sandbox> = BTreeMap::new();
    let mut objects = BTreeMap::new();
    // The added pods by name: container and limits.
    let mut added: BTreeMap<String, (String, [u64; 2])> = BTreeMap::new();
    for call in calls(run) {
        let shown = &call.name;
        let verb = call.env["CNI_COMMAND"].as_str();
        if verb == "STATUS" {
            assert_eq!(ok(&call.cni()).stdout, "", "{shown}");
            continue;
        }
        let name = call.arg("K8S_POD_NAME").unwrap();
        let (_, limits, place) = pods.iter().find(|(pod, ..)| *pod == name).unwrap();
        match verb {
            "ADD" => {
                let sandbox = sandbox(&call, *place);
                let answer = ok(&call.cni());
                assert_eq!(answer.stdout, call.prev_result(), "{shown}");
                if *limits == [0, 0] {
                    // The recorded configurations have an unknown key.
                    let others: Vec<&str> =
                        answer.stderr.lines().filter(|line| !line.contains("\"myKey\" is no key")).collect();
                    assert_eq!(others, [""; 0], "{shown}");
                } else {
                    objects.insert(name.to_owned(), sandbox.objects());
                    added.insert(name.to_owned(), (call.env["CNI_CONTAINERID"].clone(), *limits));
                }
                sandboxes.insert(name.to_owned(), sandbox);
            }
            "DEL" => {
                let sandbox = &sandboxes[name];
                // After its first DEL the pod's cgroup and namespace are removed.
                if call.env["CNI_NETNS"].is_empty() {
                    sandbox.cgroup.remove().unwrap();
                }
                // A runtime may make the same call twice at the same time.
                let answers = std::thread::scope(|scope| {
                    [(); 2].map(|()| scope.spawn(|| ok(&call.cni()))).map(|answer| answer.join().unwrap())
                });
                answers.iter().for_each(|answer| assert_eq!(answer.stdout, "", "{shown}"));
                added.remove(name);
            }
            other => panic!("{shown}: {other}"),
        }
        for (name, sandbox) in &sandboxes {
            match added.get(name) {
                Some((container_id, limits)) => {
                    assert_eq!(sandbox.owner("eth0")["containerId"], **container_id, "{shown}: {name}");
                    sandbox.assert_rates(*limits);
                }
                None => sandbox.assert_unlimited(),
            }
        }
    }
    assert!(added.is_empty() && !sandboxes.is_empty(), "{run}: {added:?}");
    objects.values().for_each(super::sandbox::Objects::assert_freed);
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn results_of_other_plugins_come_back_byte_for_byte_in_every_version() {
    let netns = Arc::new(netns_with(&["eth0"]));
    for file in ["weave.result.json", "flannel.result.json"] {
        let text = fs::read_to_string(records().join(file)).unwrap();
        let declared = serde_json::from_str::<Value>(&text).unwrap()["cniVersion"].as_str().unwrap().to_owned();
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            let result = text.trim().replace(&declared, version);
            let pod = Sandbox::with_netns(Arc::clone(&netns));
            let runtime = &pod.stdin["runtimeConfig"];
            let stdin = format!(
                r#"{{"cniVersion":"{version}","name":"{}","type":"podshaper","prevResult":{result},"runtimeConfig":{runtime}}}"#,
                pod.network
            );
            assert_eq!(ok(&pod.cni("ADD").stdin(&stdin)).stdout, result, "{file} {version}");
            pod.assert_limited(&pod.container_id, RATE);
            ok(&pod.cni("DEL").stdin(&stdin));
            pod.assert_unlimited();
        }
    }
}
