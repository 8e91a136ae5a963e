//! Short connections between a pod and its node: a web server and its clients, in a closed loop, one of them in the
//! pod.

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

/// How long the connection for small requests has been in use when the clients begin.
const ASKED_BEFORE: Duration = Duration::from_millis(300);

/// The clients and their requests.
#[derive(Clone, Debug)]
pub struct Web {
    /// The direction of the data.
    pub way: Way,
    /// The clients are in the pod and the server is outside. If the data goes to the clients they GET, else they
    /// POST.
    pub from_pod: bool,
    pub clients: usize,
    /// Size of a response, or of a posted body.
    pub bytes: usize,
    /// Each client keeps its connection.
    pub keep: bool,
    pub seconds: f64,
    /// Sends small requests meanwhile, on one connection, with this pause between a reply and the next request.
    pub ask: Option<Duration>,
    /// Small requests with a connection for each, like a kubelet probe, with this pause.
    pub probe: Option<Duration>,
    /// The number of bulk flows beside them, in the same direction.
    pub bulk_flows: usize,
    /// The clients are behind a router instead of on the node.
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

/// The report of `traffic web-get`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Responses {
    pub responses: u64,
    /// Requests without a response, by the error's name.
    pub failures: BTreeMap<String, u64>,
    /// Requests without a response at the end, and how long the oldest of them had waited.
    pub unfinished: u64,
    pub longest_unfinished_us: f64,
    /// From connect() to the last byte.
    pub from_connect: Times,
    /// From writing the request to the last byte, as wrk reports it.
    pub from_request: Times,
}

/// The result of [`web`].
#[derive(Clone, Debug, Serialize)]
pub struct WebResult {
    /// Measured in the namespace that receives the data. The wire bytes are all traffic in that direction; the
    /// payload is only the clients'.
    pub timeline: Timeline,
    pub clients: Responses,
    /// Retransmits of the end that sends the data, including answers to SYNs.
    pub retransmits: u64,
    pub latency: Option<Latency>,
    /// Times of the probes, including their connections.
    pub probes: Option<Latency>,
    /// The result of the bulk flows.
    pub bulk: Option<BulkResult>,
}

impl WebResult {
    /// The longest wait of any request, including those without a response.
    pub fn longest_us(&self) -> f64 {
        self.clients.from_connect.max_us.max(self.clients.longest_unfinished_us)
    }
}

/// Clients of a web server, one end in the pod.
pub fn web(pod: &Pod, options: &Web) -> Result<WebResult> {
    let Web { way, from_pod, clients, bytes, keep, seconds, ask, probe, bulk_flows, away } = *options;
    // The clients open the connections, whatever the direction of the data.
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

/// Times of small requests from behind a router, each on a connection of its own and after this pause, while other
/// clients there ask for `per_second` connections a second and complete none of them.
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

/// Gives the clients ports for some hundred thousand connections: ports of the last minute are used again.
fn prepare(clients: &Netns) -> Result<()> {
    let settings = ["-q", "net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"];
    clients.run("sysctl", &settings).map(drop).context("give the clients ports")
}
