//! Sends traffic between a pod and its node, and reports what arrived and how long small replies took meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::host::{BRIDGE, Host};
use super::netns::Netns;
use super::pod::{INTERFACE, Pod};
use super::process::Running;
use super::remote::Remote;
pub use super::timeline::Timeline;
use super::{Context, Failure, Result, traffic_program};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Keeps other measurements of this process waiting while it is held, since they would disturb each other.
pub fn alone() -> MutexGuard<'static, ()> {
    // A failed test leaves no state here that could affect the next test.
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Additional time beyond the measurement: a busy machine starts and ends processes late.
const GRACE: Duration = Duration::from_secs(30);

/// Which way the traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// From the pod to its node's address: the pod's egress.
    Out,
    /// From the node to the pod: the pod's ingress.
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
    /// Congestion control; the pod's default if `None`.
    pub congestion: Option<String>,
    /// SO_MAX_PACING_RATE of each flow, in bytes per second.
    pub max_pacing_rate: Option<u64>,
    /// SO_MARK of each flow.
    pub mark: Option<u32>,
    /// The flows tell the kernel at this interval not to pace them.
    pub unpace_every: Option<Duration>,
    /// Every second flow has segments with this much payload.
    pub small_segments: Option<u32>,
    /// Every message of this many bytes is a segment of its own.
    pub message_bytes: Option<usize>,
    /// TCP_WINDOW_CLAMP of each flow at the receiving end, which must have the same value at the end.
    pub window_clamp: Option<u32>,
    /// SO_RCVBUF of each flow.
    pub receive_buffer: Option<usize>,
    /// The time, in seconds from the first byte, in which nothing is written to the flows.
    pub silence: Option<[f64; 2]>,
    /// Messages that the receiving end sends on each flow meanwhile.
    pub chatter: Option<Chatter>,
    /// Flows, requests and replies use MPTCP.
    pub mptcp: bool,
    /// Sends small requests in the same direction meanwhile, with this pause between a reply and the next request:
    /// see [`ask_pause`].
    pub ask: Option<Duration>,
    pub ipv6: bool,
    /// An address of the receiving end other than that of the pod's first interface.
    pub to: Option<IpAddr>,
    /// The address by which the sending end reaches the receiving end, where addresses are translated.
    pub by: Option<IpAddr>,
}

impl Default for Bulk {
    fn default() -> Self {
        Self {
            way: Way::Out,
            flows: 1,
            seconds: 5.0,
            congestion: None,
            max_pacing_rate: None,
            mark: None,
            unpace_every: None,
            small_segments: None,
            message_bytes: None,
            window_clamp: None,
            receive_buffer: None,
            silence: None,
            chatter: None,
            mptcp: false,
            ask: None,
            ipv6: false,
            to: None,
            by: None,
        }
    }
}

/// Small messages against the stream of a bulk flow, on its connection.
#[derive(Clone, Copy, Debug)]
pub struct Chatter {
    pub bytes: usize,
    pub every: Duration,
}

/// UDP to measure with, in packets of 1428 bytes (1448 with IPv6).
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    pub way: Way,
    /// Bits per second on the wire.
    pub rate: u64,
    pub seconds: f64,
    pub ipv6: bool,
    /// As in [`Bulk`].
    pub to: Option<IpAddr>,
    pub by: Option<IpAddr>,
    /// ECN-capable packets.
    pub ecn: bool,
    /// The number of packets that the kernel gets in one piece and cuts (UDP_SEGMENT).
    pub at_once: u16,
    /// Payload of a packet, in bytes. A larger payload than fits into a packet is sent in fragments.
    pub size: usize,
    /// Every packet from a socket of its own.
    pub fresh_sockets: bool,
    /// SO_MARK of the sender's socket.
    pub mark: Option<u32>,
    /// The sender's socket has room for 40 ms of its rate. The usual 208 KiB are 11 ms at 100 Mbit/s. A kernel whose
    /// timers are late by a tick (User Mode Linux) does not refill such a buffer in time.
    pub large_buffer: bool,
}

impl Default for Udp {
    fn default() -> Self {
        Self {
            way: Way::Out,
            rate: 0,
            seconds: 5.0,
            ipv6: false,
            to: None,
            by: None,
            ecn: false,
            at_once: 1,
            size: 1400,
            fresh_sockets: false,
            mark: None,
            large_buffer: false,
        }
    }
}

/// The report of `traffic ask`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Latency {
    pub count: u64,
    /// Datagrams that were not answered in time.
    #[serde(default)]
    pub lost: u64,
    pub p50_us: f64,
    pub p50_of_time_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    /// The percentiles from 0 to 100.
    pub percentiles_us: Vec<f64>,
}

/// Percentiles of times.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Times {
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

/// The result of [`bulk`].
#[derive(Clone, Debug, Serialize)]
pub struct BulkResult {
    pub timeline: Timeline,
    pub retransmits: u64,
    pub latency: Option<Latency>,
    /// How late the chatter was, if its messages have room for a time (8 bytes).
    pub chatter: Option<Times>,
}

/// The result of [`udp`].
#[derive(Clone, Debug, Serialize)]
pub struct UdpResult {
    pub timeline: Timeline,
    /// Packets that the sender's socket accepted.
    pub sent: u64,
    /// Errors of sendto(), by name.
    pub errors: std::collections::BTreeMap<String, u64>,
    /// Packets that QUIC would take for lost, since enough later packets have overtaken them.
    pub overtaken: u64,
}

/// The size of a request of 100 bytes on the wire.
pub const REQUEST_WIRE_BITS: u64 = (100 + 52) * 8;

/// A pause with which requests are small beside a limit: a millisecond, or longer where requests would take more than
/// a twentieth of the limit.
pub fn ask_pause(limit_bits_per_s: u64) -> Duration {
    let twentieth = Duration::from_micros(REQUEST_WIRE_BITS * 1_000_000 / (limit_bits_per_s / 20).max(1));
    twentieth.max(Duration::from_millis(1))
}

/// The pacing rate of a flow, in bytes per second, with which all flows together have the limit on the wire. TCP
/// paces payload (`tcp_update_skb_after_send`): 1448 bytes in a packet of 1500.
pub fn pacing_rate(limit: u64, flows: usize) -> u64 {
    limit / 8 / flows as u64 * 1448 / 1500
}

/// Small requests without other traffic on the link.
pub fn ask(pod: &Pod, way: Way, seconds: f64, pause: Duration) -> Result<Latency> {
    let ends = Ends::new(pod, way, false, None)?;
    let (_echo, asking) = ends.start_asking(&Asking { seconds, pause, ..Asking::default() })?;
    parse(asking.json(limit(seconds))?)
}

/// Bulk flows, and small requests beside them if wanted.
pub fn bulk(pod: &Pod, options: &Bulk) -> Result<BulkResult> {
    let ends = Ends { by: options.by, ..Ends::new(pod, options.way, options.ipv6, options.to)? };
    let mut sink = ends.receiver("sink")?;
    let mptcp = options.mptcp.then_some("--mptcp");
    sink.args(["--seconds", &options.seconds.to_string(), "--flows", &options.flows.to_string()]).args(mptcp);
    if let Some(bytes) = options.window_clamp {
        sink.args(["--window-clamp", &bytes.to_string()]);
    }
    if let Some(bytes) = options.receive_buffer {
        sink.args(["--buffer", &bytes.to_string()]);
    }
    if let Some(Chatter { bytes, every }) = options.chatter {
        sink.args(["--chatter-bytes", &bytes.to_string(), "--chatter-us", &every.as_micros().to_string()]);
    }
    let (sink, address) = Running::start_server(&mut sink)?;
    let mut send = ends.sender("send")?;
    // The sink ends the measurement: its clock starts with the first byte.
    let sending = options.seconds + 5.0;
    send.args(["--to", &ends.reach(address), "--flows", &options.flows.to_string(), "--seconds", &sending.to_string()]);
    if let Some(name) = &options.congestion {
        send.args(["--cc", name]);
    }
    if let Some(rate) = options.max_pacing_rate {
        send.args(["--max-pacing-rate", &rate.to_string()]);
    }
    if let Some(mark) = options.mark {
        send.args(["--mark", &mark.to_string()]);
    }
    if let Some(bytes) = options.small_segments {
        send.args(["--small-segments", &bytes.to_string()]);
    }
    if let Some(bytes) = options.message_bytes {
        send.args(["--message-bytes", &bytes.to_string()]);
    }
    if let Some([from, to]) = options.silence {
        send.args(["--silent-after", &from.to_string(), "--silent-for", &(to - from).to_string()]);
    }
    if let Some(chatter) = options.chatter {
        send.args(["--chatter-bytes", &chatter.bytes.to_string()]);
    }
    if let Some(pause) = options.unpace_every {
        send.args(["--unpace-every-ms", &pause.as_millis().to_string()]);
    }
    let send = Running::start(send.args(mptcp))?;
    // A little shorter, so that no request is sent after the flows have ended.
    let asking = |pause| Asking { seconds: options.seconds - 0.2, pause, mptcp: options.mptcp, ..Asking::default() };
    let asking = options.ask.map(|pause| ends.start_asking(&asking(pause))).transpose()?;
    let latency = asking.map(|(_echo, asking)| parse(asking.json(limit(options.seconds))?)).transpose()?;
    let timeline = parse(sink.json(limit(options.seconds))?)?;
    let sent = send.json(limit(options.seconds))?;
    let chatter = parse(sent.get("chatter").cloned().unwrap_or_default())?;
    Ok(BulkResult { timeline, retransmits: number(&sent, "retransmits")?, latency, chatter })
}

/// One flow from each of the pods to their node, all at once. The timeline is measured on the node.
pub fn together(pods: &[Pod], seconds: f64) -> Result<Timeline> {
    let first = pods.first().ok_or_else(|| Failure::new("no pods to send"))?;
    let mut sink = Ends::new(first, Way::Out, false, None)?.receiver("sink")?;
    sink.args(["--seconds", &seconds.to_string(), "--flows", &pods.len().to_string()]);
    let (sink, address) = Running::start_server(&mut sink)?;
    let start = |pod| -> Result<Running> {
        let mut send = Ends::new(pod, Way::Out, false, None)?.sender("send")?;
        Running::start(send.args([
            "--to",
            &address.to_string(),
            "--seconds",
            &(seconds + GRACE.as_secs_f64()).to_string(),
        ]))
    };
    let _sending: Vec<Running> = pods.iter().map(start).collect::<Result<_>>()?;
    parse(sink.json(limit(seconds))?)
}

/// Bulk flows that go on until the returned processes are dropped.
pub fn load(pod: &Pod, way: Way, flows: usize) -> Result<[Running; 2]> {
    const LONG: &str = "600";
    let ends = Ends::new(pod, way, false, None)?;
    let (sink, address) = Running::start_server(ends.receiver("sink")?.args(["--seconds", LONG]))?;
    let mut send = ends.sender("send")?;
    send.args(["--to", &address.to_string(), "--flows", &flows.to_string(), "--seconds", LONG]);
    Ok([Running::start(&mut send)?, sink])
}

/// UDP at a steady rate.
pub fn udp(pod: &Pod, options: &Udp) -> Result<UdpResult> {
    let Udp { way, rate, seconds, ipv6, to, by, ecn, at_once, size, fresh_sockets, mark, large_buffer } = *options;
    let ends = Ends { by, ..Ends::new(pod, way, ipv6, to)? };
    let (sink, address) = Running::start_server(ends.receiver("udp-sink")?.args(["--seconds", &seconds.to_string()]))?;
    let mut send = ends.sender("udp-send")?;
    let sending = seconds + 0.2;
    send.args(["--to", &ends.reach(address), "--rate", &rate.to_string(), "--seconds", &sending.to_string()]);
    send.args(["--at-once", &at_once.to_string(), "--size", &size.to_string()]).args(ecn.then_some("--ecn"));
    send.args(fresh_sockets.then_some("--fresh-sockets"));
    if let Some(mark) = mark {
        send.args(["--mark", &mark.to_string()]);
    }
    if large_buffer {
        // The kernel counts the memory of a packet, and doubles the requested size.
        send.args(["--buffer", &(rate / 8 / 25).to_string()]);
    }
    let send = Running::start(&mut send)?;
    let received = sink.json(limit(seconds))?;
    let overtaken = number(&received, "overtaken")?;
    let sent = send.json(limit(seconds))?;
    let errors = sent.get("errors").cloned().unwrap_or_default();
    Ok(UdpResult { timeline: parse(received)?, sent: number(&sent, "packets")?, errors: parse(errors)?, overtaken })
}

/// The socket by which frames are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramesBy {
    /// AF_PACKET.
    Packet,
    /// AF_PACKET with PACKET_QDISC_BYPASS.
    PacketPastTheQueue,
    /// AF_XDP in generic mode.
    Xdp,
}

/// UDP in frames that the pod builds itself, to the node's bridge, as fast as the socket takes them.
pub fn frames(pod: &Pod, by: FramesBy, seconds: f64) -> Result<()> {
    let ends = Ends::new(pod, Way::Out, false, None)?;
    let (sink, address) = Running::start_server(ends.receiver("udp-sink")?.args(["--seconds", &seconds.to_string()]))?;
    let (from, to) = (Link::of(&pod.netns, INTERFACE)?, Link::of(&pod.host.netns, BRIDGE)?);
    let mut send = ends.sender("frames")?;
    from.send(&mut send, &pod_address(pod), &address, &to, seconds);
    send.args(match by {
        FramesBy::Packet => None,
        FramesBy::PacketPastTheQueue => Some("--bypass"),
        FramesBy::Xdp => Some("--xdp"),
    });
    let send = Running::start(&mut send)?;
    sink.json(limit(seconds))?;
    send.json(limit(seconds)).map(drop)
}

/// Segments from the node for a connection with the pod that never opens, as fast as the socket takes them.
pub fn segments_of_a_request(pod: &Pod, seconds: f64) -> Result<()> {
    let ends = Ends::new(pod, Way::In, false, None)?;
    let (_echo, address) = Running::start_server(&mut ends.receiver("echo")?)?;
    // Otherwise the node would reset a connection that it does not know.
    pod.host.netns.run("iptables", &["-w", "-A", "INPUT", "-p", "tcp", "-j", "DROP"])?;
    let (from, to) = (Link::of(&pod.host.netns, BRIDGE)?, Link::of(&pod.netns, INTERFACE)?);
    let mut send = ends.sender("frames")?;
    from.send(&mut send, &pod.host.gateway_v4().to_string(), &address, &to, seconds);
    Running::start(send.arg("--opening"))?.json(limit(seconds)).map(drop)
}

/// An interface, as senders of frames need it.
struct Link {
    ifindex: String,
    hardware_address: String,
}

impl Link {
    fn of(netns: &Netns, name: &str) -> Result<Self> {
        let shown = netns.run("ip", &["-o", "link", "show", name])?;
        let hardware_address = shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        Ok(Self {
            ifindex: shown.split(':').next().unwrap_or_default().to_owned(),
            hardware_address: hardware_address.unwrap_or_default().to_owned(),
        })
    }

    /// Adds the arguments of `traffic frames` that name both ends.
    fn send(&self, command: &mut Command, from: &str, to: &SocketAddr, next_hop: &Self, seconds: f64) {
        command.args(["--to", &to.to_string(), "--from", from, "--ifindex", &self.ifindex]);
        command.args(["--next-hop", &next_hop.hardware_address, "--seconds", &(seconds + 0.2).to_string()]);
    }
}

fn pod_address(pod: &Pod) -> String {
    pod.addresses().first().map(ToString::to_string).unwrap_or_default()
}

/// Large pings from the node, as many at once as fit into a backlog. The pod's kernel itself sends the answers.
pub fn pings(pod: &Pod, seconds: f64) -> Result<()> {
    let to = pod_address(pod);
    let mut ping = pod.host.command("ping");
    ping.args(["-q", "-f", "-s", "1400", "-l", "60", "-w", &(seconds.ceil() as u64 + 1).to_string(), &to]);
    // Its exit status reports that some were lost.
    let pinging = Running::start(&mut ping)?;
    thread::sleep(Duration::from_secs_f64(seconds));
    drop(pinging);
    Ok(())
}

/// The bytes that an interface receives at layer 3 while `send` runs.
pub fn watched(netns: &Netns, interface: &str, seconds: f64, send: impl FnOnce() -> Result<()>) -> Result<Timeline> {
    let watching = start_watching(netns, interface, seconds)?;
    send()?;
    parse(watching.json(limit(seconds))?)
}

/// Watches an interface for this long from the first large packet on.
pub(super) fn start_watching(netns: &Netns, interface: &str, seconds: f64) -> Result<Running> {
    let mut watch = netns.command(traffic_program()?);
    watch.args(["watch", "--interface", interface, "--seconds", &seconds.to_string()]);
    match Running::start_until_it_says(&mut watch)? {
        (watching, line) if line == "watching" => Ok(watching),
        (_, line) => Err(Failure::new(line)),
    }
}

/// One flow from the pod that the node opened. SO_MAX_PACING_RATE, in bytes per second, was set on the listening
/// socket.
pub fn served(pod: &Pod, max_pacing_rate: u64, seconds: f64) -> Result<Timeline> {
    let ends = Ends::new(pod, Way::In, false, None)?;
    let mut serve = ends.receiver("serve")?;
    serve.args(["--max-pacing-rate", &max_pacing_rate.to_string(), "--seconds", &(seconds + 5.0).to_string()]);
    let (_serve, address) = Running::start_server(&mut serve)?;
    let mut fetch = ends.sender("fetch")?;
    fetch.args(["--from", &address.to_string(), "--seconds", &seconds.to_string()]);
    parse(Running::start(&mut fetch)?.json(limit(seconds))?)
}

/// The receive window, in bytes, that the pod has given to the other end of a connection on which nothing was sent
/// yet.
pub fn first_window(pod: &Pod, way: Way) -> Result<u64> {
    const LONG: &str = "60";
    let ends = Ends::new(pod, way, false, None)?;
    let (_sink, address) = Running::start_server(ends.receiver("sink")?.args(["--seconds", "1"]))?;
    let mut send = ends.sender("send")?;
    send.args(["--to", &address.to_string(), "--seconds", LONG, "--silent-after", "0", "--silent-for", LONG]);
    let _send = Running::start(&mut send)?;
    // The socket of the other end knows the window.
    let (netns, port) = match way {
        Way::Out => (&pod.host.netns, "sport"),
        Way::In => (&pod.host.netns, "dport"),
        Way::Within => (&pod.netns, "dport"),
    };
    let filter = format!("{port} = :{}", address.port());
    let until = Instant::now() + GRACE;
    while Instant::now() < until {
        let text = netns.run("ss", &["-Htni", "state", "established", &filter])?;
        let window = text.split_whitespace().find_map(|word| word.strip_prefix("snd_wnd:"));
        if let Some(window) = window {
            return window.parse().context(format_args!("read the window in {text}"));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(Failure::new("ss shows no window of a connection"))
}

/// How long the pod takes to send a packet that is to depart after this time (SO_TXTIME), or at once.
pub fn departs(pod: &Pod, after: Option<Duration>) -> Result<Duration> {
    let gateway = pod.host.gateway_v4();
    let socket = pod.host.netns.inside(|| UdpSocket::bind((gateway, 0)))?.context("receive UDP at the node")?;
    socket.set_read_timeout(Some(GRACE)).context("wait for a packet")?;
    let address = socket.local_addr().context("receive UDP at the node")?;
    let mut send = Ends::new(pod, Way::Out, false, None)?.sender("udp-send")?;
    send.args(["--to", &address.to_string(), "--rate", "100000", "--seconds", "0.05"]);
    if let Some(after) = after {
        send.args(["--depart-after-ms", &after.as_millis().to_string()]);
    }
    let start = Instant::now();
    let _send = Running::start(&mut send)?;
    socket.recv(&mut [0]).context("wait for a packet")?;
    Ok(start.elapsed())
}

/// Wire bytes and packets that the node has received so far, from any sender.
pub fn received(host: &Host) -> Result<(u64, u64)> {
    let report = Running::start(host.command(traffic_program()?).arg("received"))?.json(GRACE)?;
    Ok((number(&report, "wire_bytes")?, number(&report, "packets")?))
}

/// Requests and replies on one connection.
#[derive(Clone, Copy, Default)]
pub(super) struct Asking {
    /// How long replies are counted.
    pub seconds: f64,
    /// How long the connection is in use before that.
    pub uncounted: f64,
    pub pause: Duration,
    pub mptcp: bool,
    /// Each request on a connection of its own.
    pub anew: bool,
    /// Each request is a datagram from a socket of its own.
    pub datagrams: bool,
}

/// The two ends of a measurement, and the address of the receiving end.
pub(super) struct Ends<'a> {
    pod: &'a Pod<'a>,
    way: Way,
    to: IpAddr,
    by: Option<IpAddr>,
    program: PathBuf,
}

impl<'a> Ends<'a> {
    pub(super) fn new(pod: &'a Pod, way: Way, ipv6: bool, to: Option<IpAddr>) -> Result<Self> {
        let to = match way {
            _ if to.is_some() => to,
            Way::Within if ipv6 => Some(Ipv6Addr::LOCALHOST.into()),
            Way::Within => Some(Ipv4Addr::LOCALHOST.into()),
            Way::Out if ipv6 => Some(pod.host.gateway_v6()),
            Way::Out => Some(pod.remote.as_ref().map_or(pod.host.gateway_v4(), Remote::address)),
            Way::In => pod.addresses().into_iter().find(|address| address.is_ipv6() == ipv6),
        };
        let to = to.ok_or_else(|| Failure::new("a pod without an address: add it to a network first"))?;
        Ok(Self { pod, way, to, by: None, program: traffic_program()? })
    }

    /// The same ends, with another program than `traffic`.
    pub(super) fn with(self, program: PathBuf) -> Self {
        Self { program, ..self }
    }

    /// The address by which the sender reaches a server at the receiving end.
    fn reach(&self, server: SocketAddr) -> String {
        SocketAddr::new(self.by.unwrap_or(server.ip()), server.port()).to_string()
    }

    pub(super) fn sender(&self, subcommand: &str) -> Result<Command> {
        self.command(self.way != Way::In, subcommand)
    }

    /// A server at a free port of the receiving end.
    pub(super) fn receiver(&self, subcommand: &str) -> Result<Command> {
        let mut command = self.command(self.way != Way::Out, subcommand)?;
        command.args(["--listen", &SocketAddr::new(self.to, 0).to_string()]);
        Ok(command)
    }

    fn command(&self, in_pod: bool, subcommand: &str) -> Result<Command> {
        let mut command = if in_pod { self.pod.command(&self.program)? } else { self.pod.other_end(&self.program) };
        command.arg(subcommand);
        Ok(command)
    }

    /// Starts the answering and the asking program. Keep the answering one until the asking one has ended.
    pub(super) fn start_asking(&self, asking: &Asking) -> Result<(Running, Running)> {
        let Asking { seconds, uncounted, pause, mptcp, anew, datagrams } = asking;
        let (mptcp, datagrams) = (mptcp.then_some("--mptcp"), datagrams.then_some("--datagrams"));
        let (echo, address) = Running::start_server(self.receiver("echo")?.args(mptcp).args(datagrams))?;
        let mut ask = self.sender("ask")?;
        ask.args(["--to", &self.reach(address), "--seconds", &(seconds + uncounted).to_string()]).args(mptcp);
        ask.args(anew.then_some("--anew")).args(datagrams);
        ask.args(["--interval-us", &pause.as_micros().to_string(), "--uncounted", &uncounted.to_string()]);
        Ok((echo, Running::start(&mut ask)?))
    }
}

pub(super) fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds) + GRACE
}

pub(super) fn parse<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("read a report of traffic")
}

pub(super) fn number(report: &Value, key: &str) -> Result<u64> {
    report.get(key).and_then(Value::as_u64).ok_or_else(|| Failure::new(format_args!("no {key} in {report}")))
}
