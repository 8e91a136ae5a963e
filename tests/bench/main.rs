//! bench: podshaper and the bandwidth plugin over many rates, flows and congestion controls, as Markdown tables.
//!
//! Every row is a fresh pod. A run takes about six minutes; with --quick it takes one and shows whether something is
//! wrong.

#[path = "../harness/mod.rs"]
mod harness;

/// Real servers and their usual clients.
mod apps;
/// Small traffic beside bulk flows.
mod beside;
mod calls;
/// CPU time that limiting costs the machine.
mod cpu;
mod many;
/// Traffic that belongs to no socket of the pod's cgroup.
mod paths;
/// Traffic other than a few long TCP flows.
mod short;

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use clap::{Parser, ValueEnum};

use harness::host::Host;
use harness::limiter::{Limiter, Limits, Programs};
use harness::measure::{self, Bulk, BulkResult, Latency, Udp, UdpResult, Way};
use harness::paths::Path;
use harness::pod::Pod;
use harness::{Context, Failure, Result, check_stop, note, stop_on_signals, stopped, table};

/// The exit status that a shell reports of a program that Ctrl-C ended.
const EXIT_STOPPED: u8 = 130;
/// More than any veth carries: shows the cost of the limiter itself.
const ABOVE_LINK_BITS_PER_S: u64 = 100_000_000_000;

/// Measures podshaper and the bandwidth plugin on throw-away pods
#[derive(Parser)]
#[command(name = "bench")]
struct Options {
    /// Limits to try, in bits per second
    #[arg(long, value_delimiter = ',', value_parser = table::parse_rate, default_value = "1M,10M,100M,1G")]
    rates: Vec<u64>,
    /// Numbers of bulk TCP flows
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    flows: Vec<usize>,
    /// Congestion controls
    #[arg(long, value_delimiter = ',', default_value = "cubic,bbr")]
    cc: Vec<String>,
    /// Which of the limiters
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Limiter::Podshaper, Limiter::Bandwidth])]
    limiters: Vec<Limiter>,
    /// How long each pod sends
    #[arg(long, default_value = "6", value_parser = table::parse_seconds)]
    seconds: f64,
    /// Numbers of clients of a web server
    #[arg(long, value_delimiter = ',', default_value = "8,64")]
    clients: Vec<usize>,
    /// Numbers of pods that are limited already, for --parts many
    #[arg(long, value_delimiter = ',', default_value = "10,500,5000")]
    pods: Vec<usize>,
    /// The clients are in the pod, and the web server is outside
    #[arg(long)]
    from_pod: bool,
    /// Bytes of what they get, or post where that is the way of the limit
    #[arg(long, value_delimiter = ',', default_value = "300,3000,10000,30000,100000")]
    sizes: Vec<usize>,
    /// Which ways, for --parts paths
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Path::value_variants().to_vec())]
    paths: Vec<Path>,
    /// Limit what the pod receives, and send to it
    #[arg(long)]
    ingress: bool,
    /// Which tables
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Tcp, Part::Udp, Part::AboveTheLink, Part::Calls])]
    parts: Vec<Part>,
    /// Make the path this many milliseconds longer (with netem, where the kernel has it), after the pod and before
    /// the node
    #[arg(long, default_value_t = 0)]
    rtt_ms: u32,
    /// Both ends negotiate ECN (net.ipv4.tcp_ecn=1)
    #[arg(long)]
    ecn: bool,
    /// Beside each TCP row the replies of another pod at the same time, which nothing limits and which is idle. What
    /// a pod receives is counted in it; what it sends is counted on the node, where the other pod's requests would be
    /// counted too
    #[arg(long, requires = "ingress")]
    beside: bool,
    /// Fewer and shorter: 10 and 100 Mbit/s, cubic, 3 seconds
    #[arg(long)]
    quick: bool,
    /// The plugin to measure [default: the one built with this program]
    #[arg(long)]
    podshaper: Option<PathBuf>,
}

/// One table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Tcp,
    /// Both directions limited and full at once
    Both,
    Udp,
    AboveTheLink,
    Calls,
    /// ADD, list and memory beside many attachments
    Many,
    /// Clients of a web server, each request on a connection of its own
    Web,
    /// Bulk flows of MPTCP
    Mptcp,
    /// Bulk flows whose receiving end says something meanwhile
    Chatter,
    /// What the machine's CPUs have to do
    Cpu,
    /// nginx, nghttpd, redis and their usual clients
    Apps,
    /// Calls by telephone beside bulk flows, both directions limited
    Voice,
    /// Look-ups of names beside bulk flows, both directions limited
    Dns,
    /// Bulk by QUIC
    Quic,
    /// Short connections beside a bulk flow: who gets what
    Mixed,
    /// What passes a pod's interface by other paths than the sockets of its cgroup
    Paths,
    /// What those sockets notice of that being held
    Own,
}

fn main() -> ExitCode {
    let mut options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    if options.quick {
        options.rates = vec![10_000_000, 100_000_000];
        options.cc = vec!["cubic".into()];
        options.seconds = 3.0;
    }
    match stop_on_signals().and_then(|()| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if stopped() => ExitCode::from(EXIT_STOPPED),
        Err(error) => {
            note(format_args!("bench: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Returns false if a row could not be measured; the other rows are printed nevertheless.
fn run(options: &Options) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::new("it makes network namespaces and loads eBPF programs: run it as root"));
    }
    if options.limiters.contains(&Limiter::Senders) && options.parts != [Part::Tcp] {
        return Err(Failure::new("only bulk TCP paces itself: name --parts tcp with --limiters senders"));
    }
    let programs = Programs::find(options.podshaper.as_deref(), &options.limiters)?;
    let mut complete = true;
    for part in &options.parts {
        let mut table = Table { programs: programs.clone(), rows: vec![], complete: true };
        let (title, header) = match part {
            Part::Tcp => tcp(options, &mut table)?,
            Part::Udp => udp(options, &mut table)?,
            Part::Both => both(options, &mut table)?,
            Part::AboveTheLink => above_the_link(options, &mut table)?,
            Part::Calls => calls::calls(&mut table)?,
            Part::Many => many::many(options, &mut table)?,
            Part::Web => short::web(options, &mut table)?,
            Part::Mptcp => short::mptcp(options, &mut table)?,
            Part::Chatter => short::chatter(options, &mut table)?,
            Part::Cpu => cpu::cpu(options, &mut table)?,
            Part::Apps => apps::apps(options, &mut table)?,
            Part::Voice => beside::voice(options, &mut table)?,
            Part::Dns => beside::dns(options, &mut table)?,
            Part::Quic => beside::quic(options, &mut table)?,
            Part::Mixed => beside::mixed(options, &mut table)?,
            Part::Paths => paths::paths(options, &mut table)?,
            Part::Own => paths::own(options, &mut table)?,
        };
        complete &= table.complete;
        let text = format!("### {title}\n\n{}\n", table::markdown(header, &table.rows));
        table::print(&text).context("print the table")?;
    }
    Ok(complete)
}

struct Table {
    programs: Programs,
    rows: Vec<Vec<String>>,
    complete: bool,
}

impl Table {
    /// Adds a row named by `labels`, with the cells that `measure` returns for a fresh pod.
    fn row(
        &mut self,
        options: &Options,
        labels: &[String],
        limiter: Limiter,
        limits: Limits,
        measure: impl FnOnce(&mut Pod) -> Result<Vec<String>>,
    ) -> Result<()> {
        check_stop()?;
        note(format_args!("{}, {} ..", labels.join(", "), limiter.title()));
        let measured = self.measure(options, limiter, limits, measure);
        // A stop signal shows up as a failure of the running program.
        check_stop()?;
        let cells = measured.unwrap_or_else(|error| {
            note(error);
            self.complete = false;
            vec!["failed".into()]
        });
        self.rows.push([labels, &[limiter.title().to_owned()], &cells].concat());
        Ok(())
    }

    /// Calls `measure` on a fresh, limited pod.
    fn measure<T>(
        &self,
        options: &Options,
        limiter: Limiter,
        limits: Limits,
        measure: impl FnOnce(&mut Pod) -> Result<T>,
    ) -> Result<T> {
        let host = Host::new()?;
        let mut pod = Pod::new(&host, "bench")?;
        limiter.add(&mut pod, limits, &self.programs)?;
        options.lengthen(&pod)?;
        if options.ecn {
            pod.negotiate_ecn()?;
        }
        measure(&mut pod)
    }
}

impl Options {
    fn way(&self) -> Way {
        if self.ingress { Way::In } else { Way::Out }
    }

    /// A limit for the direction that is measured.
    fn limits(&self, limit: u64) -> Limits {
        match self.way() {
            Way::Out => Limits { egress: Some(limit), ingress: None },
            Way::In | Way::Within => Limits { egress: None, ingress: Some(limit) },
        }
    }

    fn towards(&self) -> &'static str {
        if self.ingress { "to the pod" } else { "from the pod" }
    }

    /// The properties of the path, for a title.
    fn path(&self) -> String {
        let rtt = (self.rtt_ms != 0).then(|| format!(", {} ms away", self.rtt_ms));
        rtt.into_iter().chain(self.ecn.then(|| ", with ECN".to_owned())).collect()
    }

    /// `tc qdisc add dev VETH root netem delay` at the node's end: delays packets to the pod, data or
    /// acknowledgements.
    fn lengthen(&self, pod: &Pod) -> Result<()> {
        if self.rtt_ms == 0 {
            return Ok(());
        }
        let veth = pod
            .host
            .netns
            .run("sh", &["-c", "ip -o link show type veth | sed 's/^[0-9]*: \\([^@:]*\\).*/\\1/' | head -1"])?;
        let delay = format!("{}ms", self.rtt_ms);
        let arguments = ["qdisc", "replace", "dev", veth.trim(), "root", "netem", "delay", &delay, "limit", "100000"];
        pod.host.netns.run("tc", &arguments).map(drop)
    }

    fn bulk(&self, flows: usize, congestion: Option<String>, limit: u64) -> Bulk {
        let ask = Some(measure::ask_pause(limit));
        Bulk { way: self.way(), flows, seconds: self.seconds, congestion, ask, ..Bulk::default() }
    }
}

type Title = (String, &'static [&'static str]);

fn tcp(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        let idle = [table::limit(limit), "0".to_owned(), String::new()];
        table.row(options, &idle, Limiter::Bare, options.limits(limit), |pod| {
            let latency = measure::ask(pod, options.way(), options.seconds, measure::ask_pause(limit))?;
            Ok([nothing_on_the_wire(), latency_cells(&latency)].concat())
        })?;
        for flows in options.flows.iter().copied() {
            for congestion in &options.cc {
                let labels = [table::limit(limit), flows.to_string(), congestion.clone()];
                for limiter in options.limiters.iter().copied() {
                    let mut bulk = options.bulk(flows, Some(congestion.clone()), limit);
                    bulk.max_pacing_rate = (limiter == Limiter::Senders).then(|| measure::pacing_rate(limit, flows));
                    let mut beside = None;
                    table.row(options, &labels, limiter, options.limits(limit), |pod| {
                        let measure = || measure::bulk(pod, &bulk);
                        let result = if options.beside {
                            with_idle_pod(options, pod, &mut beside, measure)?
                        } else {
                            measure()?
                        };
                        let seconds = short::spread(&result.timeline.each_second(options.seconds));
                        let jain = format!("{:.3}", result.timeline.jain());
                        Ok([vec![seconds, jain], bulk_cells(&result, Some(limit))].concat())
                    })?;
                    if let Some(latency) = beside {
                        let names = [&labels[..], &["another pod, idle".to_owned()]].concat();
                        table.rows.push([names, nothing_on_the_wire(), latency_cells(&latency)].concat());
                    }
                }
            }
        }
    }
    let title = format!("Bulk TCP {}{}, small requests beside it", options.towards(), options.path());
    Ok((
        title,
        &[
            "limit",
            "flows",
            "",
            "limiter",
            "second by second",
            "Jain's index",
            "on the wire",
            "of the limit",
            "first second",
            "retransmits",
            "reply p50",
            "p99",
        ],
    ))
}

fn nothing_on_the_wire() -> Vec<String> {
    ["-"; 6].map(String::from).to_vec()
}

/// Calls `measure`, and stores in `replies` the times of another pod's replies on the same node meanwhile: the delay
/// that the machine itself causes.
fn with_idle_pod(
    options: &Options,
    pod: &Pod,
    replies: &mut Option<Latency>,
    measure: impl FnOnce() -> Result<BulkResult>,
) -> Result<BulkResult> {
    let mut idle = Pod::new(pod.host, "bench")?;
    Limiter::Bare.add(&mut idle, Limits::default(), &Programs::default())?;
    thread::scope(|scope| {
        let asking = scope.spawn(|| measure::ask(&idle, options.way(), options.seconds, measure::ask_pause(u64::MAX)));
        let result = measure();
        *replies = Some(asking.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        result
    })
}

/// The same number of flows each way. The bytes on the wire of one direction include the acknowledgements of the
/// other direction, as the limit does.
fn both(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for flows in options.flows.iter().copied() {
            for congestion in &options.cc {
                let labels = [table::limit(limit), flows.to_string(), congestion.clone()];
                for limiter in options.limiters.iter().copied() {
                    let limits = Limits { egress: Some(limit), ingress: Some(limit) };
                    table.row(options, &labels, limiter, limits, |pod| {
                        let [sent, received] = both_ways(options, pod, flows, congestion)?;
                        let retransmits = [sent.retransmits.to_string(), received.retransmits.to_string()];
                        let wire = |result: BulkResult| {
                            let rate = result.timeline.steady_rate();
                            [table::rate(rate), table::percent(rate, limit)]
                        };
                        Ok([wire(sent), wire(received), retransmits].concat())
                    })?;
                }
            }
        }
    }
    Ok((
        format!("Bulk TCP from the pod and to it at once{}, both limited", options.path()),
        &[
            "limit",
            "flows each way",
            "",
            "limiter",
            "sent",
            "of the limit",
            "received",
            "of the limit",
            "retransmits of the pod",
            "of the remote",
        ],
    ))
}

fn both_ways(options: &Options, pod: &Pod, flows: usize, congestion: &str) -> Result<[BulkResult; 2]> {
    let run = |way| {
        let congestion = Some(congestion.to_owned());
        measure::bulk(pod, &Bulk { way, flows, congestion, seconds: options.seconds, ..Bulk::default() })
    };
    thread::scope(|scope| {
        let received = scope.spawn(|| run(Way::In));
        let sent = run(Way::Out);
        let received = received.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok([sent?, received?])
    })
}

fn udp(options: &Options, table: &mut Table) -> Result<Title> {
    for limit in options.rates.iter().copied() {
        for limiter in options.limiters.iter().copied() {
            table.row(options, &[table::limit(limit)], limiter, options.limits(limit), |pod| {
                let udp = Udp { way: options.way(), rate: limit * 2, seconds: options.seconds, ..Udp::default() };
                Ok(udp_cells(&measure::udp(pod, &udp)?, limit))
            })?;
        }
    }
    Ok((
        format!("UDP {}{}, offered at twice the limit", options.towards(), options.path()),
        &[
            "limit",
            "limiter",
            "on the wire",
            "of the limit",
            "first second",
            "packets sent",
            "refused by the socket",
            "receiver too slow",
        ],
    ))
}

fn above_the_link(options: &Options, table: &mut Table) -> Result<Title> {
    let limit = ABOVE_LINK_BITS_PER_S;
    for flows in options.flows.iter().copied() {
        for limiter in [Limiter::Bare, Limiter::Podshaper] {
            if limiter == Limiter::Bare || options.limiters.contains(&limiter) {
                let bulk = options.bulk(flows, None, limit);
                table.row(options, &[flows.to_string()], limiter, options.limits(limit), |pod| {
                    Ok(bulk_cells(&measure::bulk(pod, &bulk)?, None))
                })?;
            }
        }
    }
    Ok((
        format!("A limit of {}, above what the link gives", table::limit(limit)),
        &["flows", "limiter", "on the wire", "first second", "retransmits", "reply p50", "p99"],
    ))
}

fn bulk_cells(result: &BulkResult, limit: Option<u64>) -> Vec<String> {
    let steady = result.timeline.steady_rate();
    let mut cells = vec![table::rate(steady)];
    cells.extend(limit.map(|limit| table::percent(steady, limit)));
    cells.push(table::rate(result.timeline.first_second()));
    cells.push(result.retransmits.to_string());
    cells.extend(result.latency.iter().flat_map(latency_cells));
    cells
}

fn latency_cells(latency: &Latency) -> Vec<String> {
    [latency.p50_us, latency.p99_us].map(table::millis).to_vec()
}

fn udp_cells(result: &UdpResult, limit: u64) -> Vec<String> {
    let steady = result.timeline.steady_rate();
    let refused: Vec<String> = result.errors.iter().map(|(name, count)| format!("{count} {name}")).collect();
    vec![
        table::rate(steady),
        table::percent(steady, limit),
        table::rate(result.timeline.first_second()),
        result.sent.to_string(),
        if refused.is_empty() { "0".into() } else { refused.join(", ") },
        result.timeline.buffer_errors.to_string(),
    ]
}
