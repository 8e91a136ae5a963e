//! The directories of this node's runtime for network configurations and plugins, as far as its configuration names
//! them.
//!
//! containerd's configuration names both directories if they are not the defaults: k3s has them below its own
//! directory, Debian has the plugins in /usr/lib/cni. Only these two keys of the file are read, line by line. CRI-O's
//! defaults are containerd's.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The runtime's default directory for network configurations.
const CONF_DIR: &str = "etc/cni/net.d";
/// The runtime's default directory for plugins.
const BIN_DIR: &str = "opt/cni/bin";
/// containerd's configuration: that of k3s, of RKE2, and of distributions.
const CONFIGURATIONS: [&str; 3] = [
    "var/lib/rancher/k3s/agent/etc/containerd/config.toml",
    "var/lib/rancher/rke2/agent/etc/containerd/config.toml",
    "etc/containerd/config.toml",
];

/// The directories of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// The directory of the network configurations.
    pub conf: PathBuf,
    /// The directory of the plugins.
    pub bin: PathBuf,
}

impl Directories {
    /// The directories of this node, unless a person names others.
    pub fn of_this_node(conf: Option<&Path>, bin: Option<&Path>) -> Self {
        let found = Self::below(Path::new("/"));
        Self { conf: conf.map_or(found.conf, Path::to_path_buf), bin: bin.map_or(found.bin, Path::to_path_buf) }
    }

    /// The directories of the node with this root directory. The first configuration that exists belongs to the runtime
    /// in use: k3s and RKE2 bring their own containerd.
    fn below(root: &Path) -> Self {
        let text = CONFIGURATIONS.iter().find_map(|path| fs::read_to_string(root.join(path)).ok()).unwrap_or_default();
        let of = |keys: &[&str], default: &str| {
            let found = keys.iter().find_map(|key| value(&text, key));
            found.map_or_else(|| root.join(default), PathBuf::from)
        };
        // containerd 2 has a list of plugin directories.
        Self { conf: of(&["conf_dir"], CONF_DIR), bin: of(&["bin_dir", "bin_dirs"], BIN_DIR) }
    }
}

/// The first absolute path that the key is set to; an empty value means the default.
fn value(text: &str, key: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix(key)?.trim_start().strip_prefix('='));
    let paths = lines.flat_map(|value| value.split(['"', '\'']).nth(1));
    paths.map(str::to_owned).find(|path| path.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_says_where_its_directories_are() {
        let debian = "[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      bin_dir = \"/usr/lib/cni\"\n      conf_dir = \"/etc/cni/net.d\"\n";
        let k3s = "[plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"/var/lib/rancher/k3s/data/cni\"\n  conf_dir = \"/var/lib/rancher/k3s/agent/etc/cni/net.d\"\n";
        let second = "[plugins.'io.containerd.cri.v1.runtime'.cni]\n  bin_dirs = ['/usr/libexec/cni', '/opt/cni/bin']\n  conf_dir=''\n  max_conf_num = 1\n";
        let k3s_paths = ("/var/lib/rancher/k3s/agent/etc/cni/net.d", "/var/lib/rancher/k3s/data/cni");
        for (files, expected) in [
            (vec![], ("<root>/etc/cni/net.d", "<root>/opt/cni/bin")),
            (vec![(2, debian)], ("/etc/cni/net.d", "/usr/lib/cni")),
            (vec![(2, second)], ("<root>/etc/cni/net.d", "/usr/libexec/cni")),
            (vec![(0, k3s), (2, debian)], k3s_paths),
            // RKE2 with containerd's defaults.
            (vec![(1, "version = 2\n"), (2, debian)], ("<root>/etc/cni/net.d", "<root>/opt/cni/bin")),
        ] {
            let root = tempfile::tempdir().unwrap();
            for (number, text) in &files {
                let path = root.path().join(CONFIGURATIONS[*number]);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let Directories { conf, bin } = Directories::below(root.path());
            let shown = [conf, bin]
                .map(|path| path.display().to_string().replace(&root.path().display().to_string(), "<root>"));
            assert_eq!((shown[0].as_str(), shown[1].as_str()), expected, "{files:?}");
        }
    }
}
