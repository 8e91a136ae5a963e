//! Real servers in the pod and their usual clients on its node: nginx with wrk, nghttpd with h2load, redis with its
//! benchmark.

use super::harness::apps::{self, App, Http, Http2, Redis, Served};
use super::harness::measure;
use super::harness::pod::Pod;
use super::harness::seen::Seen;
use super::harness::{Result, table};
use super::short::spread;
use super::{Options, Table, Title, latency_cells};

/// Size of a response, of a posted body, and of the values that redis sends by pipeline.
const BYTES: usize = 10_000;

type Measure = fn(&Pod, &Options, u64) -> Result<App>;

const APPS: [(&str, Measure); 6] = [
    ("nginx, 8 connections kept", |pod, options, limit| http(pod, options, limit, 8, true)),
    ("nginx, 64 connections kept", |pod, options, limit| http(pod, options, limit, 64, true)),
    ("nginx, 8 connections closed", |pod, options, limit| http(pod, options, limit, 8, false)),
    ("nghttpd, HTTP/2", http2),
    ("redis, 100 bytes, beside a bulk flow", |pod, options, limit| {
        let small = Redis { clients: 8, bytes: 100, pipeline: 1, bulk_flows: 1, ..pipelined(options, limit) };
        apps::redis(pod, &small)
    }),
    ("redis, 10 kB, pipelined", |pod, options, limit| apps::redis(pod, &pipelined(options, limit))),
];

fn http(pod: &Pod, options: &Options, limit: u64, clients: usize, keep: bool) -> Result<App> {
    let (way, seconds, ask) = (options.way(), options.seconds, Some(measure::ask_pause(limit)));
    apps::http(pod, &Http { way, clients, bytes: BYTES, keep, seconds, ask })
}

fn http2(pod: &Pod, options: &Options, limit: u64) -> Result<App> {
    let (way, seconds, ask) = (options.way(), options.seconds, Some(measure::ask_pause(limit)));
    apps::http2(pod, &Http2 { way, clients: 4, streams: 10, bytes: BYTES, seconds, ask })
}

fn pipelined(options: &Options, limit: u64) -> Redis {
    let (way, seconds, ask) = (options.way(), options.seconds, Some(measure::ask_pause(limit)));
    Redis { way, clients: 4, bytes: BYTES, pipeline: 16, bulk_flows: 0, seconds, ask }
}

pub fn apps(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for (name, measure) in APPS {
            for limiter in options.limiters.iter().copied() {
                let mut rows = vec![];
                let labels = [table::limit(limit), name.to_owned()];
                table.row(options, &labels, limiter, options.limits(limit), |pod| {
                    let App { served, seen } = measure(pod, options, limit)?;
                    rows =
                        served.into_iter().map(|served| [served_cells(served), seen_cells(&seen)].concat()).collect();
                    Ok(rows.first().cloned().unwrap_or_default())
                })?;
                // A client that measures several things has a row for each.
                let labels = [&labels[..], &[limiter.title().to_owned()]].concat();
                table.rows.extend(rows.into_iter().skip(1).map(|cells| [&labels[..], &cells].concat()));
            }
        }
    }
    Ok((
        format!("Servers in the pod{}, bulk {}, small requests beside it", options.path(), options.towards()),
        &[
            "limit",
            "server",
            "limiter",
            "",
            "a second",
            "p50",
            "p99",
            "longest",
            "failed",
            "first second",
            "second by second",
            "busiest second",
            "retransmits",
            "drops",
            "reply beside p50",
            "p99",
        ],
    ))
}

fn served_cells(served: Served) -> Vec<String> {
    let Served { what, per_second, p50_us, p99_us, longest_us, failed } = served;
    let times = [p50_us, p99_us, longest_us].map(table::millis).to_vec();
    [vec![what, format!("{per_second:.0}")], times, vec![failed.to_string()]].concat()
}

/// The cells: first second, second by second, busiest second (out and in, where both were watched), retransmits,
/// drops, replies beside.
pub fn seen_cells(seen: &Seen) -> Vec<String> {
    let each = |cell: &dyn Fn(&super::harness::seen::Wire) -> String| {
        seen.wire.iter().map(cell).collect::<Vec<_>>().join(", ")
    };
    let mut cells = vec![
        each(&|wire| table::rate(wire.seconds.first().copied().unwrap_or_default())),
        each(&|wire| spread(&wire.seconds)),
        each(&|wire| table::rate(wire.most)),
        seen.retransmits.to_string(),
        seen.drops.to_string(),
    ];
    cells.extend(seen.asked.iter().flat_map(latency_cells));
    cells
}
