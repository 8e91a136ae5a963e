//! The commands that an operator runs on a node: look, change, diagnose, measure. Tests that act on all attachments
//! of the node (gc, many attachments) do so in a bpffs of their own, since the node's bpffs may have attachments of
//! other tests and of real pods.

/// Limits of cgroups other than pods.
mod cgroups;
/// `install --delegate`: podshaper calls the network's list in place of the runtime, whatever the list contains.
mod delegate;
/// Changes beside a pod's rates that sync follows.
mod follow;
/// doctor and gc.
mod health;
/// Parts of a limit that another tool removes.
mod held;
/// Calls between the reading and the change of another call.
mod meanwhile;
/// With the real Prometheus and node_exporter.
mod metrics;
/// Limits of cgroups with a network namespace of their own, whose interface podshaper changes.
mod namespaces;
/// Many attachments, and the costs of the commands.
mod scale;
/// list, show, top.
mod see;
/// set.
mod set;
/// sync.
mod sync;
/// Pins with an older layout.
mod upgrade;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::kernel::mounts;
use crate::sandbox::{RATE, Sandbox, netns_with, netns_with_host_end};

/// podshaper as a person calls it, without a runtime's environment.
pub fn podshaper(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_podshaper"));
    command.args(arguments).env_remove("CNI_COMMAND");
    command
}

/// Exit status, stdout and stderr of a call.
pub fn call(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = podshaper(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// stdout of a call that must succeed.
#[track_caller]
pub fn says(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = call(arguments);
    assert_eq!(code, 0, "{arguments:?}: {stdout}{stderr}");
    stdout
}

/// stderr of a call that must fail.
#[track_caller]
pub fn refuses(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = call(arguments);
    assert_eq!((code, stdout.as_str()), (1, ""), "{arguments:?}: {stderr}");
    stderr
}

/// The entry of a pod in `list -o json`.
pub fn listed(uid: &str) -> Option<Value> {
    let all: Value = serde_json::from_str(&says(&["list", "-o", "json", "--sample", "0"])).unwrap();
    all.as_array().unwrap().iter().find(|entry| entry["key"] == uid).cloned()
}

/// A pod that may be limited in both directions, with any features of the kernel.
pub fn limited_both_ways(max: Option<u64>) -> Sandbox {
    let (netns, _) = netns_with_host_end();
    let mut pod = Sandbox::with_netns(Arc::new(netns));
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": RATE, "ingressRate": 2 * RATE });
    if let Some(max) = max {
        pod.stdin.insert("max".into(), json!({ "egress": max, "ingress": max }));
    }
    pod
}

/// Runs `work` in a bpffs without other attachments and in a network namespace of its own: a node has one waiting
/// room, and a call that finds no pods beside its own removes it.
pub fn alone<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let with_own = || {
        mounts::with_own(|| {
            mounts::without(Path::new("/sys/fs/bpf"));
            work()
        })
    };
    netns_with(&[]).inside(with_own).unwrap()
}
