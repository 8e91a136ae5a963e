//! The networks of this node that podshaper is in, according to their present conflists. A pod that was made by an
//! older conflist is limited as the present one says.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value, json};

use super::super::install;
use crate::{
    attachment::EVERY_INTERFACE,
    delegate::{NETWORK, list},
    error::Result,
    kube::Metadata,
    request::{Delegation, Env, Request},
    sandboxes::Sandbox,
};
use rscni_plugin::types::Cmd;

const PODSHAPER: &str = "podshaper";
/// The capability with which a runtime passes a pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Networks by name.
#[derive(Default)]
pub struct Networks {
    by_name: BTreeMap<String, Network>,
    /// The network that was found first, which is the default network of pods.
    first: Option<String>,
}

/// podshaper's entry in a conflist.
#[derive(Clone)]
struct Network {
    /// The capabilities that the entry declares.
    capabilities: Vec<String>,
    kubeconfig: Option<String>,
    /// The entry, with the network's version, as a plugin gets it on stdin. The name and the closing brace are missing;
    /// they are added last.
    stdin: String,
    name: String,
}

impl Networks {
    /// Reads every configuration of a directory. One that cannot be read is reported, since podshaper may be in it.
    ///
    /// # Errors
    /// The directory cannot be listed.
    pub fn read(directory: &Path) -> Result<Self> {
        let mut networks = Self::default();
        let mut delegation = None;
        for path in install::networks(directory)? {
            let text = fs::read_to_string(&path).map_err(|cause| cause.to_string());
            delegation = delegation.or_else(|| list::delegation(text.as_deref().ok()?));
            match text.and_then(|text| parse(text.as_bytes())) {
                Ok(list) => networks.take(&list),
                Err(cause) => log::warn!("leave out {}: {cause}", path.display()),
            }
        }
        if let Some(delegation) = delegation {
            networks.take_delegated(&delegation);
        }
        Ok(networks)
    }

    /// Adds the network that podshaper delegates to. Pods that the network's list made before podshaper delegated are
    /// then limited like new pods.
    fn take_delegated(&mut self, delegation: &Delegation) {
        // Without the list the network's name is not known.
        let Ok(list) = list::find(&delegation.directory) else { return };
        if let Some(ours) = self.by_name.get(NETWORK).cloned() {
            self.by_name.entry(list.network().to_owned()).or_insert_with(|| ours.named(list.network()));
        }
    }

    /// Adds a network, and those that Multus delegates to. The first network of a name counts, as for a runtime.
    fn take(&mut self, list: &Value) {
        let entry = list["plugins"].as_array().into_iter().flatten().find(|plugin| plugin["type"] == PODSHAPER);
        if let (Some(name), Some(Value::Object(entry))) = (list["name"].as_str(), entry) {
            self.first.get_or_insert_with(|| name.to_owned());
            self.by_name.entry(name.to_owned()).or_insert_with(|| Network::new(name, &list["cniVersion"], entry));
        }
        list["delegates"].as_array().into_iter().flatten().for_each(|delegate| self.take(delegate));
    }

    /// Whether podshaper is in no network.
    pub fn are_none(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The kubeconfig of the first network that names one.
    pub fn kubeconfig(&self) -> Option<&Path> {
        self.by_name.values().find_map(|network| network.kubeconfig.as_deref()).map(Path::new)
    }

    /// The request that an ADD of this sandbox would make in the present network; if the network is no longer in the
    /// directory, in the network as it was at ADD. The pod's annotations are those that the runtime has, or are left
    /// out. `None` if podshaper is not in the network.
    ///
    /// # Errors
    /// The errors of the ADD.
    pub fn request(&self, sandbox: &Sandbox, with_annotations: bool) -> Option<Result<Request>> {
        let of_add = || {
            let mut then = Self::default();
            then.take(&parse(&sandbox.config()).ok()?);
            then.by_name.remove(&sandbox.network)
        };
        match self.by_name.get(&sandbox.network) {
            Some(network) => Some(network.request(sandbox, with_annotations)),
            None => of_add().map(|network| network.request(sandbox, with_annotations)),
        }
    }

    /// The request that a runtime would make for a pod in the node's own network namespace, if it called podshaper. It
    /// uses the configuration of the pods' default network. `None` if podshaper is in no network.
    ///
    /// # Errors
    /// The errors of an ADD.
    pub fn request_of_host_pod(&self, uid: &str, pod: &Metadata) -> Option<Result<Request>> {
        let network = self.by_name.get(self.first.as_ref()?)?;
        let Metadata { namespace, name, .. } = pod;
        let env = Env {
            container_id: Some(uid.into()),
            netns: Some("/proc/self/ns/net".into()),
            ifname: Some(EVERY_INTERFACE.into()),
            args: Some(format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}").into()),
            ..Env::default()
        };
        Some(network.call(&env, &[]))
    }
}

impl Network {
    fn new(name: &str, version: &Value, entry: &Map<String, Value>) -> Self {
        let capabilities = entry.get("capabilities").and_then(Value::as_object).into_iter().flatten();
        let mut stdin = entry.clone();
        stdin.insert("cniVersion".into(), version.clone());
        ["name", "runtimeConfig"].iter().for_each(|key| drop(stdin.remove(*key)));
        let mut stdin = Value::Object(stdin).to_string();
        stdin.truncate(stdin.len() - 1);
        Self {
            capabilities: capabilities.filter(|(_, has)| **has == true).map(|(name, _)| name.clone()).collect(),
            kubeconfig: entry.get("kubeconfig").and_then(Value::as_str).map(str::to_owned),
            stdin,
            name: name.to_owned(),
        }
    }

    fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    fn request(&self, sandbox: &Sandbox, with_annotations: bool) -> Result<Request> {
        // libcni gives a plugin the values of the capabilities that the plugin declares. The runtime's text is copied:
        // a number in it may be larger than serde_json's numbers.
        let wanted = self.capabilities.iter().filter(|name| with_annotations || *name != ANNOTATIONS);
        let offered = wanted.filter_map(|name| Some((name, sandbox.offers.get(name)?)));
        let offered: Vec<String> = offered.map(|(name, offer)| format!("{}:{}", json!(name), offer.get())).collect();
        self.call(&sandbox.env(), &offered)
    }

    /// An ADD with these members of `runtimeConfig`.
    fn call(&self, env: &Env, offered: &[String]) -> Result<Request> {
        let name = json!(self.name);
        let stdin = format!("{},\"name\":{name},\"runtimeConfig\":{{{}}}}}", self.stdin, offered.join(","));
        Request::parse(Cmd::Add, env, stdin.as_bytes())
    }
}

fn parse(text: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(text).map_err(|cause| cause.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(files: &[(&str, Value)]) -> Networks {
        let directory = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, list)| fs::write(directory.path().join(name), list.to_string()).unwrap());
        Networks::read(directory.path()).unwrap()
    }

    fn list(name: &str, keys: Value) -> Value {
        let mut podshaper = json!({ "type": "podshaper", "capabilities": { "bandwidth": true } });
        podshaper.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        json!({ "cniVersion": "1.0.0", "name": name, "plugins": [{ "type": "bridge" }, podshaper] })
    }

    fn sandbox(network: &str, config: &Value) -> Sandbox {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("results")).unwrap();
        let cached = json!({
            "kind": "cniCacheV1", "containerId": "c1", "ifName": "eth0", "networkName": network, "netns": "/proc/self/ns/net",
            "config": STANDARD.encode(config.to_string()),
            "capabilityArgs": { "bandwidth": { "EgressRate": 3000000, "IngressRate": 0 }, "dns": {}, "cgroupPath": "/a" },
        });
        fs::write(directory.path().join("results/a"), cached.to_string()).unwrap();
        crate::sandboxes::read(directory.path()).unwrap().0.remove(0)
    }

    fn egress(networks: &Networks, sandbox: &Sandbox) -> Option<u64> {
        let request = networks.request(sandbox, true)?.unwrap();
        assert_eq!(request.cgroup_path, None, "podshaper has no such capability");
        Some(request.limits_of_call(&BTreeMap::new()).unwrap().egress?.rate.as_bits_per_s())
    }

    #[test]
    fn the_conflist_of_now_counts_then_the_one_of_the_add() {
        let bare = json!({ "cniVersion": "1.0.0", "name": "cbr0", "plugins": [{ "type": "bridge" }] });
        let capped = |bits: u64| list("cbr0", json!({ "max": { "egress": bits } }));
        let now = networks(&[("10-a.conflist", capped(2_000_000)), ("20-b.conflist", capped(1_000_000))]);
        assert_eq!(egress(&now, &sandbox("cbr0", &bare)), Some(2_000_000));
        let none = networks(&[("10-a.conflist", bare.clone()), ("20-b.conf", json!({ "type": "bridge" }))]);
        assert!(none.are_none() && !now.are_none());
        assert_eq!(egress(&none, &sandbox("cbr0", &list("cbr0", json!({})))), Some(3_000_000));
        assert_eq!(egress(&none, &sandbox("cbr0", &bare)), None);
        assert_eq!(egress(&now, &sandbox("other", &bare)), None);
    }

    #[test]
    fn pods_of_the_list_that_podshaper_delegates_to_are_its() {
        let directory = tempfile::tempdir().unwrap();
        let bare = json!({ "cniVersion": "1.0.0", "name": "cbr0", "plugins": [{ "type": "bridge" }] });
        let ours =
            list(NETWORK, json!({ "max": { "egress": 1_000_000 }, "delegate": { "directory": directory.path() } }));
        let write = |name: &str, list: &Value| fs::write(directory.path().join(name), list.to_string()).unwrap();
        write("00-podshaper.conflist", &ours);
        write("10-cbr0.conflist", &bare);
        let networks = Networks::read(directory.path()).unwrap();
        assert_eq!(egress(&networks, &sandbox(NETWORK, &ours)), Some(1_000_000));
        assert_eq!(egress(&networks, &sandbox("cbr0", &bare)), Some(1_000_000));
        assert_eq!(egress(&networks, &sandbox("other", &bare)), None);
        let request = networks.request(&sandbox("cbr0", &bare), true).unwrap().unwrap();
        assert_eq!(request.network.as_str(), "cbr0", "or its CHECK would find another's");
    }

    #[test]
    fn networks_that_multus_delegates_to_are_found_in_its_file() {
        let delegate = list("cbr0", json!({ "kubeconfig": "/etc/k" }));
        let multus =
            json!({ "cniVersion": "0.3.1", "name": "multus-cni-network", "type": "multus", "delegates": [delegate] });
        let networks = networks(&[("00-multus.conf", multus)]);
        assert_eq!(networks.kubeconfig(), Some(Path::new("/etc/k")));
        assert!(networks.request(&sandbox("cbr0", &json!({})), true).is_some());
        assert!(networks.request(&sandbox("multus-cni-network", &json!({})), true).is_none());
    }
}
