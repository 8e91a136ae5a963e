//! CPU time of the whole machine, which pays for what limiters do in interrupts, timers and the senders themselves alike.

use std::fs;
use std::panic::resume_unwind;
use std::thread;
use std::time::Duration;

use super::harness::host::Host;
use super::harness::limiter::{Limiter, Limits};
use super::harness::measure::{self, Bulk, Timeline};
use super::harness::pod::Pod;
use super::harness::{Context, Failure, Result, check_stop, note, table};
use super::{Options, Table, Title};

const MBIT: u64 = 1_000_000;
/// Limits, and flows at once.
const CASES: [(u64, usize); 6] =
    [(1000 * MBIT, 1), (1000 * MBIT, 4), (1000 * MBIT, 16), (1000 * MBIT, 64), (1000 * MBIT, 120), (100 * MBIT, 64)];
/// Pods that send one flow each.
const PODS: usize = 100;
const LIMIT_OF_EACH: u64 = 10 * MBIT;
/// The first second is another matter, and at the end processes exit.
const LEFT_OUT: Duration = Duration::from_secs(1);

/// Ticks since the machine started, of all CPUs.
struct Ticks {
    busy: u64,
    all: u64,
}

impl Ticks {
    fn now() -> Result<Self> {
        const STAT: &str = "/proc/stat";
        let text = fs::read_to_string(STAT).context(format_args!("read {STAT}"))?;
        let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
        let line = line.ok_or_else(|| Failure::new(format_args!("{STAT} does not begin with the CPUs' times")))?;
        // user, nice, system, idle, iowait, irq, softirq, steal; guests' are in user.
        let ticks: Vec<u64> = line.split_whitespace().take(8).map(|field| field.parse().unwrap_or(0)).collect();
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        let stolen = ticks.get(7).copied().unwrap_or(0);
        let all = ticks.iter().sum();
        Ok(Self { busy: all - idle - stolen, all })
    }
}

/// CPUs at work between the first second and the last of what `measure` takes.
pub fn while_measuring<T: Send>(seconds: f64, measure: impl FnOnce() -> Result<T> + Send) -> Result<(f64, T)> {
    let cpus = thread::available_parallelism().context("count the CPUs")?.get() as f64;
    thread::scope(|scope| {
        let measuring = scope.spawn(measure);
        thread::sleep(LEFT_OUT);
        let before = Ticks::now()?;
        thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(2 * LEFT_OUT));
        let after = Ticks::now()?;
        let measured = measuring.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        let share = (after.busy - before.busy) as f64 / (after.all - before.all).max(1) as f64;
        Ok((share * cpus, measured))
    })
}

fn cells((cpus, timeline): (f64, Timeline)) -> Vec<String> {
    let rate = timeline.steady_rate();
    vec![table::rate(rate), format!("{:.1} %", cpus * 100.0), table::millis(cpus / (rate / 1e9) * 1e6)]
}

pub fn cpu(options: &Options, table: &mut Table) -> Result<Title> {
    for (limit, flows) in CASES {
        for limiter in options.limiters.iter().copied() {
            let labels = [table::limit(limit), "1".to_owned(), flows.to_string()];
            let bulk = Bulk { way: options.way(), flows, seconds: options.seconds, ..Bulk::default() };
            table.row(options, &labels, limiter, options.limits(limit), |pod| {
                let measure = || measure::bulk(pod, &bulk).map(|result| result.timeline);
                Ok(cells(while_measuring(options.seconds, measure)?))
            })?;
        }
    }
    // Only what pods send is counted in one place.
    if !options.ingress {
        for limiter in options.limiters.iter().copied() {
            many_pods(options, table, limiter)?;
        }
    }
    Ok((
        format!("CPU time of the whole machine, bulk TCP {}", options.towards()),
        &["limit", "pods", "flows of each", "limiter", "on the wire", "of one CPU", "CPU time of a Gbit"],
    ))
}

fn many_pods(options: &Options, table: &mut Table, limiter: Limiter) -> Result<()> {
    check_stop()?;
    note(format_args!("{PODS} pods, {} ..", limiter.title()));
    let host = Host::new()?;
    let limits = Limits { egress: Some(LIMIT_OF_EACH), ingress: None };
    let mut pods = vec![];
    for _ in 0..PODS {
        check_stop()?;
        let mut pod = Pod::new(&host, "bench")?;
        limiter.add(&mut pod, limits, &table.programs)?;
        pods.push(pod);
    }
    let measured = while_measuring(options.seconds, || measure::together(&pods, options.seconds))?;
    let labels = [table::limit(LIMIT_OF_EACH), PODS.to_string(), "1".to_owned(), limiter.title().to_owned()];
    table.rows.push([&labels[..], &cells(measured)].concat());
    Ok(())
}
