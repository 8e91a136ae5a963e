//! What the pod is limited to: for each direction the first of these sources that names a rate, then the cap.
//!
//! 1. `runtimeConfig.bandwidth`, what kubelet made of the two standard annotations
//! 2. the pod's annotations, where the runtime passes them
//! 3. `args.cni`, 4. `CNI_ARGS`: the same keys
//! 5. the pod's annotations, then its labels, as the API server has them, if `kubeconfig` says to ask it
//! 6. `egress` and `ingress` of the configuration, else its `max`
//!
//! A source below the first one that is set is not looked at: a tenant cannot break a pod by writing nonsense into a key
//! that does not count. The keys of 2 to 5 are [`Direction::annotation`], in bits per second, and the ancestor's `rate`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Request, bandwidth, env, json};
use crate::direction::Direction;
use crate::error::{Code, Error, Result, quoted};
use crate::kube::Metadata;
use crate::units::{Burst, Rate, UnitError};

/// The limits of one attachment; None is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// From the pod.
    pub egress: Option<Limit>,
    /// To the pod.
    pub ingress: Option<Limit>,
}

impl Limits {
    /// Whether there is nothing to do.
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
    /// What the pod gets.
    pub rate: Rate,
    /// What it may send at once.
    pub burst: Burst,
    /// What was asked for; above `rate` if the administrator's `max` is less, which is worth a line in the log.
    pub asked: Rate,
    /// Who asked.
    pub source: Source,
}

impl Limit {
    /// A rate with its default burst.
    pub fn of(rate: Rate, source: Source) -> Self {
        Self { rate, burst: Burst::default_for(rate), asked: rate, source }
    }
}

/// Where a limit was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `runtimeConfig.bandwidth`
    RuntimeConfig,
    /// An annotation, passed by the runtime.
    Annotation,
    /// `args.cni`
    Args,
    /// `CNI_ARGS`
    CniArgs,
    /// An annotation, asked for by podshaper.
    ApiAnnotation,
    /// A label, likewise.
    ApiLabel,
    /// The plugin's configuration.
    Config,
    /// A person's command.
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

/// Where limits may be, undecoded.
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

/// What a source asks for.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    pub(super) rate: Rate,
    pub(super) burst: Option<Burst>,
    pub(super) source: Source,
}

impl Request {
    /// The limits that this call and the configuration ask for.
    ///
    /// # Errors
    /// [`Code::Config`], naming source, key, value, reason and remedy.
    pub fn limits(&self) -> Result<Limits> {
        let called_for = self.both(|direction| self.called_for(direction))?;
        // Nobody is asked for what is known.
        let pod = if called_for.iter().all(Option::is_some) { None } else { self.ask_api_server()? };
        self.complete(self.both(|direction| match (called_for[direction.index() as usize], &pod) {
            (None, Some(pod)) => self.on_pod(direction, pod),
            (called_for, _) => Ok(called_for),
        })?)
    }

    /// The same without the API server, whose answer nobody has.
    ///
    /// # Errors
    /// Those of [`Request::limits`].
    pub fn limits_of_call(&self) -> Result<Limits> {
        self.complete(self.both(|direction| self.called_for(direction))?)
    }

    /// The limits that are asked for now, of a pod as the API server has it. On the interface that the annotations are about, they take
    /// the place of what the runtime made of them at ADD; on another one the runtime was told of a limit in another way, and that
    /// counts. Labels count where an ADD asks for them.
    ///
    /// # Errors
    /// Those of [`Request::limits`].
    pub fn limits_now(&self, pod: &Metadata, are_its_annotations: bool) -> Result<Limits> {
        let labels = |direction| match self.config.kubeconfig {
            Some(_) => self.label(direction, pod),
            None => Ok(None),
        };
        self.complete(self.both(|direction| {
            let asked = if are_its_annotations {
                first([&|| self.annotation(direction, pod), &|| self.args(direction)])?
            } else {
                self.called_for(direction)?
            };
            asked.map_or_else(|| labels(direction), |asked| Ok(Some(asked)))
        })?)
    }

    fn both(&self, asked: impl Fn(Direction) -> Result<Option<Asked>>) -> Result<[Option<Asked>; 2]> {
        let [egress, ingress] = Direction::BOTH.map(asked);
        Ok([egress?, ingress?])
    }

    /// Source 6, for what nobody else has asked for, and the cap.
    fn complete(&self, asked: [Option<Asked>; 2]) -> Result<Limits> {
        let complete = |direction: Direction| -> Result<Option<Limit>> {
            let asked = match asked[direction.index() as usize] {
                None => {
                    self.config.default(direction)?.map(|(rate, burst)| Asked { rate, burst, source: Source::Config })
                }
                asked => asked,
            };
            let max = self.config.max(direction)?;
            // No pod gets more, nor does one that asks for nothing.
            let asked = asked.or_else(|| max.map(|rate| Asked { rate, burst: None, source: Source::Config }));
            let max = max.unwrap_or(Rate::MAX);
            Ok(asked.map(|Asked { rate: asked, burst, source }| {
                let rate = asked.min(max);
                Limit { rate, burst: burst.unwrap_or_else(|| Burst::default_for(rate)), asked, source }
            }))
        };
        Ok(Limits { egress: complete(Direction::Egress)?, ingress: complete(Direction::Ingress)? })
    }

    /// Source 5.
    fn on_pod(&self, direction: Direction, pod: &Metadata) -> Result<Option<Asked>> {
        first([&|| self.annotation(direction, pod), &|| self.label(direction, pod)])
    }

    fn annotation(&self, direction: Direction, pod: &Metadata) -> Result<Option<Asked>> {
        self.keys(direction, Source::ApiAnnotation, |key| Ok(pod.annotations.get(key).cloned()))
    }

    fn label(&self, direction: Direction, pod: &Metadata) -> Result<Option<Asked>> {
        self.keys(direction, Source::ApiLabel, |key| Ok(pod.labels.get(key).cloned()))
    }

    /// Sources 1 to 4, which the call brings along.
    fn called_for(&self, direction: Direction) -> Result<Option<Asked>> {
        let Sources { bandwidth, annotations, .. } = &self.sources;
        if let Some(asked) = bandwidth.as_deref().map_or(Ok(None), |raw| bandwidth::asked(raw, direction))? {
            return Ok(Some(asked));
        }
        let annotations = members("runtimeConfig[\"io.kubernetes.cri.pod-annotations\"]", annotations.as_deref())?;
        let asked = self.keys(direction, Source::Annotation, |key| text(&annotations, key))?;
        if asked.is_some() { Ok(asked) } else { self.args(direction) }
    }

    /// Sources 3 and 4.
    fn args(&self, direction: Direction) -> Result<Option<Asked>> {
        let Sources { args, cni_args, .. } = &self.sources;
        let Args { cni } = args.as_deref().map_or(Ok(Args::default()), |raw| decode("args", raw))?;
        let cni = members("args.cni", cni.as_deref())?;
        let asked = self.keys(direction, Source::Args, |key| text(&cni, key))?;
        if asked.is_some() {
            return Ok(asked);
        }
        self.keys(direction, Source::CniArgs, |key| Ok(env::value(cni_args, key).map(str::to_owned)))
    }

    /// The keys that sources 2 to 5 have in common. `value` errs with what stands there instead of a string.
    fn keys(
        &self,
        direction: Direction,
        source: Source,
        value: impl Fn(&str) -> Result<Option<String>, String>,
    ) -> Result<Option<Asked>> {
        let megabytes = self.config.rate_key.as_deref().filter(|_| direction == Direction::Egress);
        let standard = (direction.annotation(), Rate::from_quantity as fn(&str) -> Result<Rate, UnitError>, QUANTITY);
        let ancestor = megabytes.map(|key| (key, Rate::from_megabytes as fn(&str) -> _, MEGABYTES));
        for (key, parse, remedy) in [Some(standard), ancestor].into_iter().flatten() {
            let wrong = |shown: String, cause| {
                Error::because(Code::Config, format!("{source} {key}: {shown} is not a rate ({remedy})"), cause)
            };
            match value(key) {
                Ok(None) => {}
                Ok(Some(text)) => {
                    let rate = parse(&text).map_err(|cause| wrong(quoted(&text), cause))?;
                    return Ok(Some(Asked { rate, burst: None, source }));
                }
                Err(shown) => return Err(wrong(shown, UnitError::NotText)),
            }
        }
        Ok(None)
    }
}

/// The answer of the first source that has one.
fn first(sources: [&dyn Fn() -> Result<Option<Asked>>; 2]) -> Result<Option<Asked>> {
    let [one, other] = sources;
    one().and_then(|asked| if asked.is_some() { Ok(asked) } else { other() })
}

const QUANTITY: &str = "write bits per second, 1k to 1P, such as \"10M\"";
const MEGABYTES: &str = "write whole megabytes per second, such as \"1M\"";

/// The members of an object, undecoded: one that is not ours may be anything.
fn members(name: &str, raw: Option<&RawValue>) -> Result<BTreeMap<String, Box<RawValue>>> {
    raw.map_or(Ok(BTreeMap::new()), |raw| decode(name, raw))
}

pub(super) fn decode<T: for<'de> Deserialize<'de>>(name: &str, raw: &RawValue) -> Result<T> {
    json::object(raw.get()).map_err(|cause| Error::because(Code::Config, format!("decode {name}"), cause))
}

/// A member that should be a string. A number counts as its text, null as absent.
fn text(members: &BTreeMap<String, Box<RawValue>>, key: &str) -> Result<Option<String>, String> {
    match members.get(key).map(|raw| (raw.get(), json::string(raw))) {
        None | Some(("null", _)) => Ok(None),
        Some((_, Ok(text))) => Ok(Some(text)),
        Some((number, Err(_))) if number.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => {
            Ok(Some(number.to_owned()))
        }
        Some((_, Err(shown))) => Err(shown),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::request::tests::{add, config};

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
        // From last to first, each in front of all before; the wrong values are those that must not be looked at.
        let defaults = r#""egress": "7M", "ingress": 7000000, "egressBurst": "160k", "ingressBurst": 240000"#;
        let by_key = |value: &str| format!(r#"{{"kubernetes.io/egress-bandwidth": {value}, "rate": "nonsense"}}"#);
        let args = |value: &str| format!(r#""args": {{"cni": {}}}"#, by_key(value));
        let runtime = |bandwidth: &str, annotations: &str| {
            format!(r#""runtimeConfig": {{{bandwidth}"io.kubernetes.cri.pod-annotations": {annotations}}}"#)
        };
        let bandwidth =
            r#""bandwidth": {"EgressRate": 2000000, "EgressBurst": 80000, "IngressRate": 2000000, "IngressBurst": 0},"#;
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
}
