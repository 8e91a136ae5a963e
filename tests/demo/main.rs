//! demo: the README's first command. The same pod three times, without a limit, with podshaper and with the bandwidth
//! plugin: how much it may send, and how long its small requests take meanwhile.
//!
//! The demo changes nothing outside its own namespaces and removes everything that it made, even on Ctrl-C.

#[path = "../harness/mod.rs"]
mod harness;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;

use harness::host::Host;
use harness::limiter::{Limiter, Limits, Programs};
use harness::measure::{self, Bulk, Latency, Way};
use harness::pod::Pod;
use harness::{Context, Failure, Result, check_stop, note, stop_on_signals, stopped, table};

/// The number of calls of each plugin. A single call says little about its time, so the table has the median.
const CALLS: usize = 9;
/// The exit status that a shell reports of a program that Ctrl-C ended.
const EXIT_STOPPED: u8 = 130;

/// Compares a pod limited by podshaper with others, on throw-away pods
#[derive(Parser)]
#[command(name = "demo")]
struct Options {
    /// The limit, in bits per second
    #[arg(long, default_value = "100M", value_parser = table::parse_rate)]
    rate: u64,
    /// How long each pod sends
    #[arg(long, default_value = "6", value_parser = table::parse_seconds)]
    seconds: f64,
    /// Bulk TCP flows per pod
    #[arg(long, default_value_t = 4)]
    flows: usize,
    /// Congestion control of the flows [default: this machine's]
    #[arg(long)]
    cc: Option<String>,
    /// Rows of the table
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Limiter::ALL)]
    limiters: Vec<Limiter>,
    /// The plugin to show [default: the one built with this demo]
    #[arg(long)]
    podshaper: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    limit_bits_per_s: u64,
    flows: usize,
    /// Replies on a link without other traffic and without a limit.
    idle: Latency,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    limiter: Limiter,
    wire_bits_per_s: f64,
    first_second_bits_per_s: f64,
    retransmits: u64,
    reply: Option<Latency>,
    add_ms: Option<f64>,
    del_ms: Option<f64>,
}

fn main() -> ExitCode {
    let result = Options::try_parse().map_err(|error| {
        let _ = error.print();
        ExitCode::from(error.exit_code() as u8)
    });
    let options = match result {
        Ok(options) => options,
        Err(code) => return code,
    };
    match stop_on_signals().and_then(|()| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if stopped() => ExitCode::from(EXIT_STOPPED),
        Err(error) => {
            note(format_args!("demo: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("it makes network namespaces and loads eBPF programs: run it as root"));
    }
    let programs = Programs::find(options.podshaper.as_deref(), &options.limiters)?;
    let mut rows = Vec::new();
    note("an idle pod ..");
    let idle = idle(options.rate)?;
    for limiter in &options.limiters {
        check_stop()?;
        note(format_args!("{} ..", limiter.title()));
        rows.push(row(options, *limiter, &programs)?);
    }
    let report = Report { limit_bits_per_s: options.rate, flows: options.flows, idle, rows };
    let text = if options.json {
        serde_json::to_string_pretty(&report).context("print the report")? + "\n"
    } else {
        show(&report)
    };
    table::print(&text).context("print the report")
}

fn idle(rate: u64) -> Result<Latency> {
    let host = Host::new()?;
    let mut pod = Pod::new(&host, "demo")?;
    pod.add(&host.bridge_chain()?)?;
    measure::ask(&pod, Way::Out, 2.0, measure::ask_pause(rate))
}

fn row(options: &Options, limiter: Limiter, programs: &Programs) -> Result<Row> {
    let host = Host::new()?;
    let mut pod = Pod::new(&host, "demo")?;
    let limits = Limits { egress: Some(options.rate), ingress: None };
    for _ in 0..CALLS - 1 {
        limiter.add(&mut pod, limits, programs)?;
        pod.del()?;
    }
    limiter.add(&mut pod, limits, programs)?;
    let bulk = Bulk {
        flows: options.flows,
        seconds: options.seconds,
        congestion: options.cc.clone(),
        ask: Some(measure::ask_pause(options.rate)),
        ..Bulk::default()
    };
    let result = measure::bulk(&pod, &bulk)?;
    // In the order of kubelet: processes first.
    pod.cgroup.kill();
    pod.del()?;
    let elapsed = |verb: &str| limiter.plugin().and_then(|plugin| median_ms(&pod, plugin, verb));
    Ok(Row {
        limiter,
        wire_bits_per_s: result.timeline.steady_rate(),
        first_second_bits_per_s: result.timeline.first_second(),
        retransmits: result.retransmits,
        reply: result.latency,
        add_ms: elapsed("ADD"),
        del_ms: elapsed("DEL"),
    })
}

/// Median time of a plugin's calls, in milliseconds.
fn median_ms(pod: &Pod, plugin: &str, verb: &str) -> Option<f64> {
    let calls = pod.calls.iter().filter(|call| call.plugin() == plugin && call.verb() == verb);
    let mut elapsed: Vec<Duration> = calls.map(|call| call.elapsed).collect();
    elapsed.sort();
    elapsed.get(elapsed.len() / 2).map(|median| median.as_secs_f64() * 1e3)
}

fn show(report: &Report) -> String {
    let Report { limit_bits_per_s, flows, idle, rows } = report;
    let header =
        ["limiter", "on the wire", "of the limit", "first second", "retransmits", "reply p50", "p99", "ADD", "DEL"];
    let rows: Vec<Vec<String>> = rows.iter().map(|row| cells(row, *limit_bits_per_s)).collect();
    format!(
        "{}, {flows} bulk TCP flows from the pod; a small request beside them every {}.\n\
         An idle pod gets its replies in {} (p50), {} (p99).\n\n{}",
        table::limit(*limit_bits_per_s),
        table::millis(measure::ask_pause(*limit_bits_per_s).as_micros() as f64),
        table::millis(idle.p50_us),
        table::millis(idle.p99_us),
        table::markdown(&header, &rows)
    )
}

fn cells(row: &Row, limit: u64) -> Vec<String> {
    let Row { limiter, wire_bits_per_s, first_second_bits_per_s, retransmits, reply, add_ms, del_ms } = row;
    let or_none = |cell: Option<String>| cell.unwrap_or_else(|| table::NONE.to_owned());
    vec![
        limiter.title().to_owned(),
        table::rate(*wire_bits_per_s),
        or_none((*limiter != Limiter::Bare).then(|| table::percent(*wire_bits_per_s, limit))),
        table::rate(*first_second_bits_per_s),
        retransmits.to_string(),
        or_none(reply.as_ref().map(|reply| table::millis(reply.p50_us))),
        or_none(reply.as_ref().map(|reply| table::millis(reply.p99_us))),
        or_none(add_ms.map(|ms| format!("{ms:.1} ms"))),
        or_none(del_ms.map(|ms| format!("{ms:.1} ms"))),
    ]
}
