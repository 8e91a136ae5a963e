//! The sandboxes of this node, as the runtime's CNI library caches them. The result of each ADD, with all arguments of
//! the plugins, is a file until the DEL (libcni, `cachedInfo` in libcni/api.go).
//!
//! The content of a file was true at ADD; other modules find out what is asked for now, and which of the networks is
//! podshaper's. A file whose network namespace is gone, such as a reboot leaves, does not count as a sandbox.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    error::{Code, Error, Result},
    request::Env,
};

/// Where libcni keeps its results below its directory, and where Multus keeps its own.
const RESULTS: [&str; 2] = ["results", "multus/results"];
/// The `kind` of every such file.
const KIND: &str = "cniCacheV1";
/// libcni writes a file in place. A file that cannot be read may be complete in a moment, unless it is older than this.
const WRITTEN_WITHIN: Duration = Duration::from_millis(200);
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// One interface of one sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// `CNI_CONTAINERID` of the ADD.
    pub container_id: String,
    /// The interface.
    pub ifname: String,
    /// Name of the network.
    pub network: String,
    /// What the runtime offered to plugins that declare the capability.
    pub offers: BTreeMap<String, Box<RawValue>>,
    netns: PathBuf,
    args: Vec<(String, String)>,
    config: String,
    written: SystemTime,
    file: PathBuf,
}

/// A file in the format that libcni writes.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    network_name: String,
    /// Written by libcni 1.2 and later.
    #[serde(default)]
    netns: String,
    #[serde(default)]
    config: Option<String>,
    #[serde(default)]
    cni_args: Option<Vec<(String, String)>>,
    #[serde(default)]
    capability_args: Option<BTreeMap<String, Box<RawValue>>>,
    #[serde(default)]
    result: Option<Outcome>,
}

/// The part of a result that names a namespace.
#[derive(Default, Deserialize)]
struct Outcome {
    #[serde(default)]
    interfaces: Vec<Interface>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

/// The directories below `directory` in which a runtime's library keeps its results.
pub fn directories(directory: &Path) -> [PathBuf; 2] {
    RESULTS.map(|results| directory.join(results))
}

/// The names of the files in which a runtime's library keeps results, including those of sandboxes that are gone.
pub struct Results(Vec<OsString>);

impl Results {
    /// Lists the files that exist now.
    ///
    /// # Errors
    /// [`Code::Io`]: the directory exists and cannot be listed.
    pub fn list(directory: &Path) -> Result<Self> {
        let mut names = Vec::new();
        for results in directories(directory) {
            names.extend(files(&results)?.iter().filter_map(|file| file.file_name().map(OsStr::to_owned)));
        }
        Ok(Self(names))
    }

    /// Whether there is a result of this interface of this container, in any network. Then its DEL has not completed.
    pub fn has(&self, container_id: &str, ifname: &str) -> bool {
        let end = format!("-{container_id}-{ifname}");
        self.0.iter().any(|name| name.as_encoded_bytes().ends_with(end.as_bytes()))
    }
}

/// Whether a network namespace is mounted at the path. After a reboot an empty file is left there.
pub fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Every sandbox whose namespace exists, and the errors of the files that could not be read.
///
/// # Errors
/// [`Code::Io`]: a directory exists and cannot be listed.
pub fn read(directory: &Path) -> Result<(Vec<Sandbox>, Vec<Error>)> {
    let (mut found, mut errors) = (Vec::new(), Vec::new());
    for results in directories(directory) {
        for file in files(&results)? {
            match Sandbox::read_when_written(&file) {
                Ok(sandbox) => found.extend(sandbox),
                Err(error) if file.exists() => errors.push(error),
                Err(error) => log::debug!("{error}"),
            }
        }
    }
    Ok((found, errors))
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries(directory)?;
    // Every sandbox also has a file for its loopback interface.
    files.retain(|file| !file.as_os_str().as_encoded_bytes().ends_with(b"-lo"));
    files.sort();
    Ok(files)
}

/// The entries of a directory; none if there is no such directory.
///
/// # Errors
/// [`Code::Io`]: the directory is there and cannot be listed.
pub fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let doing = |cause| Error::because(Code::Io, format!("list {}", directory.display()), cause);
    match fs::read_dir(directory) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(cause) => Err(doing(cause)),
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>().map_err(doing),
    }
}

/// A file also counts as old if it was removed, or if its time is in the future because the clock was set back.
fn is_old(file: &Path) -> bool {
    let age = fs::metadata(file).and_then(|file| file.modified()).ok().and_then(|written| written.elapsed().ok());
    age.is_none_or(|age| age > WRITTEN_WITHIN)
}

impl Sandbox {
    fn read_when_written(file: &Path) -> Result<Option<Self>> {
        loop {
            match Self::read(file) {
                Err(_) if !is_old(file) => thread::sleep(READ_AGAIN_AFTER),
                read => return read,
            }
        }
    }

    /// Reads the sandbox of a file. `None` if its namespace is gone, or if the file is not a CNI result.
    fn read(file: &Path) -> Result<Option<Self>> {
        let reading = || format!("read the CNI result {}", file.display());
        let failed = |cause: io::Error| Error::because(Code::Io, reading(), cause);
        let mut bytes = Vec::new();
        let mut opened = fs::File::open(file).map_err(failed)?;
        let written = opened.metadata().and_then(|found| found.modified()).map_err(failed)?;
        opened.read_to_end(&mut bytes).map_err(failed)?;
        let cached: Cached =
            serde_json::from_slice(&bytes).map_err(|cause| Error::because(Code::Decode, reading(), cause))?;
        if cached.kind != KIND {
            return Ok(None);
        }
        let Some(netns) = cached.netns() else {
            let text = format!("{}: it does not say in which network namespace {} is", reading(), cached.if_name);
            return Err(Error::new(Code::Netns, text));
        };
        let Cached { container_id, if_name: ifname, network_name: network, config, cni_args, capability_args, .. } =
            cached;
        let mut args: Vec<(String, String)> = cni_args.unwrap_or_default();
        // Multus repeats arguments that it was given; the first one counts.
        let mut seen = std::collections::BTreeSet::new();
        args.retain(|(key, _)| seen.insert(key.clone()));
        let (config, offers) = (config.unwrap_or_default(), capability_args.unwrap_or_default());
        let file = file.to_path_buf();
        let sandbox = Self { container_id, ifname, network, offers, netns, args, config, written, file };
        Ok(Some(sandbox).filter(Self::has_namespace))
    }

    /// Whether the namespace and the file exist.
    pub fn is_there(&self) -> bool {
        self.has_namespace() && self.file.exists()
    }

    fn has_namespace(&self) -> bool {
        is_namespace(&self.netns)
    }

    /// A value of `CNI_ARGS`.
    pub fn arg(&self, key: &str) -> Option<&str> {
        self.args
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    /// The key that identifies the pod, as at ADD: the UID, or the container id if there is no UID.
    pub fn pod(&self) -> &str {
        self.arg("K8S_POD_UID").unwrap_or(&self.container_id)
    }

    /// Whether this sandbox was made after the other one.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.written > other.written
    }

    /// The configuration of the network at ADD.
    pub fn config(&self) -> Vec<u8> {
        STANDARD.decode(&self.config).unwrap_or_default()
    }

    /// The variables of the ADD.
    pub fn env(&self) -> Env {
        let args: Vec<String> = self.args.iter().map(|(key, value)| format!("{key}={value}")).collect();
        Env {
            container_id: Some(self.container_id.clone().into()),
            netns: Some(self.netns.as_os_str().to_owned()),
            ifname: Some(OsStr::new(&self.ifname).to_owned()),
            args: Some(args.join(";").into()),
            ..Env::default()
        }
    }
}

impl Cached {
    /// The namespace of the interface. libcni before 1.2 stores it only in the result.
    fn netns(&self) -> Option<PathBuf> {
        let in_result = self.result.iter().flat_map(|result| &result.interfaces);
        let mut in_result = in_result.filter(|interface| !interface.sandbox.is_empty());
        let of_name = in_result.clone().find(|interface| interface.name == self.if_name);
        let path = Some(self.netns.as_str()).filter(|netns| !netns.is_empty());
        path.or_else(|| of_name.or_else(|| in_result.next()).map(|interface| interface.sandbox.as_str()))
            .map(PathBuf::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const NETNS: &str = "/proc/self/ns/net";

    fn cached(keys: Value) -> Value {
        let mut cached = json!({
            "kind": KIND, "containerId": "c1", "ifName": "eth0", "networkName": "cbr0", "netns": NETNS,
            "config": STANDARD.encode(r#"{"name": "cbr0"}"#),
            "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_UID", "u-1"], ["K8S_POD_NAME", "web"]],
            "capabilityArgs": { "bandwidth": { "EgressRate": 1000 } },
        });
        cached.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        cached
    }

    fn directory(files: &[(&str, String)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("multus/results")).unwrap();
        fs::create_dir(directory.path().join("results")).unwrap();
        files.iter().for_each(|(name, text)| fs::write(directory.path().join(name), text).unwrap());
        directory
    }

    #[test]
    fn what_a_runtime_keeps_is_read_and_what_is_gone_is_no_sandbox() {
        let directory = directory(&[
            ("results/cbr0-c1-eth0", cached(json!({})).to_string()),
            ("results/cni-loopback-c1-lo", "not looked at".into()),
            ("results/cbr0-c2-eth0", cached(json!({ "netns": "/run/netns/gone" })).to_string()),
            // A file that was left at a path where a namespace was mounted.
            ("results/cbr0-c3-eth0", cached(json!({ "netns": "/proc/self/status" })).to_string()),
            (
                "results/other",
                json!({ "kind": "else", "containerId": "", "ifName": "", "networkName": "" }).to_string(),
            ),
            ("multus/results/mv-c1-net1", cached(json!({ "ifName": "net1", "networkName": "mv" })).to_string()),
        ]);
        let (found, errors) = read(directory.path()).unwrap();
        let names: Vec<_> = found.iter().map(|found| (found.network.as_str(), found.ifname.as_str())).collect();
        assert_eq!((names, errors.len()), (vec![("cbr0", "eth0"), ("mv", "net1")], 0));
        let env = found[0].env();
        let text = |value: &Option<std::ffi::OsString>| value.clone().unwrap().into_string().unwrap();
        assert_eq!(text(&env.args), "IgnoreUnknown=1;K8S_POD_UID=u-1;K8S_POD_NAME=web");
        assert_eq!((text(&env.netns).as_str(), found[0].pod()), (NETNS, "u-1"));
        assert_eq!(found[0].config(), br#"{"name": "cbr0"}"#);
        assert_eq!(found[0].offers["bandwidth"].get(), r#"{"EgressRate":1000}"#);
        assert!(read(Path::new("/nowhere")).unwrap().0.is_empty());
    }

    #[test]
    fn a_result_is_of_its_container_and_interface_whichever_network_it_is_of() {
        let names = ["results/cbr0-c1-eth0", "results/a-b-c2-eth0", "multus/results/mv-c3-net1"];
        let directory = directory(&names.map(|name| (name, String::new())));
        let results = Results::list(directory.path()).unwrap();
        for (container_id, ifname, has) in [
            ("c1", "eth0", true),
            ("c2", "eth0", true),
            ("c3", "net1", true),
            ("c1", "net1", false),
            ("1", "eth0", false),
        ] {
            assert_eq!(results.has(container_id, ifname), has, "{container_id} {ifname}");
        }
        assert!(!Results::list(Path::new("/nowhere")).unwrap().has("c1", "eth0"));
    }

    #[test]
    fn the_namespace_is_in_the_result_of_an_older_library() {
        let interfaces = |all: Value| json!({ "netns": "", "result": { "interfaces": all } });
        let (host, pod) = (json!({ "name": "veth1" }), json!({ "name": "eth0", "sandbox": NETNS }));
        for (keys, found) in [
            (interfaces(json!([host, pod])), true),
            // Some plugins report another name for the interface in the pod.
            (interfaces(json!([host, { "name": "other", "sandbox": NETNS }])), true),
            (interfaces(json!([host])), false),
            (json!({ "netns": "", "result": {} }), false),
        ] {
            let directory = directory(&[("results/cbr0-c1-eth0", cached(keys.clone()).to_string())]);
            let read = Sandbox::read(&directory.path().join("results/cbr0-c1-eth0"));
            assert_eq!(read.as_ref().is_ok_and(Option::is_some), found, "{keys}: {read:?}");
        }
    }

    #[test]
    fn a_file_that_is_being_written_is_waited_for_and_one_that_stays_broken_is_told() {
        let directory = directory(&[("results/cbr0-c1-eth0", "{\"kind\": \"cniCa".into())]);
        let errors = read(directory.path()).unwrap().1;
        assert!(errors[0].to_string().contains("results/cbr0-c1-eth0: EOF while parsing"), "{errors:?}");
        let file = directory.path().join("results/cbr0-c2-eth0");
        fs::write(&file, "{").unwrap();
        let found = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(3 * READ_AGAIN_AFTER);
                fs::write(&file, cached(json!({})).to_string()).unwrap();
            });
            read(directory.path()).unwrap().0
        });
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn an_argument_that_is_there_twice_counts_once() {
        let args = json!({ "cniArgs": [["K8S_POD_UID", "u-1"], ["K8S_POD_UID", "u-1"], ["K8S_POD_NAME", ""]] });
        let directory = directory(&[("results/a", cached(args).to_string())]);
        let found = read(directory.path()).unwrap().0;
        assert_eq!(
            (found[0].env().args.unwrap().to_str().unwrap(), found[0].arg("K8S_POD_NAME")),
            ("K8S_POD_UID=u-1;K8S_POD_NAME=", None)
        );
    }
}
