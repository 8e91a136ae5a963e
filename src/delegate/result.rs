//! Converts the result of an ADD between versions of the specification: the network's list has one version, and the
//! runtime may call podshaper in another.
//!
//! From 0.3.0 on results differ in one key, which is either required or not allowed: `version` of an address, which
//! 1.0.0 has removed. Readers of older versions ignore the keys that 1.1.0 has added (`mtu`, ..).

use rscni_plugin::version::SpecVersion;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Declared {
    #[serde(default)]
    cni_version: Option<SpecVersion>,
}

/// The result in version `to`, byte for byte if it already has that version. A result without a version has the version
/// in which it was asked for.
///
/// # Errors
/// [`Code::Decode`]: the result is not one of 0.3.0 or later.
pub(super) fn in_version(result: &RawValue, asked: SpecVersion, to: SpecVersion) -> Result<Box<RawValue>> {
    let failed = |cause| Error::because(Code::Decode, "decode the result of the network's plugins", cause);
    let Declared { cni_version } = serde_json::from_str(result.get()).map_err(failed)?;
    if cni_version == Some(to) {
        return Ok(result.to_owned());
    }
    let version = cni_version.unwrap_or(asked);
    if version < SpecVersion::new(0, 3, 0) {
        let text = format!("the result of the network's plugins is of CNI {version}; podshaper speaks 0.3.0 and later");
        return Err(Error::new(Code::IncompatibleVersion, text));
    }
    let mut keys: Map<String, Value> = serde_json::from_str(result.get()).map_err(failed)?;
    keys.insert("cniVersion".to_owned(), to.to_string().into());
    let addresses = keys.get_mut("ips").and_then(Value::as_array_mut);
    for address in addresses.into_iter().flatten().filter_map(Value::as_object_mut) {
        if to >= SpecVersion::new(1, 0, 0) {
            address.remove("version");
        } else if let Some(text) = address.get("address").and_then(Value::as_str) {
            let family = if text.contains(':') { "6" } else { "4" };
            address.insert("version".to_owned(), family.into());
        }
    }
    to_raw_value(&keys).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_say_their_family_before_1_0_0_alone() {
        let raw = |value: &Value| to_raw_value(value).unwrap();
        let of = |version: &str, is_old: bool| {
            let address = |address: &str, family: &str| match is_old {
                true => json!({ "address": address, "interface": 1, "version": family }),
                false => json!({ "address": address, "interface": 1 }),
            };
            json!({ "cniVersion": version, "ips": [address("10.0.0.2/24", "4"), address("fd00::2/64", "6")], "dns": {} })
        };
        for (from, is_old, to, is_old_then) in [
            ("0.3.1", true, "0.4.0", true),
            ("0.4.0", true, "1.1.0", false),
            ("1.1.0", false, "1.0.0", false),
            ("1.0.0", false, "0.4.0", true),
        ] {
            let (asked, version) = (from.parse().unwrap(), to.parse().unwrap());
            let converted = in_version(&raw(&of(from, is_old)), asked, version).unwrap();
            assert_eq!(serde_json::from_str::<Value>(converted.get()).unwrap(), of(to, is_old_then), "{from} {to}");
        }
    }

    #[test]
    fn a_result_of_the_same_version_is_kept_to_the_byte() {
        let result = r#"{ "ips":[] , "cniVersion": "1.0.0","x":1e400 }"#;
        let raw: Box<RawValue> = serde_json::from_str(result).unwrap();
        let version = SpecVersion::new(1, 0, 0);
        assert_eq!(in_version(&raw, SpecVersion::new(0, 3, 1), version).unwrap().get(), result);
        let none: Box<RawValue> = serde_json::from_str("{}").unwrap();
        assert_eq!(in_version(&none, SpecVersion::new(0, 3, 1), version).unwrap().get(), r#"{"cniVersion":"1.0.0"}"#);
        let old: Box<RawValue> = serde_json::from_str(r#"{"cniVersion":"0.2.0","ip4":{}}"#).unwrap();
        assert_eq!(in_version(&old, version, version).unwrap_err().code(), Code::IncompatibleVersion);
    }
}
