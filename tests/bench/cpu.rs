//! CPU time of the whole machine, behind each limiter.

use super::harness::cpu::while_measuring;
use super::harness::host::Host;
use super::harness::limiter::{Limiter, Limits};
use super::harness::measure::{self, Bulk, Timeline};
use super::harness::pod::Pod;
use super::harness::{Result, check_stop, note, table};
use super::{Options, Table, Title};

const MBIT: u64 = 1_000_000;
/// Limits, and the number of simultaneous flows.
const CASES: [(u64, usize); 6] =
    [(1000 * MBIT, 1), (1000 * MBIT, 4), (1000 * MBIT, 16), (1000 * MBIT, 64), (1000 * MBIT, 120), (100 * MBIT, 64)];
/// Pods that send one flow each.
const PODS: usize = 100;
const LIMIT_OF_EACH: u64 = 10 * MBIT;
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
    // Only traffic that pods send is counted in one place.
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
