//! Small traffic beside bulk flows: calls, DNS look-ups, QUIC, short connections.

use std::time::Duration;

use super::apps::seen_cells;
use super::harness::beside::{self, Calls, Flows, Names, Streams};
use super::harness::limiter::Limits;
use super::harness::measure::{self, Latency, Way};
use super::harness::quic::{self, Quic, QuicResult};
use super::harness::web::{self, Web};
use super::harness::{Result, table};
use super::short::{least_and_most, spread, times_cells};
use super::{Options, Table, Title, latency_cells};

const LOOK_UP_EACH: Duration = Duration::from_millis(5);

/// The directions that have bulk flows.
fn flows(options: &Options) -> [(&'static str, Flows); 2] {
    let flows = options.flows.iter().copied().max().unwrap_or_default();
    let one = match options.way() {
        Way::In => ("in", Flows { out: 0, into: flows }),
        Way::Out | Way::Within => ("out", Flows { out: flows, into: 0 }),
    };
    [one, ("out and in", Flows { out: flows, into: flows })]
}

/// Both directions limited, since a call has two directions.
fn both(limit: u64) -> Limits {
    Limits { egress: Some(limit), ingress: Some(limit) }
}

pub fn voice(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for ((towards, beside), calls) in flows(options).into_iter().flat_map(|flows| [(flows, 1), (flows, 20)]) {
            let labels = [table::limit(limit), flows_text(towards, beside), calls.to_string()];
            for limiter in options.limiters.iter().copied() {
                let calls = Calls { way: options.way(), calls, beside, seconds: options.seconds };
                table.row(options, &labels, limiter, both(limit), |pod| {
                    let result = beside::calls(pod, &calls)?;
                    let streams = [result.out, result.into].iter().flat_map(stream_cells).collect();
                    Ok([streams, seen_cells(&result.seen)].concat())
                })?;
            }
        }
    }
    let who = if options.ingress { "by one socket of the pod" } else { "by a socket of the pod for each" };
    Ok((
        format!("Calls of 64 kbit/s each way{}, {who}, beside bulk TCP, both directions limited", options.path()),
        &[
            "limit",
            "flows",
            "calls",
            "limiter",
            "out lost",
            "delay p50",
            "p99",
            "jitter",
            "in lost",
            "delay p50",
            "p99",
            "jitter",
            "first second",
            "second by second",
            "busiest second",
            "retransmits",
            "drops",
        ],
    ))
}

fn flows_text(towards: &str, flows: Flows) -> String {
    format!("{} {towards}", flows.out.max(flows.into))
}

fn stream_cells(streams: &Streams) -> Vec<String> {
    let lost = format!("{} of {}", streams.lost, streams.sent);
    let jitter = format!("{} (most {})", table::millis(streams.jitter_us), table::millis(streams.most_jitter_us));
    [vec![lost], times_cells(&streams.delay), vec![jitter]].concat()
}

pub fn dns(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for (towards, beside) in flows(options) {
            let labels = [table::limit(limit), flows_text(towards, beside)];
            for limiter in options.limiters.iter().copied() {
                let names = Names { way: options.way(), pause: LOOK_UP_EACH, beside, seconds: options.seconds };
                table.row(options, &labels, limiter, both(limit), |pod| {
                    let result = beside::names(pod, &names)?;
                    Ok([answer_cells(&result.answers), seen_cells(&result.seen)].concat())
                })?;
            }
        }
    }
    let who = if options.ingress { "answers" } else { "asks" };
    Ok((
        format!("Names looked up beside bulk TCP{}, which the pod {who}, both directions limited", options.path()),
        &[
            "limit",
            "flows",
            "limiter",
            "answers",
            "lost",
            "p50",
            "p99",
            "longest",
            "first second",
            "second by second",
            "busiest second",
            "retransmits",
            "drops",
        ],
    ))
}

fn answer_cells(answers: &Latency) -> Vec<String> {
    let counts = vec![answers.count.to_string(), answers.lost.to_string()];
    [counts, latency_cells(answers), vec![table::millis(answers.max_us)]].concat()
}

pub fn quic(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for connections in options.flows.iter().copied() {
            let labels = [table::limit(limit), connections.to_string()];
            for limiter in options.limiters.iter().copied() {
                let ask = Some(measure::ask_pause(limit).max(LOOK_UP_EACH));
                let quic = Quic { way: options.way(), connections, seconds: options.seconds, ask };
                table.row(options, &labels, limiter, options.limits(limit), |pod| {
                    Ok(quic_cells(&quic::quic(pod, &quic)?, options.seconds))
                })?;
            }
        }
    }
    Ok((
        format!("QUIC {}{}, small requests on another connection beside it", options.towards(), options.path()),
        &[
            "limit",
            "connections",
            "limiter",
            "datagrams sent",
            "least and most",
            "lost",
            "round trip",
            "first second",
            "second by second",
            "busiest second",
            "retransmits",
            "drops",
            "reply p50",
            "p99",
            "longest",
        ],
    ))
}

fn quic_cells(result: &QuicResult, seconds: f64) -> Vec<String> {
    let rates = result.transfers.iter().map(|transfer| transfer.sent_bytes as f64 * 8.0 / seconds);
    let rates: Vec<f64> = rates.collect();
    let sum = |of: fn(&quic::Transfer) -> u64| result.transfers.iter().map(of).sum::<u64>();
    let (lost, sent) = (sum(|transfer| transfer.lost_packets), sum(|transfer| transfer.sent_packets));
    let rtt_us = result.transfers.iter().map(|transfer| transfer.rtt_us).fold(0.0, f64::max);
    let mut cells = vec![
        table::rate(rates.iter().sum()),
        least_and_most(&rates),
        format!("{lost} of {sent}"),
        table::millis(rtt_us),
    ];
    cells.extend(seen_cells(&result.seen));
    cells.extend(result.answers.iter().flat_map(|answers| answer_cells(answers).split_off(2)));
    cells
}

pub fn mixed(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for clients in options.clients.iter().copied() {
            let labels = [table::limit(limit), clients.to_string()];
            for limiter in options.limiters.iter().copied() {
                let (way, seconds, ask) = (options.way(), options.seconds, Some(measure::ask_pause(limit)));
                let web = Web { way, clients, seconds, ask, bulk_flows: 1, ..Web::default() };
                table.row(options, &labels, limiter, options.limits(limit), |pod| {
                    let result = web::web(pod, &web)?;
                    let bulk = result.bulk.as_ref().map_or(0.0, |bulk| bulk.timeline.payload_rate(1.0, seconds));
                    let mut cells = vec![table::rate(result.timeline.payload_rate(1.0, seconds)), table::rate(bulk)];
                    cells.extend(times_cells(&result.clients.from_connect));
                    cells.push(table::millis(result.longest_us()));
                    cells.push(spread(&result.timeline.each_second(seconds)));
                    cells.push(table::rate(result.timeline.busiest_second(seconds)));
                    cells.push(result.retransmits.to_string());
                    cells.extend(result.latency.iter().flat_map(latency_cells));
                    Ok(cells)
                })?;
            }
        }
    }
    Ok((
        format!("Short connections and one bulk flow{}, {}", options.path(), options.towards()),
        &[
            "limit",
            "clients",
            "limiter",
            "clients have",
            "the flow has",
            "from connect() p50",
            "p99",
            "longest",
            "second by second",
            "busiest second",
            "retransmits",
            "reply beside p50",
            "p99",
        ],
    ))
}
