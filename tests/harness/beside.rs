//! Small traffic beside bulk flows, which must not delay it: telephone calls, and DNS look-ups.

use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Result;
use super::measure::{self, Asking, Ends, Latency, Times, Way, limit, parse};
use super::pod::Pod;
use super::process::Running;
use super::seen::{self, Look, Seen};

/// How long the bulk flows run before the measurement.
const SETTLED: Duration = Duration::from_secs(1);

/// Bulk flows from the pod and to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flows {
    pub out: usize,
    pub into: usize,
}

/// Calls, of two streams each.
#[derive(Clone, Copy, Debug)]
pub struct Calls {
    /// Out: the pod calls, with a socket for each call. In: the pod answers, with one socket for all calls.
    pub way: Way,
    pub calls: usize,
    pub beside: Flows,
    pub seconds: f64,
}

/// The packets that one end has sent and heard, as `traffic` reports them.
#[derive(Clone, Copy, Debug, Deserialize)]
struct End {
    sent: u64,
    received: u64,
    delay: Times,
    jitter_us: f64,
    most_jitter_us: f64,
}

/// All streams of one direction.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Streams {
    pub sent: u64,
    pub lost: u64,
    /// The delay of one direction.
    pub delay: Times,
    /// Jitter according to RFC 3550: its mean, and its maximum on any call.
    pub jitter_us: f64,
    pub most_jitter_us: f64,
}

/// The result of [`calls`].
#[derive(Clone, Debug, Serialize)]
pub struct CallsResult {
    pub out: Streams,
    pub into: Streams,
    pub seen: Seen,
}

/// Measures calls beside bulk flows.
pub fn calls(pod: &Pod, options: &Calls) -> Result<CallsResult> {
    let Calls { way, calls, beside, seconds } = *options;
    let ends = Ends::new(pod, way, false, None)?;
    let ((called, answered), seen) = beside_flows(pod, beside, way, seconds, || {
        let mut answer = ends.receiver("voice-answer")?;
        let (answering, address) = Running::start_server(answer.args(["--seconds", &seconds.to_string()]))?;
        let mut call = ends.sender("voice-call")?;
        call.args(["--to", &address.to_string(), "--seconds", &seconds.to_string(), "--calls", &calls.to_string()]);
        let called: End = parse(Running::start(&mut call)?.json(limit(seconds))?)?;
        Ok((called, parse::<End>(answering.json(limit(seconds))?)?))
    })?;
    let (pods, nodes) = if way == Way::Out { (called, answered) } else { (answered, called) };
    Ok(CallsResult { out: streams(pods, nodes), into: streams(nodes, pods), seen })
}

fn streams(from: End, to: End) -> Streams {
    Streams {
        sent: from.sent,
        lost: from.sent.saturating_sub(to.received),
        delay: to.delay,
        jitter_us: to.jitter_us,
        most_jitter_us: to.most_jitter_us,
    }
}

/// Names that are looked up one after the other, each with a datagram from a socket of its own.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Out: the pod asks. In: the pod answers.
    pub way: Way,
    pub pause: Duration,
    pub beside: Flows,
    pub seconds: f64,
}

/// The result of [`names`].
#[derive(Clone, Debug, Serialize)]
pub struct NamesResult {
    /// A resolver waits five seconds for an answer, then asks once more.
    pub answers: Latency,
    pub seen: Seen,
}

/// Measures look-ups of names beside bulk flows.
pub fn names(pod: &Pod, options: &Names) -> Result<NamesResult> {
    let Names { way, pause, beside, seconds } = *options;
    let ends = Ends::new(pod, way, false, None)?;
    let (answers, seen) = beside_flows(pod, beside, way, seconds, || {
        let asking = Asking { seconds, pause, datagrams: true, ..Asking::default() };
        let (_resolver, asking) = ends.start_asking(&asking)?;
        parse(asking.json(limit(seconds))?)
    })?;
    Ok(NamesResult { answers, seen })
}

/// Watches the directions that have flows, or `way` if none has.
fn beside_flows<T>(
    pod: &Pod,
    flows: Flows,
    way: Way,
    seconds: f64,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Seen)> {
    let loads = [(Way::Out, flows.out), (Way::In, flows.into)];
    let loads: Vec<_> = loads.into_iter().filter(|(_, flows)| *flows > 0).collect();
    let _flows: Vec<_> = loads.iter().map(|(way, flows)| measure::load(pod, *way, *flows)).collect::<Result<_>>()?;
    thread::sleep(SETTLED);
    let ways = if loads.is_empty() { vec![way] } else { loads.iter().map(|(way, _)| *way).collect() };
    seen::while_doing(pod, &Look { ways, seconds, ask: None }, work)
}
