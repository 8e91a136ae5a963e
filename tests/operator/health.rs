use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use super::{alone, call, limited_both_ways, listed, says};
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::{pod, process, unique};
use crate::sandbox::{NODE, RATE, Sandbox, bpftool, netns_with, within};

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn gc_removes_what_has_no_cgroup_any_more() {
    alone(|| {
        let (kept, gone) = (limited_both_ways(None), limited_both_ways(None));
        kept.call("ADD");
        gone.call("ADD");
        let objects = gone.objects();
        // A directory that a killed call leaves.
        fs::create_dir(gone.pod_directory().join("net1%new")).unwrap();
        assert_eq!(says(&["gc", "--dry-run"]).lines().count(), 1);
        gone.cgroup.remove().unwrap();
        let says_what = |arguments: &[&str]| {
            let found: Value = serde_json::from_str(&says(arguments)).unwrap();
            found.as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(says_what(&["gc", "--dry-run", "-o", "json"]), [gone.uid.as_str()]);
        assert!(gone.pod_directory().exists());
        let (_, doctor, _) = call(&["doctor"]);
        assert!(
            doctor.contains("1 dead") && doctor.contains("1 unfinished") && doctor.contains("podshaper gc"),
            "{doctor}"
        );
        assert_eq!(says_what(&["gc", "-o", "json"]), [gone.uid.as_str()]);
        assert!(!gone.pod_directory().exists() && listed(&kept.uid).is_some());
        objects.assert_freed();
        kept.call("CHECK");
        kept.call("DEL");
        assert!(says_what(&["gc", "-o", "json"]).is_empty());

        // A restarted service: the new cgroup has the old one's name.
        kept.call("ADD");
        kept.cgroup.remove().unwrap();
        kept.cgroup.make().unwrap();
        assert!(
            within(Duration::from_secs(20), || says_what(&["gc", "--dry-run", "-o", "json"]) == [kept.uid.as_str()])
        );
        says(&["gc"]);
        assert!(!kept.pod_directory().exists());
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn doctor_finds_this_node_fit_and_a_bad_conflist_not() {
    let directory = tempfile::tempdir().unwrap();
    let [conf, bin] = ["conf", "bin"].map(|name| directory.path().join(name));
    [&conf, &bin].iter().for_each(|path| fs::create_dir(path).unwrap());
    fs::copy(env!("CARGO_BIN_EXE_podshaper"), bin.join("podshaper")).unwrap();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/conflist-examples/10-flannel.conflist");
    fs::copy(example, conf.join("10-flannel.conflist")).unwrap();
    let doctor = || {
        let directories = ["--conf-dir", conf.to_str().unwrap(), "--bin-dir", bin.to_str().unwrap()];
        let (code, stdout, _) = call(&[&["doctor", "-o", "json"], &directories[..]].concat());
        let found: Value = serde_json::from_str(&stdout).unwrap();
        let missing = |finding: &&Value| finding["state"] == "missing";
        let missing = found.as_array().unwrap().iter().filter(missing).map(|finding| finding["check"].to_string());
        (code, missing.collect::<Vec<_>>())
    };
    assert_eq!(doctor(), (0, vec![]));
    fs::remove_file(bin.join("podshaper")).unwrap();
    assert_eq!(doctor(), (1, vec!["\"plugin\"".to_owned()]));
    fs::write(conf.join("05-broken.conflist"), "{\"plugins\": [").unwrap();
    assert_eq!(doctor(), (1, vec!["\"conflist\"".to_owned(), "\"plugin\"".to_owned()]));
}

/// With net_cls of cgroup v1 in use, which lasts until the kernel ends. Linux 5.10.0-32 of Debian then forgets the
/// cgroup of sockets; other kernels do not. The test compares doctor's finding with the bytes that a limit counts.
#[test]
#[ignore = "needs a kernel of its own"]
fn a_kernel_that_forgets_the_cgroup_of_sockets_is_told_so() {
    let sockets = || {
        let (_, stdout, _) = call(&["doctor", "-o", "json"]);
        let found: Value = serde_json::from_str(&stdout).unwrap();
        let finding = found.as_array().unwrap().iter().find(|finding| finding["check"] == "sockets").cloned();
        finding.unwrap()
    };
    assert_eq!(sockets()["state"], "ok");
    let slice = PodCgroup::new(cgroup::mount().unwrap().join(unique("netcls"))).unwrap();
    let path = slice.path().to_str().unwrap();
    says(&["attach", "--cgroup", path, "--egress", "1G"]);
    // Bytes that a process of the cgroup has sent, as counted by the cgroup's limit.
    let sent = || {
        let script = "ip link add v0 type veth peer name v1 && ip addr add 10.9.9.1/24 dev v0 && ip link set v0 up && ip link set v1 up
            ip neigh add 10.9.9.2 lladdr 02:00:00:00:00:01 dev v0 nud permanent
            echo 0 >\"$1/cgroup.procs\"
            ping -q -c 2 -i 0.2 -W 1 10.9.9.2 || true";
        process::run(std::process::Command::new("unshare").args(["--net", "sh", "-ec", script, "sh", path])).unwrap();
        let all: Value = serde_json::from_str(&says(&["list", "-o", "json", "--sample", "0"])).unwrap();
        let entry = all.as_array().unwrap().iter().find(|entry| entry["cgroup"] == path).unwrap();
        entry["egress"]["bytes"].as_u64().unwrap()
    };
    let before = sent();
    assert!(before > 0);
    let net_cls = tempfile::tempdir().unwrap();
    mount(Some("none"), net_cls.path(), Some("cgroup"), MsFlags::empty(), Some("net_cls")).unwrap();
    fs::create_dir(net_cls.path().join("a")).unwrap();
    fs::write(net_cls.path().join("a/net_cls.classid"), "1").unwrap();
    let (finding, is_counted) = (sockets(), sent() > before);
    umount2(net_cls.path(), MntFlags::MNT_DETACH).unwrap();
    eprintln!("counted: {is_counted}; {finding}");
    assert_eq!(finding["state"] == "ok", is_counted, "{finding}");
    assert!(is_counted || finding.to_string().contains("cgroup_no_v1=net_prio,net_cls"), "{finding}");
    says(&["detach", "--cgroup", path]);
}

/// Programs of another tool on a cgroup above, which podshaper's programs displace (allow_override), and an operator's
/// limit above.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn what_else_is_on_the_cgroups_above_a_pod_is_said() {
    alone(|| {
        let outer = PodCgroup::new(cgroup::mount().unwrap().join(unique("outer"))).unwrap();
        let inner = PodCgroup::new(outer.path().join("inner")).unwrap();
        says(&["attach", "--cgroup", inner.path().to_str().unwrap(), "--egress", "1G"]);
        let uid = pod::uuid().unwrap();
        let path = inner.path().strip_prefix(cgroup::mount().unwrap()).unwrap().join(format!("pod{uid}"));
        let path = format!("/{}", path.display());
        let mut pod = Sandbox::at(&path, uid, Arc::new(netns_with(&["eth0"])));
        pod.stdin["runtimeConfig"]["cgroupPath"] = json!(path);
        let add = pod.call("ADD");
        assert!(add.stderr.contains("inner has a limit, too (podshaper attach)"), "{}", add.stderr);
        let (_, doctor, _) = call(&["doctor"]);
        assert!(
            doctor.contains("1 below a limit of podshaper attach") && !doctor.contains("allow_override"),
            "{doctor}"
        );
        let program = pod.pod_directory().parent().unwrap().join("%node/count_egress");
        let [above, program] = [outer.path(), &program].map(|path| path.to_str().unwrap());
        bpftool(&["cgroup", "attach", above, "egress", "pinned", program, "override"]).unwrap();
        let (_, doctor, _) = call(&["doctor"]);
        assert!(doctor.contains("allow_override") && doctor.contains("[InetEgress]"), "{doctor}");
        pod.call("DEL");
        says(&["detach", "--cgroup", inner.path().to_str().unwrap()]);
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn doctor_without_the_capabilities_says_which() {
    let output = std::process::Command::new("setpriv")
        .args(["--bounding-set=-bpf,-sys_admin", "--inh-caps=-all", env!("CARGO_BIN_EXE_podshaper"), "doctor"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let programs = text.lines().find(|line| line.starts_with("eBPF programs")).unwrap();
    assert!(programs.contains("MISSING") && programs.contains("must run with CAP_BPF"), "{text}");
}

/// A node on which podshaper is not used any more: no conflist names podshaper, so no DEL would remove the limits.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn uninstall_leaves_running_pods_their_limits_or_takes_them_off() {
    let node = tempfile::tempdir().unwrap();
    let [conf, bin, units] = ["net.d", "bin", "systemd"].map(|name| node.path().join(name));
    [&conf, &bin, &units].into_iter().for_each(|directory| fs::create_dir(directory).unwrap());
    let list = conf.join("10-pods.conflist");
    let text = r#"{ "cniVersion": "1.0.0", "name": "pods", "plugins": [{ "type": "bridge" }] }"#;
    fs::write(&list, text).unwrap();
    let places = [("--conf-dir", &conf), ("--bin-dir", &bin), ("--unit-dir", &units)];
    let places: Vec<_> = places.iter().flat_map(|(option, path)| [*option, path.to_str().unwrap()]).collect();
    let call = |words: &[&str]| says(&[words, &places].concat());
    alone(|| {
        let pod = Sandbox::new();
        pod.call("ADD");
        call(&["install"]);
        call(&["uninstall"]);
        pod.assert_limited(&pod.container_id, RATE);
        call(&["install"]);
        let gone = "default/web eth0: no limit any more\n";
        assert!(call(&["uninstall", "--detach", "--dry-run"]).contains(gone));
        pod.assert_limited(&pod.container_id, RATE);
        assert!(call(&["uninstall", "--detach", "--remove-binary"]).contains(gone));
        assert_eq!(fs::read_to_string(&list).unwrap(), text);
        assert!(!pod.pod_directory().exists() && !Path::new(NODE).exists());
        let empty = |directory: &Path| fs::read_dir(directory).unwrap().count() == 0;
        assert!(empty(&bin) && empty(&units));
        // A later DEL of the pod finds nothing, and prints nothing.
        pod.call("DEL");
    });
}
