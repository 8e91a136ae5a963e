//! A pod as the control plane sees it: a namespace with an interface that leads nowhere, a cgroup, and identifiers;
//! and podshaper's objects in the kernel for it, read by `bpftool`, which knows nothing of podshaper.
//!
//! No plugin makes the network, so a sandbox takes 20 ms instead of 200. Traffic needs a
//! [`super::harness::pod::Pod`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_route::link::LinkAttribute;
use nix::net::if_::if_nametoindex;
use serde_json::{Map, Value, json};

use super::harness::cgroup::{self, Driver, PodCgroup};
use super::harness::cni::{Call, Cni};
use super::harness::netns::Netns;
use super::harness::pod::{container_id, uuid};
use super::harness::{meter, process, unique};
use super::netlink;

/// The directory of podshaper's pins in this layout.
pub const PINS: &str = "/sys/fs/bpf/podshaper/v7";
/// The directory of the programs and maps that all pods share.
pub const NODE: &str = "/sys/fs/bpf/podshaper/v7/%node";
/// The egress rate that a sandbox asks for by default, in bits per second.
pub const RATE: u64 = 10_000_000;
/// The most time that the kernel may take to free an object without references: a worker frees it after an RCU grace
/// period.
const FREED_AFTER: Duration = Duration::from_secs(2);
/// The kernel frees maps one after the other, each after a few grace periods: a thousand maps take a slow kernel
/// minutes.
const NEXT_FREED_AFTER: Duration = Duration::from_secs(10);
/// The pins of an attachment that shares the node's programs.
pub const ATTACHMENT: [&str; 1] = ["OWNER"];
/// The directory of a pod's links, and the links of an egress limit.
pub const LINKS: (&str, [&str; 3]) = ("%links", ["count_egress", "note_setsockopt", "pace_tcp"]);
/// The programs on a cgroup with one such attachment: hook and name.
pub const PROGRAMS: [(&str, &str); 3] =
    [("cgroup_inet_egress", "count_egress"), ("cgroup_setsockopt", "note_setsockopt"), ("cgroup_sock_ops", "pace_tcp")];

/// A pod's sandbox. Dropping it removes everything, even after a failed test.
pub struct Sandbox {
    pub uid: String,
    pub container_id: String,
    /// Each sandbox has a network of its own, so that the GC of one test spares the attachments of others.
    pub network: String,
    pub netns: Arc<Netns>,
    pub cgroup: PodCgroup,
    /// The keys of stdin.
    pub stdin: Map<String, Value>,
}

/// Objects of attachments in the kernel: slots, and maps by id. The kernel does not use an id again before it has
/// used all 2^31.
#[derive(Debug, Default)]
pub struct Objects {
    maps: BTreeSet<u64>,
    slots: BTreeSet<u64>,
}

impl Sandbox {
    /// With a cgroup that the runtime names, as kubelet's cgroupfs driver makes it.
    pub fn new() -> Self {
        Self::with_netns(Arc::new(netns_with(&["eth0"])))
    }

    /// The same in a namespace that several sandboxes can share, since nothing is sent.
    pub fn with_netns(netns: Arc<Netns>) -> Self {
        let uid = uuid().unwrap();
        let path = Driver::Cgroupfs.path(&uid);
        let mut sandbox = Self::at(&path, uid, netns);
        sandbox.stdin["runtimeConfig"]["cgroupPath"] = json!(path);
        sandbox
    }

    /// With a cgroup that podshaper has to search for.
    pub fn at(path: &str, uid: String, netns: Arc<Netns>) -> Self {
        let cgroup = PodCgroup::new(cgroup::mount().unwrap().join(path.trim_start_matches('/'))).unwrap();
        Self::of(cgroup, uid, netns)
    }

    /// With this cgroup.
    pub fn of(cgroup: PodCgroup, uid: String, netns: Arc<Netns>) -> Self {
        let network = unique("network");
        let stdin = json!({
            "cniVersion": "1.1.0",
            "name": network,
            "type": "podshaper",
            "runtimeConfig": { "bandwidth": { "egressRate": RATE, "egressBurst": i32::MAX } },
            "prevResult": { "cniVersion": "1.1.0", "ips": [] },
        });
        let stdin = stdin.as_object().unwrap().clone();
        Self { uid, container_id: container_id().unwrap(), network, netns, cgroup, stdin }
    }

    /// A call for eth0 of this sandbox.
    pub fn cni(&self, verb: &str) -> Cni {
        self.cni_of(verb, &self.container_id)
    }

    /// The same call for another sandbox of the pod.
    pub fn cni_of(&self, verb: &str, container_id: &str) -> Cni {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={}",
            self.uid
        );
        Cni::new(env!("CARGO_BIN_EXE_podshaper"), verb)
            .env("CNI_CONTAINERID", container_id)
            .env("CNI_NETNS", self.netns.path().display().to_string())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Value::Object(self.stdin.clone()).to_string())
    }

    /// stdin with other values for some keys.
    pub fn stdin_with(&self, keys: Value) -> String {
        let mut stdin = self.stdin.clone();
        stdin.extend(keys.as_object().unwrap().clone());
        Value::Object(stdin).to_string()
    }

    /// stdin that asks for another egress rate.
    pub fn stdin_at(&self, bits_per_s: u64) -> String {
        let mut runtime = self.stdin["runtimeConfig"].clone();
        runtime["bandwidth"]["egressRate"] = json!(bits_per_s);
        self.stdin_with(json!({ "runtimeConfig": runtime }))
    }

    /// The largest packet that may be built for eth0, in bytes.
    pub fn gso_max_size(&self) -> u32 {
        sizes(&self.netns).0
    }

    /// Makes a call that must succeed.
    #[track_caller]
    pub fn call(&self, verb: &str) -> Call {
        ok(&self.cni(verb))
    }

    /// The pins of the pod: directories with the names of the pins in them.
    pub fn pins(&self) -> BTreeMap<String, Vec<String>> {
        names(&self.pod_directory())
            .into_iter()
            .map(|name| {
                let pins = names(&self.pod_directory().join(&name));
                (name, pins)
            })
            .collect()
    }

    /// The interfaces with an attachment, finished or not, as they are spelt in the pins.
    pub fn interfaces(&self) -> Vec<String> {
        self.pins().into_keys().filter(|name| name != LINKS.0).collect()
    }

    /// Where the pod's attachments are pinned.
    pub fn pod_directory(&self) -> PathBuf {
        Path::new(PINS).join(&self.uid)
    }

    /// The owner's record in the attachment of an interface, which is spelt as in the pins.
    pub fn owner(&self, interface: &str) -> Value {
        meter::owner(&self.pod_directory().join(interface)).unwrap()
    }

    /// Overwrites the record of an attachment with any text.
    pub fn write_owner(&self, text: &str) {
        let path = self.pod_directory().join("eth0/OWNER").display().to_string();
        let size = bpftool(&["map", "show", "pinned", &path]).unwrap()["bytes_value"].as_u64().unwrap() as usize;
        let mut bytes: Vec<String> = text.bytes().map(|byte| byte.to_string()).collect();
        assert!(bytes.len() <= size, "the record has room for {size} bytes");
        bytes.resize(size, "0".to_owned());
        let update = ["map", "update", "pinned", &path, "key", "0", "0", "0", "0", "value"];
        process::run(Command::new("bpftool").args(update).args(&bytes)).unwrap();
    }

    /// The rates in the limits map: egress and ingress, 0 for none.
    pub fn rates(&self, interface: &str) -> [u64; 2] {
        let limits = meter::limits(&self.pod_directory().join(interface)).unwrap();
        [0, 1].map(|direction| limits[direction]["rate_bits_per_s"].as_u64().unwrap())
    }

    /// The programs on the pod's cgroup, sorted.
    pub fn attached(&self) -> Vec<(String, String)> {
        let text = |program: &Value, key: &str| program[key].as_str().unwrap().to_owned();
        let mut attached: Vec<_> = programs_on(self.cgroup.path())
            .iter()
            .map(|program| (text(program, "attach_type"), self.name(program)))
            .collect();
        attached.sort();
        attached
    }

    /// The id of a program on the pod's cgroup.
    pub fn program(&self, name: &str) -> u64 {
        let programs = programs_on(self.cgroup.path());
        programs.iter().find(|program| self.name(program) == name).unwrap()["id"].as_u64().unwrap()
    }

    /// A program's name. On a kernel without tracepoints (User Mode Linux) aya sets none, so the name is taken from
    /// the pin of the program's link.
    fn name(&self, program: &Value) -> String {
        let name = program["name"].as_str().unwrap_or_default();
        if !name.is_empty() {
            return name.to_owned();
        }
        let pins = self
            .pins()
            .into_iter()
            .flat_map(|(interface, pins)| pins.into_iter().map(move |pin| (interface.clone(), pin)));
        let is_its = |(interface, pin): &(String, String)| {
            let path = self.pod_directory().join(interface).join(pin);
            bpftool(&["link", "show", "pinned", path.to_str().unwrap()])
                .is_ok_and(|link| link["prog_id"] == program["id"])
        };
        pins.into_iter().find(is_its).map(|(_, pin)| pin).unwrap_or_default()
    }

    /// The objects of the pod's attachments in the kernel, except for their links.
    pub fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for interface in &self.interfaces() {
            let owner = self.pod_directory().join(interface).join("OWNER");
            let id = bpftool(&["map", "show", "pinned", owner.to_str().unwrap()]).unwrap()["id"].as_u64().unwrap();
            objects.maps.insert(id);
            objects.slots.insert(self.owner(interface)["slot"].as_u64().unwrap());
        }
        objects
    }

    /// Asserts that eth0 has these limits (egress first, 0 for none), and that exactly the programs for them are
    /// attached.
    #[track_caller]
    pub fn assert_rates(&self, rates: [u64; 2]) {
        assert_eq!(self.rates("eth0"), rates);
        let mut expected: Vec<(&str, &str)> = if rates[0] > 0 { PROGRAMS.to_vec() } else { Vec::new() };
        // The way of limiting ingress depends on the kernel and the interface.
        match self.owner("eth0").get("ingressBy").and_then(Value::as_str) {
            None => assert_eq!(rates[1], 0),
            Some("held-acks" | "held-data") => {
                expected.extend([("cgroup_inet_ingress", "count_ingress"), ("cgroup_sock_ops", "hold_acks")]);
                if rates[0] == 0 {
                    expected.extend(PROGRAMS.iter().filter(|(_, name)| *name != "pace_tcp"));
                }
            }
            Some("tbf" | "drops") => expected.push(("cgroup_inet_ingress", "count_ingress")),
            Some(other) => panic!("ingress by {other}"),
        }
        expected.sort_unstable();
        let expected: Vec<_> = expected.iter().map(|(hook, name)| (String::from(*hook), String::from(*name))).collect();
        let once = within(FREED_AFTER, || self.attached() == expected);
        assert!(once, "attached: {:?}, and not {expected:?}", self.attached());
        assert_eq!(links_on(self.cgroup.path()).len(), expected.len());
    }

    /// Asserts that exactly one complete attachment is there, for egress, with this owner.
    #[track_caller]
    pub fn assert_limited(&self, container_id: &str, egress: u64) {
        let whole = ATTACHMENT.map(String::from).to_vec();
        let mut pins = self.pins();
        let links = pins.remove(LINKS.0).unwrap();
        assert!(LINKS.1.iter().all(|name| links.iter().any(|link| link == name)), "{links:?}");
        assert_eq!(pins, BTreeMap::from([("eth0".to_owned(), whole)]));
        assert_eq!(self.owner("eth0")["containerId"], container_id);
        self.assert_rates([egress, 0]);
    }

    /// Asserts that nothing is pinned for the pod or attached to its cgroup.
    #[track_caller]
    pub fn assert_unlimited(&self) {
        assert!(!self.pod_directory().exists(), "left in bpffs: {:?}", self.pins());
        let nothing = || programs_on(self.cgroup.path()).is_empty();
        assert!(within(FREED_AFTER, nothing), "left on the cgroup: {:?}", self.attached());
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // A test that did not call DEL, or failed before, must not leave podshaper's interfaces on this machine.
        if self.pod_directory().exists() {
            let _ = self.cni("DEL").call();
        }
        // Pins first: removing the cgroup would detach their programs, but not free them.
        let _ = fs::remove_dir_all(self.pod_directory());
    }
}

impl Objects {
    /// Asserts that the kernel has freed all of them.
    #[track_caller]
    pub fn assert_freed(&self) {
        assert!(!self.slots.is_empty() && !self.maps.is_empty(), "there were none: {self:?}");
        let slots: BTreeSet<u64> = meter::slots().unwrap();
        assert!(self.slots.is_disjoint(&slots), "limits left: {:?}", &self.slots & &slots);
        let mut fewest = usize::MAX;
        loop {
            let there = maps();
            let left = &self.maps & &there;
            if left.is_empty() {
                return;
            }
            // Counts all maps, since the kernel may free other maps of this test first.
            fewest = fewest.min(there.len());
            let fewer = || maps().len() < fewest;
            assert!(within(NEXT_FREED_AFTER, fewer), "maps left: {left:?}");
        }
    }

    pub fn extend(&mut self, other: Objects) {
        self.maps.extend(other.maps);
        self.slots.extend(other.slots);
    }
}

/// Whether this kernel's TCP builds large packets for short round trips at any pacing rate: since Linux 5.18.
pub fn builds_large_packets() -> bool {
    Path::new("/proc/sys/net/ipv4/tcp_tso_rtt_log").exists()
}

/// `gso_max_size` of a namespace's eth0, and `gso_ipv4_max_size`, which exists since Linux 6.3 and which the oldest
/// iproute2 does not show.
pub fn sizes(netns: &Netns) -> (u32, Option<u32>) {
    let link = netns.inside(|| netlink::link(if_nametoindex("eth0").unwrap()).unwrap().unwrap()).unwrap();
    let find = |wanted: fn(&LinkAttribute) -> Option<u32>| link.attributes.iter().find_map(wanted);
    let max = find(|attribute| if let LinkAttribute::GsoMaxSize(bytes) = attribute { Some(*bytes) } else { None });
    let ipv4 = find(|attribute| if let LinkAttribute::GsoIpv4MaxSize(bytes) = attribute { Some(*bytes) } else { None });
    (max.unwrap(), ipv4)
}

/// Sets both sizes; the second only if the kernel has it.
pub fn set_sizes(netns: &Netns, max: u32, ipv4: u32) {
    let has_ipv4 = sizes(netns).1.is_some();
    let ipv4 = has_ipv4.then_some(LinkAttribute::GsoIpv4MaxSize(ipv4));
    let attributes = [LinkAttribute::GsoMaxSize(max)].into_iter().chain(ipv4).collect();
    netns.inside(|| netlink::set_link(if_nametoindex("eth0").unwrap(), attributes).unwrap()).unwrap();
}

/// A TCP setting of the namespace; `None` if this kernel lacks it.
pub fn sysctl(netns: &Netns, name: &str) -> Option<u32> {
    let path = format!("/proc/sys/net/ipv4/{name}");
    netns.inside(|| fs::read_to_string(path)).unwrap().ok().map(|text| text.trim().parse().unwrap())
}

/// A namespace with these interfaces, each with an end that leads nowhere.
pub fn netns_with(interfaces: &[&str]) -> Netns {
    let netns = Netns::new(&unique("sandbox")).unwrap();
    for (number, interface) in interfaces.iter().enumerate() {
        let peer = format!("peer{number}");
        netns.run("ip", &["link", "add", interface, "type", "veth", "peer", "name", &peer]).unwrap();
    }
    netns
}

/// A namespace with an eth0 whose other end is on the host, as the bridge plugin makes it; and the name of that end.
pub fn netns_with_host_end() -> (Netns, String) {
    let netns = netns_with(&[]);
    // An interface name has at most 15 characters.
    let host_end = format!("ps{}", &uuid().unwrap()[..8]);
    let words = ["link", "add", &host_end, "type", "veth", "peer", "name", "eth0", "netns", netns.name()];
    process::run(Command::new("ip").args(words)).unwrap();
    (netns, host_end)
}

/// The number of qdiscs on both ends that have podshaper's own handle.
pub fn own_qdiscs(netns: &Netns, host_end: &str) -> usize {
    let outside = process::run(Command::new("tc").args(["qdisc", "show", "dev", host_end])).unwrap();
    let inside = netns.run("tc", &["qdisc", "show", "dev", "eth0"]).unwrap();
    (outside + &inside).matches(" 7064: ").count()
}

/// Makes a call that must succeed.
#[track_caller]
pub fn ok(cni: &Cni) -> Call {
    let call = cni.call().unwrap();
    assert!(call.status.success() && !call.stderr.contains("panicked"), "{call}");
    call
}

/// Makes a call that must fail, and print only an error in the specification's form on stdout. Returns its code and
/// details.
#[track_caller]
pub fn refused(cni: &Cni) -> (u64, String) {
    let call = cni.call().unwrap();
    assert_eq!(call.status.code(), Some(1), "{call}");
    let error: BTreeMap<String, Value> = serde_json::from_str(&call.stdout).unwrap_or_else(|_| panic!("{call}"));
    assert_eq!(error.keys().collect::<Vec<_>>(), ["cniVersion", "code", "details", "msg"], "{call}");
    assert!(!error["msg"].as_str().unwrap().is_empty() && !call.stderr.contains("panicked"), "{call}");
    (error["code"].as_u64().unwrap(), error["details"].as_str().unwrap().to_owned())
}

/// Waits for a condition to become true. Returns whether it did in time.
pub fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Ids of the links on a cgroup, including dead and replaced links.
pub fn links_on(cgroup: &Path) -> Vec<u64> {
    links(cgroup).unwrap().iter().map(|link| link["id"].as_u64().unwrap()).collect()
}

fn links(cgroup: &Path) -> Result<Vec<Value>, String> {
    let id = fs::metadata(cgroup).map_err(|error| error.to_string())?.ino();
    // bpftool fails if a link of another test disappears after bpftool has listed it.
    let links = (0..5).find_map(|_| bpftool(&["link", "show"]).ok());
    let links = links.map_or_else(|| bpftool(&["link", "show"]), Ok)?;
    Ok(links.as_array().into_iter().flatten().filter(|link| link["cgroup_id"].as_u64() == Some(id)).cloned().collect())
}

/// bpftool asks for every hook that it knows, and fails at the first hook that an old kernel (5.10) does not know.
/// There the programs are found by their links.
fn programs_by_links(cgroup: &Path) -> Result<Value, String> {
    let program = |link: &Value| -> Result<Value, String> {
        let mut program = bpftool(&["prog", "show", "id", &link["prog_id"].to_string()])?;
        program["attach_type"] = link["attach_type"].clone();
        Ok(program)
    };
    links(cgroup)?.iter().map(program).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

/// The programs attached to a cgroup. bpftool fails if a program disappears meanwhile, which happens repeatedly on a
/// slow machine, and if the cgroup is gone.
fn programs_on(cgroup: &Path) -> Vec<Value> {
    let show = || bpftool(&["cgroup", "show", cgroup.to_str().unwrap()]).or_else(|_| programs_by_links(cgroup)).ok();
    let found = (0..50).find_map(|_| if cgroup.exists() { show() } else { Some(json!([])) });
    // bpftool prints nothing for a cgroup without programs.
    found.unwrap().as_array().cloned().unwrap_or_default()
}

/// Ids of all maps.
fn maps() -> BTreeSet<u64> {
    // A map of another test may disappear while bpftool runs.
    let all = (0..5).find_map(|_| bpftool(&["map", "show"]).ok()).unwrap();
    all.as_array().into_iter().flatten().map(|object| object["id"].as_u64().unwrap()).collect()
}

/// The JSON that bpftool prints. Up to Linux 5.10 the kernel charges BPF objects to the caller's limit of locked
/// memory, which not every root user may raise.
pub fn bpftool(arguments: &[&str]) -> Result<Value, String> {
    const UNLOCKED: &str = "ulimit -l unlimited 2>/dev/null || true; exec bpftool -j \"$@\"";
    let output = process::run(Command::new("sh").args(["-c", UNLOCKED, "bpftool"]).args(arguments));
    let output = output.map_err(|error| error.to_string())?;
    if output.trim().is_empty() {
        Ok(json!([]))
    } else {
        serde_json::from_str(&output).map_err(|error| error.to_string())
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
