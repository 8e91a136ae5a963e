//! What an operator does with podshaper on a node: look, change, diagnose, measure. What acts on everything that is attached (gc, many
//! attachments) does so in a bpffs of its own, since other tests and other people have theirs in the node's.

/// Limits of cgroups that are no pods.
mod cgroups;
/// `install --delegate`: the network's list called in the runtime's place, whatever is written there.
mod delegate;
/// What sync follows beside a pod's rates.
mod follow;
/// doctor and gc.
mod health;
/// What somebody takes off that holds a pod.
mod held;
/// Calls that come between the reading and the change of another.
mod meanwhile;
/// Prometheus and node_exporter, the real ones.
mod metrics;
/// Limits of cgroups with a namespace of their own, whose interface podshaper changes.
mod namespaces;
/// Many attachments, and what the commands cost.
mod scale;
/// list, show, top.
mod see;
/// set.
mod set;
/// sync.
mod sync;
/// Pins of an older layout.
mod upgrade;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::kernel::mounts;
use crate::sandbox::{RATE, Sandbox, netns_with, netns_with_host_end};

/// podshaper as a person calls it.
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

/// A pod whose traffic could be limited both ways, whatever this kernel has.
pub fn limited_both_ways(max: Option<u64>) -> Sandbox {
    let (netns, _) = netns_with_host_end();
    let mut pod = Sandbox::with_netns(Arc::new(netns));
    pod.stdin["runtimeConfig"]["bandwidth"] = json!({ "egressRate": RATE, "ingressRate": 2 * RATE });
    if let Some(max) = max {
        pod.stdin.insert("max".into(), json!({ "egress": max, "ingress": max }));
    }
    pod
}

/// Runs `work` where nothing is attached but by it, in a network namespace of its own: a node has one waiting room, and who finds no pod beside its
/// own takes it away.
pub fn alone<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let with_own = || {
        mounts::with_own(|| {
            mounts::without(Path::new("/sys/fs/bpf"));
            work()
        })
    };
    netns_with(&[]).inside(with_own).unwrap()
}
