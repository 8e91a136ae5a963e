//! A machine behind a router: the pod's node forwards, and the path may be long and lose packets.

use std::net::IpAddr;

use super::netns::Netns;
use super::pod::Pod;
use super::{Result, unique};

/// The node's end of the link to the remote.
const LINK: &str = "podshaper-away";
const ADDRESS: [u8; 4] = [192, 168, 77, 2];

/// A machine behind a router.
pub struct Remote {
    pub netns: Netns,
}

/// The delay and the loss of a path.
#[derive(Clone, Copy, Debug, Default)]
pub struct Path {
    pub rtt_ms: u32,
    /// Lost packets, in percent of those that the pod sends.
    pub loss_percent: f64,
}

impl Remote {
    /// A remote that reaches the pod through its node.
    pub fn new(pod: &Pod) -> Result<Self> {
        let netns = Netns::new(&unique("away"))?;
        let node = &pod.host.netns;
        node.run("ip", &["link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", netns.name()])?;
        node.run("ip", &["addr", "add", "192.168.77.1/24", "dev", LINK])?;
        node.run("ip", &["link", "set", LINK, "up"])?;
        node.run("sysctl", &["-q", "net.ipv4.ip_forward=1"])?;
        netns.run("ip", &["addr", "add", "192.168.77.2/24", "dev", "eth0"])?;
        netns.run("ip", &["link", "set", "eth0", "up"])?;
        netns.run("ip", &["route", "add", "default", "via", "192.168.77.1"])?;
        // The bridge plugin gives a pod only the route to its own subnet.
        let gateway = pod.host.gateway_v4().to_string();
        pod.netns.run("ip", &["route", "add", "192.168.77.0/24", "via", &gateway])?;
        Ok(Self { netns })
    }

    /// A remote at the end of such a path. Each direction has half of the round-trip time, by netem.
    pub fn at_the_end_of(path: Path, pod: &Pod) -> Result<Self> {
        let remote = Self::new(pod)?;
        let delay = format!("{}us", path.rtt_ms * 500);
        let loss = format!("{}%", path.loss_percent);
        // More packets than are in flight at any limit here.
        let netem = ["root", "netem", "limit", "100000", "delay", &delay];
        let towards = [&["qdisc", "add", "dev", LINK][..], &netem, &["loss", &loss]].concat();
        pod.host.netns.run("tc", &towards)?;
        remote.netns.run("tc", &[&["qdisc", "add", "dev", "eth0"][..], &netem].concat())?;
        Ok(remote)
    }

    /// A remote behind a link with this rate for packets from the pod, and a queue of 2 ms.
    pub fn behind_a_link(bits_per_s: u64, pod: &Pod) -> Result<Self> {
        let remote = Self::new(pod)?;
        let rate = format!("{bits_per_s}bit");
        let link = ["qdisc", "add", "dev", LINK, "root", "tbf", "rate", &rate, "burst", "256k", "latency", "2ms"];
        pod.host.netns.run("tc", &link)?;
        Ok(remote)
    }

    pub fn address(&self) -> IpAddr {
        ADDRESS.into()
    }
}
