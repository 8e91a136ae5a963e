//! The plugin's own keys in the network configuration: the administrator's side of a request.
//!
//! | key | value | default |
//! | --- | --- | --- |
//! | `egress`, `ingress` | rate of pods that ask for none: quantity, or number of bits/s | unlimited |
//! | `egressBurst`, `ingressBurst` | their bursts: quantity or number, bits | 5 ms, 10 packets at least |
//! | `max` | `{"egress", "ingress"}`: the cap for every pod, and the rate of a pod that asks for none | none |
//! | `namespaces` | list of rates and `max` by namespace: see `policy.rs` | none |
//! | `rateKey` | annotation that holds whole megabytes/s; `""` for none | `rate` |
//! | `exemptSubnets`, `shapedSubnets` | remote addresses that are not limited, that are: see `subnets.rs` | none, all |
//! | `otherPaths` | whether packets that do not pass the pod's sockets are limited: true, false | true |
//! | `cgroupPath` | below the cgroup2 mount, for runtimes that pass no UID; `{containerID}` is replaced | none |
//! | `kubeconfig` | API server to ask for annotations and labels: absolute path | none is asked |
//! | `onApiError` | what an ADD does if the API server does not answer: fail, ignore | fail |
//! | `delegate` | written by `install --delegate`: [`Delegation`] | none: one plugin of the network's list |
//! | `logFile`, `logLevel` | absolute path; off, error, warn, info, debug, trace | stderr, info |
//!
//! An unknown key is an error for `install` and `doctor`, and a warning at each ADD ([`UnknownKey`]): most often it is
//! a misspelling of a key above. An unknown key in `max` is an error at each ADD. Rates are decoded when a limit is
//! asked for, all other keys at once.

use std::fmt;
use std::path::PathBuf;

use log::LevelFilter;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::policy::{Policy, Rates};
use super::subnets::Subnets;
use super::{MAX_PATH_BYTES, NO_CGROUP_PATH, Tolerance, below_cgroup_mount, json};
use crate::error::{Code, Error, Result, quoted};
use crate::units::UnitError;

/// Longest annotation or label key: a prefix, a slash, a name.
const MAX_KEY_BYTES: usize = 253 + 1 + 63;

/// The keys of [`Keys`], with their aliases.
const OURS: [&str; 19] = [
    "logFile",
    "logLevel",
    "rateKey",
    "cgroupPath",
    "kubeconfig",
    "onApiError",
    "exemptSubnets",
    "otherPaths",
    "unshapedSubnets",
    "shapedSubnets",
    "egress",
    "egressRate",
    "ingress",
    "ingressRate",
    "egressBurst",
    "ingressBurst",
    "max",
    "namespaces",
    DELEGATE,
];
/// Keys that the configuration of any plugin may have (SPEC.md, "Plugin configuration objects", "Deriving execution
/// configuration").
const OF_ANY_PLUGIN: [&str; 12] = [
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "args",
    "capabilities",
    "runtimeConfig",
    "prevResult",
    "ipMasq",
    "ipam",
    "dns",
    "disableCheck",
];

/// The key that holds a [`Delegation`].
pub const DELEGATE: &str = "delegate";

/// Podshaper is the only plugin of its list. At each call podshaper reads the network's list and calls the plugins of
/// that list itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Delegation {
    /// The directory of the network's list. A runtime does not pass the directory of its configuration.
    pub directory: PathBuf,
    /// Whether the network's bandwidth plugin is left out, so that a pod has only one limit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replace_bandwidth: bool,
}

/// A key that neither podshaper nor the specification defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownKey {
    pub(super) key: String,
    pub(super) known: &'static [&'static str],
}

impl fmt::Display for UnknownKey {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} is no key of podshaper's (those are {})", quoted(&self.key), self.known.join(", "))
    }
}

/// The unknown ones among a configuration's keys.
pub(super) fn unknown<'a>(keys: impl IntoIterator<Item = &'a String>) -> Vec<UnknownKey> {
    let is_known = |key: &str| OURS.contains(&key) || OF_ANY_PLUGIN.contains(&key) || is_foreign(key);
    let unknown = keys.into_iter().filter(|key| !is_known(key)).cloned();
    unknown.map(|key| UnknownKey { key, known: &OURS }).collect()
}

/// Whether a slash or an underscore marks the key as another program's, or as a comment.
pub(super) fn is_foreign(key: &str) -> bool {
    key.contains('/') || key.starts_with(['_', '#'])
}

/// The plugin's own configuration.
#[derive(Debug)]
pub struct Config {
    /// `logFile`; `None` means stderr.
    pub log_file: Option<PathBuf>,
    /// `logLevel`.
    pub log_level: LevelFilter,
    /// `rateKey`; `None` if switched off.
    pub rate_key: Option<String>,
    /// `cgroupPath`, with this call's container id in it; see [`super::Request::cgroup_hint`].
    pub cgroup_path: Option<PathBuf>,
    /// `kubeconfig`; `None` if no API server is asked.
    pub kubeconfig: Option<PathBuf>,
    /// `onApiError`.
    pub on_api_error: OnApiError,
    /// `exemptSubnets` and `shapedSubnets`.
    pub subnets: Subnets,
    /// `otherPaths`.
    pub other_paths: bool,
    /// `delegate`.
    pub delegate: Option<Delegation>,
    pub(super) policy: Policy,
}

/// What a call does if the API server does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnApiError {
    /// The call fails. This is the default: a pod that asks for a limit by label must not run without the limit because
    /// the server did not answer. kubelet tries again.
    #[default]
    Fail,
    /// The call goes on as if the pod had neither labels nor annotations.
    Ignore,
}

/// The keys as they stand in stdin; null counts as absent.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Keys {
    log_file: Option<Box<RawValue>>,
    log_level: Option<Box<RawValue>>,
    rate_key: Option<Box<RawValue>>,
    cgroup_path: Option<Box<RawValue>>,
    kubeconfig: Option<Box<RawValue>>,
    on_api_error: Option<Box<RawValue>>,
    #[serde(alias = "unshapedSubnets")]
    exempt_subnets: Option<Box<RawValue>>,
    shaped_subnets: Option<Box<RawValue>>,
    other_paths: Option<Box<RawValue>>,
    // The aliases, here and above, are the bandwidth plugin's keys, which mean the same. So the keys can be copied from
    // its entry.
    #[serde(alias = "egressRate")]
    egress: Option<Box<RawValue>>,
    #[serde(alias = "ingressRate")]
    ingress: Option<Box<RawValue>>,
    egress_burst: Option<Box<RawValue>>,
    ingress_burst: Option<Box<RawValue>>,
    max: Option<Box<RawValue>>,
    namespaces: Option<Box<RawValue>>,
    // The name of this key is `DELEGATE`.
    delegate: Option<Box<RawValue>>,
}

/// The lists that the bandwidth plugin accepts beside a pod's rates.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lists {
    unshaped_subnets: Option<Box<RawValue>>,
    shaped_subnets: Option<Box<RawValue>>,
}

impl Keys {
    /// Takes the lists of `runtimeConfig.bandwidth` if the configuration has none, as the bandwidth plugin does.
    pub(super) fn complete(&mut self, bandwidth: Option<&RawValue>) {
        if self.exempt_subnets.is_none() && self.shaped_subnets.is_none() {
            // Malformed JSON is reported where the rates are read.
            let lists = bandwidth.and_then(|raw| serde_json::from_str::<Lists>(raw.get()).ok()).unwrap_or_default();
            (self.exempt_subnets, self.shaped_subnets) = (lists.unshaped_subnets, lists.shaped_subnets);
        }
    }
}

impl Config {
    /// Decodes every key except the rates.
    pub(super) fn read(keys: Keys, container_id: Option<&str>, tolerance: &mut Tolerance) -> Result<Self> {
        let Keys { log_file, log_level, rate_key, cgroup_path, kubeconfig, on_api_error, .. } = keys;
        let Keys { exempt_subnets, shaped_subnets, other_paths, delegate, .. } = keys;
        let Keys { egress, ingress, egress_burst, ingress_burst, max, namespaces, .. } = keys;

        let level = |text: &str| text.parse::<LevelFilter>().ok();
        let annotation = |text: &str| (text.len() <= MAX_KEY_BYTES).then(|| text.to_owned());
        let cgroup = |text: &str| match container_id {
            Some(id) => below_cgroup_mount(&text.replace("{containerID}", id)),
            None => below_cgroup_mount(text),
        };
        let rate_key =
            read("rateKey", rate_key, "is not an annotation's key (a string, 317 bytes at most)", annotation);
        let policy = |text: &str| match text {
            "fail" => Some(OnApiError::Fail),
            "ignore" => Some(OnApiError::Ignore),
            _ => None,
        };
        let rates = Rates { egress, ingress, egress_burst, ingress_burst, max, ..Rates::default() };
        let has_kubeconfig = kubeconfig.is_some();
        let levels = "is not a log level (off, error, warn, info, debug, trace)";
        Ok(Self {
            log_file: tolerance.weigh(read("logFile", log_file, NO_FILE, file))?,
            log_level: tolerance.weigh(read("logLevel", log_level, levels, level))?.unwrap_or(LevelFilter::Info),
            rate_key: Some(tolerance.weigh(rate_key)?.unwrap_or_else(|| "rate".to_owned()))
                .filter(|key| !key.is_empty()),
            cgroup_path: tolerance.weigh(read("cgroupPath", cgroup_path, NO_CGROUP_PATH, cgroup))?,
            kubeconfig: tolerance.weigh(read("kubeconfig", kubeconfig, NO_FILE, file))?,
            on_api_error: tolerance
                .weigh(read("onApiError", on_api_error, "is not \"fail\" or \"ignore\"", policy))?
                .unwrap_or_default(),
            subnets: tolerance.weigh(Subnets::read(exempt_subnets, shaped_subnets))?,
            other_paths: tolerance.weigh(switch("otherPaths", other_paths))?.unwrap_or(true),
            // An error here is not forgiven for a DEL: the DEL would leave behind what the network's plugins have made.
            delegate: delegation(delegate)?,
            policy: tolerance.weigh(Policy::read(rates, namespaces, has_kubeconfig))?,
        })
    }
}

const NO_FILE: &str = "is not an absolute path (4096 bytes at most)";

fn file(text: &str) -> Option<PathBuf> {
    (text.starts_with('/') && text.len() <= MAX_PATH_BYTES && !text.contains('\0')).then(|| PathBuf::from(text))
}

/// A key whose value is a string that `take` understands.
fn read<T>(key: &str, raw: Option<Box<RawValue>>, wrong: &str, take: impl Fn(&str) -> Option<T>) -> Result<Option<T>> {
    let Some(raw) = raw else { return Ok(None) };
    let taken = json::string(&raw).and_then(|text| take(&text).ok_or_else(|| quoted(&text)));
    taken.map(Some).map_err(|shown| Error::new(Code::Config, format!("configuration key {key:?}: {shown} {wrong}")))
}

fn delegation(raw: Option<Box<RawValue>>) -> Result<Option<Delegation>> {
    let Some(raw) = raw else { return Ok(None) };
    let text = || format!("configuration key {DELEGATE:?} (podshaper install --delegate writes it)");
    let delegation: Delegation =
        json::object(raw.get()).map_err(|cause| Error::because(Code::Config, text(), cause))?;
    match delegation.directory.to_str().and_then(file) {
        Some(_) => Ok(Some(delegation)),
        None => Err(Error::new(Code::Config, format!("{}: \"directory\" {NO_FILE}", text()))),
    }
}

/// A key whose value is true or false.
fn switch(key: &str, raw: Option<Box<RawValue>>) -> Result<Option<bool>> {
    let Some(raw) = raw else { return Ok(None) };
    let wrong =
        || Error::new(Code::Config, format!("configuration key {key:?}: {} is not true or false", quoted(raw.get())));
    raw.get().parse().map(Some).map_err(|_| wrong())
}

/// A number of bits, or a quantity in a string.
pub(super) fn number<T>(
    key: &str,
    raw: &RawValue,
    what: &str,
    from_bits: fn(u64) -> Result<T, UnitError>,
    from_quantity: fn(&str) -> Result<T, UnitError>,
) -> Result<T> {
    let (shown, value) = match (json::string(raw), raw.get().parse()) {
        (Ok(text), _) => (quoted(&text), from_quantity(&text)),
        (Err(_), Ok(bits)) => (raw.get().to_owned(), from_bits(bits)),
        (Err(shown), Err(_)) => (shown, Err(UnitError::NotWhole)),
    };
    let text = || format!("configuration key {key:?}: {shown} is not {what}");
    value.map_err(|cause| Error::because(Code::Config, text(), cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::{add, config};
    use std::path::Path;

    #[test]
    fn the_configuration_is_read_with_its_defaults() {
        let plain = add("", &config(r#""foreign": {"keys": ["stay"]}, "logLevel": null"#)).unwrap().config;
        assert_eq!(
            (plain.log_file, plain.log_level, plain.rate_key.as_deref()),
            (None, LevelFilter::Info, Some("rate"))
        );
        let keys = r#""logFile": "/var/log/p", "logLevel": "Debug", "rateKey": "", "kubeconfig": "/etc/k", "onApiError": "ignore",
                      "exemptSubnets": ["10.0.0.0/8", "fd00::/8"], "cgroupPath": "/machine.slice/libpod-{containerID}.scope""#;
        let request = add("", &config(keys)).unwrap();
        assert_eq!(request.config.log_file.as_deref(), Some(Path::new("/var/log/p")));
        assert_eq!(request.config.kubeconfig.as_deref(), Some(Path::new("/etc/k")));
        assert_eq!((plain.on_api_error, request.config.on_api_error), (OnApiError::Fail, OnApiError::Ignore));
        assert_eq!((request.config.log_level, request.config.rate_key.as_deref()), (LevelFilter::Debug, None));
        assert_eq!(request.config.subnets.entries().count(), 2 + 1);
        // The configured cgroup is only for pods without a UID.
        assert_eq!(request.cgroup_hint(), Some(Path::new("/machine.slice/libpod-c1.scope")));
        assert_eq!(add("K8S_POD_UID=u", &config(keys)).unwrap().cgroup_hint(), None);
    }

    #[test]
    fn every_key_is_known_and_a_misspelt_one_is_not() {
        let keys = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let unknown = |names: &[&str]| unknown(&keys(names)).into_iter().map(|key| key.key).collect::<Vec<_>>();
        // Each key is a field or an alias of a field, so giving a key twice is a duplicate-field error.
        for key in OURS {
            let twice = format!(r#"{{"{key}": null, "{key}": null}}"#);
            assert!(serde_json::from_str::<Keys>(&twice).is_err(), "{key}");
        }
        assert_eq!(unknown(&OURS), keys(&[]));
        assert_eq!(unknown(&["cniVersion", "type", "cni.dev/valid-attachments", "_comment"]), keys(&[]));
        assert_eq!(unknown(&["egres", "max", "maxx", "Egress"]), keys(&["egres", "maxx", "Egress"]));
        let request = add("", &config(r#""egres": "1M", "_why": 1"#)).unwrap();
        assert_eq!(request.unknown_keys, [UnknownKey { key: "egres".into(), known: &OURS }]);
    }

    #[test]
    fn a_mistake_in_the_configured_rates_is_named_by_key() {
        let rate = "is not a rate (\"10M\", or a number of bits per second, 1k to 1P)";
        for (keys, expected) in [
            (r#""egress": "10MB""#, format!("\"egress\": \"10MB\" {rate}: {}", UnitError::Suffix)),
            (r#""egress": 0"#, format!("\"egress\": 0 {rate}: less than 1 kbit/s")),
            (r#""ingressRate": 1e9"#, format!("\"ingress\": \"1e9\" {rate}: neither a string nor a whole number")),
            (r#""max": {"egress": true}"#, format!("\"max.egress\": \"true\" {rate}: neither a string nor a whole number")),
            (
                r#""egress": "1M", "egressBurst": "0""#,
                "\"egressBurst\": \"0\" is not a burst (\"400k\", or a number of bits, below 4 GiB): a burst of nothing"
                    .to_owned(),
            ),
            (
                r#""max": {"egres": "10M"}"#,
                "\"max\" has no other keys than egress, ingress, egressBurst, ingressBurst: unknown field `egres`, expected \
                 one of `egress`, `ingress`, `egressBurst`, `ingressBurst` at line 1 column 8"
                    .to_owned(),
            ),
            (r#""max": []"#, "\"max\" has no other keys than egress, ingress, egressBurst, ingressBurst: not an object".to_owned()),
        ] {
            let error = add("", &config(keys)).unwrap().limits().unwrap_err();
            let expected = format!("configuration key {expected}");
            assert_eq!((error.code(), error.to_string()), (Code::Config, expected), "{keys}");
        }
    }
}
