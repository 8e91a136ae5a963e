//! What is measured: one list, a value for each workload.

/// Real servers, calls, look-ups, QUIC.
mod apps;
/// Bulk TCP, with replies beside it.
mod bulk;
/// What ADD, DEL and memory cost, and what many pods at once do.
mod node;
/// Other paths than the sockets of the pod's cgroup.
mod others;
/// Short connections.
mod short;

use serde_json::{Value, json};

use crate::harness::Result;
use crate::harness::host::Host;
use crate::harness::limiter::{Limiter, Limits, Programs};
use crate::harness::measure::Way;
use crate::harness::pod::Pod;
use crate::machine::Machine;
use crate::record::{Found, Parameters};

pub const MBIT: u64 = 1_000_000;
pub const GBIT: u64 = 1000 * MBIT;

/// Plugins that stand in a chain: whose calls take time.
const PLUGINS: &[Limiter] = &[Limiter::Podshaper, Limiter::Bandwidth, Limiter::BandwidthNewer];
/// What holds a pod, and could be used by somebody who knows what he wants.
const GOOD: &[Limiter] = &[
    Limiter::Podshaper,
    Limiter::Bandwidth,
    Limiter::BandwidthNewer,
    Limiter::Edt,
    Limiter::FqCodel,
    Limiter::Cake,
    Limiter::Policer,
];

/// One thing that is measured, behind each of the limiters.
pub struct Workload {
    pub name: &'static str,
    pub parameters: Parameters,
    pub peers: Vec<Limiter>,
    pub rounds: usize,
    /// How long one measurement takes, about.
    pub seconds: f64,
    measure: Box<Measure>,
}

type Measure = dyn Fn(Limiter, &Programs) -> Result<Found>;

impl Workload {
    pub fn measure(&self, limiter: Limiter, programs: &Programs) -> Result<Found> {
        (self.measure)(limiter, programs)
    }

    /// As a line of progress names it.
    pub fn title(&self) -> String {
        let parameters = self.parameters.iter().map(|(name, value)| match value {
            Value::String(text) => format!(", {text}"),
            value => format!(", {name} {value}"),
        });
        format!("{}{}", self.name, parameters.collect::<String>())
    }

    /// A workload of one fresh pod with limits, for the list.
    fn of_pod(
        name: &'static str,
        parameters: Value,
        limits: Limits,
        seconds: f64,
        measure: impl Fn(&mut Pod, Limiter) -> Result<Found> + 'static,
    ) -> Self {
        let on_a_pod = move |limiter: Limiter, programs: &Programs| {
            let host = Host::new()?;
            let mut pod = Pod::new(&host, "report")?;
            limiter.add(&mut pod, limits, programs)?;
            measure(&mut pod, limiter)
        };
        Self::of_node(name, parameters, seconds + 0.7, on_a_pod)
    }

    /// A workload that makes what it measures by itself.
    fn of_node(
        name: &'static str,
        parameters: Value,
        seconds: f64,
        measure: impl Fn(Limiter, &Programs) -> Result<Found> + 'static,
    ) -> Self {
        let parameters = parameters.as_object().cloned().unwrap_or_default().into_iter().collect();
        Self { name, parameters, peers: GOOD.to_vec(), rounds: 1, seconds, measure: Box::new(measure) }
    }

    fn peers(self, peers: &[Limiter]) -> Self {
        Self { peers: peers.to_vec(), ..self }
    }

    fn rounds(self, rounds: usize) -> Self {
        Self { rounds, ..self }
    }
}

/// Limits of one direction.
fn limits(way: Way, limit: u64) -> Limits {
    match way {
        Way::In => Limits { egress: None, ingress: Some(limit) },
        Way::Out | Way::Within => Limits { egress: Some(limit), ingress: None },
    }
}

/// All limiters; with bulk TCP alone also senders that pace themselves.
fn everybody(with_senders: bool) -> Vec<Limiter> {
    Limiter::PEERS.into_iter().filter(|limiter| with_senders || *limiter != Limiter::Senders).collect()
}

/// What is measured on a machine.
pub fn all(machine: &Machine, is_quick: bool) -> Vec<Workload> {
    let mut list = match (machine.is_uml, is_quick) {
        (false, false) => of_a_machine(machine),
        (false, true) => quickly(),
        (true, false) => of_user_mode_linux(machine),
        (true, true) => quickly_in_uml(),
    };
    list.iter_mut().for_each(|workload| workload.peers.retain(|limiter| !machine.missing.contains_key(limiter)));
    if machine.is_uml {
        // Its one CPU takes longer to make a pod.
        list.iter_mut().for_each(|workload| workload.seconds += 2.0);
    }
    list
}

/// The kernel of the machine has all CPUs and no fq.
fn of_a_machine(machine: &Machine) -> Vec<Workload> {
    use Way::{In, Out};
    let mut list = vec![bulk::idle(3.0)];
    for (way, limit, flows, rounds) in [(Out, 100, 4, 3), (In, 100, 4, 2), (Out, 100, 128, 2)] {
        list.push(bulk::replies(way, limit * MBIT, flows, 4.0).peers(&everybody(way == Out)).rounds(rounds));
    }
    list.extend([MBIT, 10 * MBIT, 100 * MBIT, GBIT, 10 * GBIT].map(|limit| {
        let seconds = if limit == MBIT { 5.0 } else { 3.0 };
        bulk::by_limit(Out, limit, seconds).peers(&everybody(true)).rounds(2)
    }));
    list.extend([MBIT, 10 * MBIT, GBIT].map(|limit| bulk::by_limit(In, limit, 3.0)));
    list.extend([1, 16, 128, 1024].map(|flows| bulk::by_flows(100 * MBIT, flows, 3.0)));
    list.extend([1, 4, 16, 64, 128].map(|flows| bulk::by_flows(GBIT, flows, 3.0).rounds(2)));
    let controls = ["reno", "bbr"].into_iter().filter(|name| machine.has_congestion_control(name));
    list.extend(controls.map(|name| bulk::by_congestion_control(name, 3.0)));
    list.extend([Out, In].map(|way| short::connections(way, 10 * MBIT, 64, 5.0).rounds(2)));
    list.extend([bulk::with_ecn(3.0), bulk::mptcp(100 * MBIT, 3.0), bulk::unlimited(3.0).peers(&everybody(false))]);
    list.extend([apps::voice(10 * MBIT, 4.0), apps::names(10 * MBIT, 4.0), apps::by_quic(100 * MBIT, 4.0)]);
    list.extend(apps::servers(10 * MBIT, 4.0));
    list.extend(others::paths(10 * MBIT, 2.5));
    list.extend([1, 10, 100].map(|pods| node::pods(pods, 10 * MBIT, 4.0).rounds(if pods > 10 { 1 } else { 3 })));
    list.extend([0, 50, 200].map(node::calls));
    list.extend([1, 8, 32].map(node::calls_at_once));
    list.push(node::programs(100 * MBIT, 3.0));
    list
}

/// User Mode Linux has one slow CPU, and fq, netem, fq_codel and cake.
fn of_user_mode_linux(machine: &Machine) -> Vec<Workload> {
    use Way::{In, Out};
    let mut list = vec![bulk::idle(3.0)];
    for (way, limit, flows, rounds) in [(Out, 100, 4, 2), (In, 100, 4, 1), (Out, 100, 128, 1)] {
        list.push(bulk::replies(way, limit * MBIT, flows, 4.0).peers(&everybody(way == Out)).rounds(rounds));
    }
    list.extend([MBIT, 10 * MBIT].map(|limit| bulk::by_limit(Out, limit, 4.0)));
    list.push(bulk::by_limit(In, 10 * MBIT, 4.0));
    if machine.has_congestion_control("bbr") {
        list.push(bulk::by_congestion_control("bbr", 4.0));
    }
    list.extend([Out, In].map(|way| short::connections(way, 10 * MBIT, 64, 4.0)));
    list.extend([apps::voice(10 * MBIT, 4.0), apps::names(10 * MBIT, 4.0)]);
    let paths = [(10, 0.0), (40, 0.0), (100, 0.0), (40, 0.1), (100, 0.1)];
    list.extend(paths.map(|(rtt_ms, loss_percent)| bulk::far(50 * MBIT, rtt_ms, loss_percent, 5.0)));
    list
}

fn quickly() -> Vec<Workload> {
    use Way::{In, Out};
    const FEW: &[Limiter] = &[Limiter::Podshaper, Limiter::Bandwidth];
    vec![
        bulk::idle(1.0),
        bulk::replies(Out, 100 * MBIT, 4, 2.0).peers(&everybody(true)),
        bulk::by_limit(Out, 10 * MBIT, 2.0),
        bulk::by_limit(Out, GBIT, 2.0),
        bulk::by_limit(In, 10 * MBIT, 2.0).peers(FEW),
        short::connections(Out, 10 * MBIT, 16, 2.0).peers(FEW),
        node::pods(4, 10 * MBIT, 3.0).peers(FEW),
        node::calls(0).peers(PLUGINS),
        node::calls(20).peers(FEW),
    ]
    .into_iter()
    .chain(others::paths(10 * MBIT, 2.0).into_iter().take(1).map(|workload| workload.peers(FEW)))
    .collect()
}

fn quickly_in_uml() -> Vec<Workload> {
    const FEW: &[Limiter] = &[Limiter::Podshaper, Limiter::Bandwidth, Limiter::Edt, Limiter::Cake];
    vec![
        bulk::idle(1.0),
        bulk::replies(Way::Out, 100 * MBIT, 4, 2.0).peers(&everybody(false)),
        bulk::far(50 * MBIT, 40, 0.0, 3.0).peers(FEW),
    ]
}

/// For titles of parameters.
fn towards(way: Way) -> Value {
    json!(if way == Way::In { "in" } else { "out" })
}
