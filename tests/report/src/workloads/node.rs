use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{Limiter, Limits, Workload};
use crate::harness::cpu::while_measuring;
use crate::harness::host::Host;
use crate::harness::idle::{Idle, kernel_kib};
use crate::harness::limiter::Programs;
use crate::harness::measure::{self, Bulk, Way};
use crate::harness::pod::Pod;
use crate::harness::programs;
use crate::harness::{Failure, PLUGIN_DIR, Result, check_stop, note};
use crate::record::Found;

/// ADDs and DELs that are timed.
const CALLS: usize = 20;

/// The time to make the pods is not measured. If it is longer than this, there is no result.
const LONGEST_FILL: Duration = Duration::from_secs(45);

/// Pods that send one flow each, all at once.
pub fn pods(count: usize, limit: u64, seconds: f64) -> Workload {
    const SECONDS_TO_MAKE_ONE: f64 = 0.2;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let host = Host::new()?;
        let make = |_| {
            let mut pod = Pod::new(&host, "report")?;
            limiter.add(&mut pod, Limits { egress: Some(limit), ingress: None }, programs)?;
            Ok(pod)
        };
        // The first pod makes the node's bridge.
        let mut pods = vec![make(0)?];
        pods.extend(few_at_once(1..count, make)?);
        let (cpus, timeline) = while_measuring(seconds, || measure::together(&pods, seconds))?;
        let rate = timeline.steady_rate();
        let mut found = Found::default();
        found.put("percent", rate / (limit * count as u64) as f64 * 100.0);
        found.put("cpu_ms_per_gbit", cpus / (rate / 1e9) * 1e3);
        few_at_once(pods.into_iter(), |pod| {
            drop(pod);
            Ok(())
        })?;
        Ok(found)
    };
    let seconds = seconds + 1.0 + SECONDS_TO_MAKE_ONE * count as f64;
    let parameters = json!({ "limit": limit, "pods": count });
    Workload::of_node("pods-at-once", parameters, seconds, measure)
        .peers(&[Limiter::Podshaper, Limiter::BandwidthNewer])
}

/// ADD and DEL beside this number of limited pods, and the kernel's memory for each of those pods.
pub fn calls(there: usize) -> Workload {
    const SECONDS_TO_MAKE_ONE: f64 = 0.018;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let program = plugin(limiter, programs)?;
        let host = Host::new()?;
        let until = Instant::now() + LONGEST_FILL;
        let make = |_| if Instant::now() < until { Idle::new(&host).map(Some) } else { Ok(None) };
        let pods: Vec<Idle> = few_at_once(0..there, make)?.into_iter().flatten().collect();
        if pods.len() < there {
            note(format_args!("{} of {there} pods were made in {LONGEST_FILL:?}: not measured", pods.len()));
            few_at_once(pods.into_iter(), |pod| {
                drop(pod);
                Ok(())
            })?;
            settle()?;
            return Ok(Found::default());
        }
        let before = kernel_kib()?;
        let measured = beside(&host, &pods, &program);
        let grown = kernel_kib()?.saturating_sub(before);
        few_at_once(pods.into_iter(), |pod| pod.call(&program, "DEL").map(drop))?;
        let mut found = measured?;
        if there > 0 {
            settle()?;
            found.put("kib_per_pod", grown as f64 / there as f64);
        }
        Ok(found)
    };
    let seconds = 4.0 + SECONDS_TO_MAKE_ONE * there as f64;
    Workload::of_node("calls", json!({ "pods": there }), seconds, measure).peers(&[Limiter::Podshaper])
}

/// The kernel removes namespaces some time after their processes. Waits for that, so that it does not disturb the
/// next measurement.
fn settle() -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(1);
    const LONGEST: u32 = 20;
    const LITTLE_KIB: u64 = 1024;
    let mut before = kernel_kib()?;
    for _ in 0..LONGEST {
        check_stop()?;
        thread::sleep(PAUSE);
        let now = kernel_kib()?;
        if now + LITTLE_KIB > before {
            break;
        }
        before = now;
    }
    Ok(())
}

/// ADDs of this number of pods that begin at the same moment, and then their DELs.
pub fn calls_at_once(count: usize) -> Workload {
    const ROUNDS: usize = 5;
    let measure = move |limiter: Limiter, programs: &Programs| {
        let program = plugin(limiter, programs)?;
        let host = Host::new()?;
        // A real node has other pods: the first pod's ADD loads the programs.
        let other = Idle::new(&host)?;
        other.call(&program, "ADD")?;
        let pods: Vec<Idle> = (0..count).map(|_| Idle::new(&host)).collect::<Result<_>>()?;
        let mut elapsed = [vec![], vec![]];
        let measured = (0..ROUNDS).try_for_each(|_| {
            check_stop()?;
            for (verb, elapsed) in ["ADD", "DEL"].into_iter().zip(&mut elapsed) {
                elapsed.extend(all_at_once(&pods, &program, verb)?);
            }
            pods.iter().for_each(Idle::clear);
            Ok(())
        });
        other.call(&program, "DEL")?;
        measured?;
        Ok(times(elapsed))
    };
    let seconds = 3.0 + 0.2 * count as f64;
    Workload::of_node("calls-at-once", json!({ "calls": count }), seconds, measure)
        .peers(&[Limiter::Podshaper, Limiter::BandwidthNewer])
}

/// Does unmeasured work with all of them, a few at a time, which is faster.
fn few_at_once<T: Send, U: Send>(
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> Result<U> + Sync,
) -> Result<Vec<U>> {
    const AT_ONCE: usize = 4;
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        let mut done = vec![];
        while let Some(item) = next() {
            check_stop()?;
            done.push(work(item)?);
        }
        Ok(done)
    };
    let done: Result<Vec<Vec<U>>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    Ok(done?.into_iter().flatten().collect())
}

fn all_at_once(pods: &[Idle], program: &Path, verb: &str) -> Result<Vec<Duration>> {
    thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().map(|pod| scope.spawn(move || pod.call(program, verb))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// The time that each of podshaper's programs takes for a packet, in both directions.
pub fn programs(limit: u64, seconds: f64) -> Workload {
    let limits = Limits { egress: Some(limit), ingress: Some(limit) };
    let measure = move |pod: &mut Pod, _| {
        let run_ns = programs::run_ns(|| {
            for way in [Way::Out, Way::In] {
                measure::bulk(pod, &Bulk { way, flows: 8, seconds, ..Bulk::default() })?;
            }
            Ok(())
        })?;
        let mut found = Found::default();
        programs::NAMES.iter().zip(run_ns).for_each(|(name, ns)| found.put(&format!("{name}_ns"), ns));
        Ok(found)
    };
    Workload::of_pod("programs", json!({ "limit": limit }), limits, 2.0 * seconds, measure).peers(&[Limiter::Podshaper])
}

fn beside(host: &Host, pods: &[Idle], program: &Path) -> Result<Found> {
    few_at_once(pods.iter(), |pod| pod.call(program, "ADD"))?;
    let pod = Idle::new(host)?;
    let mut elapsed = [vec![], vec![]];
    for _ in 0..CALLS {
        for (verb, elapsed) in ["ADD", "DEL"].into_iter().zip(&mut elapsed) {
            elapsed.push(pod.call(program, verb)?);
        }
        pod.clear();
    }
    Ok(times(elapsed))
}

/// The times of ADDs and of DELs.
fn times(elapsed: [Vec<Duration>; 2]) -> Found {
    let mut found = Found::default();
    for (verb, mut elapsed) in ["add", "del"].into_iter().zip(elapsed) {
        elapsed.sort();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        found.put(&format!("{verb}_p50_ms"), ms(elapsed[elapsed.len() / 2]));
        found.put(&format!("{verb}_longest_ms"), ms(elapsed[elapsed.len() - 1]));
    }
    found
}

/// The path of a limiter's plugin.
fn plugin(limiter: Limiter, programs: &Programs) -> Result<PathBuf> {
    let name = limiter.plugin().ok_or_else(|| Failure::new(format_args!("{} is no plugin", limiter.title())))?;
    let directory = match limiter {
        Limiter::Podshaper => programs.directory()?,
        Limiter::BandwidthNewer => programs.newer_bandwidth()?,
        _ => PLUGIN_DIR.as_ref(),
    };
    Ok(directory.join(name))
}
