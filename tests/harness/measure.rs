//! Sends traffic between a pod and its node and says what arrived, and how long small replies took meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::host::Host;
use super::pod::Pod;
use super::process::Running;
use super::{Context, Failure, Result, traffic_program};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Keeps the other measurements of this process waiting, for as long as it is held: they would measure each other.
pub fn alone() -> MutexGuard<'static, ()> {
    // A failed test leaves nothing behind that the next one could trip over.
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Beyond the measurement itself: a busy machine starts and ends processes late.
const GRACE: Duration = Duration::from_secs(30);

/// Which way the traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the pod to its node's address: the pod's egress.
    Out,
    /// From the node to the pod: its ingress.
    In,
    /// From the pod to itself, over its loopback.
    Within,
}

/// Bulk TCP flows to measure with.
#[derive(Clone, Debug)]
pub struct Bulk {
    pub way: Way,
    pub flows: usize,
    pub seconds: f64,
    /// Congestion control; the pod's default if none is named.
    pub congestion: Option<String>,
    /// SO_MAX_PACING_RATE of each flow, in bytes per second.
    pub max_pacing_rate: Option<u64>,
    /// The flows tell the kernel so often not to pace them.
    pub unpace_every: Option<Duration>,
    /// Every second flow has segments of so much payload.
    pub small_segments: Option<u32>,
    /// Ask for small replies meanwhile, the same way, with this pause between reply and request: see [`ask_pause`].
    pub ask: Option<Duration>,
    pub ipv6: bool,
    /// An address of the receiving end that is not the one on the pod's first interface.
    pub to: Option<IpAddr>,
}

impl Default for Bulk {
    fn default() -> Self {
        Self {
            way: Way::Out,
            flows: 1,
            seconds: 5.0,
            congestion: None,
            max_pacing_rate: None,
            unpace_every: None,
            small_segments: None,
            ask: None,
            ipv6: false,
            to: None,
        }
    }
}

/// UDP to measure with, in packets of 1428 bytes (1448 with IPv6).
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    pub way: Way,
    /// Bits per second on the wire.
    pub rate: u64,
    pub seconds: f64,
    pub ipv6: bool,
    /// ECN-capable packets.
    pub ecn: bool,
    /// Packets that the kernel gets in one piece and cuts.
    pub at_once: u16,
    /// Every packet from a socket of its own.
    pub fresh_sockets: bool,
    /// The sender's socket has room for 40 ms of its rate. The usual 208 KiB are 11 ms at 100 Mbit/s, which a kernel whose timers are late
    /// by a tick (User Mode Linux) does not fill again in time.
    pub large_buffer: bool,
}

impl Default for Udp {
    fn default() -> Self {
        Self {
            way: Way::Out,
            rate: 0,
            seconds: 5.0,
            ipv6: false,
            ecn: false,
            at_once: 1,
            fresh_sockets: false,
            large_buffer: false,
        }
    }
}

/// What arrived, cumulative; as the sinks of `traffic` report it.
#[derive(Clone, Debug, Deserialize)]
pub struct Timeline {
    pub sample_us: Vec<u64>,
    pub payload_bytes: Vec<u64>,
    /// Layer 3. For TCP everything the receiving namespace got: requests, replies and retransmits are in it.
    pub wire_bytes: Vec<u64>,
    /// Payload of each TCP flow.
    #[serde(default)]
    pub flows: Vec<u64>,
    /// UDP packets that passed the limiter and found no room in the receiver's socket.
    #[serde(default)]
    pub buffer_errors: u64,
    /// UDP packets that came with a congestion mark.
    #[serde(default)]
    pub marked: u64,
}

/// What `traffic ask` reports.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Latency {
    pub count: u64,
    pub p50_us: f64,
    pub p50_of_time_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

/// What [`bulk`] found.
#[derive(Clone, Debug)]
pub struct BulkResult {
    pub timeline: Timeline,
    pub retransmits: u64,
    pub latency: Option<Latency>,
}

/// What [`udp`] found.
#[derive(Clone, Debug)]
pub struct UdpResult {
    pub timeline: Timeline,
    /// Packets the sender's socket took.
    pub sent: u64,
    /// What sendto() refused, by the error's name.
    pub errors: std::collections::BTreeMap<String, u64>,
}

impl Timeline {
    /// Wire bits per second between two times, in seconds since the first byte.
    pub fn wire_rate(&self, from: f64, to: f64) -> f64 {
        self.rate(&self.wire_bytes, from, to)
    }

    pub fn payload_rate(&self, from: f64, to: f64) -> f64 {
        self.rate(&self.payload_bytes, from, to)
    }

    /// Wire bits per second after the first second.
    pub fn steady_rate(&self) -> f64 {
        self.wire_rate(1.0, f64::INFINITY)
    }

    pub fn first_second(&self) -> f64 {
        self.wire_rate(0.0, 1.0)
    }

    /// Taken between the first samples at or after the times asked for, over the time that really lies between them: a late
    /// sample is then no error.
    fn rate(&self, bytes: &[u64], from: f64, to: f64) -> f64 {
        let sample = |seconds: f64| {
            let at = self.sample_us.partition_point(|us| (*us as f64) < seconds * 1e6);
            let at = at.min(self.sample_us.len().saturating_sub(1));
            Some((*self.sample_us.get(at)? as f64, *bytes.get(at)? as f64))
        };
        match (sample(from), sample(to)) {
            (Some((start_us, start)), Some((end_us, end))) if end_us > start_us => {
                (end - start) * 8.0 / ((end_us - start_us) / 1e6)
            }
            _ => 0.0,
        }
    }
}

/// A pause that keeps requests small beside a limit: a millisecond, or what makes them a twentieth of it.
pub fn ask_pause(limit_bits_per_s: u64) -> Duration {
    const REQUEST_WIRE_BITS: u64 = (100 + 52) * 8;
    let twentieth = Duration::from_micros(REQUEST_WIRE_BITS * 1_000_000 / (limit_bits_per_s / 20).max(1));
    twentieth.max(Duration::from_millis(1))
}

/// Small requests, alone on the link.
pub fn ask(pod: &Pod, way: Way, seconds: f64, pause: Duration) -> Result<Latency> {
    let ends = Ends::new(pod, way, false, None)?;
    let (_echo, asking) = ends.start_asking(seconds, pause)?;
    parse(asking.json(limit(seconds))?)
}

/// Bulk flows, and requests beside them if wanted.
pub fn bulk(pod: &Pod, options: &Bulk) -> Result<BulkResult> {
    let ends = Ends::new(pod, options.way, options.ipv6, options.to)?;
    let mut sink = ends.receiver("sink")?;
    sink.args(["--seconds", &options.seconds.to_string(), "--flows", &options.flows.to_string()]);
    let (sink, address) = Running::start_server(&mut sink)?;
    let mut send = ends.sender("send")?;
    // The sink decides when it is over: its clock starts with the first byte.
    let sending = options.seconds + 5.0;
    send.args(["--to", &address.to_string(), "--flows", &options.flows.to_string(), "--seconds", &sending.to_string()]);
    if let Some(name) = &options.congestion {
        send.args(["--cc", name]);
    }
    if let Some(rate) = options.max_pacing_rate {
        send.args(["--max-pacing-rate", &rate.to_string()]);
    }
    if let Some(bytes) = options.small_segments {
        send.args(["--small-segments", &bytes.to_string()]);
    }
    if let Some(pause) = options.unpace_every {
        send.args(["--unpace-every-ms", &pause.as_millis().to_string()]);
    }
    let send = Running::start(&mut send)?;
    // A little shorter, so that no request is sent on a link that has fallen idle.
    let asking = options.ask.map(|pause| ends.start_asking(options.seconds - 0.2, pause)).transpose()?;
    let latency = asking.map(|(_echo, asking)| parse(asking.json(limit(options.seconds))?)).transpose()?;
    let timeline = parse(sink.json(limit(options.seconds))?)?;
    let sent = send.json(limit(options.seconds))?;
    Ok(BulkResult { timeline, retransmits: number(&sent, "retransmits")?, latency })
}

/// UDP at a steady rate.
pub fn udp(pod: &Pod, options: &Udp) -> Result<UdpResult> {
    let Udp { way, rate, seconds, ipv6, ecn, at_once, fresh_sockets, large_buffer } = *options;
    let ends = Ends::new(pod, way, ipv6, None)?;
    let (sink, address) = Running::start_server(ends.receiver("udp-sink")?.args(["--seconds", &seconds.to_string()]))?;
    let mut send = ends.sender("udp-send")?;
    let sending = seconds + 0.2;
    send.args(["--to", &address.to_string(), "--rate", &rate.to_string(), "--seconds", &sending.to_string()]);
    send.args(["--at-once", &at_once.to_string()]).args(ecn.then_some("--ecn"));
    send.args(fresh_sockets.then_some("--fresh-sockets"));
    if large_buffer {
        // The kernel counts what a packet takes in memory, and doubles what it is asked for.
        send.args(["--buffer", &(rate / 8 / 25).to_string()]);
    }
    let send = Running::start(&mut send)?;
    let timeline = parse(sink.json(limit(seconds))?)?;
    let sent = send.json(limit(seconds))?;
    let errors = sent.get("errors").cloned().unwrap_or_default();
    Ok(UdpResult { timeline, sent: number(&sent, "packets")?, errors: parse(errors)? })
}

/// One flow from the pod which the node opened; SO_MAX_PACING_RATE, in bytes per second, was set on the listening socket.
pub fn served(pod: &Pod, max_pacing_rate: u64, seconds: f64) -> Result<Timeline> {
    let ends = Ends::new(pod, Way::In, false, None)?;
    let mut serve = ends.receiver("serve")?;
    serve.args(["--max-pacing-rate", &max_pacing_rate.to_string(), "--seconds", &(seconds + 5.0).to_string()]);
    let (_serve, address) = Running::start_server(&mut serve)?;
    let mut fetch = ends.sender("fetch")?;
    fetch.args(["--from", &address.to_string(), "--seconds", &seconds.to_string()]);
    parse(Running::start(&mut fetch)?.json(limit(seconds))?)
}

/// Wire bytes and packets that the node has received so far, from wherever.
pub fn received(host: &Host) -> Result<(u64, u64)> {
    let report = Running::start(host.command(traffic_program()?).arg("received"))?.json(GRACE)?;
    Ok((number(&report, "wire_bytes")?, number(&report, "packets")?))
}

/// The two ends of a measurement and the receiving one's address.
struct Ends<'a> {
    pod: &'a Pod<'a>,
    way: Way,
    to: IpAddr,
    traffic: std::path::PathBuf,
}

impl<'a> Ends<'a> {
    fn new(pod: &'a Pod, way: Way, ipv6: bool, to: Option<IpAddr>) -> Result<Self> {
        let to = match way {
            _ if to.is_some() => to,
            Way::Within if ipv6 => Some(Ipv6Addr::LOCALHOST.into()),
            Way::Within => Some(Ipv4Addr::LOCALHOST.into()),
            Way::Out if ipv6 => Some(pod.host.gateway_v6()),
            Way::Out => Some(pod.host.gateway_v4()),
            Way::In => pod.addresses().into_iter().find(|address| address.is_ipv6() == ipv6),
        };
        let to = to.ok_or_else(|| Failure::new("a pod without an address: add it to a network first"))?;
        Ok(Self { pod, way, to, traffic: traffic_program()? })
    }

    fn sender(&self, subcommand: &str) -> Result<Command> {
        self.command(self.way != Way::In, subcommand)
    }

    /// A server at a free port of the receiving end.
    fn receiver(&self, subcommand: &str) -> Result<Command> {
        let mut command = self.command(self.way != Way::Out, subcommand)?;
        command.args(["--listen", &SocketAddr::new(self.to, 0).to_string()]);
        Ok(command)
    }

    fn command(&self, in_pod: bool, subcommand: &str) -> Result<Command> {
        let mut command = if in_pod { self.pod.command(&self.traffic)? } else { self.pod.host.command(&self.traffic) };
        command.arg(subcommand);
        Ok(command)
    }

    /// The one that answers has to be kept until the one that asks has ended.
    fn start_asking(&self, seconds: f64, pause: Duration) -> Result<(Running, Running)> {
        let (echo, address) = Running::start_server(&mut self.receiver("echo")?)?;
        let mut ask = self.sender("ask")?;
        ask.args(["--to", &address.to_string(), "--seconds", &seconds.to_string()]);
        ask.args(["--interval-us", &pause.as_micros().to_string()]);
        Ok((echo, Running::start(&mut ask)?))
    }
}

fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds) + GRACE
}

fn parse<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("read a report of traffic")
}

fn number(report: &Value, key: &str) -> Result<u64> {
    report.get(key).and_then(Value::as_u64).ok_or_else(|| Failure::new(format_args!("no {key} in {report}")))
}
