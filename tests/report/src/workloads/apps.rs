use std::time::Duration;

use serde_json::json;

use super::bulk::replies_of;
use super::{Workload, limits, towards};
use crate::harness::apps::{self, App, Http, Http2, Redis};
use crate::harness::beside::{self, Calls, Flows, Names};
use crate::harness::measure::Way;
use crate::harness::quic::{self, Quic};
use crate::harness::seen::Seen;
use crate::record::Found;

/// Size of a response.
const BYTES: usize = 10_000;
const CLIENTS: usize = 16;

/// Bulk flows in the same direction, beside traffic that they must not delay.
fn flows(way: Way) -> Flows {
    match way {
        Way::In => Flows { out: 0, into: 4 },
        Way::Out | Way::Within => Flows { out: 4, into: 0 },
    }
}

/// Telephone calls beside bulk flows.
pub fn voice(way: Way, limit: u64, seconds: f64) -> Workload {
    let calls = Calls { way, calls: 4, beside: flows(way), seconds };
    let parameters = json!({ "direction": towards(way), "limit": limit });
    Workload::of_pod("voice", parameters, limits(way, limit), seconds + 1.0, move |pod, _| {
        let result = beside::calls(pod, &calls)?;
        let mut found = Found::default();
        let sent = if way == Way::In { result.into } else { result.out };
        found.put("lost_percent", sent.lost as f64 / sent.sent.max(1) as f64 * 100.0);
        found.put("delay_p50_ms", sent.delay.p50_us / 1e3);
        found.put("delay_p99_ms", sent.delay.p99_us / 1e3);
        found.put("jitter_ms", sent.jitter_us / 1e3);
        wire(&mut found, &result.seen, limit);
        Ok(found)
    })
}

/// DNS look-ups beside bulk flows.
pub fn names(way: Way, limit: u64, seconds: f64) -> Workload {
    let names = Names { way, pause: Duration::from_millis(5), beside: flows(way), seconds };
    let parameters = json!({ "direction": towards(way), "limit": limit });
    Workload::of_pod("names", parameters, limits(way, limit), seconds + 1.0, move |pod, _| {
        let result = beside::names(pod, &names)?;
        let mut found = Found::default();
        found.put("lost", result.answers.lost as f64);
        replies_of(&mut found, &result.answers);
        wire(&mut found, &result.seen, limit);
        Ok(found)
    })
}

/// Bulk transfers by QUIC, and requests by QUIC beside them.
pub fn by_quic(way: Way, limit: u64, seconds: f64) -> Workload {
    let quic = Quic { way, connections: 4, seconds, ask: Some(Duration::from_millis(2)) };
    let parameters = json!({ "direction": towards(way), "limit": limit });
    Workload::of_pod("quic", parameters, limits(way, limit), seconds, move |pod, _| {
        let result = quic::quic(pod, &quic)?;
        let mut found = Found::default();
        let sum = |number: fn(&quic::Transfer) -> u64| result.transfers.iter().map(number).sum::<u64>() as f64;
        let lost = sum(|transfer| transfer.lost_packets) / sum(|transfer| transfer.sent_packets).max(1.0);
        found.put("lost_percent", lost * 100.0);
        result.answers.iter().for_each(|answers| replies_of(&mut found, answers));
        wire(&mut found, &result.seen, limit);
        Ok(found)
    })
}

/// Servers in the pod and their usual clients. Out: the clients get. In: the clients post and set.
pub fn servers(way: Way, limit: u64, seconds: f64) -> Vec<Workload> {
    let ask = Some(Duration::from_millis(2));
    let http = move |keep| Http { way, clients: CLIENTS, bytes: BYTES, keep, seconds, ask };
    let http2 = Http2 { way, clients: 4, streams: 10, bytes: BYTES, seconds, ask };
    // It measures twice for half of the time, SET and GET. Before that it finds out how many requests take that long.
    let redis = Redis { way, clients: 8, bytes: 100, pipeline: 1, bulk_flows: 1, seconds: seconds / 2.0, ask: None };
    let of = |server: &'static str, seconds: f64, measure: Box<Server>| {
        let parameters = json!({ "direction": towards(way), "limit": limit, "server": server });
        Workload::of_pod("servers", parameters, limits(way, limit), seconds, move |pod, _| {
            Ok(served(&measure(pod)?, way, limit))
        })
    };
    vec![
        of("nginx, connections kept", seconds, Box::new(move |pod| apps::http(pod, &http(true)))),
        of("nginx, connections closed", seconds, Box::new(move |pod| apps::http(pod, &http(false)))),
        of("HTTP/2", seconds, Box::new(move |pod| apps::http2(pod, &http2))),
        of("redis beside a bulk flow", seconds + 2.5, Box::new(move |pod| apps::redis(pod, &redis))),
    ]
}

type Server = dyn Fn(&crate::harness::pod::Pod) -> crate::harness::Result<App>;

fn served(app: &App, way: Way, limit: u64) -> Found {
    let mut found = Found::default();
    // redis' client sets and then gets: the command whose values go in the direction of the limit.
    if let Some(served) = if way == Way::In { app.served.first() } else { app.served.last() } {
        found.put("responses_per_s", served.per_second);
        found.put("response_p50_ms", served.p50_us / 1e3);
        found.put("response_p99_ms", served.p99_us / 1e3);
        found.put("longest_ms", served.longest_us / 1e3);
        found.put("failed", served.failed as f64);
    }
    app.seen.asked.iter().for_each(|asked| replies_of(&mut found, asked));
    wire(&mut found, &app.seen, limit);
    found
}

/// The traffic behind the limiter.
fn wire(found: &mut Found, seen: &Seen, limit: u64) {
    let percent = |rate: f64| rate / limit as f64 * 100.0;
    if let Some(wire) = seen.wire.first() {
        let later = wire.seconds.get(1..).unwrap_or_default();
        found.put("percent", percent(later.iter().sum::<f64>() / later.len().max(1) as f64));
        found.put("most_second_percent", percent(wire.most));
    }
    found.put("retransmits", seen.retransmits as f64);
}
