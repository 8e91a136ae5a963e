//! Short connections between a pod and its node: a web server and its clients, in a closed loop, one of them in the pod.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::measure::{self, Asking, Bulk, BulkResult, Ends, Latency, Timeline, Times, Way, limit, number, parse};
use super::netns::Netns;
use super::pod::Pod;
use super::process::Running;
use super::remote::Remote;
use super::{Context, Failure, Result, traffic_program};

/// How long the connection that asks beside them has been in use when the others begin.
const ASKED_BEFORE: Duration = Duration::from_millis(300);

/// What the clients do.
#[derive(Clone, Debug)]
pub struct Web {
    /// Which way the data goes.
    pub way: Way,
    /// The clients are in the pod and the server outside. Where the data goes to the clients they GET, else they POST.
    pub from_pod: bool,
    pub clients: usize,
    /// Of a response, or of what is posted.
    pub bytes: usize,
    /// Each client keeps its connection.
    pub keep: bool,
    pub seconds: f64,
    /// Ask for small replies meanwhile, on one connection, with this pause between reply and request.
    pub ask: Option<Duration>,
    /// The same with a connection for each request, as a probe of kubelet's has.
    pub probe: Option<Duration>,
    /// So many bulk flows beside them, the same way.
    pub bulk_flows: usize,
    /// The clients are behind a router, and not on the node.
    pub away: bool,
}

impl Default for Web {
    fn default() -> Self {
        Self {
            way: Way::Out,
            from_pod: false,
            clients: 8,
            bytes: 10_000,
            keep: false,
            seconds: 5.0,
            ask: None,
            probe: None,
            bulk_flows: 0,
            away: false,
        }
    }
}

/// What `traffic web-get` reports.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Responses {
    pub responses: u64,
    /// Requests without a response, by the error's name.
    pub failures: BTreeMap<String, u64>,
    /// Requests that had no response yet at the end, and how long the oldest of them had waited.
    pub unfinished: u64,
    pub longest_unfinished_us: f64,
    /// From connect() to the last byte.
    pub from_connect: Times,
    /// From the request written to the last byte, as wrk reports it.
    pub from_request: Times,
}

/// What [`web`] found.
#[derive(Clone, Debug, Serialize)]
pub struct WebResult {
    /// What the namespace received that the data goes to. Its wire bytes are all traffic that way; its payload is the clients' alone.
    pub timeline: Timeline,
    pub clients: Responses,
    /// Of the end that sends the data: answers to SYNs are in it.
    pub retransmits: u64,
    pub latency: Option<Latency>,
    /// Of the probes, with their connections.
    pub probes: Option<Latency>,
    /// What the bulk flows had meanwhile.
    pub bulk: Option<BulkResult>,
}

impl WebResult {
    /// The longest time that anybody waited, with those who had no response yet.
    pub fn longest_us(&self) -> f64 {
        self.clients.from_connect.max_us.max(self.clients.longest_unfinished_us)
    }
}

/// Clients of a web server, one end in the pod.
pub fn web(pod: &Pod, options: &Web) -> Result<WebResult> {
    let Web { way, from_pod, clients, bytes, keep, seconds, ask, probe, bulk_flows, away } = *options;
    // The clients open the connections, whichever way the data goes.
    let ends = Ends::new(pod, if from_pod { Way::Out } else { Way::In }, false, None)?;
    let post = (way == Way::In) != from_pod;
    prepare(if from_pod { &pod.netns } else { &pod.host.netns })?;
    let (server, address) =
        Running::start_server(ends.receiver("web-serve")?.args(["--seconds", &seconds.to_string()]))?;
    let away = away.then(|| Remote::new(pod)).transpose()?;
    let mut get = match &away {
        Some(remote) => {
            let mut get = remote.netns.command(traffic_program()?);
            get.arg("web-get");
            get
        }
        None => ends.sender("web-get")?,
    };
    get.args(["--to", &address.to_string(), "--clients", &clients.to_string(), "--bytes", &bytes.to_string()]);
    get.args(["--seconds", &seconds.to_string()]);
    get.args(keep.then_some("--keep")).args(post.then_some("--post"));
    let mut get = Running::start_ready(&mut get)?;
    let asking = Asking { seconds: seconds - 0.2, uncounted: ASKED_BEFORE.as_secs_f64(), ..Asking::default() };
    let probing = probe.map(|pause| ends.start_asking(&Asking { pause, anew: true, ..asking })).transpose()?;
    let asking = ask.map(|pause| ends.start_asking(&Asking { pause, ..asking })).transpose()?;
    if asking.is_some() {
        thread::sleep(ASKED_BEFORE);
    }
    let (bulk, got) = thread::scope(|scope| {
        let bulk = (bulk_flows > 0).then(|| {
            let bulk = Bulk { way, flows: bulk_flows, seconds, ..Bulk::default() };
            scope.spawn(move || measure::bulk(pod, &bulk))
        });
        get.go_on();
        let got = get.json(limit(seconds));
        let bulk =
            bulk.map(|bulk| bulk.join().map_err(|_| Failure::new("the bulk flows' thread panicked"))?).transpose();
        Ok::<_, Failure>((bulk?, got?))
    })?;
    let served = server.json(limit(seconds))?;
    let answers = |(_echo, asking): (Running, Running)| parse(asking.json(limit(seconds))?);
    let (latency, probes) = (asking.map(answers).transpose()?, probing.map(answers).transpose()?);
    let (receiver, sender) = if post { (&served, &got) } else { (&got, &served) };
    let (timeline, retransmits) = (parse(receiver.clone())?, number(sender, "retransmits")?);
    Ok(WebResult { timeline, retransmits, clients: parse(got)?, latency, probes, bulk })
}

/// What clients behind a router wait for a small reply on a connection of its own, each so long after the one before, while others from there ask for
/// so many connections a second and take none of them.
pub fn ask_beside_knocks(pod: &Pod, per_second: u32, seconds: f64, pause: Duration) -> Result<Latency> {
    let ends = Ends::new(pod, Way::In, false, None)?;
    let (_echo, address) = Running::start_server(&mut ends.receiver("echo")?)?;
    let away = Remote::new(pod)?;
    let start = |arguments: &[&str]| {
        let mut command = away.netns.command(traffic_program()?);
        command.args(arguments).args(["--to", &address.to_string(), "--seconds", &seconds.to_string()]);
        Running::start(&mut command)
    };
    let knocking = start(&["knock", "--per-second", &per_second.to_string()])?;
    let asking = start(&["ask", "--anew", "--interval-us", &pause.as_micros().to_string()])?;
    let latency = parse(asking.json(limit(seconds))?)?;
    knocking.text(limit(seconds))?;
    Ok(latency)
}

/// Ports for some hundred thousand connections: those of the last minute are taken again.
fn prepare(clients: &Netns) -> Result<()> {
    let settings = ["-q", "net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"];
    clients.run("sysctl", &settings).map(drop).context("give the clients ports")
}
