use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::{Limiter, Limits, PLUGINS, Workload};
use crate::harness::cpu::while_measuring;
use crate::harness::host::Host;
use crate::harness::idle::{Idle, kernel_kib};
use crate::harness::limiter::Programs;
use crate::harness::measure;
use crate::harness::pod::Pod;
use crate::harness::{Failure, PLUGIN_DIR, Result, check_stop};
use crate::record::Found;

/// ADDs and DELs that are timed.
const CALLS: usize = 20;

/// Pods that send one flow each, all at once.
pub fn pods(count: usize, limit: u64, seconds: f64) -> Workload {
    const SECONDS_TO_MAKE_ONE: f64 = 0.35;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let host = Host::new()?;
        let mut pods = vec![];
        for _ in 0..count {
            check_stop()?;
            let mut pod = Pod::new(&host, "report")?;
            limiter.add(&mut pod, Limits { egress: Some(limit), ingress: None }, programs)?;
            pods.push(pod);
        }
        let (cpus, timeline) = while_measuring(seconds, || measure::together(&pods, seconds))?;
        let rate = timeline.steady_rate();
        let mut found = Found::default();
        found.put("percent", rate / (limit * count as u64) as f64 * 100.0);
        found.put("cpu_ms_per_gbit", cpus / (rate / 1e9) * 1e3);
        Ok(found)
    };
    let seconds = seconds + 1.0 + SECONDS_TO_MAKE_ONE * count as f64;
    let parameters = json!({ "limit": limit, "pods": count });
    Workload::of_node("pods-at-once", parameters, seconds, measure).peers(PLUGINS)
}

/// ADD and DEL beside so many limited pods, and what each of those takes of the kernel's memory.
pub fn calls(there: usize) -> Workload {
    const SECONDS_TO_MAKE_ONE: f64 = 0.15;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let program = plugin(limiter, programs)?;
        let host = Host::new()?;
        let pods: Vec<Idle> =
            (0..there).map(|_| check_stop().and_then(|()| Idle::new(&host))).collect::<Result<_>>()?;
        let before = kernel_kib()?;
        let measured = beside(&host, &pods, &program);
        let grown = kernel_kib()?.saturating_sub(before);
        for pod in &pods {
            pod.call(&program, "DEL")?;
        }
        let mut found = measured?;
        if there > 0 {
            found.put("kib_per_pod", grown as f64 / there as f64);
        }
        Ok(found)
    };
    let seconds = 3.0 + SECONDS_TO_MAKE_ONE * there as f64;
    Workload::of_node("calls", json!({ "pods": there }), seconds, measure).peers(PLUGINS)
}

fn beside(host: &Host, pods: &[Idle], program: &Path) -> Result<Found> {
    for pod in pods {
        check_stop()?;
        pod.call(program, "ADD")?;
    }
    let pod = Idle::new(host)?;
    let mut elapsed = [vec![], vec![]];
    for _ in 0..CALLS {
        for (verb, elapsed) in ["ADD", "DEL"].into_iter().zip(&mut elapsed) {
            elapsed.push(pod.call(program, verb)?);
        }
        pod.clear();
    }
    let mut found = Found::default();
    for (verb, elapsed) in ["add", "del"].into_iter().zip(&mut elapsed) {
        elapsed.sort();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        found.put(&format!("{verb}_p50_ms"), ms(elapsed[CALLS / 2]));
        found.put(&format!("{verb}_longest_ms"), ms(elapsed[CALLS - 1]));
    }
    Ok(found)
}

/// Where the plugin of a limiter is.
fn plugin(limiter: Limiter, programs: &Programs) -> Result<PathBuf> {
    let name = limiter.plugin().ok_or_else(|| Failure::new(format_args!("{} is no plugin", limiter.title())))?;
    let directory = match limiter {
        Limiter::Podshaper => programs.directory()?,
        Limiter::BandwidthNewer => programs.newer_bandwidth()?,
        _ => PLUGIN_DIR.as_ref(),
    };
    Ok(directory.join(name))
}
