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

/// Reads an example. Its plugins are looked for in this build's directory, then in Debian's.
fn example(name: &str) -> Chain {
    let podshaper = podshaper_program().unwrap();
    Chain::read(&directory("conflist-examples").join(name), &[podshaper.parent().unwrap(), Path::new(PLUGIN_DIR)])
        .unwrap()
}

/// The conflist in the NetworkAttachmentDefinition.
fn multus_example() -> Chain {
    let text = fs::read_to_string(directory("conflist-examples/multus-macvlan.yaml")).unwrap();
    let definition: Value = serde_norway::from_str(&text).unwrap();
    assert_eq!(definition["kind"], "NetworkAttachmentDefinition");
    let podshaper = podshaper_program().unwrap();
    let dirs = [podshaper.parent().unwrap(), Path::new(PLUGIN_DIR)];
    let chain = Chain::parse(definition["spec"]["config"].as_str().unwrap(), &dirs).unwrap();
    assert_eq!(definition["metadata"]["name"], chain.name);
    chain
}

/// The result of an example's primary plugin. Flannel's was recorded. The others are written from the plugins'
/// sources (Calico's cni-plugin/pkg/plugin/plugin.go; Cilium's plugins/cilium-cni/cmd/cmd.go: Add, prepareIP; AWS'
/// cmd/routed-eni-cni-plugin/cni.go, with a number where a namespace would be; OVN-Kubernetes'
/// go-controller/pkg/cni), since their daemons are not available here.
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
    let lists = ["00-podshaper", "05-cilium", "10-aws", "10-bridge", "10-calico", "10-flannel", "10-k3s", "10-kindnet"];
    let lists = lists.into_iter().chain(["10-ovn-kubernetes-podshaper", "10-weave"]);
    let mut expected: Vec<String> = lists.map(|list| format!("{list}.conflist")).collect();
    expected.push("multus-macvlan.yaml".into());
    assert_eq!(names, expected);
    let readme = fs::read_to_string(directory("conflist-examples/README.md")).unwrap();
    for name in names {
        assert!(readme.contains(&format!("[{name}]({name})")), "the README does not say where {name} goes");
        if name == "multus-macvlan.yaml" {
            continue;
        }
        let chain = example(&name);
        let wanted = json!({ "bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true });
        let podshaper = podshaper(&chain);
        let mut capabilities = podshaper["capabilities"].clone();
        if podshaper.contains_key("delegate") {
            // This includes the capabilities of the network's plugins.
            capabilities.as_object_mut().unwrap().retain(|name, _| wanted.get(name).is_some());
        }
        assert_eq!((&podshaper["type"], &capabilities), (&json!("podshaper"), &wanted), "{name}");
        assert_eq!(chain.plugins.iter().filter(|plugin| plugin["type"] == "podshaper").count(), 1, "{name}");
    }
}

/// Examples whose primary plugin does not run here, each with the plugin whose result is used instead.
const FOREIGN: [(&str, &str); 7] = [
    ("10-flannel", "flannel"),
    ("10-weave", "weave"),
    ("10-calico", "calico"),
    ("05-cilium", "cilium"),
    ("10-aws", "aws"),
    ("10-ovn-kubernetes-podshaper", "ovn"),
    (K3S, "flannel"),
];
/// Flannel in another version of the specification than the recorded one.
const K3S: &str = "10-k3s";

/// Other plugins' results have fields and layouts of their own; Weave's has no interfaces.
#[test]
fn without_a_limit_the_primary_plugins_result_comes_out_byte_for_byte() {
    for (file, primary) in FOREIGN.into_iter().filter(|(file, _)| *file != K3S) {
        let (chain, result) = (example(&format!("{file}.conflist")), recorded(primary));
        let version: Value = serde_json::from_str(&result).unwrap();
        assert_eq!(version["cniVersion"], chain.cni_version, "the example and the record of {primary}");
        let mut config = podshaper(&chain).clone();
        config.insert("name".into(), json!(chain.name));
        config.insert("cniVersion".into(), json!(chain.cni_version));
        // Joined by hand: a JSON library would format the result anew.
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

/// Asserts that the kernel has the limit, and that traffic keeps to it.
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
    // The node is temporary, so the files of host-local must be as well. Everything else is as in the example.
    chain.plugins[0]["ipam"]["dataDir"] = json!(bed.host.state());
    let mut pod = Pod::new(&bed.host, "conflist").unwrap();
    pod.offer_bandwidth(Some(LIMIT), None, None);
    offer_annotation(&mut pod);
    pod.add(&chain).unwrap();
    let call = pod.last_call("podshaper", "ADD").unwrap();
    assert!(call.stdin.contains(&format!("\"prevResult\":{}", call.stdout)), "{call}");
    // On every kernel, traffic by other paths is limited.
    let owner = meter::owner(&meter::directory(&pod, INTERFACE)).unwrap();
    assert!(owner["heldAt"]["ifindex"].is_u64(), "{owner} {call}");
    assert_limited("bridge", &pod, "10.244.1.1");
    pod.check().unwrap();
    pod.del().unwrap();
    assert!(!meter::directory(&pod, INTERFACE).exists());
}

/// These networks do not run without their daemons: a pod of the bridge plugin is used instead, and podshaper gets
/// the networks' own results. The limit is requested in the second way, by annotation alone.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_examples_of_other_networks_make_limited_pods() {
    let bed = Bed::new();
    for (file, primary) in FOREIGN {
        let chain = example(&format!("{file}.conflist"));
        let mut result: Value = serde_json::from_str(&recorded(primary)).unwrap();
        result["cniVersion"] = json!(chain.cni_version);
        let mut pod = bed.pod(Limiter::Bare, 0);
        pod.offers.remove("bandwidth");
        match primary {
            "flannel" | "calico" | "aws" => pod.offer_bandwidth(Some(LIMIT), None, None),
            _ => offer_annotation(&mut pod),
        }
        let call = chain.call(podshaper(&chain), "ADD", &pod.offers, Some(&result)).unwrap();
        let attachment = Attachment::add(pod.environment(call));
        assert_limited(file, &pod, "10.213.0.1");
        drop(attachment);
        assert!(!meter::directory(&pod, INTERFACE).exists(), "{file}");
    }
}

/// kindnet's plugins are the containernetworking project's: kindnet's own daemon only writes the file.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_kindnet_example_makes_a_limited_pod() {
    let bed = Bed::new();
    let mut chain = example("10-kindnet.conflist");
    chain.plugins[0]["ipam"]["dataDir"] = json!(bed.host.state());
    let mut pod = Pod::new(&bed.host, "kindnet").unwrap();
    pod.offer_bandwidth(Some(LIMIT), None, None);
    pod.add(&chain).unwrap();
    // ptp gives the gateway's address to the node's end of the veth.
    assert_limited("kindnet", &pod, "10.244.0.1");
    pod.del().unwrap();
    assert!(!meter::directory(&pod, INTERFACE).exists());
}

/// As Multus calls podshaper: a second interface, no annotations and no cgroupPath.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn the_multus_example_limits_the_second_interface_alone() {
    const SECOND: &str = "net1";
    let bed = Bed::new();
    let mut chain = multus_example();
    // The node of the tests has no interface other than its bridge.
    chain.plugins[0]["master"] = json!("cni0");
    chain.plugins[0]["ipam"]["dataDir"] = json!(bed.host.state());
    let mut pod = bed.pod(Limiter::Bare, 0);
    pod.offers.clear();
    let mut calls = Vec::new();
    let mut result = None;
    for plugin in &chain.plugins {
        let call = chain.call(plugin, "ADD", &pod.offers, result.as_ref()).unwrap();
        let call = pod.environment(call).env("CNI_IFNAME", SECOND);
        result = Some(pod.call(&call).unwrap().json().unwrap());
        calls.push(call);
    }
    assert_eq!(meter::egress_limit(&pod, SECOND).unwrap().rate_bits_per_s, 50 * MBIT);
    assert!(!meter::directory(&pod, INTERFACE).exists());
    for call in calls.into_iter().rev() {
        pod.call(&call.env("CNI_COMMAND", "DEL")).unwrap().success().unwrap();
    }
    assert!(!meter::directory(&pod, SECOND).exists());
}
