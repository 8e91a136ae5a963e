use serde_json::{Value, json};

use super::{Bed, MBIT, assert_rate};
use crate::harness::PLUGIN_DIR;
use crate::harness::cni::Chain;
use crate::harness::host::Host;
use crate::harness::limiter::Limits;
use crate::harness::measure::{self, Bulk, Way};
use crate::harness::meter;
use crate::harness::pod::{INTERFACE, Pod};
use crate::operator::{listed, says};

const LIMIT: u64 = 20 * MBIT;
const BOTH: Limits = Limits { egress: Some(LIMIT), ingress: Some(LIMIT) };
/// The node's own address on the link that ipvlan and macvlan share.
const NODE: [u8; 4] = [10, 215, 0, 1];

/// A network of a single plugin on a link of the node: `up0`, whose other end has the node's address. (ipvlan and
/// macvlan cannot reach the node over the link that they are on.)
fn over_a_link(host: &Host, mut plugin: Value) -> Chain {
    for arguments in
        ["link add up0 type veth peer name up1", "addr add 10.215.0.1/24 dev up1", "link set up0 up", "link set up1 up"]
    {
        host.netns.run("ip", &arguments.split(' ').collect::<Vec<_>>()).unwrap();
    }
    plugin["master"] = json!("up0");
    plugin["ipam"] = json!({ "type": "host-local", "dataDir": host.state(), "subnet": "10.215.0.0/24" });
    Chain::new(&json!({ "cniVersion": "1.0.0", "name": "podshaper-link", "plugins": [plugin] }), &[PLUGIN_DIR]).unwrap()
}

/// ipvlan and macvlan have no host end for a queue. Egress is paced as with a veth. Ingress is held where the kernel
/// has fq, and is limited by drops elsewhere; the attachment's record says which. Traffic by other paths is not
/// limited.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn interfaces_that_are_no_veth_are_limited() {
    for plugin in [json!({ "type": "ipvlan", "mode": "l2" }), json!({ "type": "macvlan", "mode": "bridge" })] {
        let bed = Bed::new();
        let pod = bed.pod_of(over_a_link(&bed.host, plugin.clone()), json!({}), BOTH);
        assert_others_are_free(&pod, &plugin);
        let bulk = Bulk { flows: 2, seconds: 2.0, to: Some(NODE.into()), ..Bulk::default() };
        let out = measure::bulk(&pod, &bulk).unwrap();
        assert_rate(&format!("out by {plugin}"), out.timeline.wire_rate(0.5, 2.0), LIMIT, 0.05);
        let bulk = Bulk { way: Way::In, to: None, ..bulk };
        let rate = measure::bulk(&pod, &bulk).unwrap().timeline.wire_rate(0.5, 2.0);
        let what = format!("in by {plugin}: {:.1} Mbit/s", rate / 1e6);
        eprintln!("{what}");
        assert!(rate < LIMIT as f64 * 1.1 && rate > LIMIT as f64 / 100.0, "{what}");
    }
}

/// The record names no host end, and `list` says in both formats that other paths are not held.
#[track_caller]
fn assert_others_are_free(pod: &Pod, plugin: &Value) {
    let record = meter::owner(&meter::directory(pod, INTERFACE)).unwrap();
    assert!(record["heldAt"].is_null(), "{plugin}: {record}");
    let entry = listed(&pod.uid).unwrap();
    for direction in ["egress", "ingress"] {
        assert_eq!(entry[direction]["otherPaths"]["held"], false, "{plugin}: {entry}");
    }
    let table = says(&["list", "--sample", "0"]);
    assert_eq!(table.matches("not held").count(), 2, "{plugin}: {table}");
}

/// Packets of 9000 bytes, and of the 1450 bytes that VXLAN leaves of 1500, are charged with their own size.
#[test]
#[ignore = "needs root and the CNI plugins"]
fn packets_of_other_sizes_weigh_what_they_are() {
    for mtu in [9000, 1450] {
        let bed = Bed::new();
        let mut network = bed.host.bridge_chain().unwrap();
        network.plugins[0].insert("mtu".to_owned(), json!(mtu));
        let pod = bed.pod_of(network, json!({}), Limits { egress: Some(LIMIT), ingress: None });
        for ipv6 in [false, true] {
            let result = measure::bulk(&pod, &Bulk { flows: 2, seconds: 2.0, ipv6, ..Bulk::default() }).unwrap();
            let what = format!("MTU {mtu}, IPv6 {ipv6}");
            assert_rate(&what, result.timeline.wire_rate(0.5, 2.0), LIMIT, 0.05);
            assert!(result.retransmits <= 20, "{what}: {} retransmits", result.retransmits);
        }
    }
}
