//! QUIC bulk transfers between a pod and its node, and small requests on another connection beside them. `tests/quic`
//! sends them.

use std::fs;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::apps::directory;
use super::measure::{Ends, Latency, Way, limit, parse};
use super::pod::Pod;
use super::process::Running;
use super::seen::{self, Look, Seen};
use super::{Result, quic_program};

/// The traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct Quic {
    pub way: Way,
    /// Bulk transfers, each with a connection and a socket of its own.
    pub connections: usize,
    pub seconds: f64,
    /// Pause between a reply and the next QUIC request, on a connection of its own.
    pub ask: Option<Duration>,
}

/// One transfer, as its sender knows it.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Transfer {
    pub sent_bytes: u64,
    pub sent_packets: u64,
    pub lost_packets: u64,
    pub congestion_events: u64,
    pub rtt_us: f64,
    pub congestion_window_bytes: u64,
    pub datagram_bytes: u16,
}

/// The result of [`quic`].
#[derive(Clone, Debug, Serialize)]
pub struct QuicResult {
    pub transfers: Vec<Transfer>,
    pub answers: Option<Latency>,
    pub seen: Seen,
}

/// Sends transfers, and requests beside them if wanted.
pub fn quic(pod: &Pod, options: &Quic) -> Result<QuicResult> {
    let Quic { way, connections, seconds, ask } = *options;
    let ends = Ends::new(pod, way, false, None)?.with(quic_program()?);
    let directory = directory()?;
    let certificate = directory.path().join("certificate");
    let (_server, address) = Running::start_server(ends.receiver("serve")?.arg("--certificate").arg(&certificate))?;
    let client = |subcommand: &str, seconds: f64| {
        let mut client = ends.sender(subcommand)?;
        client.args(["--to", &address.to_string(), "--seconds", &seconds.to_string()]);
        client.arg("--certificate").arg(&certificate);
        Ok(client)
    };
    let look = Look { ways: vec![way], seconds, ask: None };
    let ((transfers, answers), seen) = seen::while_doing(pod, &look, || {
        let mut put = client("put", seconds)?;
        put.args(["--connections", &connections.to_string()]).args((!watches_cut_udp()).then_some("--one-by-one"));
        let putting = Running::start(&mut put)?;
        let asking = |pause: Duration| {
            let mut asking = client("ask", seconds - 0.2)?;
            Running::start(asking.args(["--interval-us", &pause.as_micros().to_string()]))
        };
        let asking = ask.map(asking).transpose()?;
        let transfers = parse(putting.json(limit(seconds))?)?;
        let answers = asking.map(|asking| parse(asking.json(limit(seconds))?)).transpose()?;
        Ok((transfers, answers))
    })?;
    Ok(QuicResult { transfers, answers, seen })
}

/// Whether UDP packets that are still to be cut can be watched. Before Linux 6.2 a process that watches an interface
/// gets an error for such packets (`virtio_net_hdr_from_skb`).
fn watches_cut_udp() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(2))
}
