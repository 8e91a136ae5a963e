//! podshaper's own conflist, which delegates to the network's. The order and the contents of the calls are tested
//! with plugins that log their calls; the rest with pods of the real plugins, whose list is rewritten while pods come
//! and go.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::sync::on_a_node;
use super::{call, says};
use crate::chain::MBIT;
use crate::harness::cni::{Call, Chain};
use crate::harness::host::{Host, podshaper_plugin};
use crate::harness::pod::{INTERFACE, Pod};
use crate::harness::{PLUGIN_DIR, podshaper_program};
use crate::harness::{measure, meter};
use crate::kernel::mounts;
use crate::sandbox::{RATE, Sandbox, ok, refused, within};

const FILE: &str = "00-podshaper.conflist";
/// The directory of the records that an ADD leaves for its DEL.
const RECORDS: &str = "/var/lib/cni/podshaper";
const LIMIT: u64 = 20 * MBIT;

/// The directories of a node whose network is `net.d/10-net.conflist`, and of plugins that log their calls.
struct Node {
    root: TempDir,
}

/// A logged call of such a plugin.
#[derive(Debug)]
struct Asked {
    /// `ADD bridge`
    what: String,
    stdin: Value,
}

impl Node {
    fn new(network: &Value) -> Self {
        let node = Self { root: tempfile::tempdir().unwrap() };
        ["net.d", "bin", "systemd"].iter().for_each(|name| fs::create_dir(node.path(name)).unwrap());
        node.write("10-net.conflist", network);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, list: &Value) {
        fs::write(self.path("net.d").join(name), list.to_string()).unwrap();
    }

    fn installs(&self, options: &[&str]) -> String {
        let [conf, bin, units] = ["net.d", "bin", "systemd"].map(|name| self.path(name).display().to_string());
        let directories = ["install", "--conf-dir", &conf, "--bin-dir", &bin, "--unit-dir", &units, "--no-units"];
        says(&[&directories[..], options].concat())
    }

    /// The list that a runtime chooses.
    fn chain(&self, version: &str) -> Chain {
        let own = podshaper_program().unwrap();
        let dirs = [own.parent().unwrap(), Path::new(PLUGIN_DIR)];
        let mut chain = Chain::read(&self.path("net.d").join(FILE), &dirs).unwrap();
        chain.cni_version = version.to_owned();
        chain
    }

    /// A plugin that answers ADD with this result, and other verbs with nothing.
    fn plugin(&self, name: &str, result: &Value) {
        self.script(name, &format!("[ $CNI_COMMAND != ADD ] || echo '{result}'"));
    }

    fn script(&self, name: &str, then: &str) {
        let log = self.path("calls");
        let script = format!(
            "#!/bin/sh\nstdin=$(cat)\nprintf '%s %s\\n%s\\n' \"$CNI_COMMAND\" {name} \"$stdin\" >>{}\n{then}\n",
            log.display()
        );
        let path = self.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The calls of the plugins since the last call of this function.
    fn asked(&self) -> Vec<Asked> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        let lines: Vec<&str> = text.lines().collect();
        let asked = |call: &[&str]| Asked { what: call[0].to_owned(), stdin: serde_json::from_str(call[1]).unwrap() };
        lines.chunks(2).map(asked).collect()
    }

    #[track_caller]
    fn assert_asked(&self, expected: &[&str]) -> Vec<Value> {
        let asked = self.asked();
        assert_eq!(asked.iter().map(|asked| asked.what.as_str()).collect::<Vec<_>>(), expected);
        asked.into_iter().map(|asked| asked.stdin).collect()
    }

    /// A pod whose runtime uses podshaper's own list.
    fn sandbox(&self) -> Sandbox {
        let mut pod = Sandbox::new();
        pod.stdin.remove("prevResult");
        pod.stdin.insert("delegate".into(), json!({ "directory": self.path("net.d") }));
        pod
    }

    fn cni(&self, pod: &Sandbox, verb: &str) -> crate::harness::cni::Cni {
        pod.cni(verb).env("CNI_PATH", format!("/nowhere:{}", self.path("bin").display()))
    }
}

fn network(version: &str, plugins: Value) -> Value {
    json!({ "cniVersion": version, "name": "net", "plugins": plugins })
}

fn result(version: &str, address: &str) -> Value {
    json!({ "cniVersion": version, "interfaces": [], "ips": [{ "version": "4", "address": address }], "dns": {} })
}

/// bridge, host-local and portmap of this machine.
fn bridge(host: &Host) -> Value {
    let ipam = json!({ "type": "host-local", "dataDir": host.state(), "ranges": [[{ "subnet": "10.213.0.0/24" }]] });
    network(
        "0.3.1",
        json!([
            { "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ]),
    )
}

fn leases(host: &Host, network: &str) -> usize {
    let files = fs::read_dir(host.state().join(network)).into_iter().flatten().flatten();
    files.filter(|file| file.file_name().to_string_lossy().starts_with("10.213.")).count()
}

fn records() -> usize {
    fs::read_dir(RECORDS).map_or(0, Iterator::count)
}

/// Runs `work` without other attachments, memory of STATUS, or results.
fn on_own_node(work: impl FnOnce() + Send) {
    on_a_node(|| {
        mounts::without_results();
        work();
    });
}

#[test]
#[ignore = "needs root, cgroup2, bpffs and the CNI plugins"]
fn a_pod_of_the_network_has_its_address_and_its_limit_in_every_version() {
    on_own_node(|| {
        let host = Host::new().unwrap();
        let node = Node::new(&bridge(&host));
        node.installs(&["--delegate"]);
        for version in ["0.4.0", "1.0.0", "1.1.0"] {
            let mut pod = Pod::new(&host, "delegate").unwrap();
            pod.offer_bandwidth(Some(LIMIT), None, None);
            pod.offer("portMappings", json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]));
            let added = pod.add(&node.chain(version)).unwrap();
            assert_eq!(added["cniVersion"], version);
            assert_eq!(added["ips"][0].get("version").is_some(), version == "0.4.0", "{added}");
            assert!(pod.addresses()[0].to_string().starts_with("10.213.0."), "{added}");
            assert_eq!(meter::egress_limit(&pod, INTERFACE).unwrap().rate_bits_per_s, LIMIT);
            // portmap got the port, as from a runtime that uses the network's own list.
            let rules = |host: &Host| host.netns.run("iptables-save", &["-t", "nat"]).unwrap_or_default();
            assert!(rules(&host).contains("--dport 8080"), "{}", rules(&host));
            assert_eq!((leases(&host, "net"), records()), (1, 1), "host-local has it by the network's name");
            pod.check().unwrap();
            pod.del().unwrap();
            assert!(!meter::directory(&pod, INTERFACE).exists() && !rules(&host).contains("--dport 8080"));
            assert_eq!((leases(&host, "net"), records()), (0, 0));
        }
    });
}

/// How networks' pods write their files.
#[derive(Clone, Copy, Debug)]
enum Writing {
    /// Written to a file of another name, then renamed.
    Renamed,
    /// In place: the file is empty at first, then half written.
    InPlace,
    /// Removed, then written again.
    Removed,
}

fn write(path: &Path, text: &str, how: Writing) {
    let (first, second) = text.as_bytes().split_at(text.len() / 2);
    let pause = || thread::sleep(Duration::from_millis(2));
    match how {
        Writing::Renamed => {
            let new = path.with_extension("new");
            fs::write(&new, text).unwrap();
            fs::rename(new, path).unwrap();
            pause();
        }
        Writing::InPlace | Writing::Removed => {
            if matches!(how, Writing::Removed) {
                fs::remove_file(path).unwrap();
                pause();
            }
            let mut file = fs::File::create(path).unwrap();
            pause();
            std::io::Write::write_all(&mut file, first).unwrap();
            pause();
            std::io::Write::write_all(&mut file, second).unwrap();
        }
    }
}

#[test]
#[ignore = "needs root, cgroup2, bpffs and the CNI plugins"]
fn no_pod_fails_or_is_unlimited_while_the_network_writes_its_list_anew() {
    const PODS: usize = 12;
    on_own_node(|| {
        let host = Host::new().unwrap();
        let node = Node::new(&bridge(&host));
        node.installs(&["--delegate"]);
        let chain = node.chain("1.0.0");
        let file = node.path("net.d/10-net.conflist");
        let versions = ["0.3.1", "0.4.0", "1.0.0"].map(|version| {
            let mut list = bridge(&host);
            list["cniVersion"] = json!(version);
            serde_json::to_string_pretty(&list).unwrap()
        });
        let (is_over, written) = (AtomicBool::new(false), AtomicUsize::new(0));
        let mut longest = Duration::ZERO;
        thread::scope(|scope| {
            scope.spawn(|| {
                let ways = [Writing::Renamed, Writing::InPlace, Writing::Removed];
                while !is_over.load(Ordering::Relaxed) {
                    let number = written.fetch_add(1, Ordering::Relaxed);
                    write(&file, &versions[number / 2 % 3], ways[number % 3]);
                    thread::sleep(Duration::from_millis(3));
                }
            });
            let come_and_go = || {
                for _ in 0..PODS {
                    let mut pod = Pod::new(&host, "rewritten").unwrap();
                    pod.offer_bandwidth(Some(LIMIT), None, None);
                    pod.add(&chain).unwrap();
                    assert_eq!(meter::egress_limit(&pod, INTERFACE).unwrap().rate_bits_per_s, LIMIT);
                    assert!(!pod.addresses().is_empty());
                    longest = longest.max(pod.calls.iter().map(|call| call.elapsed).max().unwrap());
                    pod.del().unwrap();
                }
            };
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(come_and_go));
            is_over.store(true, Ordering::Relaxed);
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        eprintln!("{PODS} pods, the list written {} times, longest call {longest:?}", written.load(Ordering::Relaxed));
        assert!(written.load(Ordering::Relaxed) > PODS);
        assert_eq!((leases(&host, "net"), records()), (0, 0));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn plugins_are_called_as_a_runtime_calls_them() {
    on_own_node(|| {
        let node = Node::new(&network(
            "0.4.0",
            json!([
                { "type": "first", "name": "other", "mtu": 1400, "capabilities": { "ips": true, "mac": false } },
                // Also installed in the network's list: podshaper is called once nevertheless.
                { "type": "podshaper", "capabilities": { "bandwidth": true } },
                { "type": "last", "capabilities": { "portMappings": true, "unknown": true } },
            ]),
        ));
        let (first, last) = (result("0.4.0", "10.1.0.2/24"), result("0.4.0", "10.1.0.3/24"));
        node.plugin("first", &first);
        node.plugin("last", &last);
        let mut pod = node.sandbox();
        pod.stdin.insert("cniVersion".into(), json!("1.1.0"));
        for (name, offer) in
            [("portMappings", json!([{ "hostPort": 1 }])), ("ips", json!(["10.1.0.2"])), ("mac", json!("m"))]
        {
            pod.stdin["runtimeConfig"][name] = offer;
        }
        let answer: Value = ok(&node.cni(&pod, "ADD")).json().unwrap();
        let mut expected = last.clone();
        expected["cniVersion"] = json!("1.1.0");
        expected["ips"][0].as_object_mut().unwrap().remove("version");
        assert_eq!(answer, expected);
        pod.assert_limited(&pod.container_id, RATE);
        let asked = node.assert_asked(&["ADD first", "ADD last"]);
        let of_first = json!({
            "type": "first", "name": "net", "cniVersion": "0.4.0", "mtu": 1400, "capabilities": { "ips": true, "mac": false },
            "runtimeConfig": { "ips": ["10.1.0.2"] },
        });
        assert_eq!(asked[0], of_first);
        assert_eq!((&asked[1]["prevResult"], &asked[1]["name"]), (&first, &json!("net")));
        assert_eq!(asked[1]["runtimeConfig"], json!({ "portMappings": [{ "hostPort": 1 }] }));

        // With the result of the ADD, converted to the version of the list.
        pod.stdin.insert("prevResult".into(), answer);
        ok(&node.cni(&pod, "CHECK"));
        let asked = node.assert_asked(&["CHECK first", "CHECK last"]);
        assert!(asked.iter().all(|stdin| stdin["prevResult"] == last), "{asked:?}");
        // The list has been replaced by one of another name. The list of the ADD counts.
        fs::remove_file(node.path("net.d/10-net.conflist")).unwrap();
        node.write(
            "20-new.conflist",
            &json!({ "cniVersion": "1.1.0", "name": "new", "plugins": [{ "type": "newer" }] }),
        );
        node.plugin("newer", &json!({}));
        ok(&node.cni(&pod, "CHECK"));
        node.assert_asked(&["CHECK first", "CHECK last"]);
        ok(&node.cni(&pod, "DEL"));
        let asked = node.assert_asked(&["DEL last", "DEL first"]);
        assert!(asked.iter().all(|stdin| stdin["prevResult"] == last && stdin["name"] == "net"), "{asked:?}");
        assert_eq!(asked[0]["runtimeConfig"], json!({ "portMappings": [{ "hostPort": 1 }] }));
        pod.assert_unlimited();
        assert_eq!(records(), 0);
        // A second DEL uses the list as it is now, like the DEL of a pod that was added before podshaper delegated.
        ok(&node.cni(&pod, "DEL"));
        node.assert_asked(&["DEL newer"]);
        // Neither a list of the network nor a record of this pod is left.
        fs::remove_file(node.path("net.d/20-new.conflist")).unwrap();
        assert!(ok(&node.cni(&pod, "DEL")).stderr.contains("nothing of the network is removed"));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_del_whose_stdin_cannot_be_read_removes_the_network_too() {
    on_own_node(|| {
        let node = Node::new(&network("0.3.1", json!([{ "type": "first" }])));
        node.plugin("first", &result("0.3.1", "10.1.0.2/24"));
        let pod = node.sandbox();
        ok(&node.cni(&pod, "ADD"));
        ok(&node.cni(&pod, "DEL").stdin("{"));
        let asked = node.assert_asked(&["ADD first", "DEL first"]);
        assert_eq!((&asked[1]["name"], asked[1].get("prevResult")), (&json!("net"), None));
        assert_eq!(records(), 0);
        pod.assert_unlimited();
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_that_fails_half_way_is_undone_and_says_what_the_plugin_says() {
    on_own_node(|| {
        let plugins = json!([{ "type": "first" }, { "type": "second" }, { "type": "third" }]);
        let node = Node::new(&network("0.4.0", plugins));
        let first = result("0.4.0", "10.1.0.2/24");
        node.plugin("first", &first);
        node.plugin("third", &first);
        let pod = node.sandbox();
        let fails =
            |answer: &str| node.script("second", &format!("[ $CNI_COMMAND != ADD ] || {{ {answer}; exit 1; }}"));
        let file = node.path("net.d/10-net.conflist").display().to_string();
        let by = format!("ADD by the plugin \"second\" of {file}");
        for (answer, code, msg, details) in [
            (
                "echo '{\"code\": 11, \"msg\": \"no address\", \"details\": \"of 10.1.0.0/24\"}'",
                11,
                "no address",
                format!("of 10.1.0.0/24 ({by})"),
            ),
            ("echo '{\"code\": 999, \"msg\": \"no\"}'", 999, "no", by.clone()),
            (
                "echo oops",
                6,
                "Failed to decode content",
                format!("{by}: it failed: exit status: 1, and said \"oops\\\\n\""),
            ),
            ("true", 5, "I/O failure", format!("{by}: it failed and did not say why: exit status: 1")),
        ] {
            fails(answer);
            let called = node.cni(&pod, "ADD").call().unwrap();
            let error: Value = serde_json::from_str(&called.stdout).unwrap();
            assert_eq!((&error["code"], &error["msg"]), (&json!(code), &json!(msg)), "{called}");
            assert!(error["details"].as_str().unwrap() == details.replace("\\\\", "\\"), "{called}");
            let asked = node.assert_asked(&["ADD first", "ADD second", "DEL second", "DEL first"]);
            assert!(asked[1..].iter().all(|stdin| stdin["prevResult"] == first));
            pod.assert_unlimited();
            assert_eq!(records(), 0);
        }
        // podshaper itself fails: it does not find the pod's cgroup.
        node.plugin("second", &first);
        let nowhere = pod
            .stdin_with(json!({ "runtimeConfig": { "bandwidth": { "egressRate": RATE }, "cgroupPath": "/nowhere" } }));
        assert_eq!(refused(&node.cni(&pod, "ADD").stdin(nowhere)).0, 100);
        node.assert_asked(&["ADD first", "ADD second", "ADD third", "DEL third", "DEL second", "DEL first"]);
        // With an error in the pod's annotations no plugin is called.
        let wrong =
            pod.stdin_with(json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "rate": "x" } } }));
        assert_eq!(refused(&node.cni(&pod, "ADD").stdin(wrong)).0, 7);
        node.assert_asked(&[]);
        // The error names a missing plugin and the directories in which podshaper looked for it.
        fs::remove_file(node.path("bin/second")).unwrap();
        let (code, details) = refused(&node.cni(&pod, "ADD"));
        assert!(code == 7 && details.contains("\"second\"") && details.contains("CNI_PATH"), "{details}");
        assert_eq!((node.asked().len(), records()), (1, 1), "what could not be undone is the next DEL's");
        node.plugin("second", &first);
        ok(&node.cni(&pod, "DEL"));
        node.assert_asked(&["DEL third", "DEL second", "DEL first"]);
        // podshaper cannot delegate behind another plugin.
        let chained = pod.stdin_with(json!({ "prevResult": {} }));
        assert!(refused(&node.cni(&pod, "ADD").stdin(chained)).1.contains("not the only plugin of its list"));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn without_a_network_status_and_add_say_what_is_missing() {
    on_own_node(|| {
        let node = Node::new(&network("1.1.0", json!([{ "type": "first" }])));
        let pod = node.sandbox();
        node.script("first", "echo '{\"code\": 51, \"msg\": \"limited\"}'; exit 1");
        assert_eq!(refused(&node.cni(&pod, "STATUS")).0, 51);
        node.plugin("first", &result("1.1.0", "10.1.0.2/24"));
        ok(&node.cni(&pod, "STATUS"));
        node.assert_asked(&["STATUS first", "STATUS first"]);
        // Before 1.1.0 plugins do not know STATUS.
        node.write("10-net.conflist", &network("1.0.0", json!([{ "type": "first" }])));
        ok(&node.cni(&pod, "STATUS"));
        node.assert_asked(&[]);
        fs::remove_file(node.path("net.d/10-net.conflist")).unwrap();
        for verb in ["STATUS", "ADD"] {
            let start = Instant::now();
            let (code, details) = refused(&node.cni(&pod, verb));
            assert!(code == 50 && details.contains("has no network's list beside podshaper's own"), "{code} {details}");
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        assert_eq!(records(), 0);
        // An ADD that failed has left nothing, and its DEL succeeds.
        ok(&node.cni(&pod, "DEL"));
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_gc_goes_to_the_plugins_with_the_attachments() {
    on_own_node(|| {
        let node = Node::new(&network("1.1.0", json!([{ "type": "first" }, { "type": "second" }])));
        let result = result("1.1.0", "10.1.0.2/24");
        ["first", "second"].iter().for_each(|name| node.plugin(name, &result));
        let (stays, goes) = (node.sandbox(), node.sandbox());
        let mut goes = goes;
        goes.stdin.insert("name".into(), json!(stays.network));
        [&stays, &goes].iter().for_each(|pod| drop(ok(&node.cni(pod, "ADD"))));
        node.asked();
        let valid = json!([{ "containerID": stays.container_id, "ifname": "eth0" }]);
        let stdin = stays.stdin_with(json!({ "cni.dev/valid-attachments": valid }));
        ok(&node.cni(&stays, "GC").stdin(stdin.clone()));
        let asked = node.assert_asked(&["GC first", "GC second"]);
        assert!(
            asked
                .iter()
                .all(|stdin| stdin["cni.dev/valid-attachments"] == valid && stdin["cni.dev/attachments"] == valid)
        );
        goes.assert_unlimited();
        assert_eq!(records(), 1);
        // Every plugin is called even if one fails. With disableGC none is called.
        node.script("first", "exit 1");
        assert!(refused(&node.cni(&stays, "GC").stdin(stdin.clone())).1.contains("\"first\""));
        node.assert_asked(&["GC first", "GC second"]);
        let mut list = network("1.1.0", json!([{ "type": "first" }]));
        list["disableGC"] = json!(true);
        node.write("10-net.conflist", &list);
        ok(&node.cni(&stays, "GC").stdin(stdin));
        // Without a list of valid attachments no plugin is called either.
        ok(&node.cni(&stays, "GC"));
        node.assert_asked(&[]);
        stays.assert_limited(&stays.container_id, RATE);
    });
}

/// A pod whose DEL was never passed to podshaper, since podshaper was removed from the conflist in between.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn what_is_left_of_a_sandbox_that_is_gone_is_cleared() {
    on_own_node(|| {
        let node = Node::new(&network("0.4.0", json!([{ "type": "first" }])));
        node.plugin("first", &result("0.4.0", "10.1.0.2/24"));
        let results = Path::new("/var/lib/cni/results");
        fs::create_dir(results).unwrap();
        let conf = node.path("net.d").display().to_string();
        let sync = |option: &[&str]| says(&[&["sync", "--conf-dir", &conf], option].concat());
        let cleared_by_gc = |option: &[&str]| {
            let found: Value = serde_json::from_str(&says(&[&["gc", "-o", "json"], option].concat())).unwrap();
            found
                .as_array()
                .unwrap()
                .iter()
                .map(|entry| entry["record"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        let stays = node.sandbox();
        ok(&node.cni(&stays, "ADD"));
        for by_sync in [true, false] {
            let (pod, netns) = (node.sandbox(), node.path("netns"));
            fs::write(&netns, "").unwrap();
            mounts::bind(pod.netns.path(), &netns);
            ok(&node.cni(&pod, "ADD").env("CNI_NETNS", netns.display().to_string()));
            let (id, record) = (&pod.container_id, format!("{RECORDS}/{}:eth0", pod.container_id));
            // As long as the namespace exists, an ADD may be running.
            assert_eq!((cleared_by_gc(&[]), sync(&[])), (vec![], String::new()));
            // The runtime still has to call DEL for a stored result.
            let kept = results.join(format!("podshaper-{id}-eth0"));
            fs::write(&kept, json!({ "kind": "else", "containerId": "", "ifName": "", "networkName": "" }).to_string())
                .unwrap();
            mounts::without(&netns);
            assert_eq!((cleared_by_gc(&[]), sync(&[])), (vec![], String::new()));
            assert_eq!(records(), 2);
            fs::remove_file(kept).unwrap();
            let line = format!("{id} eth0: the network's list at its ADD is cleared, the sandbox is gone\n");
            assert_eq!(sync(&["--dry-run"]), format!("would be: {line}"));
            assert_eq!(cleared_by_gc(&["--dry-run"]), [record.as_str()]);
            assert_eq!(records(), 2);
            if by_sync {
                assert_eq!(sync(&[]), line);
            } else {
                assert_eq!(cleared_by_gc(&[]), [record]);
            }
            assert_eq!(records(), 1);
            // A DEL that comes nevertheless uses the list as it is now.
            node.asked();
            ok(&node.cni(&pod, "DEL"));
            node.assert_asked(&["DEL first"]);
        }
        ok(&node.cni(&stays, "DEL"));
        assert_eq!(records(), 0);
    });
}

/// Compared with a runtime that calls the same plugins one after the other. The node has another limited pod all the
/// time.
#[test]
#[ignore = "needs root, cgroup2, bpffs and the CNI plugins"]
fn what_delegation_costs_a_call_is_little() {
    const PODS: usize = 30;
    const MOST: Duration = Duration::from_millis(10);
    let _alone = measure::alone();
    on_own_node(|| {
        let host = Host::new().unwrap();
        let node = Node::new(&bridge(&host));
        let own = podshaper_program().unwrap();
        let chained = Chain::new(&bridge(&host), &[PLUGIN_DIR]).unwrap();
        let chained = chained.then(podshaper_plugin()).with_dir(own.parent().unwrap());
        node.installs(&["--delegate"]);
        let delegating = node.chain("1.0.0");
        let add = |chain: &Chain| {
            let mut pod = Pod::new(&host, "cost").unwrap();
            pod.offer_bandwidth(Some(LIMIT), Some(LIMIT), None);
            pod.add(chain).unwrap();
            pod
        };
        let _first = add(&chained);
        // ADD and DEL of each, in turns, so that a slow moment of the machine affects both.
        let mut times = [[const { Vec::new() }; 2], [const { Vec::new() }; 2]];
        for _ in 0..PODS {
            for (chain, times) in [&chained, &delegating].into_iter().zip(&mut times) {
                let mut pod = add(chain);
                pod.del().unwrap();
                for (verb, times) in ["ADD", "DEL"].into_iter().zip(times) {
                    times.push(pod.calls.iter().filter(|call| call.verb() == verb).map(|call| call.elapsed).sum());
                }
            }
        }
        let median = |times: &[Duration]| {
            let mut times = times.to_vec();
            times.sort();
            times[times.len() / 2]
        };
        for (number, verb) in ["ADD", "DEL"].into_iter().enumerate() {
            let [chained, delegating] = times.each_ref().map(|times| median(&times[number]));
            eprintln!(
                "{verb} of bridge, portmap and podshaper: {chained:?} one after the other, {delegating:?} delegated to"
            );
            assert!(delegating < chained + MOST, "{verb}: {chained:?}, {delegating:?}");
        }
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_bandwidth_plugin_is_left_out_where_that_was_asked_for() {
    on_own_node(|| {
        let node = Node::new(&network("1.0.0", json!([{ "type": "first" }, { "type": "bandwidth" }])));
        let result = result("1.0.0", "10.1.0.2/24");
        ["first", "bandwidth"].iter().for_each(|name| node.plugin(name, &result));
        let said = node.installs(&["--delegate"]);
        assert!(
            said.contains("the bandwidth plugin is in ") && said.contains("--replace-bandwidth has it not called"),
            "{said}"
        );
        let said = node.installs(&["--replace-bandwidth"]);
        assert!(!said.contains("the bandwidth plugin"), "{said}");
        let list: Value = serde_json::from_slice(&fs::read(node.path("net.d").join(FILE)).unwrap()).unwrap();
        let mut pod = node.sandbox();
        pod.stdin.insert("delegate".into(), list["plugins"][0]["delegate"].clone());
        ok(&node.cni(&pod, "ADD"));
        ok(&node.cni(&pod, "DEL"));
        node.assert_asked(&["ADD first", "DEL first"]);
    });
}

/// A runtime that gives up kills the plugin that it has called, and no other process.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_plugin_does_not_outlive_podshaper_and_its_pod_is_removed_by_del() {
    on_own_node(|| {
        let node = Node::new(&network("0.4.0", json!([{ "type": "first" }, { "type": "slow" }])));
        let result = result("0.4.0", "10.1.0.2/24");
        node.plugin("first", &result);
        let id = node.path("id");
        node.script("slow", &format!("[ $CNI_COMMAND != ADD ] || {{ echo $$ >{}; exec sleep 60; }}", id.display()));
        let pod = node.sandbox();
        let stdin = pod.stdin_with(json!({}));
        let mut child = node.cni(&pod, "ADD").command().spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), stdin.as_bytes()).unwrap();
        assert!(within(Duration::from_secs(10), || fs::read_to_string(&id).is_ok_and(|id| id.ends_with('\n'))));
        let slow = PathBuf::from(format!("/proc/{}", fs::read_to_string(&id).unwrap().trim()));
        assert!(slow.exists());
        child.kill().unwrap();
        child.wait().unwrap();
        let is_gone = || !fs::read_to_string(slow.join("stat")).is_ok_and(|stat| !stat.contains(") Z "));
        assert!(within(Duration::from_secs(5), is_gone));
        fs::remove_file(node.path("net.d/10-net.conflist")).unwrap();
        ok(&node.cni(&pod, "DEL"));
        node.assert_asked(&["ADD first", "ADD slow", "DEL slow", "DEL first"]);
        assert_eq!(records(), 0);
    });
}

#[test]
#[ignore = "needs root, cgroup2, bpffs and the CNI plugins"]
fn a_pod_of_before_is_removed_by_the_list_of_now() {
    on_own_node(|| {
        let host = Host::new().unwrap();
        let network = bridge(&host);
        let node = Node::new(&network);
        // A pod that the network's own list has made, without podshaper.
        let mut pod = Pod::new(&host, "before").unwrap();
        pod.offer_bandwidth(Some(LIMIT), None, None);
        pod.add(&Chain::new(&network, &[PLUGIN_DIR]).unwrap()).unwrap();
        assert_eq!(leases(&host, "net"), 1);
        node.installs(&["--delegate"]);
        // containerd calls the list as it is now, and has no result of that name.
        let chain = node.chain("1.0.0");
        let del = chain.call(&chain.plugins[0], "DEL", &pod.offers, None).unwrap();
        let del: Call = pod.call(&pod.environment(del)).unwrap();
        del.success().unwrap();
        assert_eq!(leases(&host, "net"), 0);
        let (code, said, _) = call(&["doctor", "--conf-dir", node.path("net.d").to_str().unwrap()]);
        assert!(said.contains("podshaper delegates to ") && said.contains("10-net.conflist"), "{code} {said}");
    });
}
