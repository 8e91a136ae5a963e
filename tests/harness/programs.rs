//! What podshaper's eBPF programs take each time that they run. All pods of a node have the same ones.

use std::fs;
use std::process::Command;

use podshaper_abi::LAYOUT;
use serde_json::Value;

use super::{Context, Result, process};

/// The programs that packets and segments run.
pub const NAMES: [&str; 4] = ["count_egress", "pace_tcp", "count_ingress", "out_of_pod"];

/// Nanoseconds that each of [`NAMES`] takes, on the mean of its runs during `load`.
pub fn run_ns(load: impl FnOnce() -> Result<()>) -> Result<[f64; 4]> {
    let _counting = Counting::start()?;
    let read = || NAMES.map(runs).into_iter().collect::<Result<Vec<_>>>();
    let before = read()?;
    load()?;
    let after = read()?;
    let mut mean_ns = [0.0; 4];
    for (mean_ns, ((ns, times), (ns_after, times_after))) in mean_ns.iter_mut().zip(before.into_iter().zip(after)) {
        *mean_ns = (ns_after - ns) / (times_after - times).max(1.0);
    }
    Ok(mean_ns)
}

/// How long a program of the node has run, in nanoseconds, and how often.
fn runs(program: &str) -> Result<(f64, f64)> {
    let path = format!("/sys/fs/bpf/podshaper/v{LAYOUT}/%node/{program}");
    let text = process::run(Command::new("bpftool").args(["-j", "prog", "show", "pinned", &path]))?;
    let shown: Value = serde_json::from_str(&text).context("read what bpftool says of a program")?;
    let number = |name: &str| shown[name].as_f64().unwrap_or_default();
    Ok((number("run_time_ns"), number("run_cnt")))
}

/// The kernel counts how long eBPF programs run, until this is dropped.
struct Counting;

impl Counting {
    const SYSCTL: &str = "/proc/sys/kernel/bpf_stats_enabled";

    fn start() -> Result<Self> {
        fs::write(Self::SYSCTL, "1").context("count how long eBPF programs run")?;
        Ok(Self)
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = fs::write(Self::SYSCTL, "0");
    }
}
