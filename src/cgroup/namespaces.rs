//! In which network namespaces the processes of a cgroup are.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

/// How far below a cgroup its processes are looked for: a slice has pods, a pod has containers, a container may have
/// cgroups of its own.
const MAX_DEPTH: u32 = 6;

/// The network namespaces of the processes of a cgroup and of the cgroups below it, by inode number, each with the id
/// of one of its processes. Processes that end meanwhile are left out.
pub fn network_namespaces(cgroup: &Path) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    collect(cgroup, MAX_DEPTH, &mut found);
    found
}

/// The inode number of the network namespace of a process, or of this one (`self`); `None` if the process has ended.
pub fn network_namespace_of(process: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{process}/ns/net")).map(|namespace| namespace.ino()).ok()
}

fn collect(cgroup: &Path, depth: u32, found: &mut BTreeMap<u64, String>) {
    for process in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Some(namespace) = network_namespace_of(process) {
            found.entry(namespace).or_insert_with(|| process.to_owned());
        }
    }
    if depth > 0 {
        let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        below.for_each(|entry| collect(&entry.path(), depth - 1, found));
    }
}
