//! The machine of the measurements, and the versions of what was measured.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::harness::limiter::{Limiter, Programs};
use crate::harness::process;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release, as printed by `uname -r`.
    pub kernel: String,
    /// Whether the kernel is User Mode Linux.
    pub is_uml: bool,
    pub date: String,
    pub cpu: String,
    pub cpus: usize,
    pub memory_mib: u64,
    pub congestion_controls: String,
    /// The commit that podshaper was built from.
    pub podshaper: String,
    pub bandwidth_plugin: String,
    pub newer_bandwidth_plugin: String,
    pub iproute2: String,
    /// The versions of the programs in the pods, as far as they are installed; records of earlier versions have none.
    #[serde(default)]
    pub apps: BTreeMap<String, String>,
    pub is_quick: bool,
    /// The limiters that are not compared here, and the reasons.
    pub missing: BTreeMap<Limiter, String>,
}

impl Machine {
    pub fn of(programs: &Programs, commit: &str, newer_bandwidth: Option<&Path>, is_quick: bool) -> Self {
        // A module in some kernels.
        let _ = printed_by("modprobe", &["--quiet", "tcp_bbr"]);
        let cpuinfo = read("/proc/cpuinfo");
        let model =
            cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        let memory = read("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        let is_uml = cpuinfo.contains("User Mode Linux") || cpuinfo.contains("UML");
        let peers = Limiter::PEERS.into_iter();
        Self {
            kernel: read("/proc/sys/kernel/osrelease"),
            is_uml,
            date: printed_by("date", &["--utc", "+%Y-%m-%d %H:%M UTC"]),
            cpu: model.unwrap_or("unknown").trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory.unwrap_or(0) / 1024,
            congestion_controls: read("/proc/sys/net/ipv4/tcp_available_congestion_control"),
            podshaper: commit.to_owned(),
            bandwidth_plugin: printed_by("dpkg-query", &["-W", "-f", "${Version}", "containernetworking-plugins"]),
            newer_bandwidth_plugin: newer_bandwidth
                .map(|directory| read(directory.join("version")))
                .unwrap_or_default(),
            iproute2: printed_by("tc", &["-V"]).trim_start_matches("tc utility, ").to_owned(),
            apps: apps(),
            is_quick,
            missing: peers.filter_map(|limiter| Some((limiter, limiter.missing(programs)?))).collect(),
        }
    }

    /// For a heading: the kernel and its machine.
    pub fn title(&self) -> String {
        let place = if self.is_uml { "User Mode Linux" } else { "this machine's own kernel" };
        format!("Linux {}, {place}", self.release())
    }

    /// A User Mode Linux that lacks nothing, for the estimate of the measurements there.
    pub fn as_uml(&self) -> Self {
        let is_of_any_kernel =
            |limiter: &Limiter| matches!(limiter, Limiter::BandwidthNewer | Limiter::BandwidthNewerAsKubelet);
        let missing = self.missing.iter().filter(|(limiter, _)| is_of_any_kernel(limiter));
        let missing = missing.map(|(limiter, why)| (*limiter, why.clone())).collect();
        Self { is_uml: true, congestion_controls: "reno cubic bbr".to_owned(), missing, ..self.clone() }
    }

    /// "6.18.44" for "6.18.44-more".
    pub fn release(&self) -> &str {
        self.kernel.split('-').next().unwrap_or_default()
    }

    pub fn has_congestion_control(&self, name: &str) -> bool {
        self.congestion_controls.split_whitespace().any(|known| known == name)
    }
}

fn apps() -> BTreeMap<String, String> {
    let packages = [("nginx", "nginx"), ("wrk", "wrk"), ("nghttp2", "nghttp2-server"), ("redis", "redis-server")];
    let version = |package| printed_by("dpkg-query", &["-W", "-f", "${Version}", package]);
    let installed = packages.map(|(name, package)| (name, version(package)));
    let all = installed.into_iter().chain([("quinn", locked("quinn").to_owned())]);
    all.filter(|(_, version)| !version.is_empty()).map(|(name, version)| (name.to_owned(), version)).collect()
}

/// The version of a crate in the workspace's Cargo.lock; empty if the crate is not used.
fn locked(name: &str) -> &'static str {
    let entries = include_str!("../../../Cargo.lock").split("[[package]]");
    let value = |entry: &'static str, key: &str| {
        let line = entry.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
        line.unwrap_or_default().trim_matches('"')
    };
    let mut found = entries.filter(|entry| value(entry, "name") == name);
    found.next().map(|entry| value(entry, "version")).unwrap_or_default()
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The output of a program; empty if the program is missing.
fn printed_by(program: &str, arguments: &[&str]) -> String {
    process::run(Command::new(program).args(arguments)).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_record_without_versions_is_read() {
        let mut record = serde_json::to_value(Machine::default()).unwrap();
        record.as_object_mut().unwrap().remove("apps");
        assert_eq!(serde_json::from_value::<Machine>(record).unwrap().apps, BTreeMap::new());
    }

    #[test]
    fn a_crates_version_is_that_of_the_lock() {
        assert!(locked("quinn").starts_with("0."), "{}", locked("quinn"));
        assert_eq!(locked("no-such-crate"), "");
    }
}
