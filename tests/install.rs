//! `podshaper install` and `uninstall` on directories like a node's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

const PODSHAPER: &str = env!("CARGO_BIN_EXE_podshaper");
const CAPABILITIES: [&str; 3] = ["bandwidth", "cgroupPath", "io.kubernetes.cri.pod-annotations"];

const CAPABILITIES_LINE: &str =
    r#""capabilities": { "bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true }"#;

/// /etc/cni/net.d and /opt/cni/bin of a node.
struct Node {
    root: TempDir,
}

struct Ran {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Node {
    fn new(conflists: &[(&str, &str)]) -> Self {
        let node = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir_all(node.path("net.d")).unwrap();
        fs::create_dir_all(node.path("bin")).unwrap();
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
            .args(options);
        let output = command.env_remove("CNI_COMMAND").output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { status: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
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

/// As a network's own pod leaves it: flannel's, without podshaper.
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
    assert!(said.contains("warning: flannel's pod writes this file anew"), "{said}");
    let installed = node.read("10-flannel.conflist");
    assert_eq!(types(&installed), ["flannel", "portmap", "podshaper"]);
    let capabilities: Value =
        CAPABILITIES.iter().map(|name| ((*name).to_owned(), json!(true))).collect::<serde_json::Map<_, _>>().into();
    assert_eq!(plugins(&installed)[2], json!({ "type": "podshaper", "capabilities": capabilities }));
    assert_eq!(fs::metadata(&list).unwrap().mode() & 0o7777, 0o640);
    let program = fs::metadata(node.path("bin/podshaper")).unwrap();
    assert_eq!((program.mode() & 0o7777, program.len()), (0o755, fs::metadata(PODSHAPER).unwrap().len()));

    // A second time nothing happens: not even to the files' times.
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
    // Other keys for the entry, in place.
    node.ok("install", &["--config", r#"{"rateKey": "", "egress": "10M"}"#]);
    assert_eq!(plugins(&node.read("10-flannel.conflist"))[2]["egress"], "10M");
    let said = node.ok("uninstall", &[]);
    assert!(
        said.contains("podshaper's entry is out") && said.contains("warning: ") && said.contains(".before-podshaper"),
        "{said}"
    );
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL.replace("\"hairpinMode\": true", "\"hairpinMode\": false"));
    // Whoever writes the file anew takes podshaper out; the next install keeps the new one.
    node.ok("install", &[]);
    node.write("10-flannel.conflist", &FLANNEL.replace("cbr0", "cbr1"));
    node.ok("install", &[]);
    node.ok("uninstall", &[]);
    assert_eq!(node.read("10-flannel.conflist"), FLANNEL.replace("cbr0", "cbr1"));
}

#[test]
fn a_lone_configuration_becomes_a_conflist_and_comes_back() {
    let lone = "{ \"cniVersion\": \"0.4.0\", \"name\": \"mynet\", \"type\": \"bridge\", \"ipam\": {} }\n";
    let node = Node::new(&[("10-mynet.conf", lone)]);
    let said = node.ok("install", &["--dry-run"]);
    assert!(said.contains("+  \"name\": \"mynet\",\n+  \"plugins\": [\n"), "{said}");
    node.ok("install", &[]);
    assert_eq!(node.files(), ["10-mynet.conf.before-podshaper", "10-mynet.conflist"]);
    let list = node.read("10-mynet.conflist");
    assert_eq!(types(&list), ["bridge", "podshaper"]);
    assert_eq!(plugins(&list)[0], serde_json::from_str::<Value>(lone).unwrap());
    node.ok("install", &[]);
    node.ok("uninstall", &[]);
    assert_eq!((node.files(), node.read("10-mynet.conf").as_str()), (vec!["10-mynet.conf".to_owned()], lone));
    node.write("10-mynet.conflist", FLANNEL);
    let error = node.refused("install", &[]);
    assert!(error.contains("10-mynet.conflist is there, too, and not used: remove one of them"), "{error}");
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
    // The one that is named is taken, by name or by path; uninstall leaves alone what it does not understand.
    node.ok("install", &["--conflist", "20-b.conflist"]);
    node.ok("install", &["--conflist", node.path("net.d/20-b.conflist").to_str().unwrap()]);
    let said = node.ok("uninstall", &[]);
    assert!(said.contains("warning: left alone: ") && said.contains("10-a.conflist"), "{said}");
    assert_eq!(node.read("20-b.conflist"), FLANNEL);
}

/// Those of conflist-examples are what install makes of the networks' own.
#[test]
fn every_example_survives_uninstall_and_install() {
    let names = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("conflist-examples")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    for name in names.filter(|name| name.ends_with(".conflist")) {
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

/// What the DaemonSet's init container runs.
fn manifest(name: &str) -> (Value, Vec<String>) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("install").join(name)).unwrap();
    let manifest: Value = serde_norway::from_str(&text).unwrap();
    let arguments = manifest["spec"]["template"]["spec"]["initContainers"][0]["args"].as_array().unwrap();
    let arguments = arguments.iter().map(|argument| argument.as_str().unwrap().to_owned()).collect();
    (manifest, arguments)
}

#[test]
fn the_manifests_install_and_uninstall_from_an_empty_root() {
    let node = Node::new(&[("10-flannel.conflist", FLANNEL)]);
    fs::create_dir(node.path("host")).unwrap();
    for name in ["net.d", "bin"] {
        fs::rename(node.path(name), node.path("host").join(name)).unwrap();
    }
    let run = |arguments: Vec<String>| {
        let root = node.root.path().to_str().unwrap();
        let arguments = arguments.iter().map(|argument| argument.replace("=/host/", &format!("={root}/host/")));
        // As in a container of nothing but the program: no PATH, no HOME, no CNI_COMMAND.
        let output = Command::new(PODSHAPER).args(arguments).env_clear().output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    let ((installer, install), (uninstaller, uninstall)) = (manifest("podshaper.yaml"), manifest("uninstall.yaml"));
    for key in ["apiVersion", "kind", "metadata"] {
        assert_eq!(installer[key], uninstaller[key], "the one takes the other's place");
    }
    assert_eq!(installer["spec"]["selector"], uninstaller["spec"]["selector"]);
    let list = node.path("host/net.d/10-flannel.conflist");
    run(install.clone());
    run(install);
    assert_eq!(types(&fs::read_to_string(&list).unwrap()), ["flannel", "portmap", "podshaper"]);
    assert!(node.path("host/bin/podshaper").exists());
    run(uninstall.clone());
    run(uninstall);
    assert_eq!(fs::read_to_string(&list).unwrap(), FLANNEL);
}
