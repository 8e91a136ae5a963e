use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use serde_json::json;

use super::mounts;
use crate::harness::cgroup::{self, Driver, PodCgroup};
use crate::harness::pod::{container_id, uuid};
use crate::operator::call;
use crate::sandbox::{PINS, RATE, Sandbox, netns_with, ok, refused};

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn the_cgroup_of_every_driver_class_and_prefix_is_found() {
    let netns = Arc::new(netns_with(&["eth0"]));
    let (dashed, docker) = (|uid: &str| uid.replace('-', "_"), format!("docker/{}", container_id().unwrap()));
    // In the format of a static pod's UID.
    let statically = || uuid().unwrap().replace('-', "");
    let kind = "kubelet.slice/kubelet-kubepods.slice";
    let shapes: [&dyn Fn(&str) -> String; 8] = [
        &|uid| Driver::Cgroupfs.path(uid),
        &|uid| Driver::Systemd.path(uid),
        &|uid| format!("/kubepods/pod{uid}"),
        &|uid| format!("/kubepods/besteffort/pod{uid}"),
        &|uid| format!("/kubepods.slice/kubepods-pod{}.slice", dashed(uid)),
        &|uid| format!("/{kind}/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{}.slice", dashed(uid)),
        &|uid| format!("/kubelet/kubepods/burstable/pod{uid}"),
        &|uid| format!("/{docker}/kubepods/burstable/pod{uid}"),
    ];
    for shape in shapes {
        for uid in [uuid().unwrap(), statically()] {
            let path = shape(&uid);
            let pod = Sandbox::at(&path, uid, Arc::clone(&netns));
            let named = |path: &str| {
                let runtime = json!({ "bandwidth": { "egressRate": RATE }, "cgroupPath": path });
                pod.stdin_with(json!({ "runtimeConfig": runtime }))
            };
            let slice = path.rsplit_once('/').unwrap().1;
            // The cgroup is found by a search; named by containerd; named by crictl, which knows no parent; named by
            // CRI-O.
            let mut all = vec![pod.stdin_with(json!({})), named(&path), named("")];
            all.extend(slice.ends_with(".slice").then(|| named(slice)));
            for stdin in all {
                ok(&pod.cni("ADD").stdin(&stdin));
                pod.assert_limited(&pod.container_id, RATE);
                assert_eq!(pod.owner("eth0")["cgroup"], json!(pod.cgroup.path()), "{stdin}");
                ok(&pod.cni("CHECK").stdin(&stdin));
                ok(&pod.cni("DEL").stdin(&stdin));
                pod.assert_unlimited();
            }
        }
    }
}

/// kubelet 1.20 with the systemd driver leaves an empty directory with the name of the other driver.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn of_two_directories_the_slice_is_taken() {
    let uid = uuid().unwrap();
    let leftover = PodCgroup::new(cgroup::mount().unwrap().join(&Driver::Cgroupfs.path(&uid)[1..])).unwrap();
    let pod = Sandbox::at(&Driver::Systemd.path(&uid), uid, Arc::new(netns_with(&["eth0"])));
    pod.call("ADD");
    pod.assert_limited(&pod.container_id, RATE);
    pod.call("DEL");
    drop(leftover);
}

/// A cgroup v1 hierarchy, which makes this a hybrid host in any case. Make it in mounts of the test's own.
struct V1 {
    mount: tempfile::TempDir,
}

impl V1 {
    fn new() -> Self {
        move_cgroup2_beside();
        let own = Self { mount: tempfile::tempdir().unwrap() };
        let options = format!("none,name=podshaper-{}", std::process::id());
        mount(Some("none"), own.mount.path(), Some("cgroup"), MsFlags::empty(), Some(options.as_str())).unwrap();
        own
    }

    /// Makes the pod's directory in this hierarchy, as kubelet does.
    fn pod(&self, path: &str) -> PodCgroup {
        PodCgroup::new(self.mount.path().join(&path[1..])).unwrap()
    }
}

/// Moves cgroup2 to its place on a hybrid host: podshaper would use nothing else if cgroup2 were on /sys/fs/cgroup.
fn move_cgroup2_beside() {
    let usual = Path::new("/sys/fs/cgroup");
    if cgroup::mount().unwrap() != usual {
        return;
    }
    let aside = tempfile::tempdir().unwrap();
    mounts::bind(usual, aside.path());
    mounts::without(usual);
    mount(Some("none"), usual, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let beside = usual.join("unified");
    fs::create_dir(&beside).unwrap();
    mounts::bind(aside.path(), &beside);
    mounts::without(aside.path());
}

impl Drop for V1 {
    fn drop(&mut self) {
        mounts::without(self.mount.path());
    }
}

#[test]
#[ignore = "needs root, cgroup2, cgroup v1 and bpffs"]
fn on_a_hybrid_host_the_pods_directory_is_made_and_removed() {
    let netns = Arc::new(netns_with(&["eth0", "net1"]));
    mounts::with_own(|| {
        let v1 = V1::new();
        for driver in [Driver::Cgroupfs, Driver::Systemd] {
            let uid = uuid().unwrap();
            let path = driver.path(&uid);
            // Made on v1 only, and removed there when dropped.
            let kubelets = v1.pod(&path);
            let unified = cgroup::mount().unwrap().join(&path[1..]);
            let pod = Sandbox::of(PodCgroup::absent(unified.clone()), uid, Arc::clone(&netns));

            pod.call("ADD");
            pod.assert_limited(&pod.container_id, RATE);
            assert!(is_marked(&unified));
            ok(&pod.cni("ADD").env("CNI_IFNAME", "net1"));
            pod.call("DEL");
            assert!(unified.is_dir(), "the other interface's attachment is on it");
            ok(&pod.cni("DEL").env("CNI_IFNAME", "net1"));
            assert!(!unified.exists());
            assert!(!pod.pod_directory().exists());

            // At the first DEL a container is still in the directory. At the last DEL kubelet has removed its own
            // directory.
            pod.call("ADD");
            let container = unified.join("c1");
            fs::create_dir(&container).unwrap();
            pod.call("DEL");
            assert!(!pod.pod_directory().exists() && container.is_dir());
            fs::remove_dir(&container).unwrap();
            kubelets.remove().unwrap();
            ok(&pod.cni("DEL").env("CNI_NETNS", ""));
            assert!(!unified.exists());
            kubelets.make().unwrap();

            // An ADD that fails before it attaches.
            let (code, _) = refused(&pod.cni("ADD").env("CNI_IFNAME", "net7"));
            assert_eq!(code, 8);
            assert!(!unified.exists());
            drop(kubelets);
        }
    });
}

/// Runs `work` with a pod for which kubelet has made a directory on cgroup v1 and none exists on cgroup2, with the
/// path of the latter, and with kubelet's directory.
fn with_a_pod_on_v1(work: impl FnOnce(&Sandbox, &PathBuf, &Path) + Send) {
    let netns = Arc::new(netns_with(&["eth0"]));
    mounts::with_own(|| {
        let v1 = V1::new();
        let uid = uuid().unwrap();
        let path = Driver::Cgroupfs.path(&uid);
        let kubelets = v1.pod(&path);
        let unified = cgroup::mount().unwrap().join(&path[1..]);
        let pod = Sandbox::of(PodCgroup::absent(unified.clone()), uid, netns);
        work(&pod, &unified, kubelets.path());
        drop(kubelets);
    });
}

/// A pod that existed before its limit, which sync attaches and takes off later: runc has made the pod's directory.
#[test]
#[ignore = "needs root, cgroup2, cgroup v1 and bpffs"]
fn on_a_hybrid_host_the_directory_goes_with_a_pod_whose_limit_came_later_and_ended_before() {
    with_a_pod_on_v1(|pod, unified, _| {
        let runcs = PodCgroup::new(unified.clone()).unwrap();
        let container = runcs.container("c1").unwrap();
        assert!(!is_marked(unified));
        pod.call("ADD");
        pod.assert_limited(&pod.container_id, RATE);
        // An ADD without a limit, in the same sandbox.
        ok(&pod.cni("ADD").stdin(pod.stdin_with(json!({ "runtimeConfig": {} }))));
        pod.assert_unlimited();
        assert!(container.is_dir(), "the pod lives");
        fs::remove_dir(container).unwrap();
        pod.call("DEL");
        assert!(!unified.exists());
    });
}

/// A pod whose DEL does not come, as with hostNetwork.
#[test]
#[ignore = "needs root, cgroup2, cgroup v1 and bpffs"]
fn on_a_hybrid_host_the_limit_of_a_pod_that_has_ended_is_cleared_with_its_directory() {
    with_a_pod_on_v1(|pod, unified, kubelets| {
        let cleared = || {
            let (code, said, errors) = call(&["gc", "-o", "json"]);
            assert_eq!(code, 0, "{errors}");
            said.contains(&pod.uid)
        };
        pod.call("ADD");
        let container = unified.join("c1");
        fs::create_dir(&container).unwrap();
        let mut running = Command::new("sleep").arg("60").spawn().unwrap();
        fs::write(container.join("cgroup.procs"), running.id().to_string()).unwrap();
        assert!(!cleared(), "kubelet has its directory");
        fs::remove_dir(kubelets).unwrap();
        assert!(!cleared(), "something runs in it");
        running.kill().unwrap();
        running.wait().unwrap();
        fs::remove_dir(&container).unwrap();
        assert!(cleared());
        pod.assert_unlimited();
        assert!(!unified.exists() && !pod.pod_directory().exists());
        fs::create_dir(kubelets).unwrap();
    });
}

/// The ADD fails after it has made the directory, since it cannot pin.
#[test]
#[ignore = "needs root, cgroup2, cgroup v1 and bpffs"]
fn a_directory_made_for_an_add_that_fails_is_removed() {
    with_a_pod_on_v1(|pod, unified, kubelets| {
        // A bpffs of its own, without pins of other tests.
        mounts::without(Path::new("/sys/fs/bpf"));
        pod.call("ADD");
        pod.call("DEL");
        assert!(!unified.exists());
        assert!(!Path::new(PINS).exists(), "the last pod is gone");
        // Only this mount becomes read-only: the filesystem stays writable in other mount namespaces.
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/sys/fs/bpf", None::<&str>, flags, None::<&str>).unwrap();
        let refusal = format!("make the directory {PINS}: Read-only file system (os error 30)");
        assert_eq!(refused(&pod.cni("ADD")), (101, refusal));
        assert!(!unified.exists() && kubelets.exists());
    });
}

fn is_marked(path: &PathBuf) -> bool {
    fs::metadata(path).is_ok_and(|found| found.mode() & 0o1000 != 0)
}
