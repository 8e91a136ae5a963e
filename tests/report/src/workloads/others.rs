use serde_json::json;

use super::{Workload, limits, towards};
use crate::harness::measure::Way;
use crate::harness::paths::{Load, Path};
use crate::record::Found;

/// Some of the paths, each with its traffic: UDP above the limit, or TCP.
const PATHS: [(Path, bool); 5] = [
    (Path::AnotherCgroup, false),
    (Path::Vxlan, false),
    (Path::Forwarded, false),
    (Path::AfPacket, true),
    (Path::Multicast, true),
];

/// Traffic through the pod's interface that belongs to no socket of the pod's cgroup, on the wire behind the limiter.
pub fn paths(way: Way, limit: u64, seconds: f64) -> Vec<Workload> {
    let workload = |(path, is_udp): (Path, bool)| {
        let load = Load { way, is_udp, limit, seconds };
        let parameters = json!({ "direction": towards(way), "limit": limit, "path": path.title() });
        Workload::of_pod("other-paths", parameters, limits(way, limit), seconds, move |pod, _| {
            let timeline = path.with(pod, |pod, ends| path.send(pod, ends, &load))?;
            let percent = |rate: f64| rate / limit as f64 * 100.0;
            let mut found = Found::default();
            found.put("percent", percent(timeline.wire_rate(1.0, seconds)));
            found.put("most_second_percent", percent(timeline.busiest_second(seconds)));
            Ok(found)
        })
    };
    PATHS.into_iter().filter(|(path, is_udp)| path.carries(way, *is_udp)).map(workload).collect()
}
