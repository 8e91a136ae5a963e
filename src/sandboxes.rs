//! The sandboxes of this node, as the runtime's CNI library keeps them: the result of each ADD, with all that the plugins were told, is a
//! file until its DEL (libcni, `cachedInfo` in libcni/api.go).
//!
//! What is in them was true at ADD. What is asked for now may be another thing, which is not this file's business; nor is which of the
//! networks is podshaper's. A file of a sandbox whose network namespace is gone, as a reboot leaves it, is no sandbox.

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

/// Where libcni keeps its results below its directory, and where Multus has its own.
const RESULTS: [&str; 2] = ["results", "multus/results"];
/// What every such file is.
const KIND: &str = "cniCacheV1";
/// libcni writes a file where it is read: one that cannot be read may be whole in a moment, unless it is older than this.
const WRITTEN_WITHIN: Duration = Duration::from_millis(200);
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// One interface of one sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// `CNI_CONTAINERID` of its ADD.
    pub container_id: String,
    /// The interface.
    pub ifname: String,
    /// Name of the network.
    pub network: String,
    /// What the runtime offered to plugins that have the capability.
    pub offers: BTreeMap<String, Box<RawValue>>,
    netns: PathBuf,
    args: Vec<(String, String)>,
    config: String,
    written: SystemTime,
    file: PathBuf,
}

/// A file, as libcni writes it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    network_name: String,
    /// libcni 1.2 and later.
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

/// The part of a result in which a namespace is named.
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

/// Where a runtime's library keeps them below its directory.
pub fn directories(directory: &Path) -> [PathBuf; 2] {
    RESULTS.map(|results| directory.join(results))
}

/// The names of the files in which a runtime's library keeps results, of sandboxes that are gone as well.
pub struct Results(Vec<OsString>);

impl Results {
    /// Those that are there now.
    ///
    /// # Errors
    /// [`Code::Io`]: the directory is there and cannot be listed.
    pub fn list(directory: &Path) -> Result<Self> {
        let mut names = Vec::new();
        for results in directories(directory) {
            names.extend(files(&results)?.iter().filter_map(|file| file.file_name().map(OsStr::to_owned)));
        }
        Ok(Self(names))
    }

    /// Whether there is one of this interface of this container, by whichever network: its DEL has not ended then.
    pub fn has(&self, container_id: &str, ifname: &str) -> bool {
        let end = format!("-{container_id}-{ifname}");
        self.0.iter().any(|name| name.as_encoded_bytes().ends_with(end.as_bytes()))
    }
}

/// Whether there is a namespace at a path. What a reboot leaves there is an empty file.
pub fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Every sandbox whose namespace is there, of each interface of a container the newest, and why files could not be read.
///
/// # Errors
/// [`Code::Io`]: the directory is there and cannot be listed.
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
    let doing = |cause| Error::because(Code::Io, format!("list {}", directory.display()), cause);
    let entries = match fs::read_dir(directory) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(doing)?,
    };
    let mut files =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>().map_err(doing)?;
    // Every sandbox has one for its loopback.
    files.retain(|file| !file.as_os_str().as_encoded_bytes().ends_with(b"-lo"));
    files.sort();
    Ok(files)
}

/// Also one that was removed, or that was written in the future of a clock that was set back.
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

    /// The sandbox of a file; `None` for one that is gone, and for what is no result.
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
        // Multus repeats what it was given, and the first counts.
        let mut seen = std::collections::BTreeSet::new();
        args.retain(|(key, _)| seen.insert(key.clone()));
        let (config, offers) = (config.unwrap_or_default(), capability_args.unwrap_or_default());
        let file = file.to_path_buf();
        let sandbox = Self { container_id, ifname, network, offers, netns, args, config, written, file };
        Ok(Some(sandbox).filter(Self::has_namespace))
    }

    /// Whether its namespace and its file are there.
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

    /// What tells its pod from others, as an ADD does: the UID, or without one the container.
    pub fn pod(&self) -> &str {
        self.arg("K8S_POD_UID").unwrap_or(&self.container_id)
    }

    /// Whether it was made after another one.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.written > other.written
    }

    /// The configuration of the network at ADD.
    pub fn config(&self) -> Vec<u8> {
        STANDARD.decode(&self.config).unwrap_or_default()
    }

    /// The variables of its ADD.
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
    /// Where the interface is: libcni before 1.2 has it in the result alone.
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
            // A file that was left where a namespace was mounted.
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
            // Some plugins give the interface in the pod another name.
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
