//! Short connections, MPTCP, and traffic against the stream.

use std::time::Duration;

use super::harness::Result;
use super::harness::limiter::Limits;
use super::harness::measure::{self, Bulk, Chatter, Times};
use super::harness::table;
use super::harness::web::{self, Web, WebResult};
use super::{Options, Table, Title, bulk_cells, latency_cells};

/// Pause between a reply and the next request, of the requests beside short connections.
const PAUSE: Duration = Duration::from_millis(2);

/// A web server, each request on a connection of its own.
pub fn web(options: &Options, table: &mut Table) -> Result<Title> {
    for (limit, bytes, clients) in every(&options.rates, &options.sizes, &options.clients) {
        let labels = [table::limit(limit), format!("{} kB", bytes as f64 / 1e3), clients.to_string()];
        for limiter in options.limiters.iter().copied() {
            let web = Web {
                way: options.way(),
                from_pod: options.from_pod,
                clients,
                bytes,
                seconds: options.seconds,
                ask: Some(PAUSE),
                ..Web::default()
            };
            table.row(options, &labels, limiter, options.limits(limit), |pod| {
                Ok(web_cells(&web::web(pod, &web)?, options.seconds))
            })?;
        }
    }
    let what = match (options.from_pod, options.ingress) {
        (false, false) => "got from a web server in the pod",
        (false, true) => "posted to a web server in the pod",
        (true, false) => "posted by the pod",
        (true, true) => "got by the pod",
    };
    Ok((
        format!("Short connections, {what}{}, small requests beside it", options.path()),
        &[
            "limit",
            "size",
            "clients",
            "limiter",
            "responses a second",
            "on the wire, second by second",
            "from the request p50",
            "p99",
            "from connect() p50",
            "p99",
            "longest",
            "reply beside p50",
            "p99",
            "retransmits",
            "failed",
        ],
    ))
}

fn every(limits: &[u64], sizes: &[usize], clients: &[usize]) -> Vec<(u64, usize, usize)> {
    let sizes = |limit| sizes.iter().flat_map(move |size| clients.iter().map(move |clients| (limit, *size, *clients)));
    limits.iter().copied().flat_map(sizes).collect()
}

fn web_cells(result: &WebResult, seconds: f64) -> Vec<String> {
    let clients = &result.clients;
    let mut cells =
        vec![format!("{:.0}", clients.responses as f64 / seconds), spread(&result.timeline.each_second(seconds))];
    cells.extend([&clients.from_request, &clients.from_connect].into_iter().flat_map(times_cells));
    cells.push(table::millis(result.longest_us()));
    cells.extend(result.latency.iter().flat_map(latency_cells));
    cells.push(result.retransmits.to_string());
    let failed: Vec<String> = clients.failures.iter().map(|(name, count)| format!("{count} {name}")).collect();
    cells.push(if failed.is_empty() { "0".into() } else { failed.join(", ") });
    cells
}

pub fn times_cells(times: &Times) -> Vec<String> {
    [times.p50_us, times.p99_us].map(table::millis).to_vec()
}

/// The least and the most of any second after the first.
pub fn spread(seconds: &[f64]) -> String {
    least_and_most(seconds.get(1..).unwrap_or_default())
}

/// The least and the most of some rates.
pub fn least_and_most(rates: &[f64]) -> String {
    let least = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let most = rates.iter().copied().fold(0.0, f64::max);
    format!("{:.2} .. {}", least / 1e6, table::rate(most))
}

/// Bulk flows of MPTCP, measured like those of TCP.
pub fn mptcp(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for flows in options.flows.iter().copied() {
            let labels = [table::limit(limit), flows.to_string()];
            for limiter in options.limiters.iter().copied() {
                let bulk = Bulk { mptcp: true, ..options.bulk(flows, None, limit) };
                table.row(options, &labels, limiter, options.limits(limit), |pod| {
                    let result = measure::bulk(pod, &bulk)?;
                    Ok([vec![spread(&result.timeline.each_second(options.seconds))], bulk_cells(&result, Some(limit))]
                        .concat())
                })?;
            }
        }
    }
    Ok((
        format!("Bulk MPTCP {}{}, small requests beside it", options.towards(), options.path()),
        &[
            "limit",
            "flows",
            "limiter",
            "second by second",
            "on the wire",
            "of the limit",
            "first second",
            "retransmits",
            "reply p50",
            "p99",
        ],
    ))
}

/// Bulk flows whose receiving end sends a little on the same connections.
pub fn chatter(options: &Options, table: &mut Table) -> Result<Title> {
    let kinds = [(1, 1), (100, 10)].map(|(bytes, ms)| Chatter { bytes, every: Duration::from_millis(ms) });
    for limit in options.rates.iter().copied() {
        for flows in options.flows.iter().copied() {
            for chatter in kinds {
                let said = format!("{} bytes each {} ms", chatter.bytes, chatter.every.as_millis());
                let labels = [table::limit(limit), flows.to_string(), said];
                for limiter in options.limiters.iter().copied() {
                    let bulk = Bulk { chatter: Some(chatter), ask: None, ..options.bulk(flows, None, limit) };
                    let limits: Limits = options.limits(limit);
                    table.row(options, &labels, limiter, limits, |pod| {
                        let result = measure::bulk(pod, &bulk)?;
                        let late = result.chatter.as_ref().map_or_else(|| vec![table::NONE.into(); 2], times_cells);
                        let spread = vec![spread(&result.timeline.each_second(options.seconds))];
                        Ok([spread, bulk_cells(&result, Some(limit)), late].concat())
                    })?;
                }
            }
        }
    }
    Ok((
        format!("Bulk TCP {}{}, and a little against it on the same connections", options.towards(), options.path()),
        &[
            "limit",
            "flows",
            "against them",
            "limiter",
            "second by second",
            "on the wire",
            "of the limit",
            "first second",
            "retransmits",
            "late p50",
            "p99",
        ],
    ))
}
