use std::time::Duration;

use serde_json::json;

use super::bulk::replies_of;
use super::{Workload, limits, towards};
use crate::harness::measure::{Times, Way};
use crate::harness::web::{self, Web};
use crate::record::Found;

/// Size of a response, or of a posted body.
const BYTES: usize = 10_000;
/// Pause between a reply and the next request, on the one connection for small requests.
const PAUSE: Duration = Duration::from_millis(2);

/// Clients of a web server in the pod, each request on a connection of its own. Out: the clients get. In: the clients
/// post.
pub fn connections(way: Way, limit: u64, clients: usize, seconds: f64) -> Workload {
    let parameters = json!({ "direction": towards(way), "limit": limit, "clients": clients });
    let web = Web { way, clients, bytes: BYTES, seconds, ask: Some(PAUSE), ..Web::default() };
    Workload::of_pod("short-connections", parameters, limits(way, limit), seconds, move |pod, _| {
        let result = web::web(pod, &web)?;
        let mut found = Found::default();
        found.put("responses_per_s", result.clients.responses as f64 / seconds);
        times(&mut found, "from_connect", &result.clients.from_connect);
        found.put("longest_ms", result.longest_us() / 1e3);
        found.put("failed", result.clients.failures.values().sum::<u64>() as f64);
        found.put("retransmits", result.retransmits as f64);
        let later = result.timeline.each_second(seconds).into_iter().skip(1).map(|rate| rate / limit as f64 * 100.0);
        found.put("most_second_percent", later.fold(0.0, f64::max));
        found.put("percent", result.timeline.steady_rate() / limit as f64 * 100.0);
        if let Some(latency) = &result.latency {
            replies_of(&mut found, latency);
        }
        Ok(found)
    })
}

fn times(found: &mut Found, name: &str, times: &Times) {
    found.put(&format!("{name}_p50_ms"), times.p50_us / 1e3);
    found.put(&format!("{name}_p99_ms"), times.p99_us / 1e3);
}
