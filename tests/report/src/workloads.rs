//! The measurements: one list, with a value for each workload.

/// Real servers, calls, DNS look-ups, QUIC.
mod apps;
/// Bulk TCP, with replies beside it.
mod bulk;
/// The costs of ADD, DEL and memory, and the traffic of many pods at once.
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

/// The plugins of a chain, whose calls take time.
const PLUGINS: &[Limiter] = &[Limiter::Podshaper, Limiter::Bandwidth, Limiter::BandwidthNewer];
/// The limiters that hold a pod, and that an experienced administrator could use. Of the bandwidth plugin the newer
/// version, see [`all`].
const GOOD: &[Limiter] =
    &[Limiter::Podshaper, Limiter::BandwidthNewer, Limiter::Edt, Limiter::FqCodel, Limiter::Cake, Limiter::Policer];
/// The limiters that differ from others only in their first seconds.
const AS_KUBELET: &[Limiter] = &[Limiter::BandwidthAsKubelet, Limiter::BandwidthNewerAsKubelet];

/// One measurement, repeated with each of the limiters.
pub struct Workload {
    pub name: &'static str,
    pub parameters: Parameters,
    pub peers: Vec<Limiter>,
    pub rounds: usize,
    /// The approximate time of one measurement.
    pub seconds: f64,
    measure: Box<Measure>,
}

type Measure = dyn Fn(Limiter, &Programs) -> Result<Found>;

impl Workload {
    pub fn measure(&self, limiter: Limiter, programs: &Programs) -> Result<Found> {
        (self.measure)(limiter, programs)
    }

    /// The name in a progress line.
    pub fn title(&self) -> String {
        let parameters = self.parameters.iter().map(|(name, value)| match value {
            Value::String(text) => format!(", {text}"),
            value => format!(", {name} {value}"),
        });
        format!("{}{}", self.name, parameters.collect::<String>())
    }

    /// A workload with one fresh pod with limits, for the list.
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

    /// A workload that makes its own pods.
    fn of_node(
        name: &'static str,
        parameters: Value,
        seconds: f64,
        measure: impl Fn(Limiter, &Programs) -> Result<Found> + 'static,
    ) -> Self {
        let parameters = parameters.as_object().cloned().unwrap_or_default().into_iter().collect();
        Self { name, parameters, peers: GOOD.to_vec(), rounds: 1, seconds, measure: Box::new(measure) }
    }

    /// The time of all its rounds, with all limiters.
    pub fn seconds_in_all(&self) -> f64 {
        self.seconds * (self.rounds * self.peers.len()) as f64
    }

    fn peers(self, peers: &[Limiter]) -> Self {
        Self { peers: peers.to_vec(), ..self }
    }

    fn rounds(self, rounds: usize) -> Self {
        Self { rounds, ..self }
    }
}

/// Limits for one direction.
fn limits(way: Way, limit: u64) -> Limits {
    match way {
        Way::In => Limits { egress: None, ingress: Some(limit) },
        Way::Out | Way::Within => Limits { egress: Some(limit), ingress: None },
    }
}

/// All limiters except those in these lists.
fn everybody_but(left_out: &[&[Limiter]]) -> Vec<Limiter> {
    let is_left_out = |limiter: &Limiter| left_out.iter().any(|some| some.contains(limiter));
    Limiter::PEERS.into_iter().filter(|limiter| !is_left_out(limiter)).collect()
}

/// Senders that pace themselves exist only in the pod, so they limit only its egress.
fn who_replies(way: Way) -> Vec<Limiter> {
    everybody_but(if way == Way::Out { &[] } else { &[&[Limiter::Senders]] })
}

/// All measurements for a machine.
pub fn all(machine: &Machine, is_quick: bool) -> Vec<Workload> {
    let mut list = match (machine.is_uml, is_quick) {
        (false, false) => of_a_machine(machine),
        (false, true) => quickly(),
        (true, false) => of_user_mode_linux(machine),
        (true, true) => quickly_in_uml(),
    };
    for workload in &mut list {
        // Where one bandwidth plugin is enough, the newer one is used if it is there.
        if machine.missing.contains_key(&Limiter::BandwidthNewer) && !workload.peers.contains(&Limiter::Bandwidth) {
            let newer = workload.peers.iter_mut().filter(|limiter| **limiter == Limiter::BandwidthNewer);
            newer.for_each(|limiter| *limiter = Limiter::Bandwidth);
        }
        workload.peers.retain(|limiter| !machine.missing.contains_key(limiter));
        if machine.is_uml {
            // Its single CPU needs more time to make a pod.
            workload.seconds += 1.0;
        }
    }
    list
}

/// The list for the machine's own kernel, which has all CPUs and no fq.
fn of_a_machine(machine: &Machine) -> Vec<Workload> {
    use Way::{In, Out};
    let mut list = vec![bulk::idle(3.0)];
    list.push(bulk::replies(Out, 100 * MBIT, 4, 4.0).peers(&who_replies(Out)).rounds(3));
    list.push(bulk::replies(In, 100 * MBIT, 4, 4.0).peers(&who_replies(In)).rounds(2));
    list.push(bulk::replies(Out, 100 * MBIT, 128, 4.0).peers(&everybody_but(&[AS_KUBELET])).rounds(2));
    // 100 Mbit/s out of the pod is in the section before.
    list.extend([MBIT, 10 * MBIT, GBIT, 10 * GBIT].map(|limit| {
        let seconds = if limit == MBIT { 4.0 } else { 3.0 };
        let repeated = [Limiter::Bare, Limiter::Bandwidth, Limiter::BandwidthNewerAsKubelet];
        bulk::by_limit(Out, limit, seconds).peers(&everybody_but(&[&repeated])).rounds(2)
    }));
    list.extend([10 * MBIT, GBIT].map(|limit| bulk::by_limit(In, limit, 3.0)));
    list.extend([1, 16, 128, 1024].map(|flows| bulk::by_flows(100 * MBIT, flows, 3.0)));
    list.extend([1, 16, 128].map(|flows| bulk::by_flows(GBIT, flows, 3.0).rounds(2)));
    let controls = ["reno", "bbr"].into_iter().filter(|name| machine.has_congestion_control(name));
    list.extend(controls.map(|name| bulk::by_congestion_control(name, 3.0)));
    list.push(bulk::with_ecn(3.0));
    list.extend([Out, In].map(|way| short::connections(way, 10 * MBIT, 64, 4.0).rounds(2)));
    let repeated = [Limiter::Senders, Limiter::Bandwidth];
    list.push(bulk::unlimited(3.0).peers(&everybody_but(&[&repeated, AS_KUBELET])));
    for way in [Out, In] {
        list.extend([bulk::mptcp(way, 100 * MBIT, 3.0), apps::by_quic(way, 100 * MBIT, 3.0)]);
        list.extend([apps::voice(way, 10 * MBIT, 3.0), apps::names(way, 10 * MBIT, 3.0)]);
        list.extend(apps::servers(way, 10 * MBIT, 3.0));
        list.extend(others::paths(way, 10 * MBIT, 3.0));
    }
    list.extend([(10, 2), (100, 1)].map(|(pods, rounds)| node::pods(pods, 10 * MBIT, 4.0).rounds(rounds)));
    list.extend([0, 50, 200].map(|pods| node::calls(pods).peers(PLUGINS)));
    list.push(node::calls(1000).peers(&[Limiter::Podshaper, Limiter::BandwidthNewer]));
    list.extend([1, 8, 32].map(node::calls_at_once));
    list.push(node::programs(100 * MBIT, 3.0));
    list
}

/// The list for User Mode Linux, which has one slow CPU, and fq, netem, fq_codel and cake.
fn of_user_mode_linux(machine: &Machine) -> Vec<Workload> {
    use Way::{In, Out};
    let mut list = vec![bulk::idle(3.0)];
    list.push(bulk::replies(Out, 100 * MBIT, 4, 3.0).peers(&who_replies(Out)));
    list.push(bulk::replies(In, 100 * MBIT, 4, 3.0).peers(&everybody_but(&[&[Limiter::Senders], AS_KUBELET])));
    list.push(bulk::replies(Out, 100 * MBIT, 128, 3.0).peers(&everybody_but(&[&[Limiter::Bare], AS_KUBELET])));
    list.push(bulk::by_limit(Out, 10 * MBIT, 3.0));
    if machine.has_congestion_control("bbr") {
        list.push(bulk::by_congestion_control("bbr", 3.0));
    }
    for way in [Out, In] {
        list.push(short::connections(way, 10 * MBIT, 64, 3.0));
        list.extend([apps::voice(way, 10 * MBIT, 3.0), apps::names(way, 10 * MBIT, 3.0)]);
    }
    let mut list: Vec<Workload> = list.into_iter().map(|workload| workload.rounds(2)).collect();
    // A path of milliseconds varies little from round to round.
    for (rtt_ms, seconds) in [(10, 3.0), (40, 4.0), (100, 4.0)] {
        list.extend([0.0, 0.1].map(|loss_percent| bulk::far(50 * MBIT, rtt_ms, loss_percent, seconds)));
    }
    list
}

fn quickly() -> Vec<Workload> {
    use Way::{In, Out};
    const FEW: &[Limiter] = &[Limiter::Podshaper, Limiter::BandwidthNewer];
    let paths = [Out, In].into_iter().filter_map(|way| others::paths(way, 10 * MBIT, 3.0).into_iter().next());
    vec![
        bulk::idle(1.0),
        bulk::replies(Out, 100 * MBIT, 4, 2.0).peers(&who_replies(Out)),
        bulk::by_limit(Out, 10 * MBIT, 2.0),
        bulk::by_limit(Out, GBIT, 2.0),
        bulk::by_limit(In, 10 * MBIT, 2.0).peers(FEW),
        short::connections(Out, 10 * MBIT, 16, 2.0).peers(FEW),
        apps::voice(In, 10 * MBIT, 2.0).peers(FEW),
        node::pods(4, 10 * MBIT, 3.0).peers(FEW),
        node::calls(0).peers(PLUGINS),
        node::calls(20).peers(FEW),
    ]
    .into_iter()
    .chain(paths.map(|workload| workload.peers(FEW)))
    .collect()
}

fn quickly_in_uml() -> Vec<Workload> {
    const FEW: &[Limiter] = &[Limiter::Podshaper, Limiter::BandwidthNewer, Limiter::Edt, Limiter::Cake];
    vec![
        bulk::idle(1.0),
        bulk::replies(Way::Out, 100 * MBIT, 4, 2.0).peers(&everybody_but(&[&[Limiter::Senders], AS_KUBELET])),
        bulk::far(50 * MBIT, 40, 0.0, 3.0).peers(FEW),
    ]
}

/// For titles of parameters.
fn towards(way: Way) -> Value {
    json!(if way == Way::In { "in" } else { "out" })
}
