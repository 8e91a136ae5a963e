//! Paths on which traffic passes a pod's interface without the hooks of the pod's cgroup, or with a hook that must
//! not count it.

use std::fs;
use std::mem;
use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use clap::ValueEnum;

use super::cgroup::{self, PodCgroup};
use super::host::BRIDGE;
use super::measure::{self, Bulk, FramesBy, Timeline, Udp, Way};
use super::netns::Netns;
use super::pod::{INTERFACE, Pod};
use super::process::{self, Running};
use super::{Context, Failure, Result, unique};

/// Addresses of a tunnel's ends: the node's, the pod's.
const TUNNEL: [[u8; 4]; 2] = [[10, 77, 0, 1], [10, 77, 0, 2]];
/// The address of a namespace that a pod has made.
const NESTED: [u8; 4] = [10, 78, 0, 2];
/// An unused address of the pod's subnet.
const FREE: [u8; 4] = [10, 213, 0, 200];
const GROUP: [u8; 4] = [239, 77, 0, 1];
/// The number of a nested namespace's interface, where it must differ from the number of the pod's interface.
const OTHER_NUMBER: u32 = 77;

/// One of these paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Path {
    /// Processes of another cgroup in the pod's namespace.
    AnotherCgroup,
    Vxlan,
    Wireguard,
    /// A VPN whose program runs in the pod: the pod's own sockets send what the tunnel carries.
    Tun,
    Gre,
    Ipip,
    AfPacket,
    /// With PACKET_QDISC_BYPASS.
    AfPacketPastTheQueue,
    AfXdp,
    /// Of a namespace that the pod has made and routes.
    Forwarded,
    ForwardedWithNat,
    /// Of such a namespace whose interface has the number of the pod's.
    SameNumber,
    /// A bridge above eth0.
    Bridge,
    /// In a namespace that the pod has made.
    Ipvlan,
    Macvlan,
    Multicast,
    /// The kernel's own: what the pod's says to pings.
    Answers,
    /// Datagrams that are cut.
    Fragments,
}

/// The traffic to send.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub way: Way,
    /// UDP, or TCP if false.
    pub is_udp: bool,
    pub limit: u64,
    pub seconds: f64,
}

/// The addresses of both ends; `None` is the default address.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    pub node: Option<IpAddr>,
    pub pod: Option<IpAddr>,
    /// The address by which the node reaches the pod's end, where addresses are translated.
    by: Option<IpAddr>,
    /// The namespace of the interface that is limited.
    limited: &'a Netns,
}

impl<'a> Ends<'a> {
    pub fn of(pod: &'a Pod) -> Self {
        Self { node: None, pod: None, by: None, limited: &pod.netns }
    }

    fn of_tunnel(pod: &'a Pod) -> Self {
        Self { node: Some(TUNNEL[0].into()), pod: Some(TUNNEL[1].into()), ..Self::of(pod) }
    }

    /// The address of the receiving end.
    fn reached(self, way: Way) -> Option<IpAddr> {
        if way == Way::Out { self.node } else { self.pod }
    }

    /// The translated address by which the receiving end is reached, if there is one.
    fn reached_by(self, way: Way) -> Option<IpAddr> {
        if way == Way::Out { None } else { self.by }
    }
}

impl Path {
    pub fn title(self) -> &'static str {
        match self {
            Self::AnotherCgroup => "a socket of another cgroup",
            Self::Vxlan => "VXLAN",
            Self::Wireguard => "WireGuard",
            Self::Tun => "tun, a VPN's program",
            Self::Gre => "GRE",
            Self::Ipip => "ipip",
            Self::AfPacket => "AF_PACKET",
            Self::AfPacketPastTheQueue => "AF_PACKET, PACKET_QDISC_BYPASS",
            Self::AfXdp => "AF_XDP",
            Self::Forwarded => "forwarded, a nested namespace",
            Self::ForwardedWithNat => "forwarded with NAT",
            Self::SameNumber => "nested, with the pod's ifindex",
            Self::Bridge => "a bridge above eth0",
            Self::Ipvlan => "ipvlan above eth0",
            Self::Macvlan => "macvlan above eth0",
            Self::Multicast => "multicast",
            Self::Answers => "answers to pings",
            Self::Fragments => "fragments",
        }
    }

    /// Whether the path carries such traffic.
    pub fn carries(self, way: Way, is_udp: bool) -> bool {
        match self {
            Self::AfPacket | Self::AfPacketPastTheQueue | Self::AfXdp | Self::Answers => way == Way::Out && is_udp,
            Self::Multicast | Self::Fragments => is_udp,
            _ => true,
        }
    }

    /// Fails if the running kernel lacks the path.
    pub fn must_be_had(self) -> Result<()> {
        let link = match self {
            Self::AfXdp if !has_xdp()? => return Err(Failure::new("this kernel has no AF_XDP")),
            Self::Vxlan => "type vxlan id 7 dstport 4789",
            Self::Wireguard => "type wireguard",
            Self::Gre => "type gre remote 192.0.2.1",
            Self::Ipip => "type ipip remote 192.0.2.1",
            Self::Ipvlan => "link v0 type ipvlan mode l2",
            Self::Macvlan => "link v0 type macvlan mode bridge",
            _ => return Ok(()),
        };
        let netns = Netns::new(&unique("asked"))?;
        run(&netns, "ip link add v0 type veth peer name v1")?;
        let made = run(&netns, &format!("ip link add name t0 {link}"));
        made.map(drop).context(format_args!("this kernel cannot make what {} takes", self.title()))
    }

    /// Sets up the path, and calls `work` with a pod whose processes use it.
    pub fn with<T>(self, pod: &mut Pod, work: impl FnOnce(&Pod, Ends) -> Result<T>) -> Result<T> {
        match self {
            Self::AnotherCgroup => as_another_cgroup(pod, |pod| work(pod, Ends::of(pod)))?,
            Self::Vxlan | Self::Wireguard | Self::Gre | Self::Ipip => {
                self.tunnel(pod)?;
                work(pod, Ends::of_tunnel(pod))
            }
            Self::Tun => {
                let _programs = vpn(pod)?;
                work(pod, Ends::of_tunnel(pod))
            }
            Self::Forwarded => in_nested(pod, nest(pod, OTHER_NUMBER)?, NESTED, None, work),
            Self::SameNumber => in_nested(pod, nest(pod, number(pod)?)?, NESTED, None, work),
            Self::ForwardedWithNat => {
                let nested = nest(pod, OTHER_NUMBER)?;
                run(&pod.netns, "iptables -w -t nat -A POSTROUTING -o eth0 -j MASQUERADE")?;
                run(
                    &pod.netns,
                    &format!("iptables -w -t nat -A PREROUTING -i eth0 -j DNAT --to {}", IpAddr::from(NESTED)),
                )?;
                let by = address(pod)?;
                in_nested(pod, nested, NESTED, Some(by), work)
            }
            Self::Ipvlan | Self::Macvlan => in_nested(pod, self.above(pod)?, FREE, None, work),
            Self::Bridge => {
                bridge(pod)?;
                work(pod, Ends::of(pod))
            }
            Self::Multicast => {
                run(&pod.netns, "ip route add 239.0.0.0/8 dev eth0")?;
                run(&pod.host.netns, "ip route replace 239.0.0.0/8 dev cni0")?;
                work(pod, Ends { node: Some(GROUP.into()), pod: Some(GROUP.into()), ..Ends::of(pod) })
            }
            Self::AfXdp if !has_xdp()? => Err(Failure::new("this kernel has no AF_XDP")),
            Self::AfPacket | Self::AfPacketPastTheQueue | Self::AfXdp | Self::Answers | Self::Fragments => {
                work(pod, Ends::of(pod))
            }
        }
    }

    /// Sends, and returns the traffic on the wire behind the limiter: at the node's bridge, or at the pod's
    /// interface.
    pub fn send(self, pod: &Pod, ends: Ends, load: &Load) -> Result<Timeline> {
        let (netns, interface) = match load.way {
            // The pod's own socket receives it. With fq, datagrams are dropped at that socket.
            Way::In if self == Self::Multicast => return Ok(measure::udp(pod, &self.udp(ends, load))?.timeline),
            Way::In => (ends.limited, INTERFACE),
            Way::Out | Way::Within => (&pod.host.netns, BRIDGE),
        };
        measure::watched(netns, interface, load.seconds, || self.load(pod, ends, load))
    }

    fn udp(self, ends: Ends, load: &Load) -> Udp {
        let Load { way, limit, seconds, .. } = *load;
        let size = if self == Self::Fragments { 4000 } else { 1400 };
        let rate = limit / 10 * 13;
        let (to, by) = (ends.reached(way), ends.reached_by(way));
        Udp { way, to, by, rate, seconds, size, large_buffer: true, ..Udp::default() }
    }

    fn load(self, pod: &Pod, ends: Ends, load: &Load) -> Result<()> {
        let Load { way, is_udp, seconds, .. } = *load;
        match self {
            Self::AfPacket => measure::frames(pod, FramesBy::Packet, seconds),
            Self::AfPacketPastTheQueue => measure::frames(pod, FramesBy::PacketPastTheQueue, seconds),
            Self::AfXdp => measure::frames(pod, FramesBy::Xdp, seconds),
            Self::Answers => measure::pings(pod, seconds),
            _ if is_udp => measure::udp(pod, &self.udp(ends, load)).map(drop),
            _ => {
                let (to, by) = (ends.reached(way), ends.reached_by(way));
                let bulk = Bulk { way, to, by, flows: 2, seconds, ..Bulk::default() };
                measure::bulk(pod, &bulk).map(drop)
            }
        }
    }

    /// A tunnel between pod and node, whose pod end the pod has made.
    fn tunnel(self, pod: &Pod) -> Result<()> {
        let (node, own) = (pod.host.gateway_v4(), address(pod)?);
        let keys = if self == Self::Wireguard { Some([key()?, key()?]) } else { None };
        let ends = [(&pod.host.netns, node, own), (&pod.netns, own, node)];
        for (end, (netns, local, remote)) in ends.into_iter().enumerate() {
            let kind = match self {
                Self::Vxlan => format!("vxlan id 7 dstport 4789 local {local} remote {remote}"),
                Self::Gre => format!("gre local {local} remote {remote}"),
                Self::Ipip => format!("ipip local {local} remote {remote}"),
                _ => "wireguard".to_owned(),
            };
            run(netns, &format!("ip link add t0 type {kind}"))?;
            if let Some(keys) = &keys {
                configure_wireguard(netns, keys, end, remote)?;
            }
            run(netns, &format!("ip addr add {}/24 dev t0", IpAddr::from(TUNNEL[end])))?;
            run(netns, "ip link set t0 up")?;
        }
        Ok(())
    }

    /// A namespace whose interface is on top of the pod's interface.
    fn above(self, pod: &Pod) -> Result<Netns> {
        let nested = Netns::new(&unique("nested"))?;
        let kind = if self == Self::Ipvlan { "ipvlan mode l2" } else { "macvlan mode bridge" };
        run(&pod.netns, &format!("ip link add v0 link eth0 type {kind}"))?;
        run(&pod.netns, &format!("ip link set v0 netns {} name eth0", nested.name()))?;
        run(&nested, &format!("ip addr add {}/24 dev eth0", IpAddr::from(FREE)))?;
        run(&nested, "ip link set eth0 up")?;
        Ok(nested)
    }
}

/// Whether the kernel has AF_XDP. User Mode Linux has not.
pub fn has_xdp() -> Result<bool> {
    const PROTOCOLS: &str = "/proc/net/protocols";
    let text = fs::read_to_string(PROTOCOLS).context(format_args!("read {PROTOCOLS}"))?;
    Ok(text.lines().any(|line| line.starts_with("XDP")))
}

pub fn run(netns: &Netns, command: &str) -> Result<String> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    netns.run(program, &words.collect::<Vec<_>>())
}

/// Runs `work` while the pod's traffic comes from the processes of another cgroup, like that of a service mesh's
/// proxy on the node.
pub fn as_another_cgroup<T>(pod: &mut Pod, work: impl FnOnce(&Pod) -> T) -> Result<T> {
    let other = PodCgroup::new(cgroup::mount()?.join(unique("mesh")))?;
    let own = mem::replace(&mut pod.cgroup, other);
    let done = work(pod);
    pod.cgroup = own;
    Ok(done)
}

fn in_nested<T>(
    pod: &mut Pod,
    nested: Netns,
    address: [u8; 4],
    by: Option<IpAddr>,
    work: impl FnOnce(&Pod, Ends) -> Result<T>,
) -> Result<T> {
    let own = mem::replace(&mut pod.netns, nested);
    let done = work(pod, Ends { node: None, pod: Some(address.into()), by, limited: &own });
    pod.netns = own;
    done
}

/// Makes a namespace in the pod, as docker in docker does. `number` is the number of its interface.
fn nest(pod: &Pod, number: u32) -> Result<Netns> {
    let nested = Netns::new(&unique("nested"))?;
    run(&pod.netns, &format!("ip link add n0 type veth peer name eth0 index {number} netns {}", nested.name()))?;
    for command in ["ip addr add 10.78.0.1/24 dev n0", "ip link set n0 up", "sysctl -q net.ipv4.ip_forward=1"] {
        run(&pod.netns, command)?;
    }
    for command in ["ip addr add 10.78.0.2/24 dev eth0", "ip link set eth0 up", "ip route add default via 10.78.0.1"] {
        run(&nested, command)?;
    }
    run(&pod.host.netns, &format!("ip route add 10.78.0.0/24 via {}", address(pod)?))?;
    Ok(nested)
}

/// Runs a program at each end of a tunnel, which exchange datagrams as long as they run.
fn vpn(pod: &Pod) -> Result<[Running; 2]> {
    let (node, own) = (pod.host.gateway_v4().to_string(), address(pod)?.to_string());
    let socat = |mut command: Command, end: usize, local: &str, remote: &str| {
        let device = format!("TUN:{}/24,tun-type=tun,tun-name=t0,iff-up", IpAddr::from(TUNNEL[end]));
        let datagrams = format!("UDP4-DATAGRAM:{remote}:1194,bind={local}:1194");
        Running::start(command.args([device, datagrams]))
    };
    let mut on_node = Command::new("nsenter");
    on_node.arg(format!("--net={}", pod.host.netns.path().display())).arg("socat");
    let programs = [socat(on_node, 0, &node, &own)?, socat(pod.command("socat")?, 1, &own, &node)?];
    for netns in [&pod.host.netns, &pod.netns] {
        // So that packets in the tunnel fit into 1500 bytes outside.
        let mut tries = 100;
        while let Err(error) = run(netns, "ip link set t0 mtu 1440") {
            tries -= 1;
            if tries == 0 {
                return Err(error);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(programs)
}

fn bridge(pod: &Pod) -> Result<()> {
    let address = address(pod)?;
    for command in [
        "ip link add br0 type bridge",
        "ip link set br0 up",
        "ip link set eth0 master br0",
        &format!("ip addr del {address}/24 dev eth0"),
        &format!("ip addr add {address}/24 dev br0"),
    ] {
        run(&pod.netns, command)?;
    }
    Ok(())
}

/// The number of the pod's interface.
pub fn number(pod: &Pod) -> Result<u32> {
    let link = pod.netns.run("ip", &["-o", "link", "show", INTERFACE])?;
    let number = link.split(':').next().and_then(|number| number.parse().ok());
    number.ok_or_else(|| Failure::new(format_args!("no number in {link}")))
}

fn address(pod: &Pod) -> Result<IpAddr> {
    pod.addresses().first().copied().ok_or_else(|| Failure::new("a pod without an address: add it to a network first"))
}

/// A private key and its public key.
struct Key {
    private: String,
    public: String,
}

fn key() -> Result<Key> {
    let private = process::run(Command::new("wg").arg("genkey"))?.trim().to_owned();
    let public = process::run(Command::new("sh").args(["-c", &format!("echo {private} | wg pubkey")]))?;
    Ok(Key { private, public: public.trim().to_owned() })
}

fn configure_wireguard(netns: &Netns, keys: &[Key; 2], end: usize, remote: IpAddr) -> Result<()> {
    let (own, other) = (&keys[end], &keys[1 - end]);
    // `wg` reads a key from a file. Not all machines of tests/lab have /dev/stdin.
    let command = format!(
        "echo {} | wg set t0 listen-port 51820 private-key /proc/self/fd/0 peer {} allowed-ips 0.0.0.0/0 \
         endpoint {remote}:51820",
        own.private, other.public
    );
    netns.run("sh", &["-c", &command])?;
    // So that packets in the tunnel fit into 1500 bytes outside.
    run(netns, "ip link set t0 mtu 1440").map(drop)
}
