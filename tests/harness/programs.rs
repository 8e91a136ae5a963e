//! The time of each run of podshaper's eBPF programs. All pods of a node share the same programs.

use std::fs;
use std::process::Command;

use podshaper_abi::LAYOUT;
use serde_json::Value;

use super::{Context, Result, process};

/// The programs that run for packets and segments.
pub const NAMES: [&str; 4] = ["count_egress", "pace_tcp", "count_ingress", "out_of_pod"];

/// The mean time of a run of each of [`NAMES`] during `load`, in nanoseconds.
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

/// The total run time of a program of the node, in nanoseconds, and the number of its runs.
fn runs(program: &str) -> Result<(f64, f64)> {
    let path = format!("/sys/fs/bpf/podshaper/v{LAYOUT}/%node/{program}");
    let text = process::run(Command::new("bpftool").args(["-j", "prog", "show", "pinned", &path]))?;
    let shown: Value = serde_json::from_str(&text).context("read what bpftool says of a program")?;
    let number = |name: &str| shown[name].as_f64().unwrap_or_default();
    Ok((number("run_time_ns"), number("run_cnt")))
}

/// Makes the kernel measure the run time of eBPF programs, until this is dropped.
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
