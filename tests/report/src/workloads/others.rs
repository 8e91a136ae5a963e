use serde_json::json;

use super::{Workload, limits};
use crate::harness::measure::Way;
use crate::harness::paths::{Load, Path};
use crate::record::Found;

/// Some of the ways, each with what it carries: UDP above the limit, or TCP.
const PATHS: [(Path, bool); 5] = [
    (Path::AnotherCgroup, false),
    (Path::Vxlan, false),
    (Path::Forwarded, false),
    (Path::AfPacket, true),
    (Path::Multicast, true),
];

/// What passes the pod's interface and no socket of its cgroup, on the wire behind the limiter.
pub fn paths(limit: u64, seconds: f64) -> Vec<Workload> {
    let workload = |(path, is_udp): (Path, bool)| {
        let load = Load { way: Way::Out, is_udp, limit, seconds };
        let parameters = json!({ "limit": limit, "path": path.title() });
        Workload::of_pod("other-paths", parameters, limits(Way::Out, limit), seconds, move |pod, _| {
            let timeline = path.with(pod, |pod, ends| path.send(pod, ends, &load))?;
            let percent = |from: f64, to: f64| timeline.wire_rate(from, to) / limit as f64 * 100.0;
            let mut found = Found::default();
            found.put("percent", percent(1.0, seconds));
            Ok(found)
        })
    };
    PATHS.into_iter().map(workload).collect()
}
