use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::chain::{Attachment, Bed, MBIT, assert_rate};
use super::harness::cni::{Chain, Cni};
use super::harness::limiter::Limiter;
use super::harness::measure::{self, Bulk};
use super::harness::pod::{INTERFACE, Pod};
use super::harness::{PLUGIN_DIR, meter, podshaper_program};

const LIMIT: u64 = 20 * MBIT;

fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The plugins are looked for in this build's directory, then in Debian's.
fn example(name: &str) -> Chain {
    let podshaper = podshaper_program().unwrap();
    Chain::read(&directory("conflist-examples").join(name), &[podshaper.parent().unwrap(), Path::new(PLUGIN_DIR)])
        .unwrap()
}

/// What the primary plugin of an example answers.
fn recorded(primary: &str) -> String {
    fs::read_to_string(directory("tests/records").join(format!("{primary}.result.json"))).unwrap()
}

fn podshaper(chain: &Chain) -> &Map<String, Value> {
    chain.plugins.last().unwrap()
}

#[test]
fn every_example_ends_with_podshaper_and_its_capabilities() {
    let names = fs::read_dir(directory("conflist-examples")).unwrap().flatten();
    let mut names: Vec<String> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.retain(|name| name != "README.md");
    names.sort();
    assert_eq!(names, ["10-bridge.conflist", "10-flannel.conflist", "10-weave.conflist"]);
    let readme = fs::read_to_string(directory("conflist-examples/README.md")).unwrap();
    for name in names {
        assert!(readme.contains(&format!("[{name}]({name})")), "the README does not say where {name} goes");
        let chain = example(&name);
        let wanted = json!({ "bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true });
        let podshaper = podshaper(&chain);
        assert_eq!((&podshaper["type"], &podshaper["capabilities"]), (&json!("podshaper"), &wanted), "{name}");
        assert_eq!(chain.plugins.iter().filter(|plugin| plugin["type"] == "podshaper").count(), 1, "{name}");
    }
}

/// Other plugins' results have fields and layouts of their own, and Weave's has no interfaces.
#[test]
fn without_a_limit_the_primary_plugins_result_comes_out_byte_for_byte() {
    for primary in ["flannel", "weave"] {
        let (chain, result) = (example(&format!("10-{primary}.conflist")), recorded(primary));
        let version: Value = serde_json::from_str(&result).unwrap();
        assert_eq!(version["cniVersion"], chain.cni_version, "the example and the record of {primary}");
        let mut config = podshaper(&chain).clone();
        config.insert("name".into(), json!(chain.name));
        config.insert("cniVersion".into(), json!(chain.cni_version));
        // By hand: a JSON library would write the result anew.
        let config = Value::Object(config).to_string();
        let stdin = format!("{},\"prevResult\":{result}}}", config.strip_suffix('}').unwrap());
        let call = Cni::new(podshaper_program().unwrap(), "ADD")
            .env("CNI_CONTAINERID", "0123456789abcdef")
            .env("CNI_NETNS", "/run/netns/none")
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", "K8S_POD_UID=8a0f2f2e-54c5-4a3c-a1a6-90d2b4f3d0aa")
            .env("CNI_PATH", PLUGIN_DIR)
            .stdin(stdin);
        let call = call.call().unwrap();
        assert_eq!(call.success().unwrap().stdout, result.trim(), "{primary}");
    }
}

fn offer_annotation(pod: &mut Pod) {
    let annotation = json!({ "kubernetes.io/egress-bandwidth": format!("{}M", LIMIT / MBIT) });
    pod.offer("io.kubernetes.cri.pod-annotations", annotation);
}

/// The kernel has the limit, and traffic keeps to it.
fn assert_limited(what: &str, pod: &Pod, to: &str) {
    assert_eq!(meter::egress_limit(pod, INTERFACE).unwrap().rate_bits_per_s, LIMIT, "{what}");
    let bulk = Bulk { flows: 2, seconds: 2.0, to: Some(to.parse().unwrap()), ..Bulk::default() };
    assert_rate(what, measure::bulk(pod, &bulk).unwrap().timeline.wire_rate(0.5, 2.0), LIMIT, 0.05);
}

#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_bridge_example_makes_a_limited_pod() {
    let bed = Bed::new();
    let mut chain = example("10-bridge.conflist");
    // The node is thrown away, and what host-local writes must be as well. Everything else is as it stands in the file.
    chain.plugins[0]["ipam"]["dataDir"] = json!(bed.host.state());
    let mut pod = Pod::new(&bed.host, "conflist").unwrap();
    pod.offer_bandwidth(Some(LIMIT), None, None);
    offer_annotation(&mut pod);
    pod.add(&chain).unwrap();
    let call = pod.last_call("podshaper", "ADD").unwrap();
    assert!(call.stdin.contains(&format!("\"prevResult\":{}", call.stdout)), "{call}");
    assert_limited("bridge", &pod, "10.244.1.1");
    pod.check().unwrap();
    pod.del().unwrap();
    assert!(!meter::directory(&pod, INTERFACE).exists());
}

/// Neither plugin runs without its daemon: a pod of the bridge plugin stands in for theirs, and their own results tell
/// podshaper of it. The second way a limit is asked for is by annotation alone.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_flannel_and_weave_examples_make_limited_pods() {
    let bed = Bed::new();
    for primary in ["flannel", "weave"] {
        let chain = example(&format!("10-{primary}.conflist"));
        let result: Value = serde_json::from_str(&recorded(primary)).unwrap();
        let mut pod = bed.pod(Limiter::Bare, 0);
        pod.offers.remove("bandwidth");
        match primary {
            "flannel" => pod.offer_bandwidth(Some(LIMIT), None, None),
            _ => offer_annotation(&mut pod),
        }
        let call = chain.call(podshaper(&chain), "ADD", &pod.offers, Some(&result)).unwrap();
        let attachment = Attachment::add(pod.environment(call));
        assert_limited(primary, &pod, "10.213.0.1");
        drop(attachment);
        assert!(!meter::directory(&pod, INTERFACE).exists(), "{primary}");
    }
}
