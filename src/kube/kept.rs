//! The part of a pod's labels or annotations that is kept in memory. A tenant may write a quarter of a megabyte of
//! annotations on each pod, and a node has hundreds of pods. Values that cannot be a limit are not kept.
//!
//! A long value cannot be a rate. Only its beginning is kept, for the error text.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::MIRROR;
use crate::direction::Direction;

/// How many characters of a value are kept.
const MAX_CHARACTERS: usize = 256;
/// How many bytes of keys and values are kept for keys that the configuration may name (`rateKey`). Podshaper's own
/// keys do not count.
const MAX_BYTES: usize = 64 << 10;
/// Replaces the rest of a cut value: a part of a number must not be taken for the number.
const LEFT_OUT: &str = "...";

/// The kept values, by key.
#[derive(Debug, Default)]
pub(super) struct Kept(pub(super) BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Kept {
    fn deserialize<D: Deserializer<'de>>(members: D) -> Result<Self, D::Error> {
        members.deserialize_map(Members)
    }
}

fn is_own(key: &str) -> bool {
    key == MIRROR || Direction::BOTH.iter().any(|way| key == way.annotation() || key == way.burst_annotation())
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Kept;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Kept, A::Error> {
        let (mut kept, mut bytes) = (BTreeMap::new(), 0);
        while let Some(key) = map.next_key::<String>()? {
            if !is_own(&key) && bytes >= MAX_BYTES {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let Short(value) = map.next_value()?;
            bytes += key.len() + value.len();
            kept.insert(key, value);
        }
        Ok(Kept(kept))
    }
}

/// A value, or its first characters.
struct Short(String);

impl<'de> Deserialize<'de> for Short {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_str(Value)
    }
}

struct Value;

impl Visitor<'_> for Value {
    type Value = Short;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Short, E> {
        let end = value.char_indices().nth(MAX_CHARACTERS).map(|(end, _)| end);
        Ok(Short(end.map_or_else(|| value.to_owned(), |end| value[..end].to_owned() + LEFT_OUT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kept(members: &serde_json::Value) -> BTreeMap<String, String> {
        serde_json::from_str::<Kept>(&members.to_string()).unwrap().0
    }

    #[test]
    fn a_long_value_is_cut_and_no_number_any_more() {
        let (whole, long) = ("0".repeat(256), "\u{1f600}".repeat(257));
        let found = kept(&json!({ "a": whole, "b": long, "c": "0".repeat(300) + "1M" }));
        assert_eq!((&found["a"], found["b"].len()), (&whole, 4 * 256 + 3));
        assert_eq!(found["c"], "0".repeat(256) + "...");
    }

    #[test]
    fn podshapers_own_keys_are_kept_beside_any_number_of_others() {
        let mut members: BTreeMap<String, String> = (0..50_000).map(|i| (format!("a{i:05}"), String::new())).collect();
        members.insert("kubernetes.io/egress-bandwidth".into(), "10M".into());
        members.insert(MIRROR.into(), "u-1".into());
        let found = kept(&json!(members));
        assert_eq!((found["kubernetes.io/egress-bandwidth"].as_str(), found[MIRROR].as_str()), ("10M", "u-1"));
        let bytes: usize = found.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(bytes < MAX_BYTES + 1024, "{bytes}");
        assert_eq!(kept(&json!({ "rate": "1M" }))["rate"], "1M");
    }
}
