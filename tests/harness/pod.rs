//! A throw-away pod: what kubelet and the runtime make before a CNI plugin is called, and the calls that they make.

use std::any::Any;
use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::thread;

use serde_json::{Map, Value, json};

use super::cgroup::{self, Driver, PodCgroup};
use super::cni::{Call, Chain, Cni};
use super::host::Host;
use super::netns::Netns;
use super::remote::Remote;
use super::{Context, Failure, Result, note, unique};

/// The interface that the runtime asks for.
pub const INTERFACE: &str = "eth0";

/// A pod: network namespace, cgroup, identity. Dropping it kills its processes, calls DEL if that is due, and removes
/// the rest.
pub struct Pod<'host> {
    pub host: &'host Host,
    pub name: String,
    pub uid: String,
    /// Identifies the sandbox: a new sandbox gets a new id, see [`Pod::new_sandbox`].
    pub container_id: String,
    /// Data that the runtime passes to plugins that ask for it by `capabilities`, such as `bandwidth`.
    pub offers: Map<String, Value>,
    /// Every call made, in order.
    pub calls: Vec<Call>,
    pub netns: Netns,
    pub cgroup: PodCgroup,
    /// The other end of the pod's traffic, if that is not its node.
    pub remote: Option<Remote>,
    /// Objects that must live as long as the pod.
    kept: Vec<Box<dyn Any + Send + Sync>>,
    /// The chain that was added, with its last result: the data that a runtime keeps on disk for the DEL.
    added: Option<(Chain, Option<Value>)>,
}

impl<'host> Pod<'host> {
    pub fn new(host: &'host Host, prefix: &str) -> Result<Self> {
        Self::with_driver(host, prefix, Driver::Cgroupfs)
    }

    pub fn with_driver(host: &'host Host, prefix: &str, driver: Driver) -> Result<Self> {
        let (name, uid) = (unique(prefix), uuid()?);
        let path = driver.path(&uid);
        let cgroup = PodCgroup::new(cgroup::mount()?.join(path.trim_start_matches('/')))?;
        let netns = Netns::new(&name)?;
        let offers = Map::from_iter([("cgroupPath".to_owned(), json!(path))]);
        let container_id = container_id()?;
        let (calls, kept) = (vec![], vec![]);
        Ok(Self { host, name, uid, container_id, offers, calls, netns, cgroup, remote: None, kept, added: None })
    }

    /// Makes the runtime pass `value` to plugins with the capability `name`.
    pub fn offer(&mut self, name: &str, value: Value) {
        self.offers.insert(name.to_owned(), value);
    }

    /// The offer that runtimes make of a pod's annotations: limits in bits per second; the burst in bits, if one is
    /// set.
    pub fn offer_bandwidth(&mut self, egress: Option<u64>, ingress: Option<u64>, burst: Option<u64>) {
        let mut bandwidth = Map::new();
        for (direction, rate) in [("egress", egress), ("ingress", ingress)] {
            if let Some(rate) = rate {
                bandwidth.insert(format!("{direction}Rate"), json!(rate));
                // Runtimes pass 2^31-1 if no burst was requested.
                bandwidth.insert(format!("{direction}Burst"), json!(burst.unwrap_or(i32::MAX as u64)));
            }
        }
        self.offer("bandwidth", Value::Object(bandwidth));
    }

    /// A new sandbox of the same pod, as after the end of its pause container: new container id, same UID and cgroup.
    pub fn new_sandbox(&mut self) -> Result<()> {
        self.container_id = container_id()?;
        Ok(())
    }

    /// Adds the environment of a call for this pod's interface.
    pub fn environment(&self, call: Cni) -> Cni {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.name, self.container_id, self.uid
        );
        call.env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", self.netns.path().display().to_string())
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", arguments)
    }

    /// Makes one call in the node's namespace and keeps it in `calls`.
    pub fn call(&mut self, cni: &Cni) -> Result<Call> {
        let call = cni.call_in(&self.host.netns)?;
        self.calls.push(call.clone());
        Ok(call)
    }

    /// Calls each plugin of the chain with ADD and passes the result of each to the next. Returns the last result.
    /// Stops at the first failure; the DEL that a runtime then calls is [`Pod::del`].
    pub fn add(&mut self, chain: &Chain) -> Result<Value> {
        self.added = Some((chain.clone(), None));
        let mut result = None;
        for plugin in &chain.plugins {
            let call = chain.call(plugin, "ADD", &self.offers, result.as_ref())?;
            result = Some(self.call(&self.environment(call))?.json()?);
        }
        let result = result.ok_or_else(|| Failure::new("a chain without plugins"))?;
        self.added = Some((chain.clone(), Some(result.clone())));
        Ok(result)
    }

    /// Calls each plugin of the added chain with CHECK, in order, with the result of ADD.
    pub fn check(&mut self) -> Result<()> {
        let (chain, result) = self.added.clone().ok_or_else(|| Failure::new("CHECK of a pod that was not added"))?;
        for plugin in &chain.plugins {
            let call = chain.call(plugin, "CHECK", &self.offers, result.as_ref())?;
            self.call(&self.environment(call))?.success()?;
        }
        Ok(())
    }

    /// Calls each plugin of the added chain with DEL, last first, with the result of ADD. Stops at the first failure,
    /// as libcni does; it can then be called again.
    pub fn del(&mut self) -> Result<()> {
        let Some((chain, result)) = self.added.clone() else { return Ok(()) };
        for plugin in chain.plugins.iter().rev() {
            let call = chain.call(plugin, "DEL", &self.offers, result.as_ref())?;
            self.call(&self.environment(call))?.success()?;
        }
        self.added = None;
        Ok(())
    }

    /// The last call of a plugin with a verb.
    pub fn last_call(&self, plugin: &str, verb: &str) -> Option<&Call> {
        self.calls.iter().rev().find(|call| call.plugin() == plugin && call.verb() == verb)
    }

    /// Keeps an object as long as the pod exists.
    pub fn keep(&mut self, what: impl Any + Send + Sync) {
        self.kept.push(Box::new(what));
    }

    /// Makes both ends negotiate ECN from now on.
    pub fn negotiate_ecn(&self) -> Result<()> {
        for netns in [&self.host.netns, &self.netns] {
            netns.run("sysctl", &["-q", "net.ipv4.tcp_ecn=1"])?;
        }
        Ok(())
    }

    /// The host end of the pod's first interface, according to the bridge plugin's result.
    pub fn host_end(&self) -> Result<String> {
        let added = self.last_call("bridge", "ADD").map(Call::json).transpose()?;
        let name = added.as_ref().and_then(|result| result["interfaces"][1]["name"].as_str());
        name.map(String::from).ok_or_else(|| Failure::new("the bridge plugin has named no end on the host"))
    }

    /// A command at the other end of the pod's traffic: on its node, or on the remote.
    pub fn other_end(&self, program: impl AsRef<OsStr>) -> Command {
        match &self.remote {
            Some(remote) => remote.netns.command(program),
            None => self.host.command(program),
        }
    }

    /// The pod's addresses, IPv4 first, from the result of ADD.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let result = self.added.as_ref().and_then(|(_, result)| result.as_ref());
        let ips = result.and_then(|result| result.get("ips")).and_then(Value::as_array);
        let address = |ip: &Value| ip.get("address")?.as_str()?.split('/').next()?.parse().ok();
        let mut addresses: Vec<IpAddr> = ips.into_iter().flatten().filter_map(address).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        addresses
    }

    /// A command that runs in a container of the pod: in a child of the pod's cgroup and in its network namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let container = self.cgroup.container("c1")?;
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ >\"$1\" && shift && exec \"$@\"", "sh"]);
        command.arg(container.join("cgroup.procs"));
        command.arg("nsenter").arg(format!("--net={}", self.netns.path().display())).arg("--").arg(program);
        Ok(command)
    }

    /// All calls with their answers, and the qdiscs of both sides: for the analysis of a failed test.
    pub fn dump(&self) -> String {
        let mut text = format!("pod {} ({}), {} calls\n", self.name, self.uid, self.calls.len());
        self.calls.iter().for_each(|call| text += &call.to_string());
        for netns in [&self.netns, &self.host.netns] {
            let qdiscs = netns.run("tc", &["-s", "qdisc", "show"]).unwrap_or_else(|error| error.to_string());
            text += &format!("tc -s qdisc show in {}:\n{qdiscs}", netns.name());
        }
        text
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // Not note(): libtest captures the output of this macro, and shows it with the failed test.
            eprintln!("{}", self.dump());
        }
        self.cgroup.kill();
        if let Err(error) = self.del() {
            note(format_args!("while removing pod {}: {error}", self.name));
        }
    }
}

/// A pod's UID, in the format of an API server.
pub fn uuid() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    Ok(fs::read_to_string(path).context(format_args!("read {path}"))?.trim().to_owned())
}

/// The id of a sandbox, in the format of containerd.
pub fn container_id() -> Result<String> {
    Ok((uuid()? + &uuid()?).replace('-', ""))
}
