//! The administrator's policy: the rates of pods that ask for none, and the cap of every pod. Both can be set for all
//! namespaces and, by name or labels, for some.
//!
//! ```json
//! "namespaces": [
//!   { "name": "batch", "egress": "50M", "max": { "egress": "100M" } },
//!   { "labels": { "tier": "free" }, "max": { "egress": "20M", "ingress": "20M" } }
//! ]
//! ```
//!
//! The first element that matches the pod's namespace counts. Each key that it sets replaces the same key of the
//! configuration, in each direction separately. The API server has the labels. Rates are decoded when a limit is asked
//! for, all other keys at once. An unknown key is treated like one outside of `namespaces` ([`UnknownKey`]).

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::config::{UnknownKey, is_foreign, number};
use super::json;
use crate::direction::Direction;
use crate::error::{Code, Error, Result, quoted};
use crate::kube::Labels;
use crate::pod::object_name;
use crate::units::{Burst, Rate};

/// What an administrator can write instead of a rate that was refused.
const RATE: &str = "a rate (\"10M\", or a number of bits per second, 1k to 1P)";
/// What an administrator can write instead of a burst that was refused.
const BURST: &str = "a burst (\"400k\", or a number of bits, below 4 GiB)";

/// The rates of the configuration, or of one element of its `namespaces`.
#[derive(Debug, Default)]
pub(super) struct Rates {
    pub(super) egress: Option<Box<RawValue>>,
    pub(super) ingress: Option<Box<RawValue>>,
    pub(super) egress_burst: Option<Box<RawValue>>,
    pub(super) ingress_burst: Option<Box<RawValue>>,
    pub(super) max: Option<Box<RawValue>>,
    /// The text in front of a key when an error names it.
    pub(super) prefix: String,
}

/// The two directions of `max`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Max {
    egress: Option<Box<RawValue>>,
    ingress: Option<Box<RawValue>>,
    egress_burst: Option<Box<RawValue>>,
    ingress_burst: Option<Box<RawValue>>,
}

/// The cap of a pod in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Most {
    /// The highest rate.
    pub(super) rate: Rate,
    /// The largest burst, if the pod asks for one.
    pub(super) burst: Burst,
}

/// An element of `namespaces`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuleKeys {
    name: Option<String>,
    #[serde(default)]
    labels: Labels,
    #[serde(alias = "egressRate")]
    egress: Option<Box<RawValue>>,
    #[serde(alias = "ingressRate")]
    ingress: Option<Box<RawValue>>,
    egress_burst: Option<Box<RawValue>>,
    ingress_burst: Option<Box<RawValue>>,
    max: Option<Box<RawValue>>,
}

/// The keys of [`RuleKeys`], with their aliases.
const OF_RULE: [&str; 9] =
    ["name", "labels", "egress", "egressRate", "ingress", "ingressRate", "egressBurst", "ingressBurst", "max"];

/// Rates for the pods of some namespaces.
#[derive(Debug)]
struct Rule {
    name: Option<String>,
    labels: Labels,
    rates: Rates,
    unknown_keys: Vec<UnknownKey>,
}

/// Rates for all pods, and for the pods of some namespaces.
#[derive(Debug, Default)]
pub(super) struct Policy {
    general: Rates,
    rules: Vec<Rule>,
}

/// The rates that count for a pod.
pub(super) struct Counting<'a> {
    special: Option<&'a Rates>,
    general: &'a Rates,
}

impl Policy {
    /// Reads `namespaces`.
    ///
    /// # Errors
    /// [`Code::Config`]: not a list of objects that each name namespaces and rates; or labels without a `kubeconfig` to
    /// read them by.
    pub(super) fn read(general: Rates, namespaces: Option<Box<RawValue>>, has_kubeconfig: bool) -> Result<Self> {
        let wrong = |shown: String| {
            let remedy =
                "is not a list such as [{\"name\": \"batch\", \"egress\": \"50M\", \"max\": {\"egress\": \"100M\"}}]";
            Error::new(Code::Config, format!("configuration key \"namespaces\": {shown} {remedy}"))
        };
        let elements: Vec<Box<RawValue>> = match &namespaces {
            None => Vec::new(),
            Some(raw) => serde_json::from_str(raw.get()).map_err(|_| wrong(quoted(raw.get())))?,
        };
        let rules = elements.iter().enumerate().map(|(index, raw)| Rule::read(index, raw));
        let policy = Self { general, rules: rules.collect::<Result<_>>()? };
        if policy.asks_for_labels() && !has_kubeconfig {
            let text = "configuration key \"namespaces\": only the API server knows the labels of a namespace; name a \"kubeconfig\", \
                        whose user may get and list namespaces (install/labels-rbac.yaml)";
            return Err(Error::new(Code::Config, text));
        }
        Ok(policy)
    }

    /// Whether the policy depends on the labels of namespaces.
    pub(super) fn asks_for_labels(&self) -> bool {
        self.rules.iter().any(|rule| !rule.labels.is_empty())
    }

    /// The unknown keys.
    pub(super) fn unknown_keys(&self) -> impl Iterator<Item = &UnknownKey> {
        self.rules.iter().flat_map(|rule| &rule.unknown_keys)
    }

    /// The rates that count for a pod of a namespace. `labels` is called for the namespace's labels if the result
    /// depends on them; if it returns `None`, no element with labels matches. Every `max` is checked, so that a mistake
    /// in one shows at every pod, and not only at the pods that it should have capped.
    ///
    /// # Errors
    /// [`Code::Config`] for a malformed `max`, and the errors of `labels`.
    pub(super) fn of(
        &self,
        namespace: Option<&str>,
        labels: &dyn Fn(&str) -> Result<Option<Labels>>,
    ) -> Result<Counting<'_>> {
        for rates in self.rules.iter().map(|rule| &rule.rates).chain([&self.general]) {
            rates.max(Direction::Egress)?;
        }
        let (mut known, mut special) = (None, None);
        for rule in self.rules.iter().filter(|rule| rule.may_be_for(namespace)) {
            if !rule.labels.is_empty() && known.is_none() {
                known = Some(labels(namespace.unwrap_or_default())?.unwrap_or_default());
            }
            let has = |(key, value): (&String, &String)| known.as_ref().and_then(|known| known.get(key)) == Some(value);
            if rule.labels.iter().all(has) {
                special = Some(&rule.rates);
                break;
            }
        }
        Ok(Counting { special, general: &self.general })
    }
}

impl Rule {
    fn read(index: usize, raw: &RawValue) -> Result<Self> {
        let prefix = format!("namespaces[{index}].");
        let key = || format!("configuration key \"namespaces[{index}]\"");
        let failed = |cause| Error::because(Code::Config, key(), cause);
        let keys: RuleKeys = json::object(raw.get()).map_err(failed)?;
        let all: BTreeMap<String, IgnoredAny> = json::object(raw.get()).map_err(failed)?;
        let unknown = all.into_keys().filter(|key| !OF_RULE.contains(&key.as_str()) && !is_foreign(key));
        let unknown_keys = unknown.map(|key| UnknownKey { key: format!("{prefix}{key}"), known: &OF_RULE }).collect();
        let RuleKeys { name, labels, egress, ingress, egress_burst, ingress_burst, max } = keys;
        let name = name.map(|name| object_name(&name)).transpose();
        let name = name.map_err(|cause| Error::because(Code::Config, key(), cause))?;
        if name.is_none() && labels.is_empty() {
            let text = format!("{}: it has neither the \"name\" of a namespace nor \"labels\"", key());
            return Err(Error::new(Code::Config, text));
        }
        let rates = Rates { egress, ingress, egress_burst, ingress_burst, max, prefix };
        Ok(Self { name, labels, rates, unknown_keys })
    }

    /// Whether the element matches as far as the name tells; labels may still exclude it. A call without a namespace is
    /// not about a pod.
    fn may_be_for(&self, namespace: Option<&str>) -> bool {
        namespace.is_some() && self.name.as_deref().is_none_or(|name| Some(name) == namespace)
    }
}

impl Counting<'_> {
    /// The rate and burst of pods that ask for none.
    pub(super) fn default(&self, direction: Direction) -> Result<Option<(Rate, Option<Burst>)>> {
        let special = self.special.map_or(Ok(None), |rates| rates.default(direction))?;
        if special.is_some() { Ok(special) } else { self.general.default(direction) }
    }

    /// The cap of the pod.
    pub(super) fn max(&self, direction: Direction) -> Result<Option<Most>> {
        let special = self.special.map_or(Ok(None), |rates| rates.max(direction))?;
        if special.is_some() { Ok(special) } else { self.general.max(direction) }
    }
}

impl Rates {
    fn default(&self, direction: Direction) -> Result<Option<(Rate, Option<Burst>)>> {
        let Self { egress, ingress, egress_burst, ingress_burst, .. } = self;
        match direction {
            Direction::Egress => self.pair(egress, egress_burst, ["egress", "egressBurst"]),
            Direction::Ingress => self.pair(ingress, ingress_burst, ["ingress", "ingressBurst"]),
        }
    }

    /// The cap of one direction. Both directions are checked.
    fn max(&self, direction: Direction) -> Result<Option<Most>> {
        let wrong = |cause| {
            let text = format!(
                "configuration key \"{}max\" has no other keys than egress, ingress, egressBurst, ingressBurst",
                self.prefix
            );
            Error::because(Code::Config, text, cause)
        };
        let max = self.max.as_ref().map(|raw| json::object(raw.get())).transpose().map_err(wrong)?;
        let Max { egress, ingress, egress_burst, ingress_burst } = max.unwrap_or_default();
        let is_without_rate = |rate: &Option<_>, burst: &Option<_>| rate.is_none() && burst.is_some();
        if is_without_rate(&egress, &egress_burst) || is_without_rate(&ingress, &ingress_burst) {
            let text =
                format!("configuration key \"{}max\": it has a burst without the rate of its direction", self.prefix);
            return Err(Error::new(Code::Config, text));
        }
        let both = [
            self.pair(&egress, &egress_burst, ["max.egress", "max.egressBurst"])?,
            self.pair(&ingress, &ingress_burst, ["max.ingress", "max.ingressBurst"])?,
        ];
        let most =
            |(rate, burst): (Rate, Option<Burst>)| Most { rate, burst: burst.unwrap_or(Burst::default_for(rate)) };
        Ok(both[direction.index() as usize].map(most))
    }

    /// A rate and its burst, under these keys.
    fn pair(
        &self,
        rate: &Option<Box<RawValue>>,
        burst: &Option<Box<RawValue>>,
        [rate_key, burst_key]: [&str; 2],
    ) -> Result<Option<(Rate, Option<Burst>)>> {
        let key = |name: &str| format!("{}{name}", self.prefix);
        let Some(rate) = rate else { return Ok(None) };
        let rate = number(&key(rate_key), rate, RATE, Rate::bits_per_s, Rate::from_quantity)?;
        let burst = burst.as_ref().map(|raw| number(&key(burst_key), raw, BURST, Burst::bits, Burst::from_quantity));
        Ok(Some((rate, burst.transpose()?)))
    }
}

/// Labels of namespaces, by name, as far as they are known.
pub type Namespaces = BTreeMap<String, Labels>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::{add, config};

    const RULES: &str = r#""kubeconfig": "/etc/k", "egress": "7M", "max": {"egress": "100M", "ingress": "100M"}, "namespaces": [
        {"name": "batch", "egress": "5M", "max": {"egress": "10M"}},
        {"labels": {"tier": "free", "team": "a"}, "ingress": "2M", "max": {"ingress": "3M", "ingressBurst": "1M"}},
        {"labels": {"tier": "free"}, "max": {"egress": "200M"}}]"#;

    /// Egress and ingress of a pod in a namespace with these labels, in bits per second.
    fn limits(args: &str, keys: &str, labels: &[(&str, &str)]) -> Result<[u64; 2]> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let namespaces = BTreeMap::from([("n".to_owned(), labels)]);
        let limits = add(args, &config(keys)).and_then(|request| request.limits_of_call(&namespaces))?;
        Ok([limits.egress, limits.ingress].map(|limit| limit.map_or(0, |limit| limit.rate.as_bits_per_s() / 1_000_000)))
    }

    #[test]
    fn the_first_rule_for_the_namespace_takes_the_place_of_the_general_keys() {
        let (free, both) = ([("tier", "free")], [("tier", "free"), ("team", "a")]);
        for (args, labels, expected) in [
            // No pod.
            ("", &[][..], [7, 100]),
            ("K8S_POD_NAMESPACE=n", &[], [7, 100]),
            ("K8S_POD_NAMESPACE=other", &both, [7, 100]),
            ("K8S_POD_NAMESPACE=batch", &[], [5, 100]),
            ("K8S_POD_NAMESPACE=batch;kubernetes.io/egress-bandwidth=50M", &[], [10, 100]),
            ("K8S_POD_NAMESPACE=n", &free, [7, 100]),
            ("K8S_POD_NAMESPACE=n;kubernetes.io/egress-bandwidth=500M", &free, [200, 100]),
            ("K8S_POD_NAMESPACE=n", &both, [7, 2]),
            ("K8S_POD_NAMESPACE=n;kubernetes.io/ingress-bandwidth=50M", &both, [7, 3]),
        ] {
            assert_eq!(limits(args, RULES, labels).unwrap(), expected, "{args} {labels:?}");
        }
    }

    #[test]
    fn a_key_that_nobody_knows_is_told_with_its_place() {
        // Each key is a field or an alias of a field, so giving a key twice is a duplicate-field error.
        for key in OF_RULE {
            let twice = format!(r#"{{"{key}": null, "{key}": null}}"#);
            assert!(serde_json::from_str::<RuleKeys>(&twice).is_err(), "{key}");
        }
        let keys = r#""namespaces": [{"name": "a", "_why": 1}, {"name": "n", "egres": "1M", "egress": "2M"}]"#;
        let request = add("K8S_POD_NAMESPACE=n", &config(keys)).unwrap();
        let unknown: Vec<String> = request.unknown_keys.iter().map(ToString::to_string).collect();
        assert_eq!(
            unknown,
            [
                r#""namespaces[1].egres" is no key of podshaper's (those are name, labels, egress, egressRate, ingress, ingressRate, egressBurst, ingressBurst, max)"#
            ]
        );
        assert_eq!(limits("K8S_POD_NAMESPACE=n", keys, &[]).unwrap(), [2, 0]);
    }

    #[test]
    fn a_burst_that_is_asked_for_is_not_above_the_administrators() {
        let burst = |keys: &str, args: &str| {
            let limits = add(args, &config(keys)).unwrap().limits_of_call(&Namespaces::new()).unwrap();
            limits.egress.unwrap().burst.as_bytes()
        };
        let asked = "kubernetes.io/egress-bandwidth=10M;podshaper.io/egress-burst=80M";
        assert_eq!(burst("", asked), 10_000_000);
        assert_eq!(burst(r#""max": {"egress": "1G"}"#, asked), 625_000);
        assert_eq!(burst(r#""max": {"egress": "1G", "egressBurst": "16M"}"#, asked), 2_000_000);
        assert_eq!(
            burst(r#""max": {"egress": "1G", "egressBurst": "80k"}"#, "kubernetes.io/egress-bandwidth=10M"),
            10_000
        );
        // The administrator's own burst may be above the cap.
        assert_eq!(burst(r#""max": {"egress": "1G"}, "egress": "1M", "egressBurst": "80M""#, ""), 10_000_000);
    }

    #[test]
    fn a_rule_that_is_none_is_named_by_its_place() {
        for (keys, expected) in [
            (r#""namespaces": {}"#, r#"configuration key "namespaces": "{}" is not a list such as"#),
            (
                r#""namespaces": [{"name": "a"}, {"egress": "1M"}]"#,
                r#"configuration key "namespaces[1]": it has neither the "name""#,
            ),
            (
                r#""namespaces": [{"name": "a/b"}]"#,
                r#"configuration key "namespaces[0]": "a/b" is not the name of an object"#,
            ),
            (
                r#""namespaces": [{"labels": {"a": "b"}}]"#,
                "only the API server knows the labels of a namespace; name a \"kubeconfig\"",
            ),
            // Whatever the pod's namespace is.
            (
                r#""namespaces": [{"name": "a", "max": {"ingress": "fast"}}]"#,
                r#"configuration key "namespaces[0].max.ingress": "fast" is not a rate"#,
            ),
        ] {
            let error = limits("K8S_POD_NAMESPACE=n", keys, &[]).unwrap_err();
            assert!(error.code() == Code::Config && error.to_string().contains(expected), "{error}");
        }
    }
}
