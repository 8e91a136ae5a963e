//! Watches the traffic at a pod's limiter while something is done: the rate in each second, drops, retransmits, and
//! the time of small requests beside it.

use std::fs;
use std::time::Duration;

use serde::Serialize;

use super::host::BRIDGE;
use super::measure::{self, Asking, Ends, Latency, Timeline, Way, limit, parse};
use super::netns::Netns;
use super::pod::{INTERFACE, Pod};
use super::process::Running;
use super::{Context, Failure, Result, meter};

/// The directions to watch, and how long.
#[derive(Clone, Debug)]
pub struct Look {
    /// The directions whose wire is watched. Small requests go in the first of these directions.
    pub ways: Vec<Way>,
    /// How long to watch, from the first large packet on.
    pub seconds: f64,
    /// Sends small requests meanwhile, on one connection, with this pause between a reply and the next request.
    pub ask: Option<Duration>,
}

/// The results.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// In the order of [`Look::ways`].
    pub wire: Vec<Wire>,
    /// TCP segments that pod and node have sent again.
    pub retransmits: u64,
    /// Packets that podshaper's programs or a queue have dropped.
    pub drops: u64,
    pub asked: Option<Latency>,
}

/// The rate behind a limiter, in bits per second at layer 3.
#[derive(Clone, Debug, Serialize)]
pub struct Wire {
    pub way: Way,
    /// Each second, from the first large packet on.
    pub seconds: Vec<f64>,
    /// The rate in the busiest second after the first, wherever that second begins.
    pub most: f64,
}

/// Watches while `work` runs.
pub fn while_doing<T>(pod: &Pod, look: &Look, work: impl FnOnce() -> Result<T>) -> Result<(T, Seen)> {
    let before = Lost::now(pod)?;
    let watching: Vec<Running> =
        look.ways.iter().map(|way| start_watching(pod, *way, look.seconds)).collect::<Result<_>>()?;
    let way = look.ways.first().copied().unwrap_or(Way::Out);
    let ends = Ends::new(pod, way, false, None)?;
    let asking = |pause| Asking { seconds: look.seconds - 0.2, pause, ..Asking::default() };
    let asking = look.ask.map(|pause| ends.start_asking(&asking(pause))).transpose()?;
    let done = work()?;
    let asked = asking.map(|(_echo, asking)| parse(asking.json(limit(look.seconds))?)).transpose()?;
    let timelines: Vec<Timeline> =
        watching.into_iter().map(|watch| parse(watch.json(limit(look.seconds))?)).collect::<Result<_>>()?;
    let wire = |(way, timeline): (&Way, Timeline)| Wire {
        way: *way,
        seconds: timeline.each_second(look.seconds),
        most: timeline.busiest_second(look.seconds),
    };
    let after = Lost::now(pod)?;
    let seen = Seen {
        wire: look.ways.iter().zip(timelines).map(wire).collect(),
        retransmits: after.retransmits - before.retransmits,
        drops: after.drops - before.drops,
        asked,
    };
    Ok((done, seen))
}

/// Watches behind the limiter.
fn start_watching(pod: &Pod, way: Way, seconds: f64) -> Result<Running> {
    match way {
        Way::Out => measure::start_watching(&pod.host.netns, BRIDGE, seconds),
        Way::In | Way::Within => measure::start_watching(&pod.netns, INTERFACE, seconds),
    }
}

/// Losses since both namespaces exist.
struct Lost {
    retransmits: u64,
    drops: u64,
}

impl Lost {
    fn now(pod: &Pod) -> Result<Self> {
        let namespaces = [&pod.netns, &pod.host.netns];
        let sum = |of: fn(&Netns) -> Result<u64>| namespaces.into_iter().map(of).sum::<Result<u64>>();
        Ok(Self { retransmits: sum(sent_again)?, drops: sum(dropped_by_queues)? + dropped_by_podshaper(pod)? })
    }
}

fn sent_again(netns: &Netns) -> Result<u64> {
    const COUNTERS: &str = "/proc/thread-self/net/snmp";
    let text = netns.inside(|| fs::read_to_string(COUNTERS))?.context(format_args!("read {COUNTERS}"))?;
    let mut rows = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (rows.next().unwrap_or_default(), rows.next().unwrap_or_default());
    let mut columns = names.split(' ').zip(values.split(' '));
    let value = columns.find_map(|(name, value)| (name == "RetransSegs").then(|| value.parse().ok())).flatten();
    value.ok_or_else(|| Failure::new(format_args!("no RetransSegs in {text}")))
}

/// Drops of root qdiscs only, since a root qdisc includes the drops of the qdiscs within it.
fn dropped_by_queues(netns: &Netns) -> Result<u64> {
    let text = netns.run("tc", &["-s", "qdisc", "show"])?;
    let mut lines = text.lines();
    let mut dropped = 0;
    while let Some(line) = lines.next() {
        if line.starts_with("qdisc") && line.contains(" root ") {
            let counters = lines.next().unwrap_or_default();
            let count = counters.split_once("(dropped ").and_then(|(_, rest)| rest.split(',').next());
            let count = count.and_then(|count| count.parse::<u64>().ok());
            dropped += count.ok_or_else(|| Failure::new(format_args!("no count of drops in {counters:?}")))?;
        }
    }
    Ok(dropped)
}

fn dropped_by_podshaper(pod: &Pod) -> Result<u64> {
    if !meter::directory(pod, INTERFACE).exists() {
        return Ok(0);
    }
    let others: u64 = meter::others(pod)?.iter().map(|others| others.drops).sum();
    Ok(meter::egress(pod)?.drops + meter::ingress(pod)?.drops + others)
}
