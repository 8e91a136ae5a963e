//! The pod's limits: for each direction the first of these sources that names a rate, then the cap.
//!
//! 1. `runtimeConfig.bandwidth`, which kubelet makes of the two standard annotations
//! 2. the pod's annotations, where the runtime passes them
//! 3. `args.cni`
//! 4. `CNI_ARGS`: the same keys
//! 5. the pod's annotations, then its labels, from the API server, if `kubeconfig` names one
//! 6. `egress` and `ingress` of the configuration, else its `max`, both by the pod's namespace: see `policy.rs`
//!
//! Sources after the first one that is set are not read: a tenant cannot break a pod with nonsense in a key that does
//! not count. The keys of sources 2 to 5 are [`Direction::annotation`], in bits per second, and the ancestor project's
//! `rate`. The burst is looked up in the same order, under [`Direction::burst_annotation`], whichever source has named
//! the rate.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::policy::Namespaces;
use super::{Request, bandwidth, env, json};
use crate::direction::Direction;
use crate::error::{Code, Error, Result, quoted};
use crate::kube::{Kept, Labels, LeftOut, MAX_BYTES, Metadata};
use crate::units::{Burst, Rate, UnitError};

/// The limits of one attachment; `None` means unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The limit of packets from the pod.
    pub egress: Option<Limit>,
    /// The limit of packets to the pod.
    pub ingress: Option<Limit>,
}

impl Limits {
    /// Whether neither direction is limited.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The limit of a direction.
    pub fn of(&self, direction: Direction) -> Option<&Limit> {
        match direction {
            Direction::Egress => self.egress.as_ref(),
            Direction::Ingress => self.ingress.as_ref(),
        }
    }
}

/// The limit of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The rate that the pod gets.
    pub rate: Rate,
    /// How much the pod may send at once.
    pub burst: Burst,
    /// The rate that was asked for. It is above `rate` if the administrator's `max` is lower; then the log says so.
    pub asked: Rate,
    /// The administrator's `max` for this pod.
    pub max: Option<Rate>,
    /// Where the rate was asked for.
    pub source: Source,
}

impl Limit {
    /// A rate with its default burst.
    pub fn of(rate: Rate, source: Source) -> Self {
        Self { rate, burst: Burst::default_for(rate), asked: rate, max: None, source }
    }
}

/// Where a limit was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `runtimeConfig.bandwidth`
    RuntimeConfig,
    /// An annotation, passed on by the runtime.
    Annotation,
    /// `args.cni`
    Args,
    /// `CNI_ARGS`
    CniArgs,
    /// An annotation, read from the API server.
    ApiAnnotation,
    /// A label, read from the API server.
    ApiLabel,
    /// The plugin's configuration.
    Config,
    /// A command of the operator.
    Operator,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::RuntimeConfig => "runtimeConfig.bandwidth",
            Self::Annotation => "pod annotation",
            Self::Args => "args.cni",
            Self::CniArgs => "CNI_ARGS",
            Self::ApiAnnotation => "API server's pod annotation",
            Self::ApiLabel => "API server's pod label",
            Self::Config => "configuration",
            Self::Operator => "command line",
        })
    }
}

/// The sources that may hold limits, undecoded.
#[derive(Debug)]
pub(super) struct Sources {
    pub(super) bandwidth: Option<Box<RawValue>>,
    pub(super) annotations: Option<Box<RawValue>>,
    pub(super) args: Option<Box<RawValue>>,
    pub(super) cni_args: Vec<(String, String)>,
}

#[derive(Default, Deserialize)]
struct Args {
    cni: Option<Box<RawValue>>,
}

/// The rate and burst that the sources read so far ask for in one direction.
#[derive(Clone, Copy, Default)]
pub(super) struct Asked {
    pub(super) rate: Option<(Rate, Source)>,
    pub(super) burst: Option<Burst>,
}

/// Egress and ingress.
type Both = [Asked; 2];

impl Asked {
    fn is_complete(&self) -> bool {
        self.rate.is_some() && self.burst.is_some()
    }
}

/// The value of a key.
type Value<'a> = &'a dyn Fn(&str) -> Result<Option<String>, NoValue>;

/// Why a key has no value that can be used.
enum NoValue {
    /// The JSON that stands there instead of a string.
    NotText(String),
    /// The key may be one of those of this pod that were left out.
    LeftOut { pod: String },
}

impl Request {
    /// The limits that this call and the configuration ask for.
    ///
    /// # Errors
    /// [`Code::Config`], naming source, key, value, reason and remedy.
    pub fn limits(&self) -> Result<Limits> {
        let mut asked = self.called_for()?;
        // The API server is not asked if both rates are already known.
        if asked.iter().any(|asked| asked.rate.is_none())
            && let Some(pod) = self.ask_api_server()?
        {
            self.annotations(&pod, &mut asked)?;
            self.labels(&pod, &mut asked)?;
        }
        self.complete(&asked, &|namespace| self.ask_for_namespace(namespace))
    }

    /// The limits without asking the API server, with the given labels of namespaces.
    ///
    /// # Errors
    /// Those of [`Request::limits`].
    pub fn limits_of_call(&self, namespaces: &Namespaces) -> Result<Limits> {
        self.complete(&self.called_for()?, &|namespace| Ok(namespaces.get(namespace).cloned()))
    }

    /// The limits that are asked for now, for a pod as the API server has it. On the interface that the annotations are
    /// about, the annotations replace the limits that the runtime derived from them at ADD. On another interface the
    /// limits of the runtime's call count, since they do not come from these annotations. Labels count where an ADD
    /// reads them.
    ///
    /// # Errors
    /// Those of [`Request::limits`].
    pub fn limits_now(&self, pod: &Metadata, are_its_annotations: bool, namespaces: &Namespaces) -> Result<Limits> {
        let mut asked = Both::default();
        if are_its_annotations {
            self.annotations(pod, &mut asked)?;
            self.args(&mut asked)?;
        } else {
            asked = self.called_for()?;
        }
        if self.config.kubeconfig.is_some() {
            self.labels(pod, &mut asked)?;
        }
        self.complete(&asked, &|namespace| Ok(namespaces.get(namespace).cloned()))
    }

    /// The limits that a pod's annotations on the API server ask for, capped by the administrator's `max`. No other
    /// source counts.
    ///
    /// # Errors
    /// Those of [`Request::limits`].
    pub fn limits_by_annotation(&self, pod: &Metadata, namespaces: &Namespaces) -> Result<Limits> {
        let mut asked = Both::default();
        self.annotations(pod, &mut asked)?;
        let Limits { egress, ingress } = self.complete(&asked, &|namespace| Ok(namespaces.get(namespace).cloned()))?;
        let [of_egress, of_ingress] = asked.map(|asked| asked.rate.is_some());
        Ok(Limits { egress: egress.filter(|_| of_egress), ingress: ingress.filter(|_| of_ingress) })
    }

    /// Whether limits depend on the labels of namespaces.
    pub fn asks_for_namespaces(&self) -> bool {
        self.config.policy.asks_for_labels()
    }

    /// Applies source 6 where no other source has asked for a limit, and the cap.
    fn complete(&self, asked: &Both, labels: &dyn Fn(&str) -> Result<Option<Labels>>) -> Result<Limits> {
        let policy = self.config.policy.of(self.pod_namespace.as_deref(), labels)?;
        let complete = |direction: Direction| -> Result<Option<Limit>> {
            let Asked { rate, burst } = asked[direction.index() as usize];
            let most = policy.max(direction)?;
            let max = most.map(|most| most.rate);
            // A pod cannot get a larger burst than `max` allows. The configuration's default burst is not capped.
            let burst = burst.map(|burst| most.map_or(burst, |most| burst.min(most.burst)));
            let (rate, source, burst) = match rate {
                Some((rate, source)) => (Some(rate), source, burst),
                None => {
                    let default = policy.default(direction)?;
                    let given = default.and_then(|(_, burst)| burst);
                    // `max` is also the rate of a pod that asks for none.
                    (default.map(|(rate, _)| rate).or(max), Source::Config, burst.or(given))
                }
            };
            Ok(rate.map(|asked| {
                let rate = max.map_or(asked, |max| asked.min(max));
                let usual = most.map_or(Burst::default_for(rate), |most| Burst::default_for(rate).min(most.burst));
                Limit { rate, burst: burst.unwrap_or(usual), asked, max, source }
            }))
        };
        Ok(Limits { egress: complete(Direction::Egress)?, ingress: complete(Direction::Ingress)? })
    }

    /// Source 5, first part: the annotations.
    fn annotations(&self, pod: &Metadata, asked: &mut Both) -> Result<()> {
        check_own_keys(Source::ApiAnnotation, pod.annotations.keys())?;
        self.keys(Source::ApiAnnotation, &|key| self.kept(&pod.annotations, key), asked)
    }

    /// Source 5, second part: the labels.
    fn labels(&self, pod: &Metadata, asked: &mut Both) -> Result<()> {
        self.keys(Source::ApiLabel, &|key| self.kept(&pod.labels, key), asked)
    }

    fn kept(&self, kept: &Kept, key: &str) -> Result<Option<String>, NoValue> {
        let names = [&self.pod_namespace, &self.pod_name].map(|name| name.as_deref().unwrap_or_default());
        let value = kept.get(key).map_err(|LeftOut| NoValue::LeftOut { pod: names.join("/") })?;
        Ok(value.map(str::to_owned))
    }

    /// Sources 1 to 4, which the call itself carries.
    fn called_for(&self) -> Result<Both> {
        let Sources { bandwidth, annotations, .. } = &self.sources;
        let mut asked = Both::default();
        if let Some(raw) = bandwidth {
            asked = [bandwidth::asked(raw, Direction::Egress)?, bandwidth::asked(raw, Direction::Ingress)?];
        }
        if !asked.iter().all(Asked::is_complete) {
            let annotations = members("runtimeConfig[\"io.kubernetes.cri.pod-annotations\"]", annotations.as_deref())?;
            check_own_keys(Source::Annotation, annotations.keys())?;
            self.keys(Source::Annotation, &|key| text(&annotations, key), &mut asked)?;
            self.args(&mut asked)?;
        }
        Ok(asked)
    }

    /// Sources 3 and 4.
    fn args(&self, asked: &mut Both) -> Result<()> {
        let Sources { args, cni_args, .. } = &self.sources;
        let Args { cni } = args.as_deref().map_or(Ok(Args::default()), |raw| decode("args", raw))?;
        let cni = members("args.cni", cni.as_deref())?;
        self.keys(Source::Args, &|key| text(&cni, key), asked)?;
        self.keys(Source::CniArgs, &|key| Ok(env::value(cni_args, key).map(str::to_owned)), asked)
    }

    /// Reads the keys that sources 2 to 5 have in common, as far as no earlier source has set them.
    fn keys(&self, source: Source, value: Value<'_>, asked: &mut Both) -> Result<()> {
        for (direction, asked) in Direction::BOTH.into_iter().zip(asked) {
            if asked.rate.is_none() {
                asked.rate = self.rate(direction, source, value)?.map(|rate| (rate, source));
            }
            if asked.burst.is_none() {
                asked.burst = read(source, direction.burst_annotation(), value, Burst::from_quantity, BURST)?;
            }
        }
        Ok(())
    }

    fn rate(&self, direction: Direction, source: Source, value: Value<'_>) -> Result<Option<Rate>> {
        let standard = read(source, direction.annotation(), value, Rate::from_quantity, QUANTITY)?;
        let ancestors = self.config.rate_key.as_deref().filter(|_| direction == Direction::Egress);
        match (standard, ancestors) {
            (None, Some(key)) => read(source, key, value, Rate::from_megabytes, MEGABYTES),
            (standard, _) => Ok(standard),
        }
    }
}

/// The value of a key, parsed by `parse`.
fn read<T>(
    source: Source,
    key: &str,
    value: Value<'_>,
    parse: fn(&str) -> Result<T, UnitError>,
    remedy: &str,
) -> Result<Option<T>> {
    let wrong =
        |shown: String, cause| Error::because(Code::Config, format!("{source} {key}: {shown} is not {remedy}"), cause);
    match value(key) {
        Ok(None) => Ok(None),
        Ok(Some(text)) => parse(&text).map(Some).map_err(|cause| wrong(quoted(&text), cause)),
        Err(NoValue::NotText(shown)) => Err(wrong(shown, UnitError::NotText)),
        Err(NoValue::LeftOut { pod }) => Err(left_out(source, key, &pod)),
    }
}

/// The error about a key that was left out, if the pod has it. The pod keeps the limit that it has; a new pod is not
/// made.
fn left_out(source: Source, key: &str, pod: &str) -> Error {
    let text = format!(
        "{source} {key}: it is not known whether pod {pod} has it, since the keys in front of it have {MAX_BYTES} \
         bytes or more, and no more are read: take some of them off the pod, write its limit as {}, or set \
         \"rateKey\" to \"\"",
        Direction::Egress.annotation()
    );
    Error::new(Code::Config, text)
}

/// Refuses an unknown key with podshaper's own prefix. Such a key is most often misspelt, and its limit would be
/// ignored silently.
fn check_own_keys<'a>(source: Source, mut keys: impl Iterator<Item = &'a String>) -> Result<()> {
    let known = Direction::BOTH.map(Direction::burst_annotation);
    match keys.find(|key| key.starts_with(OWN_PREFIX) && !known.contains(&key.as_str())) {
        Some(key) => {
            let text = format!("{source} {} is none of podshaper's: those are {}", quoted(key), known.join(", "));
            Err(Error::new(Code::Config, text))
        }
        None => Ok(()),
    }
}

/// The prefix of keys that only podshaper defines.
const OWN_PREFIX: &str = "podshaper.io/";
const QUANTITY: &str = "a rate (write bits per second, 1k to 1P, such as \"10M\")";
const MEGABYTES: &str = "a rate (write whole megabytes per second, such as \"1M\")";
const BURST: &str = "a burst (write bits, below 4 GiB, such as \"400k\")";

/// The members of an object, undecoded: another program's member may hold any value.
fn members(name: &str, raw: Option<&RawValue>) -> Result<BTreeMap<String, Box<RawValue>>> {
    raw.map_or(Ok(BTreeMap::new()), |raw| decode(name, raw))
}

pub(super) fn decode<T: for<'de> Deserialize<'de>>(name: &str, raw: &RawValue) -> Result<T> {
    json::object(raw.get()).map_err(|cause| Error::because(Code::Config, format!("decode {name}"), cause))
}

/// A member that should be a string. A number counts as its text, null counts as absent.
fn text(members: &BTreeMap<String, Box<RawValue>>, key: &str) -> Result<Option<String>, NoValue> {
    match members.get(key).map(|raw| (raw.get(), json::string(raw))) {
        None | Some(("null", _)) => Ok(None),
        Some((_, Ok(text))) => Ok(Some(text)),
        Some((number, Err(_))) if number.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => {
            Ok(Some(number.to_owned()))
        }
        Some((_, Err(shown))) => Err(NoValue::NotText(shown)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::request::tests::{add, config};
    use serde_json::json;

    /// Egress and ingress as "rate burst source", or the error.
    pub(in crate::request) fn outcome(request: &Request) -> Result<[String; 2], String> {
        let print = |limit: Limit| {
            let capped = if limit.asked == limit.rate { String::new() } else { format!(" not {}", limit.asked) };
            format!("{} {} {}{capped}", limit.rate, limit.burst.as_bytes(), limit.source)
        };
        let limits = request.limits().map_err(|error| error.to_string())?;
        Ok([limits.egress, limits.ingress].map(|limit| limit.map(print).unwrap_or_default()))
    }

    fn annotations(annotations: &str) -> String {
        config(&format!(r#""runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {annotations}}}"#))
    }

    #[test]
    fn the_first_source_that_is_set_counts_and_no_other_is_looked_at() {
        // From the last source to the first; each is put in front of all earlier ones. The malformed values are those
        // that must not be read.
        let defaults = r#""egress": "7M", "ingress": 7000000, "egressBurst": "160k", "ingressBurst": 240000"#;
        let by_key = |value: &str| format!(r#"{{"kubernetes.io/egress-bandwidth": {value}, "rate": "nonsense"}}"#);
        let args = |value: &str| format!(r#""args": {{"cni": {}}}"#, by_key(value));
        let runtime = |bandwidth: &str, annotations: &str| {
            format!(r#""runtimeConfig": {{{bandwidth}"io.kubernetes.cri.pod-annotations": {annotations}}}"#)
        };
        let bandwidth = r#""bandwidth": {"EgressRate": 2000000, "EgressBurst": 80000, "IngressRate": 2000000, "IngressBurst": 120000},"#;
        let cni_args = "rate=5M;kubernetes.io/ingress-bandwidth=5M";
        let null = runtime("", "null");
        for (call, keys, egress, ingress) in [
            ("", vec![null.as_str()], "", ""),
            ("", vec![defaults], "7M 20000 configuration", "7M 30000 configuration"),
            (cni_args, vec![r#""egress": true"#], "40M 25000 CNI_ARGS", "5M 15000 CNI_ARGS"),
            (cni_args, vec![&args(r#""4M""#)], "4M 15000 args.cni", "5M 15000 CNI_ARGS"),
            (
                cni_args,
                vec![&args("true"), &runtime("", &by_key(r#""3M""#))],
                "3M 15000 pod annotation",
                "5M 15000 CNI_ARGS",
            ),
            (
                "rate=x",
                vec![&args("true"), &runtime(bandwidth, r#""not even an object""#)],
                "2M 10000 runtimeConfig.bandwidth",
                "2M 15000 runtimeConfig.bandwidth",
            ),
        ] {
            let request = add(call, &config(&keys.join(", "))).unwrap();
            assert_eq!(outcome(&request), Ok([egress, ingress].map(String::from)), "{call} {keys:?}");
        }
    }

    #[test]
    fn a_wrong_annotation_is_named_with_its_remedy() {
        let long = format!(r#"{{"rate": "{}"}}"#, "9".repeat(100));
        let shown = format!("\"{}\"..", "9".repeat(64));
        for (text, expected) in [
            (
                r#"{"kubernetes.io/egress-bandwidth": "10MB"}"#,
                "pod annotation kubernetes.io/egress-bandwidth: \"10MB\" is not a rate (write bits per second, 1k to 1P, \
                 such as \"10M\"): the number is followed by something else than k, M, G, T, P, Ki, Mi, Gi or an exponent",
            ),
            (
                r#"{"kubernetes.io/ingress-bandwidth": "\u001b[2J\n"}"#,
                "pod annotation kubernetes.io/ingress-bandwidth: \"\\u{1b}[2J\\n\" is not a rate (write bits per second, \
                 1k to 1P, such as \"10M\"): does not start with a number",
            ),
            (
                r#"{"rate": "1.5M"}"#,
                "pod annotation rate: \"1.5M\" is not a rate (write whole megabytes per second, such as \"1M\"): \
                 not digits followed by M",
            ),
            (
                r#"{"rate": {"a": 1}}"#,
                "pod annotation rate: \"{\\\"a\\\": 1}\" is not a rate (write whole megabytes per second, such as \"1M\"): \
                 not a string",
            ),
            (
                &long,
                &format!(
                    "pod annotation rate: {shown} is not a rate (write whole megabytes per second, such as \"1M\"): \
                     not digits followed by M"
                ),
            ),
            ("[]", "decode runtimeConfig[\"io.kubernetes.cri.pod-annotations\"]: not an object"),
        ] {
            let error = add("", &annotations(text)).unwrap().limits().unwrap_err();
            assert_eq!((error.code(), error.to_string().as_str()), (Code::Config, expected));
        }
    }

    #[test]
    fn the_administrators_cap_holds_for_every_source() {
        let max = r#""max": {"egress": "1G", "ingress": 100000000}"#;
        for (call, keys, egress, ingress) in [
            ("", "", "1G 625000 configuration", "100M 62500 configuration"),
            (
                "",
                r#", "egress": "2G", "egressBurst": "80k""#,
                "1G 10000 configuration not 2G",
                "100M 62500 configuration",
            ),
            ("rate=1M;kubernetes.io/ingress-bandwidth=1G", "", "8M 15000 CNI_ARGS", "100M 62500 CNI_ARGS not 1G"),
            ("kubernetes.io/egress-bandwidth=1P", "", "1G 625000 CNI_ARGS not 1P", "100M 62500 configuration"),
        ] {
            let request = add(call, &config(&format!("{max}{keys}"))).unwrap();
            assert_eq!(outcome(&request), Ok([egress, ingress].map(String::from)), "{call} {keys}");
        }
    }

    #[test]
    fn the_ancestors_key_can_be_renamed_and_switched_off() {
        for (rate_key, call, egress) in [
            ("", "rate=1M", "8M 15000 CNI_ARGS"),
            (r#""rateKey": "example.org/rate""#, "rate=x;example.org/rate=2M", "16M 15000 CNI_ARGS"),
            (r#""rateKey": """#, "rate=x", ""),
        ] {
            let request = add(call, &config(rate_key)).unwrap();
            assert_eq!(outcome(&request), Ok([egress, ""].map(String::from)), "{rate_key} {call}");
        }
    }

    /// More keys and values than are kept, and these behind them.
    fn behind_many_others(members: &[(&str, &str)]) -> Kept {
        let value = "x".repeat(250);
        let others = (0..300).map(|i| (format!("a{i:03}"), value.clone()));
        let members = members.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        serde_json::from_str(&json!(others.chain(members).collect::<BTreeMap<_, _>>()).to_string()).unwrap()
    }

    #[test]
    fn a_rate_that_may_be_left_out_is_an_error_and_not_absent() {
        let (many, none) = (|members: &[(&str, &str)]| behind_many_others(members), Kept::default);
        let text = |source| {
            format!(
                "{source} rate: it is not known whether pod n/a has it, since the keys in front of it have 65536 bytes \
                 or more, and no more are read: take some of them off the pod, write its limit as \
                 kubernetes.io/egress-bandwidth, or set \"rateKey\" to \"\""
            )
        };
        let standard = ("kubernetes.io/egress-bandwidth", "5M");
        for (annotations, labels, keys, expected) in [
            (many(&[("rate", "1M")]), none(), "", Err(text("API server's pod annotation"))),
            (many(&[]), none(), "", Err(text("API server's pod annotation"))),
            (none(), many(&[("rate", "1M")]), "", Err(text("API server's pod label"))),
            // These do not depend on the keys that are left out.
            (many(&[standard, ("rate", "1M")]), none(), "", Ok("5M")),
            (many(&[("rate", "1M")]), none(), r#", "rateKey": """#, Ok("")),
        ] {
            let keys = config(&format!(r#""kubeconfig": "/k"{keys}"#));
            let request = add("K8S_POD_NAMESPACE=n;K8S_POD_NAME=a", &keys).unwrap();
            let pod = Metadata { annotations, labels, ..Metadata::default() };
            let limits = request.limits_now(&pod, true, &Namespaces::new()).map_err(|error| error.to_string());
            let egress = limits.map(|limits| limits.egress.map(|limit| limit.rate.to_string()).unwrap_or_default());
            assert_eq!(egress, expected.map(String::from), "{keys}");
        }
    }
}
