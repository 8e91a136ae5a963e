//! `runtimeConfig.bandwidth`: the limit as the runtime passes it, the capability `bandwidth` of the CNI conventions.
//!
//! All values are numbers of bits. A rate of 0 means no rate, and three different numbers mean no burst. These special
//! values do not leave this file.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::limits::{Asked, Source, decode};
use crate::direction::Direction;
use crate::error::{Code, Error, Result, quoted};
use crate::units::{Burst, Rate};

/// Bursts in bits that mean "not set": 0, kubelet's value (2^31-1) and containerd's (2^32-1).
const UNSET_BURSTS: [u64; 3] = [0, i32::MAX as u64, u32::MAX as u64];

/// containerd spells the keys like Go fields, CRI-O as the CNI conventions do.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bandwidth {
    #[serde(alias = "EgressRate")]
    egress_rate: Option<Box<RawValue>>,
    #[serde(alias = "EgressBurst")]
    egress_burst: Option<Box<RawValue>>,
    #[serde(alias = "IngressRate")]
    ingress_rate: Option<Box<RawValue>>,
    #[serde(alias = "IngressBurst")]
    ingress_burst: Option<Box<RawValue>>,
}

/// The rate and burst of one direction.
///
/// # Errors
/// [`Code::Config`], naming key, value and reason.
pub(super) fn asked(raw: &RawValue, direction: Direction) -> Result<Asked> {
    let Bandwidth { egress_rate, egress_burst, ingress_rate, ingress_burst } = decode("runtimeConfig.bandwidth", raw)?;
    let (rate, burst, keys) = match direction {
        Direction::Egress => (egress_rate, egress_burst, ["egressRate", "egressBurst"]),
        Direction::Ingress => (ingress_rate, ingress_burst, ["ingressRate", "ingressBurst"]),
    };
    let number = |key: &str, raw: Option<Box<RawValue>>| match raw {
        None => Ok(0),
        Some(raw) => raw.get().parse::<u64>().map_err(|_| {
            let shown = quoted(raw.get());
            Error::new(Code::Config, format!("runtimeConfig.bandwidth {key}: {shown} is not a whole number of bits"))
        }),
    };
    let wrong = |key: &str, bits: u64, cause| {
        Error::because(Code::Config, format!("runtimeConfig.bandwidth {key}: cannot be {bits}"), cause)
    };
    let bits_per_s = number(keys[0], rate)?;
    if bits_per_s == 0 {
        return Ok(Asked::default());
    }
    let rate = Rate::bits_per_s(bits_per_s).map_err(|cause| wrong(keys[0], bits_per_s, cause))?;
    let bits = number(keys[1], burst)?;
    let burst = if UNSET_BURSTS.contains(&bits) { None } else { Some(Burst::bits(bits)) };
    let burst = burst.transpose().map_err(|cause| wrong(keys[1], bits, cause))?;
    Ok(Asked { rate: Some((rate, Source::RuntimeConfig)), burst })
}

#[cfg(test)]
mod tests {
    use crate::request::limits::tests::outcome;
    use crate::request::tests::{add, config};

    #[test]
    fn bandwidth_is_what_either_runtime_spells() {
        for (bandwidth, expected) in [
            (r#"{"EgressRate": 1000}"#, Ok(["1k 15000 runtimeConfig.bandwidth", ""])),
            (r#"{"ingressRate": 24000000, "ingressBurst": 8}"#, Ok(["", "24M 1 runtimeConfig.bandwidth"])),
            (r#"{"egressRate": 1000, "egressBurst": 2147483647}"#, Ok(["1k 15000 runtimeConfig.bandwidth", ""])),
            (r#"{"egressRate": 1000, "egressBurst": 4294967295}"#, Ok(["1k 15000 runtimeConfig.bandwidth", ""])),
            (r#"{"egressRate": 1000, "egressBurst": null}"#, Ok(["1k 15000 runtimeConfig.bandwidth", ""])),
            (r#"{"egressRate": 0, "egressBurst": 80, "else": [1]}"#, Ok(["", ""])),
            ("null", Ok(["", ""])),
            ("{}", Ok(["", ""])),
            (
                r#"{"egressRate": 1000, "EgressRate": 2000}"#,
                Err("decode runtimeConfig.bandwidth: duplicate field `egressRate` at line 1 column 33"),
            ),
            ("[1000]", Err("decode runtimeConfig.bandwidth: not an object")),
            (r#"{"egressRate": 999}"#, Err("egressRate: cannot be 999: less than 1 kbit/s")),
            (r#"{"egressRate": 1000000000000001}"#, Err("egressRate: cannot be 1000000000000001: more than 1 Pbit/s")),
            (
                r#"{"egressRate": 1000, "egressBurst": 34359738361}"#,
                Err("egressBurst: cannot be 34359738361: a burst of 4 GiB or more"),
            ),
            (r#"{"egressRate": -1}"#, Err(r#"egressRate: "-1" is not a whole number of bits"#)),
            (r#"{"egressRate": -0}"#, Err(r#"egressRate: "-0" is not a whole number of bits"#)),
            (r#"{"egressRate": 1e6}"#, Err(r#"egressRate: "1e6" is not a whole number of bits"#)),
            (r#"{"egressRate": 1e400}"#, Err(r#"egressRate: "1e400" is not a whole number of bits"#)),
            (
                r#"{"egressRate": 18446744073709551616}"#,
                Err(r#"egressRate: "18446744073709551616" is not a whole number of bits"#),
            ),
            (r#"{"egressRate": "10M"}"#, Err(r#"egressRate: "\"10M\"" is not a whole number of bits"#)),
            (
                r#"{"ingressRate": 1000, "ingressBurst": 1.5}"#,
                Err(r#"ingressBurst: "1.5" is not a whole number of bits"#),
            ),
        ] {
            let request = add("", &config(&format!(r#""runtimeConfig": {{"bandwidth": {bandwidth}}}"#))).unwrap();
            let prefixed = |text: &str| match text.starts_with("decode") {
                true => text.to_owned(),
                false => format!("runtimeConfig.bandwidth {text}"),
            };
            let expected = expected.map(|limits| limits.map(String::from)).map_err(prefixed);
            assert_eq!(outcome(&request), expected, "{bandwidth}");
        }
    }

    #[test]
    fn lists_of_subnets_beside_the_rates_count_where_the_configuration_has_none() {
        let subnets = |keys: &str, bandwidth: &str| {
            let keys = format!(r#"{keys}"runtimeConfig": {{"bandwidth": {bandwidth}}}"#);
            add("", &config(&keys)).map(|request| request.config.subnets).map_err(|error| error.to_string())
        };
        let (ten, eleven) = (r#"["10.0.0.0/8"]"#, r#"["11.0.0.0/8"]"#);
        for (kind, own) in [("unshapedSubnets", "exemptSubnets"), ("shapedSubnets", "shapedSubnets")] {
            let configured = subnets(&format!(r#""{own}": {ten}, "#), "{}").unwrap();
            assert!(!configured.is_empty());
            assert_eq!(subnets("", &format!(r#"{{"{kind}": {ten}}}"#)).unwrap(), configured, "{kind}");
            let both = subnets(&format!(r#""{own}": {ten}, "#), &format!(r#"{{"{kind}": {eleven}}}"#));
            assert_eq!(both.unwrap(), configured, "the configuration's");
            assert!(subnets("", &format!(r#"{{"{kind}": ["x"]}}"#)).unwrap_err().contains("is not a subnet"));
        }
    }
}
