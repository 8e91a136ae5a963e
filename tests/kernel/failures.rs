use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use serde_json::json;

use super::mounts;
use crate::harness::cgroup::{self, PodCgroup};
use crate::harness::cni::Cni;
use crate::harness::pod::uuid;
use crate::harness::{process, unique};
use crate::operator::alone;
use crate::sandbox::{RATE, Sandbox, bpftool, netns_with_host_end, ok, own_qdiscs, refused};

const NETNS: u64 = 8;
const UNAVAILABLE: u64 = 50;
const CGROUP: u64 = 100;
const KERNEL: u64 = 101;
const BPFFS: &str = "/sys/fs/bpf";
const OPTMEM_MAX: &str = "/proc/sys/net/core/optmem_max";
const CAPABILITIES: &str =
    "podshaper must run with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: as root, as container runtimes do";

fn status(keys: &str) -> Cni {
    let stdin = format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "x"{keys}}}"#);
    Cni::new(env!("CARGO_BIN_EXE_podshaper"), "STATUS").stdin(stdin)
}

/// The answers of STATUS on a node that cannot limit any pod.
struct Status {
    /// The line in the log where pods may have no limit: the node is ready then.
    warning: String,
    /// The error where the configuration limits every pod: no pod could be added.
    error: String,
}

impl Status {
    /// Calls STATUS through another program, which may be the reason why no pod can be limited.
    #[track_caller]
    fn through(wrapper: &[&str]) -> Self {
        mounts::without_memory();
        let call = ok(&status("").through(wrapper));
        assert!(call.stdout.is_empty() && call.stderr.lines().count() == 1, "{call}");
        let (_, warning) = call.stderr.trim_end().split_once(" [WARN] ").unwrap_or_else(|| panic!("{call}"));
        // A runtime asks every few seconds, so the warning comes once only.
        assert_eq!(ok(&status("").through(wrapper)).stderr, "");
        let (code, error) = refused(&status(r#", "egress": "10M""#).through(wrapper));
        assert_eq!(code, UNAVAILABLE);
        Self { warning: warning.to_owned(), error }
    }

    /// Asserts that the warning and the error give this reason.
    #[track_caller]
    fn assert(&self, reason: &str) {
        let warning = format!("this node cannot limit pods; one that asks for a limit will fail: {reason}");
        let error = format!("this node cannot limit pods, and its configuration limits each of them: {reason}");
        assert_eq!((self.warning.as_str(), self.error.as_str()), (warning.as_str(), error.as_str()));
    }
}

/// The end of the message that counts the v1 mounts.
fn nor_on_v1() -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    match mounts.lines().filter(|line| line.contains(" - cgroup ")).count() {
        0 => String::new(),
        count => format!(" nor on the cgroup v1 mounts ({count})"),
    }
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_missing_cgroup_is_told_with_what_was_looked_for() {
    let pod = Sandbox::new();
    pod.cgroup.remove().unwrap();
    let (mount, uid, path) = (cgroup::mount().unwrap(), &pod.uid, pod.cgroup.path().display());
    let below = format!("{}{}", mount.display(), nor_on_v1());
    let given = pod.stdin["runtimeConfig"]["cgroupPath"].as_str().unwrap();
    let by_path = format!(
        "find the cgroup \"{given}\": not below {below}; looked for {path}; the path comes from the runtime's or the \
         configuration's cgroupPath: correct it there, or leave it out to have the pod found by its UID"
    );
    assert_eq!(refused(&pod.cni("ADD")), (CGROUP, by_path));

    let searched = pod.stdin_with(json!({ "runtimeConfig": { "bandwidth": { "egressRate": RATE } } }));
    let by_uid = format!(
        "find the cgroup of pod {uid}: not below {below}; looked for kubepods[-burstable|-besteffort]-pod{}.slice, \
         kubepods[/burstable|/besteffort]/pod{uid} down to a depth of 10; kubelet makes it unless its cgroupsPerQOS is off; \
         with a runtime that knows the path (containerd 1.7, CRI-O) add the capability cgroupPath to the plugin",
        uid.replace('-', "_")
    );
    assert_eq!(refused(&pod.cni("ADD").stdin(&searched)), (CGROUP, by_uid));

    let nameless = format!(
        "find the cgroup of container {}: the runtime passes neither K8S_POD_UID nor cgroupPath; give the plugin's \
         configuration a \"cgroupPath\", with {{containerID}} in it if need be",
        pod.container_id
    );
    assert_eq!(refused(&pod.cni("ADD").env("CNI_ARGS", "").stdin(searched)), (CGROUP, nameless));
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_namespace_or_interface_that_is_none_is_named() {
    let pod = Sandbox::new();
    let directory = tempfile::tempdir().unwrap();
    let leftover = directory.path().join("netns").display().to_string();
    fs::write(&leftover, "").unwrap();
    let gone = directory.path().join("gone").display().to_string();
    let pods = pod.netns.path().display();
    let enter = |path: &str, why: &str| format!("enter the pod's netns {path}: {why}");
    for (path, interface, details) in [
        (gone.as_str(), "eth0", enter(&gone, "open (the sandbox may be gone): ENOENT: No such file or directory")),
        (&leftover, "eth0", enter(&leftover, "not a namespace, perhaps the leftover of a sandbox of a former boot")),
        (
            "/proc/self/ns/uts",
            "eth0",
            enter("/proc/self/ns/uts", "setns (a namespace of another kind): EINVAL: Invalid argument"),
        ),
        (
            "/proc/self/ns/net",
            "eth0",
            enter("/proc/self/ns/net", "it is the host's own (hostNetwork): such a pod cannot be limited"),
        ),
        (
            &pods.to_string(),
            "net1",
            format!(
                "find the interface \"net1\" in the netns {pods}; podshaper must come after the plugin that makes it: ENODEV: \
                 No such device"
            ),
        ),
    ] {
        let call = pod.cni("ADD").env("CNI_NETNS", path).env("CNI_IFNAME", interface);
        assert_eq!(refused(&call), (NETNS, details));
        pod.assert_unlimited();
    }
    // The attachment of an ADD that succeeded stays when the next ADD fails.
    pod.call("ADD");
    refused(&pod.cni("ADD").env("CNI_NETNS", gone).stdin(pod.stdin_at(2 * RATE)));
    pod.assert_limited(&pod.container_id, RATE);
    pod.call("DEL");
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_owner_too_large_for_its_map_is_refused() {
    let pod = Sandbox::new();
    let netns = format!("{}{}", "/./".repeat(1200), pod.netns.path().display());
    let long = json!({ "name": "n".repeat(255) });
    let (code, details) = refused(&pod.cni("ADD").env("CNI_NETNS", netns).stdin(pod.stdin_with(long)));
    let expected = "record whose attachment this is: its names take ";
    assert!(code == 7 && details.starts_with(expected), "{details}");
    pod.assert_unlimited();
}

/// With an ingress limit, which may need a qdisc on the host end.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_failed_add_leaves_the_limit_before_it_in_force() {
    let (netns, host_end) = netns_with_host_end();
    let mut pod = Sandbox::with_netns(Arc::new(netns));
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "ingressRate": RATE });
    let qdiscs = || process::run(Command::new("tc").args(["qdisc", "show", "dev", &host_end])).unwrap();
    pod.call("ADD");
    let before = qdiscs();
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "ingressRate": 2 * RATE });
    let netns = format!("{}{}", "/./".repeat(1200), pod.netns.path().display());
    let too_long = pod.cni("ADD").env("CNI_NETNS", netns).stdin(pod.stdin_with(json!({ "name": "n".repeat(255) })));
    assert_eq!(refused(&too_long).0, 7);
    assert_eq!(qdiscs(), before);
    pod.assert_rates([0, RATE]);
    pod.call("DEL");
}

/// An ADD that waits for the lock in vain changes nothing either.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_that_does_not_get_the_lock_leaves_the_limit_before_it_in_force() {
    // In a bpffs of its own: the other tests need the lock of the usual bpffs.
    alone(|| {
        let (netns, host_end) = netns_with_host_end();
        let mut pod = Sandbox::with_netns(Arc::new(netns));
        let limit = |ingress| json!({ "egressRate": RATE, "ingressRate": ingress });
        pod.stdin["runtimeConfig"]["bandwidth"] = limit(RATE);
        pod.call("ADD");
        let qdiscs = || process::run(Command::new("tc").args(["qdisc", "show", "dev", &host_end])).unwrap();
        let before = (own_qdiscs(&pod.netns, &host_end), qdiscs());
        assert_ne!(before.0, 0);
        let directory = Path::new(BPFFS).join("podshaper");
        let lock = fs::File::open(&directory).unwrap();
        lock.lock().unwrap();
        let other = json!({ "runtimeConfig": { "bandwidth": limit(2 * RATE) } });
        let path = directory.display();
        let text = format!("lock {path}: another process has held it for 30 s (fuser -v {path} shows it)");
        assert_eq!(refused(&pod.cni("ADD").stdin(pod.stdin_with(other))), (KERNEL, text));
        drop(lock);
        assert_eq!((own_qdiscs(&pod.netns, &host_end), qdiscs()), before);
        pod.assert_rates([RATE, RATE]);
        pod.call("CHECK");
        pod.call("DEL");
        pod.assert_unlimited();
        assert_eq!(own_qdiscs(&pod.netns, &host_end), 0);
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_process_that_may_not_is_told_what_it_needs() {
    let pod = Sandbox::new();
    let netns = pod.netns.path().display();
    // Either of the two capabilities permits bpf(2). Without CAP_SYS_ADMIN podshaper cannot enter the pod's
    // namespace, which comes first.
    let no_bpf = ["setpriv", "--bounding-set=-bpf,-sys_admin", "--inh-caps=-all"];
    let enter = format!("enter the pod's netns {netns}: setns (needs CAP_SYS_ADMIN): EPERM: Operation not permitted");
    assert_eq!(refused(&pod.cni("ADD").through(&no_bpf)), (KERNEL, enter.clone()));
    let load = format!("load podshaper's eBPF maps ({CAPABILITIES}): Operation not permitted (os error 1)");
    mounts::with_own(|| Status::through(&no_bpf)).assert(&load);
    // Without CAP_PERFMON the verifier refuses the programs, and names the reason. The verifier of Linux 7.3 accepts
    // them nevertheless.
    let no_perfmon = ["setpriv", "--bounding-set=-perfmon,-sys_admin", "--inh-caps=-all"];
    mounts::with_own(|| {
        mounts::without_memory();
        if !ok(&status("").through(&no_perfmon)).stderr.is_empty() {
            let refusal = Status::through(&no_perfmon).error;
            assert!(refusal.contains(CAPABILITIES) && refusal.contains("the verifier says: "), "{refusal}");
        }
    });

    // A rootless runtime: root in a user namespace, in which it may make network namespaces.
    let rootless = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "sh",
        "-c",
        "ip link add eth0 type veth && exec 3</proc/self/ns/net && exec unshare --net \"$@\"",
        "sh",
    ];
    let call = pod.cni("ADD").env("CNI_NETNS", "/proc/self/fd/3").through(&rootless);
    // If another test has an attachment, the node's programs are loaded already.
    let (code, details) = refused(&call);
    let not_permitted = format!(" ({CAPABILITIES}): Operation not permitted (os error 1)");
    assert!(code == KERNEL && details.ends_with(&not_permitted), "{details}");
    pod.assert_unlimited();
}

/// The programs load even where the kernel cannot keep their state with a socket, and then nothing would be paced.
/// Before Linux 6.8 the room for that (net.core.optmem_max) cannot be made so small in a network namespace of its own.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_node_where_nothing_can_be_kept_with_a_socket_is_told_so() {
    let no_room = format!("[ ! -e {OPTMEM_MAX} ] || echo 0 >{OPTMEM_MAX}; exec \"$@\"");
    let within = ["unshare", "--net", "sh", "-c", no_room.as_str(), "sh"];
    let room = process::run(Command::new(within[0]).args(&within[1..]).args(["cat", OPTMEM_MAX]));
    if room.ok().as_deref().map(str::trim) != Some("0") {
        mounts::with_own(|| {
            mounts::without_memory();
            assert_eq!(ok(&status("").through(&within)).stderr, "");
        });
        return;
    }
    let reason = "keep a flow's state with its socket, without which nothing is paced (net.core.optmem_max may be too small, or \
                  this kernel has no lock-free allocator for this CPU): Cannot allocate memory (os error 12)";
    mounts::with_own(|| Status::through(&within)).assert(reason);
}

/// On such a node, pods without a limit start, and STATUS reports the node as ready for them.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn an_add_without_a_limit_succeeds_where_no_pod_can_be_limited() {
    let pod = Sandbox::new();
    mounts::with_own(|| {
        mounts::without(&cgroup::mount().unwrap());
        mounts::hide_bpffs();
        ok(&pod.cni("ADD").stdin(pod.stdin_with(json!({ "runtimeConfig": null }))));
        assert_eq!(pod.call("DEL").stdout, "");
    });
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn bpffs_is_mounted_where_it_is_missing_unless_that_is_forbidden() {
    let pod = Sandbox::new();
    mounts::with_own(|| {
        mounts::without(Path::new(BPFFS));
        let mount = "mount bpffs on /sys/fs/bpf, where it is missing (on the node: mount -t bpf bpf /sys/fs/bpf)";
        Status::through(&["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"])
            .assert(&format!("{mount}: Operation not permitted (os error 1)"));
        assert_eq!(mounts::count_at(Path::new(BPFFS)), 0);
        // Without bpffs nothing was ever attached.
        assert_eq!(pod.call("DEL").stdout, "");
        assert_eq!(mounts::count_at(Path::new(BPFFS)), 0);

        pod.call("ADD");
        pod.assert_limited(&pod.container_id, RATE);
        mounts::without_memory();
        assert_eq!(ok(&status("")).stderr, "");
        assert_eq!(mounts::count_at(Path::new(BPFFS)), 1);
        // With another mode, any process could hold the lock.
        let mode = fs::metadata("/sys/fs/bpf/podshaper").unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let options = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let line = options.lines().find(|line| line.contains(" /sys/fs/bpf ")).unwrap();
        assert!(line.contains("nosuid,nodev,noexec") && line.ends_with("mode=700"), "{line}");
        pod.call("DEL");
        pod.assert_unlimited();
    });
}

/// Where all users may write to bpffs, any user can make the directory first, and could then hold the lock of every
/// pod's ADD.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_directory_of_pins_that_is_not_roots_alone_is_not_used() {
    let pod = Sandbox::new();
    mounts::with_own(|| {
        mounts::without(Path::new(BPFFS));
        let mode_of = Some("mode=1777");
        nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), nix::mount::MsFlags::empty(), mode_of).unwrap();
        let directory = Path::new(BPFFS).join("podshaper");
        fs::create_dir(&directory).unwrap();
        let refusal = |uid: u32, mode: &str| {
            let what = "it is not a directory that root alone may write to";
            let remedy = "remove it and find out who made it";
            (KERNEL, format!("use {}: {what} (uid {uid}, mode {mode}); {remedy}", directory.display()))
        };
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(refused(&pod.cni("ADD")), refusal(0, "777"));
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(&directory, Some(1000), None).unwrap();
        assert_eq!(refused(&pod.cni("ADD")), refusal(1000, "700"));
        // A pod without a limit must not wait for the lock of that user.
        let _lock = Flock::lock(File::open(&directory).unwrap(), FlockArg::LockExclusive).unwrap();
        pod.call("DEL");
        fs::remove_dir(&directory).unwrap();
        pod.call("ADD");
        pod.call("DEL");
    });
    pod.assert_unlimited();
}

/// A kernel without bpffs, or a container in which /sys is read-only.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_node_where_bpffs_cannot_be_is_told_so() {
    let pod = Sandbox::new();
    mounts::with_own(|| {
        mounts::hide_bpffs();
        let refusal = "mount bpffs on /sys/fs/bpf, where it is missing (on the node: mount -t bpf bpf /sys/fs/bpf): ";
        let (code, details) = refused(&pod.cni("ADD"));
        assert_eq!((code, details), (KERNEL, format!("{refusal}No such file or directory (os error 2)")));
        Status::through(&[]).assert(&format!("{refusal}No such file or directory (os error 2)"));
    });
    pod.assert_unlimited();
}

#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_host_with_cgroup_v1_only_is_told_how_to_get_v2() {
    let pod = Sandbox::new();
    mounts::with_own(|| {
        mounts::without(&cgroup::mount().unwrap());
        let no_cgroup2 = "find the cgroup mounts: no cgroup2 is mounted here, and podshaper needs cgroup v2; boot this node \
                          with the kernel parameter systemd.unified_cgroup_hierarchy=1, or mount cgroup2 beside v1: mkdir \
                          /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified";
        assert_eq!(refused(&pod.cni("ADD")), (CGROUP, no_cgroup2.to_owned()));
        Status::through(&[]).assert(no_cgroup2);
        assert_eq!(pod.call("DEL").stdout, "");
    });
    pod.assert_unlimited();
}

/// An old tool attaches such a program, without BPF_F_ALLOW_MULTI.
#[test]
#[ignore = "needs root, cgroup2 and bpffs"]
fn a_program_that_tolerates_no_other_is_told_from_a_missing_capability() {
    let (netns, host_end) = netns_with_host_end();
    let netns = Arc::new(netns);
    let lender = Sandbox::with_netns(Arc::clone(&netns));
    lender.call("ADD");
    // The qdiscs of the lender's limit stay on the interface.
    let there = own_qdiscs(&netns, &host_end);
    let program = lender.program("count_egress").to_string();
    let parent = PodCgroup::new(cgroup::mount().unwrap().join(unique("occupied"))).unwrap();
    let occupy = |action: &str| {
        let parent = parent.path().to_str().unwrap();
        bpftool(&["cgroup", action, parent, "egress", "id", &program]).unwrap();
    };
    let place = parent.path().file_name().unwrap().to_str().unwrap();
    let uid = uuid().unwrap();
    let pod = Sandbox::at(&format!("/{place}/kubepods/pod{uid}"), uid, netns);
    occupy("attach");
    let details = "attach the eBPF program count_egress to the pod's cgroup: another one is attached there or above, and \
                   tolerates none beside it (bpftool cgroup tree shows them): Operation not permitted (os error 1)";
    let both = json!({ "bandwidth": { "egressRate": RATE, "ingressRate": RATE } });
    let call = pod.cni("ADD").stdin(pod.stdin_with(json!({ "runtimeConfig": both })));
    assert_eq!(refused(&call), (KERNEL, details.to_owned()));
    pod.assert_unlimited();
    assert_eq!(own_qdiscs(&pod.netns, &host_end), there);
    occupy("detach");
    pod.call("ADD");
    pod.assert_limited(&pod.container_id, RATE);
    pod.call("DEL");
    lender.call("DEL");
}
