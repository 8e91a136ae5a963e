//! The processes of a cgroup, and the network namespaces in which they are.

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt, path::Path};

/// The processes of a cgroup and of those below it.
pub fn processes(cgroup: &Path) -> Vec<i32> {
    let (mut found, mut directories) = (Vec::new(), vec![cgroup.to_path_buf()]);
    while let Some(directory) = directories.pop() {
        // The directory is gone, or it is a threaded cgroup, whose processes are listed in the cgroup above.
        let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        // 0 is a process of another PID namespace.
        found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|id| *id != 0));
        let below = fs::read_dir(&directory).into_iter().flatten().flatten();
        let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories.extend(below.map(|entry| entry.path()));
    }
    found
}

/// The network namespaces of these processes, by inode number, each with the id of one of its processes. Processes that
/// end meanwhile are left out.
pub fn network_namespaces(cgroup: &Path) -> BTreeMap<u64, i32> {
    let namespace = |process: i32| Some((network_namespace_of(&process.to_string())?, process));
    processes(cgroup).into_iter().filter_map(namespace).collect()
}

/// The inode number of the network namespace of a process, or of this one (`self`); `None` if the process has ended.
pub fn network_namespace_of(process: &str) -> Option<u64> {
    fs::metadata(format!("/proc/{process}/ns/net")).map(|namespace| namespace.ino()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_a_cgroup_are_those_of_its_directory_and_below() {
        let root = tempfile::tempdir().unwrap();
        let below = root.path().join("container/inner");
        fs::create_dir_all(&below).unwrap();
        fs::write(root.path().join("cgroup.procs"), "").unwrap();
        fs::write(root.path().join("container/cgroup.procs"), "12\n0\n").unwrap();
        fs::write(below.join("cgroup.procs"), "7\n").unwrap();
        let mut found = processes(root.path());
        found.sort_unstable();
        assert_eq!(found, [7, 12]);
        assert_eq!(processes(&root.path().join("gone")), [0; 0]);
    }
}
