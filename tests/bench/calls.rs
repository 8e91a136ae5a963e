//! The time of an ADD and a DEL: whole processes, called as a runtime calls them, on pods that bridge and host-local
//! made.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    Table, Title, check_stop,
    harness::{
        Result,
        host::{Host, bandwidth_plugin, podshaper_plugin},
        note,
        pod::Pod,
    },
    table,
};

/// Calls of each kind. The plugins take turns, so that a slow moment of the machine affects all of them.
const CALLS: usize = 60;
const SUBNETS: usize = 2_000;
const RATE: u64 = 100_000_000;
/// Set explicitly: the bandwidth plugin's own default burst is seconds of the limit.
const BURST: u64 = 1_000_000;

/// One plugin on one pod.
struct Caller<'a> {
    name: String,
    host: &'a Host,
    pod: Pod<'a>,
    plugin: Value,
    /// The result of the bridge plugin.
    result: Value,
    /// Times of the ADDs, and of the DELs.
    elapsed: [Vec<Duration>; 2],
    peak_bytes: u64,
}

impl<'a> Caller<'a> {
    fn new(host: &'a Host, name: &str, plugin: Value, bandwidth: Value) -> Result<Self> {
        let mut pod = Pod::new(host, "bench")?;
        let result = pod.add(&host.bridge_chain()?)?;
        pod.offer("bandwidth", bandwidth);
        Ok(Self { name: name.to_owned(), host, pod, plugin, result, elapsed: [vec![], vec![]], peak_bytes: 0 })
    }

    fn call(&mut self, table: &Table, verb: usize) -> Result<()> {
        let chain = self.host.bridge_chain()?.then(self.plugin.clone()).with_dir(table.programs.directory()?);
        let plugin = self.plugin.as_object().cloned().unwrap_or_default();
        let call = chain.call(&plugin, ["ADD", "DEL"][verb], &self.pod.offers, Some(&self.result))?;
        let call = self.pod.environment(call).call_in(&self.host.netns)?;
        self.peak_bytes = self.peak_bytes.max(call.success()?.peak_rss_bytes);
        self.elapsed[verb].push(call.elapsed);
        Ok(())
    }

    /// Removes the qdiscs that the bandwidth plugin's DEL leaves on the host end. Its next ADD would fail because of
    /// them.
    fn clear(&self) {
        let host_end = self.result["interfaces"][1]["name"].as_str().unwrap_or_default();
        for place in ["ingress", "root"] {
            // A direction without a limit has no qdisc.
            let _ = self.host.netns.run("tc", &["qdisc", "del", "dev", host_end, place]);
        }
    }

    fn row(mut self, limits: &str) -> Vec<String> {
        let mut cells = vec![limits.to_owned(), self.name];
        for elapsed in &mut self.elapsed {
            elapsed.sort();
            let at = |part: usize| table::millis(elapsed[elapsed.len() * part / 100].as_secs_f64() * 1e6);
            cells.extend([at(50), at(95)]);
        }
        cells.push(format!("{:.1} MB", self.peak_bytes as f64 / 1e6));
        cells
    }
}

pub fn calls(table: &mut Table) -> Result<Title> {
    let rates = |directions: &[&str]| {
        let keys = directions.iter().flat_map(|direction| {
            [(format!("{direction}Rate"), json!(RATE)), (format!("{direction}Burst"), json!(BURST))]
        });
        Value::Object(keys.collect())
    };
    let subnets: Vec<String> = (0..SUBNETS).map(|i| format!("172.{}.{}.0/24", 16 + i / 256, i % 256)).collect();
    let cases = [
        ("egress", rates(&["egress"]), json!({})),
        ("both directions", rates(&["egress", "ingress"]), json!({})),
        ("egress, 2000 exemptSubnets", rates(&["egress"]), json!({ "exemptSubnets": subnets })),
        ("none", Value::Null, json!({})),
    ];
    for (limits, bandwidth, keys) in cases {
        check_stop()?;
        note(format_args!("ADD and DEL, {limits} .."));
        let host = Host::new()?;
        let mut podshaper = podshaper_plugin();
        let keys = keys.as_object().cloned().unwrap_or_default();
        podshaper.as_object_mut().into_iter().for_each(|plugin| plugin.extend(keys.clone()));
        let caller = |name, plugin: &Value| Caller::new(&host, name, plugin.clone(), bandwidth.clone());
        let mut first = caller("podshaper, the node's only pod", &podshaper)?;
        let mut beside = caller("podshaper", &podshaper)?;
        podshaper["otherPaths"] = json!(false);
        let mut own = caller("podshaper, otherPaths false", &podshaper)?;
        let mut plugin = caller("bandwidth plugin", &bandwidth_plugin())?;
        for _ in 0..CALLS {
            first.call(table, 0)?;
            for call in [0, 1] {
                beside.call(table, call)?;
                own.call(table, call)?;
                plugin.call(table, call)?;
            }
            plugin.clear();
            first.call(table, 1)?;
        }
        table.rows.extend([beside, own, first, plugin].map(|caller| caller.row(limits)));
    }
    let header = &["limits", "plugin", "ADD p50", "p95", "DEL p50", "p95", "peak memory"];
    Ok((format!("Calls: median and 95th percentile of {CALLS}, whole processes, in turn"), header))
}
