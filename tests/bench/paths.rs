//! Traffic that passes a pod's interface by other paths than the sockets of its cgroup; and whether those sockets
//! notice that the other paths are limited.

use std::time::Duration;

use super::harness::cpu::while_measuring;
use super::harness::limiter::{Limiter, Limits};
use super::harness::measure::{self, Bulk, BulkResult, Timeline, Way};
use super::harness::paths::Load;
use super::harness::{Result, note, table};
use super::{Options, Table, Title};

/// In the order of the columns.
const LOADS: [(Way, bool); 4] = [(Way::Out, false), (Way::Out, true), (Way::In, false), (Way::In, true)];

pub fn paths(options: &Options, table: &mut Table) -> Result<Title> {
    for path in options.paths.iter().copied() {
        for limit in options.rates.iter().copied() {
            for limiter in options.limiters.iter().copied() {
                let labels = [path.title().to_owned(), table::limit(limit)];
                let limits = Limits { egress: Some(limit), ingress: Some(limit) };
                table.row(options, &labels, limiter, limits, |pod| {
                    let made = path.with(pod, |pod, ends| {
                        LOADS
                            .iter()
                            .map(|(way, is_udp)| {
                                if !path.carries(*way, *is_udp) {
                                    return Ok(String::new());
                                }
                                let load = Load { way: *way, is_udp: *is_udp, limit, seconds: options.seconds };
                                let sent = path.send(pod, ends, &load);
                                Ok(sent.map_or_else(failed, |sent| parts(&sent, options.seconds, limit)))
                            })
                            .collect()
                    });
                    Ok(made.unwrap_or_else(|error| {
                        note(error);
                        vec!["cannot be made here".to_owned()]
                    }))
                })?;
            }
        }
    }
    Ok((
        "By other paths, on the wire behind the limiter at layer 3, as parts of the limit: after the first second (the largest second of those)"
            .to_owned(),
        &["path", "limit", "limiter", "out, TCP", "out, UDP", "in, TCP", "in, UDP"],
    ))
}

fn failed(error: super::Failure) -> String {
    note(error);
    "failed".to_owned()
}

fn parts(timeline: &Timeline, seconds: f64, limit: u64) -> String {
    let part = |from: f64, to: f64| timeline.wire_rate(from, to) / limit as f64;
    let largest = (1..seconds as u32).map(|second| part(second.into(), f64::from(second) + 1.0)).fold(0.0, f64::max);
    format!("{:.3} ({largest:.2})", part(1.0, seconds))
}

/// Limits (used if they are among the requested ones), and the number of simultaneous flows.
const CASES: [(u64, usize); 3] = [(10_000_000, 4), (100_000_000, 32), (1_000_000_000, 8)];
/// Rounds of each. The variants take turns, so that a slow moment of the machine affects all of them.
const ROUNDS: usize = 5;

/// The result of one round.
struct Round {
    cpus: f64,
    result: BulkResult,
}

pub fn own(options: &Options, table: &mut Table) -> Result<Title> {
    for (limit, flows) in CASES.into_iter().filter(|(limit, _)| options.rates.contains(limit)) {
        for way in [Way::Out, Way::In] {
            let mut rounds = [vec![], vec![]];
            for (setting, limiter) in
                (0..ROUNDS).flat_map(|_| [Limiter::Podshaper, Limiter::OwnSockets].into_iter().enumerate())
            {
                let limits = Limits { egress: Some(limit), ingress: Some(limit) };
                let bulk = Bulk {
                    way,
                    flows,
                    seconds: options.seconds,
                    ask: Some(Duration::from_millis(5)),
                    ..Bulk::default()
                };
                let (cpus, result) = table.measure(options, limiter, limits, |pod| {
                    while_measuring(options.seconds, || measure::bulk(pod, &bulk))
                })?;
                rounds[setting].push(Round { cpus, result });
            }
            for (limiter, rounds) in [Limiter::Podshaper, Limiter::OwnSockets].into_iter().zip(&rounds) {
                let towards = if way == Way::Out { "out" } else { "in" };
                let labels = [table::limit(limit), format!("{flows}, {towards}"), limiter.title().to_owned()];
                table.rows.push([&labels[..], &cells(rounds, limit)].concat());
            }
        }
    }
    Ok((
        format!(
            "The pod's own sockets, with other paths held and not: medians of {ROUNDS} in turn (least and largest)"
        ),
        &["limit", "flows", "limiter", "of the limit", "retransmits", "reply p50", "p99", "CPU time of a Gbit"],
    ))
}

fn cells(rounds: &[Round], limit: u64) -> Vec<String> {
    let of = |value: &dyn Fn(&Round) -> f64, show: &dyn Fn(f64) -> String| {
        let mut values: Vec<f64> = rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().map(show).unwrap_or_default();
        format!("{} ({} .. {})", at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
    };
    let rate = |round: &Round| round.result.timeline.steady_rate();
    let latency =
        |round: &Round| round.result.latency.as_ref().map_or([f64::NAN; 2], |latency| [latency.p50_us, latency.p99_us]);
    vec![
        of(&|round| rate(round) / limit as f64, &|part| format!("{part:.3}")),
        of(&|round| round.result.retransmits as f64, &|count| count.to_string()),
        of(&|round| latency(round)[0], &table::millis),
        of(&|round| latency(round)[1], &table::millis),
        of(&|round| round.cpus / (rate(round) / 1e9) * 1e6, &table::millis),
    ]
}
