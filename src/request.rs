//! One call of a runtime: its `CNI_*` variables and stdin become a [`Request`], or an error with the code that the
//! specification gives it.
//!
//! `request/limits.rs` finds the limits that are asked for; `request/config.rs` reads the keys of the plugin's own
//! configuration; `cni` acts on a request. All input is untrusted. Tenants write the annotations, so limits are not
//! read before [`Request::limits`] is called: a DEL must succeed whatever the annotations hold. For the same reason a
//! DEL or GC only notes some errors that make an ADD fail ([`Request::forgiven`]). A DEL whose stdin is not a
//! configuration uses its variables alone ([`Request::of_variables`]).

mod api;
mod bandwidth;
mod config;
mod env;
mod json;
mod limits;
mod policy;
#[cfg(test)]
mod records;
mod subnets;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use rscni_plugin::types::{Cmd, ContainerId, GcAttachment, InterfaceName};
use rscni_plugin::version::{PluginInfo, SpecVersion};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result, quoted};
use crate::pod::{NetworkName, PodKey};
pub use config::{Config, DELEGATE, Delegation, UnknownKey};
pub use env::Env;
pub use limits::{Limit, Limits, Source};
pub use policy::Namespaces;
pub use subnets::Subnets;

/// How much is read from stdin at most. The API server keeps a pod's annotations under 256 KiB; these become six times
/// as many bytes where Go escapes each character. A runtime may pass the annotations twice, and the rest of the 8 MiB
/// is for the configuration. The bound is generous because a DEL that fails would prevent the call of IPAM's DEL.
const MAX_STDIN_BYTES: u64 = 8 << 20;
/// The longest path that is accepted: the kernel's PATH_MAX.
const MAX_PATH_BYTES: usize = 4096;

/// A checked call.
#[derive(Debug)]
pub struct Request {
    /// The verb.
    pub cmd: Cmd,
    /// The CNI version of the configuration; podshaper supports it.
    pub version: SpecVersion,
    /// Name of the network.
    pub network: NetworkName,
    /// What the call is about.
    pub subject: Subject,
    /// `CNI_NETNS`: always set for ADD and CHECK, for DEL only while the sandbox lives.
    pub netns: Option<PathBuf>,
    /// `K8S_POD_NAMESPACE`.
    pub pod_namespace: Option<String>,
    /// `K8S_POD_NAME`.
    pub pod_name: Option<String>,
    /// The plugin's own configuration.
    pub config: Config,
    /// `runtimeConfig.cgroupPath`: the pod's cgroup, relative to the cgroup2 mount.
    pub cgroup_path: Option<PathBuf>,
    /// `runtimeConfig`, byte for byte: what a runtime offers to plugins that declare `capabilities`.
    pub runtime_config: Option<Box<RawValue>>,
    /// `prevResult`, byte for byte; a chained ADD returns it as its own result.
    pub prev_result: Option<Box<RawValue>>,
    /// `cni.dev/valid-attachments` of a GC. `None` differs from an empty list: with `None` nothing may be removed.
    pub valid_attachments: Option<Vec<GcAttachment>>,
    /// Keys of the configuration that neither podshaper nor the specification defines.
    pub unknown_keys: Vec<UnknownKey>,
    /// Malformed parts that this DEL or GC did not need; the caller logs them.
    pub forgiven: Vec<Error>,
    sources: limits::Sources,
}

/// What a call is about.
#[derive(Debug)]
pub enum Subject {
    /// ADD, CHECK, DEL: one interface of one sandbox.
    Endpoint(Endpoint),
    /// A DEL of an attachment that cannot exist, since ADD refuses such identifiers with this error. The answer is
    /// success, and nothing is done: a DEL that fails keeps the pod in Terminating.
    NeverAdded(Error),
    /// STATUS, GC: the node.
    Node,
}

/// One interface of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The pod: its UID, or the container id if the runtime passes no UID.
    pub key: PodKey,
    /// The sandbox.
    pub container_id: ContainerId,
    /// The interface inside the sandbox.
    pub ifname: InterfaceName,
}

/// Reads stdin to its end.
///
/// # Errors
/// Stdin is longer than 8 MiB, or the read fails.
pub fn read_stdin(stdin: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = stdin.take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|cause| Error::because(Code::Io, "read the network configuration from stdin", cause))?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        return Err(Error::new(Code::Decode, "the network configuration on stdin has more than 8 MiB (8388608 bytes)"));
    }
    Ok(bytes)
}

/// The `cniVersion` that stdin declares, if it can be read. It is the version of the answer to VERSION, and of the
/// answer when [`Request::parse`] fails.
pub fn declared_version(stdin: &[u8]) -> Option<SpecVersion> {
    json::object::<Versioned>(stdin).ok()?.cni_version?.parse().ok()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Versioned {
    cni_version: Option<String>,
}

/// The keys of stdin that the specification defines. Each verb decodes the raw values that it needs.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Stdin {
    cni_version: Option<String>,
    name: Option<String>,
    runtime_config: Option<Box<RawValue>>,
    args: Option<Box<RawValue>>,
    prev_result: Option<Box<RawValue>>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Box<RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    cgroup_path: Option<Box<RawValue>>,
    bandwidth: Option<Box<RawValue>>,
    #[serde(rename = "io.kubernetes.cri.pod-annotations")]
    annotations: Option<Box<RawValue>>,
}

impl Request {
    /// Checks the variables that `cmd` needs, then stdin: JSON, version, name of the network, the plugin's own keys.
    /// VERSION has no request; [`declared_version`] is enough to answer it.
    ///
    /// # Errors
    /// [`Code::Environment`], [`Code::Decode`], [`Code::IncompatibleVersion`] and [`Code::Config`], in this order.
    pub fn parse(cmd: Cmd, env: &Env, stdin: &[u8]) -> Result<Self> {
        let mut tolerance = Tolerance::of(cmd);
        let call = env.read(cmd, &mut tolerance)?;

        let read = || format!("decode the network configuration on stdin ({} bytes)", stdin.len());
        let decoded: Stdin = json::object(stdin).map_err(|cause| Error::because(Code::Decode, read(), cause))?;
        let mut keys: config::Keys =
            json::object(stdin).map_err(|cause| Error::because(Code::Decode, read(), cause))?;
        let all: BTreeMap<String, &RawValue> =
            json::object(stdin).map_err(|cause| Error::because(Code::Decode, read(), cause))?;
        let version = negotiate(cmd, decoded.cni_version.as_deref().unwrap_or_default())?;
        let network = decoded.name.as_deref().unwrap_or_default().parse()?;

        let container_id = match &call.subject {
            Subject::Endpoint(endpoint) => Some(&*endpoint.container_id),
            Subject::NeverAdded(_) | Subject::Node => None,
        };
        let runtime =
            decoded.runtime_config.as_deref().map(|raw| part("runtimeConfig", json::object(raw.get()))).transpose()?;
        let RuntimeConfig { cgroup_path, bandwidth, annotations } = runtime.unwrap_or_default();
        keys.complete(bandwidth.as_deref());
        let config = Config::read(keys, container_id, &mut tolerance)?;
        let mut unknown_keys = config::unknown(all.keys());
        unknown_keys.extend(config.policy.unknown_keys().cloned());
        // A sandbox without a cgroup parent, such as crictl makes, has an empty path.
        let cgroup_path = cgroup_path.as_deref().filter(|raw| raw.get() != "\"\"").map(runtime_cgroup_path).transpose();
        let attachments = decoded.valid_attachments.filter(|_| cmd == Cmd::Gc);
        let attachments = attachments.map(|raw| part("cni.dev/valid-attachments", serde_json::from_str(raw.get())));
        Ok(Self {
            cmd,
            version,
            network,
            subject: call.subject,
            netns: call.netns,
            pod_namespace: call.pod_namespace,
            pod_name: call.pod_name,
            config,
            cgroup_path: tolerance.weigh(cgroup_path)?,
            runtime_config: decoded.runtime_config,
            prev_result: decoded.prev_result,
            valid_attachments: attachments.transpose()?,
            unknown_keys,
            forgiven: tolerance.forgiven,
            sources: limits::Sources { bandwidth, annotations, args: decoded.args, cni_args: call.args },
        })
    }

    /// The request of an ADD with these keys of podshaper's configuration and without a pod. It finds errors in the
    /// keys before the first pod does.
    ///
    /// # Errors
    /// Those of every ADD.
    pub fn of_keys(keys: &Map<String, Value>) -> Result<Self> {
        let mut stdin = keys.clone();
        let standing = [("cniVersion", "1.1.0"), ("name", "none"), ("type", "podshaper")];
        stdin.extend(standing.map(|(key, value)| (key.to_owned(), value.into())));
        let named = |name: &str| Some(name.into());
        let env = Env { container_id: named("none"), netns: named("/"), ifname: named("eth0"), ..Env::default() };
        let request = Self::parse(Cmd::Add, &env, Value::Object(stdin).to_string().as_bytes())?;
        request.limits()?;
        Ok(request)
    }

    /// The request of a call whose stdin cannot be read, built from the variables alone. `unreadable` says why stdin
    /// cannot be read.
    ///
    /// # Errors
    /// [`Code::Environment`].
    pub fn of_variables(cmd: Cmd, env: &Env, unreadable: Error) -> Result<Self> {
        let mut request = Self::parse(cmd, env, br#"{"cniVersion": "1.0.0", "name": "unknown"}"#)?;
        request.forgiven.push(unreadable);
        Ok(request)
    }

    /// The configured path of the pod's cgroup: the runtime's; else, if there is no UID to search by, the one in the
    /// configuration.
    pub fn cgroup_hint(&self) -> Option<&Path> {
        let nameless = matches!(&self.subject, Subject::Endpoint(Endpoint { key: PodKey::Container(_), .. }));
        let configured = self.config.cgroup_path.as_deref().filter(|_| nameless);
        self.cgroup_path.as_deref().or(configured)
    }
}

/// Decides whether an error ends the call. ADD, CHECK and STATUS fail. DEL and GC note the error and go on without the
/// value.
struct Tolerance {
    cleanup: bool,
    forgiven: Vec<Error>,
}

impl Tolerance {
    fn of(cmd: Cmd) -> Self {
        Self { cleanup: matches!(cmd, Cmd::Del | Cmd::Gc), forgiven: Vec::new() }
    }

    fn weigh<T: Default>(&mut self, result: Result<T>) -> Result<T> {
        match result {
            Err(error) if self.cleanup => {
                self.forgiven.push(error);
                Ok(T::default())
            }
            result => result,
        }
    }
}

/// The version of the answer, chosen as in the reference implementation: the version must have the verb, and podshaper
/// must support the version.
fn negotiate(cmd: Cmd, declared: &str) -> Result<SpecVersion> {
    // A configuration without the key is older than the key, which 0.2.0 introduced.
    let undeclared = SpecVersion::new(0, 1, 0);
    let parse = || declared.parse().ok().filter(|_| declared.len() <= 32);
    let version = if declared.is_empty() { Some(undeclared) } else { parse() };
    let no_version = || Error::new(Code::Decode, format!("\"cniVersion\": {} is not a version", quoted(declared)));
    let version: SpecVersion = version.ok_or_else(no_version)?;
    version.allows(cmd)?;
    PluginInfo::default().validate(version)?;
    Ok(version)
}

/// A part of stdin that the specification defines. A malformed part is a decode error, as for stdin as a whole.
fn part<T>(key: &str, decoded: serde_json::Result<T>) -> Result<T> {
    decoded.map_err(|cause| Error::because(Code::Decode, format!("decode {key:?} of the network configuration"), cause))
}

fn runtime_cgroup_path(raw: &RawValue) -> Result<PathBuf> {
    let path = json::string(raw).and_then(|text| below_cgroup_mount(&text).ok_or_else(|| quoted(&text)));
    path.map_err(|shown| Error::new(Code::Config, format!("runtimeConfig.cgroupPath: {shown} {NO_CGROUP_PATH}")))
}

const NO_CGROUP_PATH: &str =
    "is not a path below the cgroup2 mount, nor the name of a slice (without '..', 4096 bytes at most)";

/// A path that stays below the directory to which it is joined. CRI-O with the systemd driver gives the name of the
/// slice alone.
fn below_cgroup_mount(text: &str) -> Option<PathBuf> {
    let stays = !text.contains('\0') && !text.split('/').any(|name| name == "..");
    (stays && text.len() <= MAX_PATH_BYTES).then(|| PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration with `keys` in it.
    pub(super) fn config(keys: &str) -> String {
        let comma = if keys.is_empty() { "" } else { ", " };
        format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "podshaper"{comma}{keys}}}"#)
    }

    /// The variables of a well-formed call with these `CNI_ARGS`.
    pub(super) fn env(args: &str) -> Env {
        Env {
            command: None,
            container_id: Some("c1".into()),
            netns: Some("/run/netns/n1".into()),
            ifname: Some("eth0".into()),
            args: Some(args.into()),
            path: Some("/opt/cni/bin".into()),
        }
    }

    /// An ADD with these `CNI_ARGS`.
    pub(super) fn add(args: &str, stdin: &str) -> Result<Request> {
        Request::parse(Cmd::Add, &env(args), stdin.as_bytes())
    }

    fn all() -> [Cmd; 5] {
        [Cmd::Add, Cmd::Check, Cmd::Del, Cmd::Gc, Cmd::Status]
    }

    #[test]
    fn stdin_that_is_no_configuration_is_refused_whatever_the_verb() {
        let bytes = |text: &str| format!("decode the network configuration on stdin ({} bytes): ", text.len());
        for (stdin, code, expected) in [
            ("", Code::Decode, "EOF while parsing a value at line 1 column 0"),
            ("null", Code::Decode, "not an object"),
            (r#"["1.1.0", "net"]"#, Code::Decode, "not an object"),
            ("{", Code::Decode, "EOF while parsing an object at line 1 column 1"),
            ("[1,", Code::Decode, "EOF while parsing a value at line 1 column 3"),
            (r#"{"name": 1}"#, Code::Decode, "invalid type: integer `1`, expected a string at line 1 column 10"),
            (r#"{"name": "a", "name": "b"}"#, Code::Decode, "duplicate field `name` at line 1 column 20"),
            ("{\"name\": \"a\", \"x\": 01}", Code::Decode, "invalid number at line 1 column 21"),
        ] {
            for cmd in all() {
                let error = Request::parse(cmd, &env(""), stdin.as_bytes()).unwrap_err();
                assert_eq!((error.code(), error.to_string()), (code, bytes(stdin) + expected), "{stdin}");
            }
        }
        let part = config(r#""runtimeConfig": []"#);
        let error = add("", &part).unwrap_err();
        assert_eq!(error.to_string(), r#"decode "runtimeConfig" of the network configuration: not an object"#);
        assert_eq!(Request::parse(Cmd::Add, &env(""), b"{\"name\": \"\xff\"}").unwrap_err().code(), Code::Decode);
    }

    #[test]
    fn versions_and_networks_are_checked_in_this_order() {
        let supported = r#"plugin supports ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]"#;
        let unsupported = |version| Err(format!(r#"config is "{version}", {supported}"#));
        let network = "is not a network name (a letter or digit, then letters, digits, '_', '.' and '-', 255 at most)";
        for (cmd, stdin, expected) in [
            (Cmd::Add, r#"{"cniVersion": "0.3.0", "name": "weave"}"#, Ok("0.3.0")),
            (Cmd::Del, r#"{"cniVersion": "1.0.0", "name": "a"}"#, Ok("1.0.0")),
            (Cmd::Add, r#"{"name": ""}"#, unsupported("0.1.0")),
            (Cmd::Add, r#"{"cniVersion": null}"#, unsupported("0.1.0")),
            (Cmd::Add, r#"{"cniVersion": "9.9.9"}"#, unsupported("9.9.9")),
            (Cmd::Check, r#"{"cniVersion": "0.3.1"}"#, Err("config version does not allow CHECK".to_owned())),
            (Cmd::Gc, r#"{"cniVersion": "1.0.0"}"#, Err("config version does not allow GC".to_owned())),
            (Cmd::Add, r#"{"cniVersion": "1.x"}"#, Err("\"cniVersion\": \"1.x\" is not a version".to_owned())),
            (Cmd::Add, r#"{"cniVersion": "1.1.0"}"#, Err(format!("configuration key \"name\": \"\" {network}"))),
            (
                Cmd::Add,
                r#"{"cniVersion": "1.1.0", "name": "../a"}"#,
                Err(format!("configuration key \"name\": \"../a\" {network}")),
            ),
        ] {
            let version = Request::parse(cmd, &env(""), stdin.as_bytes()).map(|request| request.version.to_string());
            assert_eq!(version.map_err(|error| error.to_string()), expected.map(String::from), "{stdin}");
        }
        assert_eq!(declared_version(br#"{"cniVersion": "0.4.0"}"#), Some(SpecVersion::new(0, 4, 0)));
        assert_eq!(declared_version(b"{}"), None);
    }

    #[test]
    fn an_add_refuses_what_a_del_forgives() {
        let long = "x".repeat(5000);
        for (args, keys, code) in [
            ("A", String::new(), Code::Environment),
            ("K8S_POD_NAME=a/b", String::new(), Code::Environment),
            ("K8S_POD_NAMESPACE=a b", String::new(), Code::Environment),
            ("", r#""logLevel": "loud""#.to_owned(), Code::Config),
            ("", r#""logFile": "log""#.to_owned(), Code::Config),
            ("", r#""rateKey": 1"#.to_owned(), Code::Config),
            ("", format!(r#""rateKey": "{long}""#), Code::Config),
            ("", r#""kubeconfig": []"#.to_owned(), Code::Config),
            ("", r#""onApiError": "retry""#.to_owned(), Code::Config),
            ("", r#""exemptSubnets": "10.0.0.0/8""#.to_owned(), Code::Config),
            ("", r#""exemptSubnets": ["10.0.0.0/33"]"#.to_owned(), Code::Config),
            ("", r#""cgroupPath": "/a/../b""#.to_owned(), Code::Config),
            ("", r#""runtimeConfig": {"cgroupPath": 1}"#.to_owned(), Code::Config),
            ("", r#""runtimeConfig": {"cgroupPath": "/.."}"#.to_owned(), Code::Config),
            ("", r#""runtimeConfig": {"cgroupPath": "/\u0000"}"#.to_owned(), Code::Config),
            ("", format!(r#""runtimeConfig": {{"cgroupPath": "/{long}"}}"#), Code::Config),
        ] {
            let stdin = config(&keys);
            let error = add(args, &stdin).unwrap_err();
            assert_eq!(error.code(), code, "{args} {keys}");
            assert!(error.to_string().len() < 300, "{error}");
            let request = Request::parse(Cmd::Del, &env(args), stdin.as_bytes()).unwrap();
            let forgiven: Vec<String> = request.forgiven.iter().map(Error::to_string).collect();
            assert_eq!(forgiven, [error.to_string()]);
            assert!(matches!(request.subject, Subject::Endpoint(_)));
        }
    }

    #[test]
    fn a_del_does_not_look_at_what_it_does_not_need() {
        let nested = "[".repeat(100_000) + &"]".repeat(100_000);
        let keys = format!(
            r#""runtimeConfig": {{"bandwidth": 1e400, "io.kubernetes.cri.pod-annotations": {nested}}}, "args": "?",
               "max": {nested}, "egress": -1, "cni.dev/valid-attachments": 3, "prevResult": {nested}, "else": {nested}"#
        );
        let request = Request::parse(Cmd::Del, &env("rate=x"), config(&keys).as_bytes()).unwrap();
        assert!(request.forgiven.is_empty() && request.valid_attachments.is_none());
        assert_eq!(request.prev_result.as_ref().map(|raw| raw.get()), Some(nested.as_str()));
        assert_eq!(request.limits().unwrap_err().code(), Code::Config);
    }

    #[test]
    fn prev_result_is_kept_to_the_byte() {
        let raw = r#"{ "b":1.0e0,"a" : [ "\u00e9" , 1e400 ],"a":2 }"#;
        let request = add("", &config(&format!(r#""prevResult":  {raw} "#))).unwrap();
        assert_eq!(request.prev_result.unwrap().get(), raw);
        assert!(add("", &config(r#""prevResult": null"#)).unwrap().prev_result.is_none());
    }

    #[test]
    fn gc_tells_no_list_from_an_empty_one() {
        let gc = |keys: &str| Request::parse(Cmd::Gc, &env(""), config(keys).as_bytes());
        let id = |found: &GcAttachment| format!("{}/{}", found.container_id, found.ifname);
        for (keys, expected) in [
            ("", None),
            (r#""cni.dev/valid-attachments": null"#, None),
            (r#""cni.dev/valid-attachments": []"#, Some(vec![])),
            (
                r#""cni.dev/valid-attachments": [{"containerID": "a", "ifname": "b", "c": 1}]"#,
                Some(vec!["a/b".to_owned()]),
            ),
        ] {
            let found = gc(keys).unwrap().valid_attachments;
            assert_eq!(found.map(|found| found.iter().map(id).collect::<Vec<_>>()), expected, "{keys}");
        }
        assert_eq!(gc(r#""cni.dev/valid-attachments": [1]"#).unwrap_err().code(), Code::Decode);
    }

    #[test]
    fn stdin_is_read_up_to_eight_mebibytes() {
        assert_eq!(read_stdin(std::io::repeat(b' ').take(8 << 20)).unwrap().len(), 8 << 20);
        let error = read_stdin(std::io::repeat(b' ')).unwrap_err();
        assert_eq!(error.code(), Code::Decode);
        assert_eq!(error.to_string(), "the network configuration on stdin has more than 8 MiB (8388608 bytes)");
    }
}
