//! `podshaper install` and `uninstall` on directories like a node's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::{ApiServer, Reply};
use crate::harness::process;
use crate::kernel::mounts;

const PODSHAPER: &str = env!("CARGO_BIN_EXE_podshaper");
const CAPABILITIES: [&str; 3] = ["bandwidth", "cgroupPath", "io.kubernetes.cri.pod-annotations"];

const CAPABILITIES_LINE: &str =
    r#""capabilities": { "bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true }"#;

/// A node's /etc/cni/net.d and /opt/cni/bin.
struct Node {
    root: TempDir,
}

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(mut command: Command) -> Self {
        let output = command.env_remove("CNI_COMMAND").output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { status: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Node {
    fn new(conflists: &[(&str, &str)]) -> Self {
        let node = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir_all(node.path("net.d")).unwrap();
        fs::create_dir_all(node.path("bin")).unwrap();
        fs::create_dir_all(node.path("systemd")).unwrap();
        for (name, text) in conflists {
            node.write(name, text);
        }
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path("net.d").join(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path("net.d").join(name)).unwrap()
    }

    /// Names of the files in net.d.
    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path("net.d"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn run(&self, verb: &str, options: &[&str]) -> Ran {
        let mut command = Command::new(PODSHAPER);
        command
            .arg(verb)
            .arg("--conf-dir")
            .arg(self.path("net.d"))
            .arg("--bin-dir")
            .arg(self.path("bin"))
            // The default would be this machine's directory.
            .arg("--unit-dir")
            .arg(self.path("systemd"))
            .args(options);
        Ran::of(command)
    }

    #[track_caller]
    fn ok(&self, verb: &str, options: &[&str]) -> String {
        let ran = self.run(verb, options);
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{verb} {options:?}: {}", ran.stdout);
        ran.stdout
    }

    #[track_caller]
    fn refused(&self, verb: &str, options: &[&str]) -> String {
        let ran = self.run(verb, options);
        assert_eq!((ran.status, ran.stdout.as_str()), (1, ""), "{verb} {options:?}: {}", ran.stderr);
        ran.stderr
    }
}

fn example(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("conflist-examples").join(name)).unwrap()
}

/// A conflist as the network's own pod leaves it: flannel's, without podshaper.
const FLANNEL: &str = "{\n  \"name\": \"cbr0\",\n  \"cniVersion\": \"0.3.1\",\n  \"plugins\": [\n    {\n      \"type\": \"flannel\",\n      \"delegate\": {\n        \"hairpinMode\": true,\n        \"isDefaultGateway\": true\n      }\n    },\n    {\n      \"type\": \"portmap\",\n      \"capabilities\": {\n        \"portMappings\": true\n      }\n    }\n  ]\n}\n";

fn plugins(text: &str) -> Vec<Value> {
    serde_json::from_str::<Value>(text).unwrap()["plugins"].as_array().unwrap().clone()
}

fn types(text: &str) -> Vec<String> {
    plugins(text).iter().map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn install_changes_the_first_network_and_uninstall_brings_it_back() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL), ("20-other.conf", "{}"), ("00-readme.txt", "no network")]);
    let list = node.path("net.d/10-flannel.conflist");
    fs::set_permissions(&list, fs::Permissions::from_mode(0o640)).unwrap();
    let said = node.ok("install", &[]);
    assert!(
        said.contains("bin/podshaper: installed, ") && said.contains("10-flannel.conflist: podshaper is in it"),
        "{said}"
    );
    assert!(!said.contains("flannel's pod writes this file anew"), "the units follow that: {said}");
    let installed = node.read("10-flannel.conflist");
    assert_eq!(types(&installed), ["flannel", "portmap", "podshaper"]);
    let capabilities: Value =
        CAPABILITIES.iter().map(|name| ((*name).to_owned(), json!(true))).collect::<serde_json::Map<_, _>>().into();
    assert_eq!(plugins(&installed)[2], json!({ "type": "podshaper", "capabilities": capabilities }));
    assert_eq!(fs::metadata(&list).unwrap().mode() & 0o7777, 0o640);
    let program = fs::metadata(node.path("bin/podshaper")).unwrap();
    assert_eq!((program.mode() & 0o7777, program.len()), (0o755, fs::metadata(PODSHAPER).unwrap().len()));

    // A second installation changes nothing, not even the files' times.
    let inodes = || [&list, &node.path("bin/podshaper")].map(|path| fs::metadata(path).unwrap().ino());
    let before = (inodes(), node.files());
    let said = node.ok("install", &[]);
    assert!(said.contains("is this program already") && said.contains("has podshaper already"), "{said}");
    assert_eq!((inodes(), node.files()), before);

    let said = node.ok("uninstall", &[]);
    assert!(said.contains("10-flannel.conflist is as it was before install"), "{said}");
    assert!(said.contains("bin/podshaper is left for the pods that were made with it"), "{said}");
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL);
    assert_eq!(node.files(), ["00-readme.txt", "10-flannel.conflist", "20-other.conf"]);
    assert!(node.ok("uninstall", &["--remove-binary"]).contains("podshaper is in no conflist of "));
    assert!(!node.path("bin/podshaper").exists());
    assert_eq!(node.files(), ["00-readme.txt", "10-flannel.conflist", "20-other.conf"]);
}

#[test]
fn a_dry_run_shows_the_change_and_makes_none() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    let said = node.ok("install", &["--dry-run", "--config", r#"{"max": {"egress": "1G"}}"#]);
    let lines = [
        "       \"capabilities\": {\n         \"portMappings\": true\n       }\n+    },\n+    {\n+      \"type\": \"podshaper\",\n",
        &format!("+      {CAPABILITIES_LINE},\n+      \"max\": {{\"egress\":\"1G\"}}\n     }}\n   ]\n }}\n"),
    ];
    assert!(said.contains(&format!("@@ -14,6 +14,11 @@\n{}", lines.concat())), "{said}");
    assert!(said.contains("bin/podshaper would be this program"), "{said}");
    assert_eq!(
        (node.read("10-flannel.conflist").as_str(), node.files()),
        (FLANNEL, vec!["10-flannel.conflist".to_owned()])
    );
    assert!(!node.path("bin/podshaper").exists());
    node.ok("install", &[]);
    let installed = node.read("10-flannel.conflist");
    let said = node.ok("uninstall", &["--dry-run", "--remove-binary"]);
    assert!(said.contains("\n-      \"type\": \"podshaper\",\n"), "{said}");
    assert_eq!(node.read("10-flannel.conflist"), installed);
    assert!(node.path("bin/podshaper").exists());
}

#[test]
fn the_bandwidth_plugin_is_warned_about_and_taken_out_when_asked() {
    let bandwidth = FLANNEL.replace(
        "\n    }\n  ]",
        "\n    },\n    { \"type\": \"bandwidth\", \"capabilities\": { \"bandwidth\": true } }\n  ]",
    );
    let node = Node::new(&[("10-flannel.conflist", &bandwidth)]);
    let said = node.ok("install", &[]);
    assert!(
        said.contains("warning: the bandwidth plugin is in the list as well") && said.contains("--replace-bandwidth"),
        "{said}"
    );
    assert_eq!(types(&node.read("10-flannel.conflist")), ["flannel", "portmap", "bandwidth", "podshaper"]);
    let said = node.ok("install", &["--replace-bandwidth"]);
    assert!(!said.contains("the bandwidth plugin"), "{said}");
    assert_eq!(types(&node.read("10-flannel.conflist")), ["flannel", "portmap", "podshaper"]);
    node.ok("uninstall", &[]);
    assert_eq!(node.read("10-flannel.conflist"), bandwidth);
    assert_eq!(node.files(), ["10-flannel.conflist"]);
}

#[test]
fn what_was_changed_since_install_stays_changed() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    node.ok("install", &[]);
    let edited = node.read("10-flannel.conflist").replace("\"hairpinMode\": true", "\"hairpinMode\": false");
    node.write("10-flannel.conflist", &edited);
    // The entry gets other keys and keeps its place.
    node.ok("install", &["--config", r#"{"rateKey": "", "egress": "10M"}"#]);
    assert_eq!(plugins(&node.read("10-flannel.conflist"))[2]["egress"], "10M");
    let said = node.ok("uninstall", &[]);
    assert!(
        said.contains("podshaper's entry is out") && said.contains("warning: ") && said.contains(".before-podshaper"),
        "{said}"
    );
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL.replace("\"hairpinMode\": true", "\"hairpinMode\": false"));
    // Another program writes the file anew, without podshaper; the next install keeps the new file's network.
    node.ok("install", &[]);
    node.write("10-flannel.conflist", &FLANNEL.replace("cbr0", "cbr1"));
    node.ok("install", &[]);
    node.ok("uninstall", &[]);
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL.replace("cbr0", "cbr1"));
}

const DELEGATING: &str = "00-podshaper.conflist";

#[test]
fn a_list_that_delegates_is_written_once_whatever_the_network_writes() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    let network = node.path("net.d/10-flannel.conflist");
    fs::set_permissions(&network, fs::Permissions::from_mode(0o640)).unwrap();
    let said = node.ok("install", &["--delegate", "--dry-run"]);
    assert!(said.contains("+  \"name\": \"podshaper\",\n") && node.files() == ["10-flannel.conflist"], "{said}");
    node.ok("install", &["--delegate", "--no-units"]);
    // install writes the same list as the example, for the directory of this node.
    let example = example(DELEGATING).replace("/etc/cni/net.d", &node.path("net.d").display().to_string());
    assert_eq!(node.read(DELEGATING), example);
    let list = node.path("net.d").join(DELEGATING);
    assert_eq!(fs::metadata(&list).unwrap().mode() & 0o7777, 0o640, "a network's list may hold a token");
    assert_eq!(
        (node.files(), node.read("10-flannel.conflist").as_str()),
        (vec![DELEGATING.into(), "10-flannel.conflist".into()], FLANNEL)
    );
    // The list stays, with or without --delegate. A network's list that is written anew, as another network, changes
    // nothing.
    let inode = || fs::metadata(&list).unwrap().ino();
    let before = inode();
    for options in [&["--delegate"][..], &[]] {
        node.write("10-flannel.conflist", &FLANNEL.replace("cbr0", "cbr1"));
        assert!(node.ok("install", options).contains("00-podshaper.conflist has podshaper already"));
        assert_eq!((inode(), node.read("10-flannel.conflist")), (before, FLANNEL.replace("cbr0", "cbr1")));
    }
    let service = || fs::read_to_string(node.path("systemd/podshaper.service")).unwrap();
    assert!(service().contains("\"--and-sync\" \"--delegate\" "), "{}", service());
    node.ok("install", &["--config", r#"{"max": {"egress": "1G"}}"#]);
    assert!(node.ok("install", &[]).contains("has podshaper already"));
    let entry = &plugins(&node.read(DELEGATING))[0];
    assert_eq!(
        (&entry["max"], &entry["delegate"]["directory"]),
        (&json!({ "egress": "1G" }), &json!(node.path("net.d")))
    );
    // An unknown capability must be declared, too, and stays declared.
    let unknown = FLANNEL.replace("\"portMappings\"", "\"myCapability\"");
    for text in [unknown.as_str(), FLANNEL] {
        node.write("10-flannel.conflist", text);
        node.ok("install", &[]);
        assert_eq!(plugins(&node.read(DELEGATING))[0]["capabilities"]["myCapability"], true);
    }
    let said = node.ok("uninstall", &[]);
    assert!(said.contains("00-podshaper.conflist: removed; the network's list"), "{said}");
    assert_eq!(
        (node.files(), node.read("10-flannel.conflist").as_str()),
        (vec!["10-flannel.conflist".into()], FLANNEL)
    );
}

#[test]
fn what_an_earlier_installation_made_gives_way_to_a_list_that_delegates() {
    let node = Node::new(&[("10-ovn-kubernetes.conf", OVN)]);
    node.ok("install", &["--config", r#"{"max": {"egress": "1G"}}"#]);
    let said = node.ok("install", &["--delegate"]);
    assert!(
        said.contains("10-ovn-kubernetes-podshaper.conflist: removed, what it was made of is delegated to"),
        "{said}"
    );
    assert_eq!(node.files(), [DELEGATING, "10-ovn-kubernetes.conf"]);
    assert_eq!(plugins(&node.read(DELEGATING))[0]["max"]["egress"], "1G");
    // podshaper stays in the network's own list, and is not called twice.
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    node.ok("install", &["--config", r#"{"max": {"egress": "2G"}}"#]);
    let said = node.ok("install", &["--delegate"]);
    assert!(said.contains("10-flannel.conflist as well, and is not called a second time there"), "{said}");
    assert_eq!(plugins(&node.read(DELEGATING))[0]["max"]["egress"], "2G");
    node.ok("uninstall", &[]);
    assert_eq!(
        (node.files(), node.read("10-flannel.conflist").as_str()),
        (vec!["10-flannel.conflist".into()], FLANNEL)
    );
}

#[test]
fn where_a_list_that_delegates_would_not_be_in_force_none_is_written() {
    for (files, expected) in [
        (vec![], "has no network's list beside podshaper's own"),
        (vec![("10-flannel.conflist", "{")], "10-flannel.conflist, the network's list that podshaper delegates to: "),
        (vec![("00-flannel.conflist", FLANNEL)], "00-flannel.conflist: it sorts before that one"),
        (
            vec![("00-multus.conf", &*multus(json!({}))), ("10-flannel.conflist", FLANNEL)],
            "00-multus.conf: it is Multus'",
        ),
    ] {
        let node = Node::new(&files);
        let before = node.files();
        let error = node.refused("install", &["--delegate"]);
        assert!(error.contains(expected), "{error}");
        assert_eq!((node.files(), node.path("bin/podshaper").exists()), (before, false));
    }
    let node = Node::new(&[("05-cilium.conflist", &FLANNEL.replace("\"flannel\"", "\"cilium-cni\""))]);
    let error = node.refused("install", &["--delegate", "--config", r#"{"delegate": {}}"#]);
    assert!(
        error.contains("the key \"delegate\" is written by install itself") || error.contains("\"delegate\""),
        "{error}"
    );
    assert!(node.ok("install", &["--delegate"]).contains("unless its Helm value cni.exclusive is false"));
    // A network that is removed leaves the list, and the next installation says so.
    fs::remove_file(node.path("net.d/05-cilium.conflist")).unwrap();
    assert!(node.refused("install", &[]).contains("has no network's list beside podshaper's own"));
    assert_eq!(node.files(), [DELEGATING]);
}

const OVN: &str = "{\"cniVersion\":\"1.0.0\",\"name\":\"ovn-kubernetes\",\"type\":\"ovn-k8s-cni-overlay\",\"ipam\":{},\"dns\":{},\"logFile\":\"/a\"}";

/// OVN-Kubernetes watches its file, and Multus takes the file for the sign that there is a network.
#[test]
fn a_lone_configuration_stays_and_a_list_that_sorts_before_it_is_used() {
    let node = Node::new(&[("10-ovn-kubernetes.conf", OVN), ("20-other.conflist", FLANNEL)]);
    let said = node.ok("install", &["--dry-run"]);
    assert!(said.contains("+  \"name\": \"ovn-kubernetes\",\n+  \"plugins\": [\n"), "{said}");
    node.ok("install", &["--config", r#"{"max": {"egress": "1G"}}"#]);
    let files = ["10-ovn-kubernetes-podshaper.conflist", "10-ovn-kubernetes.conf", "20-other.conflist"];
    assert_eq!((node.files(), node.read(files[1]).as_str()), (files.map(String::from).to_vec(), OVN));
    let list = node.read(files[0]);
    assert_eq!(types(&list), ["ovn-k8s-cni-overlay", "podshaper"]);
    assert_eq!(plugins(&list)[0], serde_json::from_str::<Value>(OVN).unwrap());
    // The owner writes its file anew several times; the keys of podshaper's entry stay.
    for log_file in ["/b", "/c", "/c"] {
        node.write(files[1], &OVN.replace("/a", log_file));
        let said = node.ok("install", &[]);
        let list = node.read(files[0]);
        assert_eq!(
            (&plugins(&list)[0]["logFile"], &plugins(&list)[1]["max"]["egress"]),
            (&json!(log_file), &json!("1G")),
            "{said}"
        );
        assert_eq!(node.files(), files);
    }
    assert!(node.ok("install", &[]).contains("has podshaper already"));
    let said = node.ok("uninstall", &[]);
    assert!(said.contains("10-ovn-kubernetes-podshaper.conflist: removed"), "{said}");
    assert_eq!(
        (node.files(), node.read(files[1])),
        (files[1..].iter().map(|name| (*name).to_owned()).collect(), OVN.replace("/a", "/c"))
    );
    // When the network's file is removed, install removes the list, and the runtime uses the next network.
    node.ok("install", &[]);
    fs::remove_file(node.path("net.d").join(files[1])).unwrap();
    let said = node.ok("install", &[]);
    assert!(said.contains("10-ovn-kubernetes-podshaper.conflist: removed, its network is gone"), "{said}");
    assert_eq!(types(&node.read(files[2])), ["flannel", "portmap", "podshaper"]);
}

/// The first versions of podshaper renamed a lone configuration. When its owner then wrote the file again, every
/// later install failed. The example is the list that install makes of the configuration that OVN-Kubernetes writes.
#[test]
fn the_example_for_ovn_kubernetes_is_what_install_makes() {
    let list = example("10-ovn-kubernetes-podshaper.conflist");
    let lone = plugins(&list)[0].to_string();
    let node = Node::new(&[("10-ovn-kubernetes.conf", &lone)]);
    node.ok("install", &[]);
    let made: Value = serde_json::from_str(&node.read("10-ovn-kubernetes-podshaper.conflist")).unwrap();
    assert_eq!(made, serde_json::from_str::<Value>(&list).unwrap());
}

#[test]
fn a_list_of_an_earlier_version_gives_way_when_the_configuration_it_was_made_of_is_back() {
    let node = Node::new(&[("10-ovn-kubernetes.conf", OVN)]);
    node.ok("install", &[]);
    let list = node.read("10-ovn-kubernetes-podshaper.conflist");
    let earlier = || {
        fs::remove_file(node.path("net.d/10-ovn-kubernetes-podshaper.conflist")).unwrap();
        node.write("10-ovn-kubernetes.conflist", &list);
        node.write("10-ovn-kubernetes.conf.before-podshaper", OVN);
    };
    earlier();
    node.ok("install", &[]);
    assert_eq!(node.files(), ["10-ovn-kubernetes-podshaper.conflist", "10-ovn-kubernetes.conf"]);
    // As long as the owner has not written the file again, the list is the network's.
    earlier();
    fs::remove_file(node.path("net.d/10-ovn-kubernetes.conf")).unwrap();
    node.ok("install", &[]);
    assert_eq!(node.files(), ["10-ovn-kubernetes.conf.before-podshaper", "10-ovn-kubernetes.conflist"]);
    node.ok("uninstall", &[]);
    assert_eq!(
        (node.files(), node.read("10-ovn-kubernetes.conf").as_str()),
        (vec!["10-ovn-kubernetes.conf".to_owned()], OVN)
    );
    // Another program's list that happens to have this name is not used, and is left alone.
    node.write("10-ovn-kubernetes.conflist", FLANNEL);
    node.ok("install", &[]);
    assert_eq!(node.read("10-ovn-kubernetes.conflist"), FLANNEL);
}

fn multus(keys: Value) -> String {
    let mut multus =
        json!({ "cniVersion": "0.3.1", "name": "multus-cni-network", "type": "multus", "kubeconfig": "/etc/k" });
    multus.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    serde_json::to_string_pretty(&multus).unwrap()
}

#[test]
fn behind_multus_podshaper_goes_into_the_network_that_it_delegates_to() {
    let flannel: Value = serde_json::from_str(FLANNEL).unwrap();
    let ovn: Value = serde_json::from_str(OVN).unwrap();
    let other = FLANNEL.replace("cbr0", "other");
    for (keys, network) in [
        (json!({}), "10-flannel.conflist"),
        (json!({ "clusterNetwork": "/host/etc/cni/net.d/20-other.conflist" }), "20-other.conflist"),
        (json!({ "clusterNetwork": "other" }), "20-other.conflist"),
        (
            json!({ "delegates": [flannel, { "type": "macvlan" }], "capabilities": { "bandwidth": true } }),
            "10-flannel.conflist",
        ),
        (json!({ "delegates": [ovn], "type": "multus-shim" }), "10-flannel.conflist"),
    ] {
        let (text, has_copy) = (multus(keys.clone()), keys.get("delegates").is_some());
        let node =
            Node::new(&[("00-multus.conf", &text), ("10-flannel.conflist", FLANNEL), ("20-other.conflist", &other)]);
        let said = node.ok("install", &[]);
        assert_eq!(
            said.contains("Multus passes no pod's limits on"),
            has_copy && keys.get("capabilities").is_none(),
            "{said}"
        );
        assert_eq!(types(&node.read(network)).last().unwrap(), "podshaper", "{keys}");
        let installed = node.read("00-multus.conf");
        let copy: Value = serde_json::from_str(&installed).unwrap();
        if has_copy {
            assert_eq!(types(&copy["delegates"][0].to_string()).last().unwrap(), "podshaper", "{copy}");
            assert_eq!(copy["delegates"].as_array().unwrap().len(), keys["delegates"].as_array().unwrap().len());
        } else {
            assert_eq!(installed, text);
        }
        assert!(node.ok("install", &[]).contains("has podshaper already"));
        assert_eq!(node.read("00-multus.conf"), installed);
        // The owner writes its file anew, and install runs again.
        node.write("00-multus.conf", &text);
        node.ok("install", &[]);
        assert_eq!(node.read("00-multus.conf"), installed);
        node.ok("uninstall", &[]);
        assert_eq!(
            (node.read("00-multus.conf"), node.read("10-flannel.conflist").as_str(), node.read("20-other.conflist")),
            (text, FLANNEL, other.clone()),
            "{keys}"
        );
        assert_eq!(node.files(), ["00-multus.conf", "10-flannel.conflist", "20-other.conflist"]);
    }
    let node = Node::new(&[("00-multus.conf", &multus(json!({})))]);
    let error = node.refused("install", &[]);
    assert!(error.contains("00-multus.conf is Multus', and the network it delegates to is not in "), "{error}");
}

#[test]
fn units_call_the_same_installation_again_and_go_with_it() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    let said = node.ok("install", &["--dry-run"]);
    assert!(said.contains("+ExecStart=\"") && fs::read_dir(node.path("systemd")).unwrap().count() == 0, "{said}");
    node.ok("install", &["--config", r#"{"max": {"egress": "1G"}}"#, "--kubeconfig", "/etc/k", "--node", "n1"]);
    let service = || fs::read_to_string(node.path("systemd/podshaper.service")).unwrap();
    let command = || service().lines().find_map(|line| line.strip_prefix("ExecStart=").map(str::to_owned)).unwrap();
    let root = node.root.path().display().to_string();
    let expected = format!(
        "\"{root}/bin/podshaper\" \"install\" \"--and-sync\" \"--conf-dir\" \"{root}/net.d\" \"--bin-dir\" \"{root}/bin\" \
         \"--cache-dir\" \"/var/lib/cni\" \"--config\" \"{{\\\"max\\\":{{\\\"egress\\\":\\\"1G\\\"}}}}\" \"--kubeconfig\" \"/etc/k\" \"--node\" \"n1\""
    );
    assert_eq!(command(), expected);
    // podshaper.path does not see changes while podshaper.service runs. The second service looks for such changes
    // afterwards.
    let again = fs::read_to_string(node.path("systemd/podshaper-again.service")).unwrap();
    assert!(again.contains(&format!("\nExecStart={expected} \"--if-changed\"\n")), "{again}");
    assert!(again.contains("\nAfter=podshaper.service\n") && service().contains(" restart podshaper-again.service\n"));
    let path = fs::read_to_string(node.path("systemd/podshaper.path")).unwrap();
    for watched in [node.path("net.d"), "/var/lib/cni/results".into(), "/var/lib/cni/multus/results".into()] {
        assert!(path.contains(&format!("PathChanged={}\n", watched.display())), "{path}");
    }
    // A later installation keeps all options that it is not given.
    let before = service();
    assert!(node.ok("install", &[]).contains("podshaper's units are there"));
    assert_eq!(service(), before);
    node.ok("install", &["--config", "{}", "--node", "n2"]);
    let changed = expected.replace("n1", "n2");
    let (head, tail) =
        (changed.split(" \"--config\"").next().unwrap(), changed.split(" \"--kubeconfig\"").nth(1).unwrap());
    assert_eq!(command(), format!("{head} \"--config\" \"{{}}\" \"--kubeconfig\"{tail}"));
    if process::run(Command::new("systemd-analyze").arg("--version")).is_ok() {
        let unit = |name: &str| node.path("systemd").join(name);
        let verified = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .args([unit("podshaper.path"), unit("podshaper.timer"), unit("podshaper.service")])
            .arg(unit("podshaper-again.service"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&verified.stderr).into_owned();
        assert!(!said.contains("podshaper."), "{said}");
    }
    let said = node.ok("uninstall", &[]);
    assert!(said.contains("systemd: podshaper's units removed"), "{said}");
    assert_eq!(fs::read_dir(node.path("systemd")).unwrap().count(), 0);
    node.ok("install", &["--no-units"]);
    assert_eq!(fs::read_dir(node.path("systemd")).unwrap().count(), 0);
}

#[test]
fn a_later_installation_keeps_the_options_of_the_units() {
    let bandwidth = FLANNEL.replace("\n    }\n  ]", "\n    },\n    { \"type\": \"bandwidth\" }\n  ]");
    let node = Node::new(&[("10-flannel.conflist", FLANNEL), ("20-other.conflist", &bandwidth)]);
    node.ok("install", &["--replace-bandwidth", "--conflist", "20-other.conflist", "--cache-dir", "/c"]);
    let units = || ["service", "path"].map(|kind| node.read(&format!("../systemd/podshaper.{kind}")));
    let before = units();
    // The network writes its list anew.
    node.write("20-other.conflist", &bandwidth);
    node.ok("install", &[]);
    assert_eq!(units(), before);
    assert!(before[0].contains("\"--cache-dir\" \"/c\" \"--conflist\" \"20-other.conflist\""), "{}", before[0]);
    assert!(before[0].contains("\"--replace-bandwidth\"") && before[1].contains("PathChanged=/c/results\n"));
    assert_eq!(types(&node.read("20-other.conflist")), ["flannel", "portmap", "podshaper"]);
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL);
    // Other values replace those of the units, and --delegate replaces --conflist.
    node.ok("install", &["--conflist", "10-flannel.conflist", "--cache-dir", "/d"]);
    assert_eq!(units(), before.clone().map(|unit| unit.replace("20-other", "10-flannel").replace("/c", "/d")));
    node.ok("install", &["--delegate"]);
    assert!(!units()[0].contains("--conflist"), "{}", units()[0]);
    // uninstall forgets them.
    node.ok("uninstall", &[]);
    node.ok("install", &[]);
    assert!(!units()[0].contains("--replace-bandwidth") && units()[0].contains("\"/var/lib/cni\""), "{}", units()[0]);
}

#[test]
fn a_kept_conflist_that_is_gone_is_told_of() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL), ("20-other.conflist", FLANNEL)]);
    node.ok("install", &["--conflist", "20-other.conflist"]);
    fs::remove_file(node.path("net.d/20-other.conflist")).unwrap();
    let error = node.refused("install", &[]);
    let remedy = "the conflist of the last installation (--conflist names another one, uninstall forgets it): find ";
    assert!(error.contains(remedy), "{error}");
    node.ok("install", &["--conflist", "10-flannel.conflist"]);
}

/// A service that runs on would put podshaper back, and the first service starts the second one when it is stopped.
#[test]
fn uninstall_stops_the_services_that_systemd_may_be_running() {
    // In namespaces of its own, /etc and /run are like those of a node with systemd. A systemctl that writes down its
    // calls is in $PATH.
    let script = r#"set -e
        mount -t tmpfs none /etc && mount -t tmpfs none /run && mkdir -p /run/systemd/system /etc/systemd/system
        printf '#!/bin/sh\necho "$@" >>%s/calls\n' "$1" >"$1/systemctl" && chmod +x "$1/systemctl"
        export PATH="$1:$PATH"
        "$0" install --conf-dir "$1/net.d" --bin-dir "$1/bin" >&2
        rm -f "/etc/systemd/system/$2" "$1/calls"
        "$0" uninstall --conf-dir "$1/net.d" --bin-dir "$1/bin" >&2
        cat "$1/calls""#;
    let [disable, reload] = ["disable --now podshaper.path podshaper.timer", "daemon-reload"];
    // systemd lists a stopped run as failed until it is told to forget it.
    let first = ["stop podshaper.service", "reset-failed podshaper.service"];
    let second = ["stop podshaper-again.service", "reset-failed podshaper-again.service"];
    for (missing, expected) in [
        ("none", [&[disable][..], &first, &second, &[reload]].concat()),
        // Another version may have no second service.
        ("podshaper-again.service", [&[disable][..], &first, &[reload]].concat()),
    ] {
        let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script, PODSHAPER]).arg(node.root.path()).arg(missing);
        let ran = Ran::of(command);
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        assert_eq!(ran.stdout.lines().collect::<Vec<_>>(), expected);
    }
}

/// podshaper asks the API server for the labels of namespaces, which kubelet's user may not get.
#[test]
fn a_user_who_may_not_get_namespaces_is_found_before_any_pod_fails() {
    let namespace = json!({ "metadata": { "name": "default", "uid": "n-1" } });
    let one = Reply::json("200 OK", &namespace);
    let all = Reply::json("200 OK", &json!({ "metadata": {}, "items": [namespace] }));
    let no = || Reply::status("403 Forbidden", "no namespaces for you");
    for (one, all, what) in [
        (one.clone(), all.clone(), None),
        (no(), no(), Some("namespace default")),
        // Enough for an ADD, but not for sync.
        (one, no(), Some("the namespaces")),
    ] {
        let replies = vec![("/api/v1/namespaces?", all), ("/api/v1/namespaces/default", one)];
        let server = ApiServer::start(Reply::ByPath(replies)).unwrap();
        let kubeconfig = server.kubeconfig(&json!({}), &json!({})).unwrap();
        let rule = json!({ "labels": { "tier": "free" }, "egress": "5M" });
        let keys = json!({ "kubeconfig": kubeconfig, "namespaces": [rule] });
        let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
        let doctor = |node: &Node| {
            let directories = ["net.d", "bin"].map(|name| node.path(name));
            let mut command = Command::new(PODSHAPER);
            command.args(["doctor", "--conf-dir"]).arg(&directories[0]).arg("--bin-dir").arg(&directories[1]);
            String::from_utf8(command.env_remove("CNI_COMMAND").output().unwrap().stdout).unwrap()
        };
        let Some(what) = what else {
            node.ok("install", &["--config", &keys.to_string()]);
            // doctor also tells of attachments on this machine, and of their namespaces.
            assert!(!doctor(&node).contains("its user may not"), "{}", doctor(&node));
            continue;
        };
        let remedy = format!(
            "for {what}: it answered 403 \"no namespaces for you\": its user may not; kubectl apply -f install/labels-rbac.yaml makes one \
             who may get and list pods and namespaces, and install/kubeconfig writes its kubeconfig"
        );
        let refusal = node.refused("install", &["--config", &keys.to_string()]);
        assert!(refusal.contains(&remedy), "{refusal}");
        assert_eq!(node.read("10-flannel.conflist"), FLANNEL);
        // As another program may write the list.
        let mut list: Value = serde_json::from_str(FLANNEL).unwrap();
        let mut entry = keys.clone();
        entry["type"] = json!("podshaper");
        list["plugins"].as_array_mut().unwrap().push(entry);
        node.write("10-flannel.conflist", &list.to_string());
        assert!(doctor(&node).contains(&remedy), "{}", doctor(&node));
    }
}

#[test]
fn nothing_is_changed_on_a_node_that_cannot_be_understood() {
    let node = Node::new(&[]);
    let error = node.refused("install", &[]);
    assert!(error.contains("net.d has no network yet"), "{error}");
    node.write("10-a.conflist", "{\"cniVersion\": \"0.2.0\", \"plugins\": [{\"type\": \"bridge\"}]}");
    node.write("20-b.conflist", FLANNEL);
    let error = node.refused("install", &[]);
    assert!(
        error.starts_with("podshaper: put podshaper into ")
            && error.contains("10-a.conflist: its \"cniVersion\" is \"0.2.0\""),
        "{error}"
    );
    let error = node.refused("install", &["--config", r#"{"egress": "1MB"}"#]);
    assert!(error.contains("--config: configuration key \"egress\": \"1MB\" is not a rate"), "{error}");
    let error = node.refused("install", &["--conflist", "nowhere.conflist"]);
    assert!(error.contains("find ") && error.contains("nowhere.conflist: No such file"), "{error}");
    let ran = node.run("install", &["--bin-dir", "/nowhere", "--conflist", "20-b.conflist"]);
    assert!(ran.status != 0, "the option is there twice: {}", ran.stdout);
    assert_eq!(node.files(), ["10-a.conflist", "20-b.conflist"]);
    assert_eq!(fs::read_dir(node.path("bin")).unwrap().count(), 0);
    // --conflist chooses the list, by name or by path. uninstall leaves alone a list that it cannot parse.
    node.ok("install", &["--conflist", "20-b.conflist"]);
    node.ok("install", &["--conflist", node.path("net.d/20-b.conflist").to_str().unwrap()]);
    let said = node.ok("uninstall", &[]);
    assert!(said.contains("warning: left alone: ") && said.contains("10-a.conflist"), "{said}");
    assert_eq!(node.read("20-b.conflist"), FLANNEL);
}

/// A mistake in an existing entry fails every ADD.
#[test]
fn keys_of_an_entry_that_is_there_are_looked_at() {
    for (key, reason) in [("egres", "\"egres\" is no key of podshaper's"), ("egress", "\"1MB\" is not a rate")] {
        let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
        node.ok("install", &["--config", r#"{"rateKey": "1MB"}"#]);
        let mistaken = node.read("10-flannel.conflist").replace("rateKey", key);
        node.write("10-flannel.conflist", &mistaken);
        let error = node.refused("install", &[]);
        assert!(
            error.contains("10-flannel.conflist: its entry of podshaper (--config writes it anew): ")
                && error.contains(reason),
            "{error}"
        );
        assert_eq!(node.read("10-flannel.conflist"), mistaken);
        node.ok("install", &["--config", "{}"]);
        node.ok("install", &[]);
    }
}

/// install makes the lists of conflist-examples from the networks' own lists.
#[test]
fn every_example_survives_uninstall_and_install() {
    let names = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("conflist-examples")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    // A list that install makes of a lone configuration is removed together with that.
    let is_list = |name: &String| name.ends_with(".conflist") && !name.ends_with("-podshaper.conflist");
    for name in names.filter(is_list) {
        let node = Node::new(&[(&name, &example(&name))]);
        node.ok("uninstall", &[]);
        let without = node.read(&name);
        assert!(!types(&without).contains(&"podshaper".to_owned()), "{name}");
        node.ok("install", &[]);
        assert_eq!(node.read(&name), example(&name), "{name}");
        node.ok("uninstall", &[]);
        assert_eq!(node.read(&name), without, "{name}");
    }
}

#[test]
fn a_link_to_the_conflist_stays_one() {
    let node = Node::new(&[]);
    fs::write(node.path("real.conflist"), FLANNEL).unwrap();
    std::os::unix::fs::symlink("../real.conflist", node.path("net.d/10-link.conflist")).unwrap();
    node.ok("install", &[]);
    assert!(fs::symlink_metadata(node.path("net.d/10-link.conflist")).unwrap().is_symlink());
    assert_eq!(types(&node.read("10-link.conflist")).last().unwrap(), "podshaper");
    node.ok("uninstall", &["--conflist", "10-link.conflist"]);
    assert_eq!(fs::read_to_string(node.path("real.conflist")).unwrap(), FLANNEL);
}

/// A manifest, and the arguments of its init container.
fn manifest(name: &str) -> (Value, Vec<String>) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("install").join(name)).unwrap();
    let manifest: Value = serde_norway::from_str(&text).unwrap();
    let arguments = manifest["spec"]["template"]["spec"]["initContainers"][0]["args"].as_array().unwrap();
    let arguments = arguments.iter().map(|argument| argument.as_str().unwrap().to_owned()).collect();
    (manifest, arguments)
}

#[test]
fn the_kustomization_names_what_is_there() {
    let read = |name: &str| -> Value {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("install").join(name)).unwrap();
        serde_norway::from_str(&text).unwrap()
    };
    let kustomization = read("kustomization.yaml");
    assert_eq!(
        (&kustomization["kind"], &kustomization["resources"]),
        (&json!("Kustomization"), &json!(["podshaper.yaml"]))
    );
    let image = &kustomization["images"][0];
    let manifest = read("podshaper.yaml");
    let installer = &manifest["spec"]["template"]["spec"]["initContainers"][0];
    let named = [&image["name"], &image["newTag"]].map(|text| text.as_str().unwrap());
    assert_eq!(installer["image"], named.join(":"), "or the image would not be replaced");
}

/// On the node's root directory, into which the program changes its root: here of a node without systemd, with the
/// directories of k3s.
#[test]
fn the_manifests_install_and_uninstall_on_the_nodes_root() {
    let root = tempfile::tempdir().unwrap();
    let of_k3s = "var/lib/rancher/k3s/agent/etc";
    let conf = root.path().join(of_k3s).join("cni/net.d");
    let bin = root.path().join("var/lib/rancher/k3s/data/cni");
    for directory in [&conf, &bin, &root.path().join(of_k3s).join("containerd")] {
        fs::create_dir_all(directory).unwrap();
    }
    let containerd = format!("bin_dir = \"/var/lib/rancher/k3s/data/cni\"\nconf_dir = \"/{of_k3s}/cni/net.d\"\n");
    fs::write(root.path().join(of_k3s).join("containerd/config.toml"), containerd).unwrap();
    let list = conf.join("10-flannel.conflist");
    fs::write(&list, FLANNEL).unwrap();
    let run = |arguments: &[String]| {
        let root = format!("--host-root={}", root.path().display());
        let arguments = arguments.iter().map(|argument| argument.replace("--host-root=/host", &root));
        // As in a container that has only the program: no PATH, no HOME, no CNI_COMMAND. The user namespace permits
        // chroot without root.
        let mut command = Command::new("unshare");
        let output = command.args(["--map-root-user", PODSHAPER]).args(arguments).env_clear().output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let ((installer, install), (uninstaller, uninstall)) = (manifest("podshaper.yaml"), manifest("uninstall.yaml"));
    for key in ["apiVersion", "kind", "metadata"] {
        assert_eq!(installer[key], uninstaller[key], "the one takes the other's place");
    }
    assert_eq!(installer["spec"]["selector"], uninstaller["spec"]["selector"]);
    let said = run(&install);
    assert!(said.contains("no systemd runs on this host"), "{said}");
    run(&install);
    assert_eq!(types(&fs::read_to_string(&list).unwrap()), ["flannel", "portmap", "podshaper"]);
    assert_eq!(fs::metadata(bin.join("podshaper")).unwrap().len(), fs::metadata(PODSHAPER).unwrap().len());
    run(&uninstall);
    run(&uninstall);
    assert_eq!(fs::read_to_string(&list).unwrap(), FLANNEL);
}

/// A bpffs that a container mounts is the container's alone.
#[test]
fn a_container_does_not_mount_bpffs_for_the_node() {
    let root = tempfile::tempdir().unwrap();
    let conf = root.path().join("etc/cni/net.d");
    fs::create_dir_all(&conf).unwrap();
    fs::write(conf.join("10-flannel.conflist"), FLANNEL).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", PODSHAPER, "install", "--and-sync"]);
    let output = command.arg(format!("--host-root={}", root.path().display())).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let told = "find the node's bpffs on /sys/fs/bpf: it is not mounted there";
    assert!(!output.status.success() && stderr.contains(told), "{output:?}");
}

/// Runs podshaper with exactly the capabilities of the DaemonSet's container.
fn as_the_daemonset(verb: &str, node: &Node, bin: &Path) -> Ran {
    let container = &manifest("podshaper.yaml").0["spec"]["template"]["spec"]["initContainers"][0];
    let added = container["securityContext"]["capabilities"]["add"].as_array().unwrap();
    let added: Vec<String> = added.iter().map(|name| name.as_str().unwrap().to_lowercase()).collect();
    let bounding = format!("--bounding-set=-all,+{}", added.join(",+"));
    let mut command = Command::new("setpriv");
    command.args([&bounding, "--inh-caps=-all", "--no-new-privs", PODSHAPER, verb, "--no-units"].map(str::to_owned));
    command.arg("--conf-dir").arg(node.path("net.d")).arg("--bin-dir").arg(bin);
    Ran::of(command)
}

#[test]
#[ignore = "needs root"]
fn directories_and_files_of_another_owner_are_written_and_stay_that_owners() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    let list = node.path("net.d/10-flannel.conflist");
    fs::set_permissions(&list, fs::Permissions::from_mode(0o640)).unwrap();
    let theirs = [node.path("bin"), node.path("net.d"), list.clone()];
    theirs.iter().for_each(|path| chown(path, Some(1234), Some(1235)).unwrap());
    let is_theirs = || {
        let found = fs::metadata(&list).unwrap();
        (found.uid(), found.gid(), found.mode() & 0o7777) == (1234, 1235, 0o640)
    };
    for _ in 0..2 {
        let ran = as_the_daemonset("install", &node, &node.path("bin"));
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{}", ran.stdout);
        assert_eq!(types(&node.read("10-flannel.conflist")), ["flannel", "portmap", "podshaper"]);
        assert!(is_theirs() && node.path("bin/podshaper").exists());
    }
    let ran = Ran::of({
        let mut command = Command::new(PODSHAPER);
        command.arg("uninstall").arg("--conf-dir").arg(node.path("net.d")).arg("--unit-dir").arg(node.path("systemd"));
        command
    });
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{}", ran.stdout);
    assert!(is_theirs());
    assert_eq!(
        (node.read("10-flannel.conflist").as_str(), node.files()),
        (FLANNEL, vec!["10-flannel.conflist".into()])
    );
}

/// install changes nothing before it knows that it can write the program. With another directory it succeeds.
#[test]
#[ignore = "needs root"]
fn a_directory_of_plugins_that_is_read_only_is_told_of_and_another_one_does() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    mounts::with_own(|| {
        let bin = node.path("bin");
        mounts::bind(&bin, &bin);
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, &bin, None::<&str>, flags, None::<&str>).unwrap();
        let ran = as_the_daemonset("install", &node, &bin);
        assert_eq!((ran.status, ran.stdout.as_str()), (1, ""));
        assert!(ran.stderr.contains("Read-only file system") && ran.stderr.contains("--bin-dir"), "{}", ran.stderr);
        assert_eq!(node.read("10-flannel.conflist"), FLANNEL);
        let other = node.path("other/cni/bin");
        fs::create_dir_all(&other).unwrap();
        let ran = as_the_daemonset("install", &node, &other);
        assert_eq!((ran.status, ran.stderr.as_str()), (0, ""), "{}", ran.stdout);
        assert!(other.join("podshaper").exists());
        assert_eq!(types(&node.read("10-flannel.conflist")), ["flannel", "portmap", "podshaper"]);
        mounts::without(&bin);
    });
}

/// The manifests permit what the work needs on a node with SELinux and with directories of another owner, and no
/// more.
#[test]
fn the_manifests_may_do_what_the_work_takes_and_no_more() {
    for name in ["podshaper.yaml", "uninstall.yaml"] {
        let (manifest, arguments) = manifest(name);
        let pod = &manifest["spec"]["template"]["spec"];
        let installer = &pod["initContainers"][0];
        assert!(arguments.contains(&"--host-root=/host".to_owned()), "{name}: {arguments:?}");
        let expected = json!({
            "runAsUser": 0, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["SYS_CHROOT", "DAC_OVERRIDE", "CHOWN"] },
            "seLinuxOptions": { "type": "spc_t" },
        });
        assert_eq!(installer["securityContext"], expected, "{name}");
        assert_eq!(installer["volumeMounts"], json!([{ "name": "host", "mountPath": "/host" }]), "{name}");
        assert_eq!(
            pod["volumes"],
            json!([{ "name": "host", "hostPath": { "path": "/", "type": "Directory" } }]),
            "{name}"
        );
        assert_eq!(
            (&pod["hostNetwork"], &pod["automountServiceAccountToken"]),
            (&json!(true), &json!(false)),
            "{name}"
        );
        assert_eq!(pod["tolerations"], json!([{ "operator": "Exists" }]), "{name}");
        assert_eq!(pod["containers"][0]["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }), "{name}");
    }
}

/// The probe calls the same commands as the units, with the files and mounts of the manifest.
#[test]
fn kubelets_probe_calls_what_the_units_call() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("install");
    let patch: Value = serde_norway::from_str(&fs::read_to_string(root.join("without-systemd.yaml")).unwrap()).unwrap();
    let pod = &patch["spec"]["template"]["spec"];
    let (container, whole) = (&pod["containers"][0], &manifest("podshaper.yaml").0["spec"]["template"]["spec"]);
    assert_eq!(container["name"], whole["containers"][0]["name"], "or it would be another container");
    assert_eq!(container["volumeMounts"][0]["name"], whole["volumes"][0]["name"]);
    assert_eq!((&pod["hostPID"], &whole["hostNetwork"]), (&json!(true), &json!(true)));
    // kubelet would not start a privileged container without privilege escalation.
    let security = &container["securityContext"];
    assert_eq!((&security["privileged"], &security["allowPrivilegeEscalation"]), (&json!(true), &json!(true)));
    let mount = &container["volumeMounts"][0];
    assert_eq!((&mount["mountPath"], &mount["mountPropagation"]), (&json!("/host"), &json!("HostToContainer")));
    let probe = &container["readinessProbe"];
    let command: Vec<&str> =
        probe["exec"]["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    assert_eq!(command, ["/host/opt/cni/bin/podshaper", "install", "--and-sync", "--host-root=/host"]);
    assert_eq!((&probe["periodSeconds"], &probe["failureThreshold"]), (&json!(10), &json!(1)));
}

/// `tests/run cluster` renders the chart with helm and compares the result.
#[test]
fn the_chart_is_of_this_version() {
    let read = |name: &str| -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("install/helm/podshaper").join(name);
        serde_norway::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    };
    let (chart, values) = (read("Chart.yaml"), read("values.yaml"));
    let version = json!(env!("CARGO_PKG_VERSION"));
    assert_eq!((&chart["version"], &chart["appVersion"]), (&version, &version));
    let pod = &manifest("podshaper.yaml").0["spec"]["template"]["spec"];
    assert_eq!(
        pod["initContainers"][0]["image"],
        format!("{}:{}", values["image"]["repository"].as_str().unwrap(), env!("CARGO_PKG_VERSION"))
    );
    assert_eq!(pod["containers"][0]["image"], values["pauseImage"]);
}
