use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::harness::cgroup::{self, Driver};
use super::harness::cni::{Chain, Cni};
use super::harness::host::{BRIDGE, Host};
use super::harness::limiter::{Limiter, Limits, Programs};
use super::harness::measure::{self, Bulk, Timeline, Udp, Way};
use super::harness::paths::Path as OtherPath;
use super::harness::pod::Pod;
use super::harness::process::Running;
use super::harness::table;

#[test]
fn a_plugin_gets_what_its_capabilities_name_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("meta"), "").unwrap();
    let conflist = json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [
        { "type": "meta", "capabilities": { "bandwidth": true, "portMappings": false } },
    ]});
    let chain = Chain::new(&conflist, &[dir.path()]).unwrap();
    let offers: Map<String, Value> =
        json!({ "bandwidth": { "egressRate": 1 }, "portMappings": [], "cgroupPath": "/x" })
            .as_object()
            .unwrap()
            .clone();
    let call = chain.call(&chain.plugins[0], "ADD", &offers, Some(&json!({ "ips": [] }))).unwrap();
    let text = format!("{call:?}").replace('\\', "");
    assert!(text.contains(r#""runtimeConfig":{"bandwidth":{"egressRate":1}}"#), "{text}");
    assert!(text.contains(r#""prevResult":{"ips":[]}"#), "{text}");
    assert!(text.contains(r#""name":"net""#), "{text}");
}

#[test]
fn a_rate_is_taken_over_the_time_that_really_passed() {
    let timeline = Timeline {
        sample_us: vec![0, 500_000, 1_100_000, 2_100_000],
        payload_bytes: vec![0, 1_000, 2_200, 4_200],
        wire_bytes: vec![0, 1_000, 2_200, 4_200],
        ..Timeline::default()
    };
    assert_eq!(timeline.first_second().round(), 16_000.0);
    assert_eq!(timeline.steady_rate().round(), 16_000.0);
    assert_eq!(timeline.wire_rate(5.0, 6.0), 0.0, "there is nothing after the end");
}

#[test]
fn jains_index_is_one_of_even_flows_and_a_part_of_one_else() {
    let jain = |flows: &[u64]| Timeline { flows: flows.to_vec(), ..Timeline::default() }.jain();
    for (flows, index) in [(&[5, 5, 5, 5][..], 1.0), (&[8, 0], 0.5), (&[1, 3], 0.8)] {
        assert!((jain(flows) - index).abs() < 1e-9, "{flows:?}");
    }
    assert!(jain(&[]).is_nan());
}

#[test]
fn rates_on_the_command_line() {
    for (text, rate) in
        [("9600", Some(9600)), ("100M", Some(100_000_000)), ("1G", Some(1_000_000_000)), ("1k", Some(1000))]
    {
        assert_eq!(table::parse_rate(text).ok(), rate, "{text}");
    }
    for text in ["", "M", "1MM", "-1", "1.5M", "1m"] {
        assert!(table::parse_rate(text).is_err(), "{text:?}");
    }
}

#[test]
fn a_table_keeps_the_precision_that_its_numbers_have() {
    for (bits_per_s, text) in
        [(1.047e6, "1.05 Mbit/s"), (100.08e6, "100.1 Mbit/s"), (990.5e6, "990.5 Mbit/s"), (22.16e9, "22.2 Gbit/s")]
    {
        assert_eq!(table::rate(bits_per_s), text);
    }
    for (limit, text) in [(1_000_000, "1 Mbit/s"), (1_500_000_000, "1.5 Gbit/s"), (9_600, "0.0096 Mbit/s")] {
        assert_eq!(table::limit(limit), text);
    }
    let text = table::markdown(&["a", "b"], &[vec!["x".into(), "12.5".into()]]);
    assert_eq!(text, "| a   |    b |\n| --- | ---: |\n| x   | 12.5 |\n");
}

/// All traces that pods and nodes of this process leave on a machine.
fn traces() -> BTreeSet<PathBuf> {
    fn walk(path: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.insert(entry.path());
                walk(&entry.path(), found);
            }
        }
    }
    let mut found = BTreeSet::new();
    walk(&cgroup::mount().unwrap().join("kubepods"), &mut found);
    walk(&cgroup::mount().unwrap().join("kubepods.slice"), &mut found);
    found
}

#[test]
#[ignore = "needs root"]
fn a_pod_is_in_its_namespace_and_cgroup_and_leaves_nothing() {
    let host = Host::new().unwrap();
    let mut pod = Pod::with_driver(&host, "self", Driver::Systemd).unwrap();
    pod.add(&host.bridge_chain().unwrap()).unwrap();
    pod.check().unwrap();
    let addresses = pod.addresses();
    assert!(addresses[0].is_ipv4() && addresses[1].is_ipv6(), "{addresses:?}");

    let output = pod.command("cat").unwrap().arg("/proc/self/cgroup").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let own = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    assert_eq!(own, format!("{}/c1", Driver::Systemd.path(&pod.uid)));
    let output = pod.command("ip").unwrap().args(["-br", "addr", "show", "eth0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&addresses[0].to_string()), "{text}");

    let sleeping = Running::start(pod.command("sleep").unwrap().arg("600")).unwrap();
    let process = PathBuf::from(format!("/proc/{}/stat", sleeping.id()));
    let (netns, cgroup, state) =
        (pod.netns.path().to_owned(), pod.cgroup.path().to_owned(), host.state().join("podshaper-test"));
    assert!(fs::read_dir(&state).unwrap().count() > 0, "host-local keeps its state elsewhere");
    drop(pod);
    let stat = fs::read_to_string(process).unwrap_or_default();
    assert!(stat.is_empty() || stat.contains(") Z "), "the pod's process lives: {stat}");
    assert!(!netns.exists() && !cgroup.exists());
    let leased = fs::read_dir(&state).unwrap().flatten().filter(|entry| entry.file_name() != "lock");
    assert_eq!(leased.filter(|entry| !entry.file_name().to_string_lossy().starts_with("last_")).count(), 0);
    let node = host.netns.path().to_owned();
    drop(host);
    assert!(!node.exists() && !state.exists());
}

#[test]
#[ignore = "needs root"]
fn a_panic_leaves_nothing() {
    let (mut netns, mut cgroup) = (PathBuf::new(), PathBuf::new());
    let result = catch_unwind(AssertUnwindSafe(|| {
        let host = Host::new().unwrap();
        let mut pod = Pod::new(&host, "self").unwrap();
        pod.add(&host.bridge_chain().unwrap()).unwrap();
        (netns, cgroup) = (pod.netns.path().to_owned(), pod.cgroup.path().to_owned());
        assert!(netns.exists() && traces().contains(&cgroup));
        panic!("on purpose: the calls above this line are the dump that a failed test prints");
    }));
    assert!(result.is_err());
    assert!(!netns.exists() && !traces().contains(&cgroup));
}

#[test]
#[ignore = "needs root"]
fn an_answer_of_failure_shows_the_whole_call() {
    let host = Host::new().unwrap();
    let mut pod = Pod::new(&host, "self").unwrap();
    let bad = pod.environment(Cni::new("/usr/lib/cni/bandwidth", "ADD")).stdin("{}");
    let call = pod.call(&bad).unwrap();
    let failure = format!("{:?}", call.json().unwrap_err());
    for part in ["CNI_COMMAND=ADD", "stdin: {}", "stdout: {", &pod.uid] {
        assert!(failure.contains(part), "{part} in {failure}");
    }
    assert!(call.error_code().is_some() && call.peak_rss_bytes > 0 && call.elapsed > Duration::ZERO);
}

/// Compares the count of packets that the pod's kernel leaves to be cut, with and without a tunnel's headers, with
/// the payload.
#[test]
#[ignore = "needs root"]
fn a_watched_interface_counts_the_packets_within_a_gso_packet() {
    const BYTES_PER_S: u64 = 12_500_000;
    const SECONDS: f64 = 2.0;
    /// The payload of a packet of 1500 bytes.
    const PAYLOAD: f64 = 1448.0;
    for (path, headers) in [(OtherPath::AnotherCgroup, 0.0), (OtherPath::Vxlan, 50.0)] {
        let host = Host::new().unwrap();
        let mut pod = Pod::new(&host, "self").unwrap();
        Limiter::Bare.add(&mut pod, Limits::default(), &Programs::default()).unwrap();
        let mut payload = None;
        let made = path.with(&mut pod, |pod, ends| {
            let bulk = Bulk { to: ends.node, max_pacing_rate: Some(BYTES_PER_S), seconds: SECONDS, ..Bulk::default() };
            measure::watched(&host.netns, BRIDGE, SECONDS, || {
                payload = Some(measure::bulk(pod, &bulk)?.timeline.payload_rate(0.5, SECONDS));
                Ok(())
            })
        });
        let wire = made.unwrap().wire_rate(0.5, SECONDS);
        let ratio = wire / payload.unwrap() * (PAYLOAD - headers) / 1500.0;
        assert!((0.99..1.01).contains(&ratio), "{}: {ratio} of {wire} bit/s", path.title());
    }
}

/// Checks the measurements against a limiter with known behaviour.
#[test]
#[ignore = "needs root and a calm machine"]
fn the_bandwidth_plugin_measures_as_it_is_known_to() {
    let _alone = measure::alone();
    // Where the CPU is slower than the limit, no packet waits in the plugin's queue: User Mode Linux on a busy host
    // reaches less than 100 Mbit/s.
    const LIMIT: u64 = 30_000_000;
    for way in [Way::Out, Way::In] {
        let host = Host::new().unwrap();
        let mut pod = Pod::new(&host, "self").unwrap();
        let limits = Limits { egress: Some(LIMIT), ingress: Some(LIMIT) };
        Limiter::Bandwidth.add(&mut pod, limits, &Programs::default()).unwrap();
        for ipv6 in [false, true] {
            let ask = Some(measure::ask_pause(LIMIT));
            let bulk =
                Bulk { way, flows: 4, seconds: 3.0, congestion: Some("cubic".into()), ask, ipv6, ..Bulk::default() };
            let result = measure::bulk(&pod, &bulk).unwrap();
            let share = result.timeline.steady_rate() / LIMIT as f64;
            assert!((0.85..1.01).contains(&share), "{way:?}, IPv6 {ipv6}: {share} of the limit");
            // The median of the time and not of the requests: when all four flows have lost packets at the same
            // moment there is no queue, and most requests are made at such moments.
            let p50_us = result.latency.unwrap().p50_of_time_us;
            assert!(p50_us > 2_000.0, "{way:?}, IPv6 {ipv6}: a queue that nobody waits in? {p50_us} us");
            assert_eq!(result.timeline.flows.len(), 4);
        }
        let udp = measure::udp(&pod, &Udp { way, rate: LIMIT * 2, seconds: 2.0, large_buffer: true, ..Udp::default() })
            .unwrap();
        let share = udp.timeline.steady_rate() / LIMIT as f64;
        assert!((0.85..1.01).contains(&share), "UDP {way:?}: {share} of the limit");
        // Sender and limiter share a kernel: the socket's buffer stays charged while a packet waits in the plugin's
        // queue, so the sender blocks and nearly nothing is dropped. Over a network card half of the packets would be
        // dropped.
        let arrived = *udp.timeline.wire_bytes.last().unwrap() / 1428;
        assert!(
            udp.sent >= arrived && udp.errors.is_empty(),
            "UDP {way:?}: {} sent, {:?}, {arrived} arrived",
            udp.sent,
            udp.errors
        );
    }
}
