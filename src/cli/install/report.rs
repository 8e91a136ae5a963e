//! The output of `install` and `uninstall`.

use std::path::Path;

use super::diff;

/// The messages for the operator.
pub(super) struct Report {
    /// Whether nothing is changed.
    pub(super) dry_run: bool,
    /// Whether only changes are reported.
    is_quiet: bool,
    /// The messages, line by line.
    pub(super) text: String,
}

impl Report {
    pub(super) fn new(dry_run: bool, is_quiet: bool) -> Self {
        Self { dry_run, is_quiet, text: String::new() }
    }

    pub(super) fn say(&mut self, line: impl AsRef<str>) {
        self.text.push_str(line.as_ref());
        self.text.push('\n');
    }

    /// Reports a part that needs no change.
    pub(super) fn unchanged(&mut self, line: impl AsRef<str>) {
        if !self.is_quiet {
            self.say(line);
        }
    }

    pub(super) fn warn(&mut self, line: impl AsRef<str>) {
        self.unchanged(format!("warning: {}", line.as_ref()));
    }

    pub(super) fn change(&mut self, path: &Path, before: &str, after: &str) {
        if self.dry_run {
            self.text.push_str(&diff::unified(&path.display().to_string(), before, after));
        }
    }
}

/// The program that rewrites the conflist of this plugin, and its source.
pub(super) fn writer(primary: &str) -> Option<&'static str> {
    match primary {
        "flannel" => Some("flannel's pod writes this file anew when it starts, from the ConfigMap kube-flannel-cfg"),
        "calico" => Some("calico's pod writes this file anew when it starts, from the ConfigMap calico-config"),
        "cilium-cni" => Some(
            "cilium's agent writes this file anew, at once unless cni.exclusive=false, from cni.configMap (cni.customConf=true) if set",
        ),
        "weave-net" => Some("weave's pod may write this file anew when it is upgraded"),
        _ => None,
    }
}
