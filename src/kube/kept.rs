//! The part of a pod's labels or annotations that is kept in memory. A tenant may write a quarter of a megabyte of
//! annotations on each pod, and a node has hundreds of pods. Values that cannot be a limit are not kept.
//!
//! A long value cannot be a rate. Only its beginning is kept, for the error text. A key that is left out is not taken
//! for absent ([`LeftOut`]): otherwise a tenant could hide a limit behind other keys.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::MIRROR;
use crate::direction::Direction;

/// How many characters of a value are kept.
const MAX_CHARACTERS: usize = 256;
/// How many bytes of keys and values are kept for keys that the configuration may name (`rateKey`). Podshaper's own
/// keys do not count.
pub const MAX_BYTES: usize = 64 << 10;
/// Replaces the rest of a cut value: a part of a number must not be taken for the number.
const LEFT_OUT: &str = "...";

/// The kept values, by key.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kept {
    values: BTreeMap<String, String>,
    /// Whether keys were left out.
    is_cut: bool,
}

/// The key may be one of those that were left out.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftOut;

impl Kept {
    /// The value of a key.
    ///
    /// # Errors
    /// Keys were left out, and this may be one of them.
    pub fn get(&self, key: &str) -> Result<Option<&str>, LeftOut> {
        match self.values.get(key) {
            None if self.is_cut && !is_own(key) => Err(LeftOut),
            value => Ok(value.map(String::as_str)),
        }
    }

    /// The kept keys.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.values.keys()
    }

    /// The UID of the static pod that this pod mirrors, if these are a mirror's annotations.
    pub(super) fn mirrored(&self) -> Option<&str> {
        self.values.get(MIRROR).map(String::as_str)
    }
}

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
        let (mut kept, mut bytes) = (Kept::default(), 0);
        while let Some(key) = map.next_key::<String>()? {
            let is_own = is_own(&key);
            if !is_own && bytes >= MAX_BYTES {
                map.next_value::<IgnoredAny>()?;
                kept.is_cut = true;
                continue;
            }
            let Short(value) = map.next_value()?;
            bytes += if is_own { 0 } else { key.len() + value.len() };
            kept.values.insert(key, value);
        }
        Ok(kept)
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

    const LIMIT: &str = "kubernetes.io/egress-bandwidth";

    fn kept(members: &serde_json::Value) -> Kept {
        serde_json::from_str(&members.to_string()).unwrap()
    }

    /// Keys that sort before all others, each with its value one byte long.
    fn small(count: usize) -> BTreeMap<String, String> {
        (0..count).map(|i| (format!("a{i:06}"), "x".to_owned())).collect()
    }

    #[test]
    fn a_long_value_is_cut_and_no_number_any_more() {
        let (whole, long) = ("0".repeat(256), "\u{1f600}".repeat(257));
        let found = kept(&json!({ "a": whole, "b": long, "c": "0".repeat(300) + "1M" })).values;
        assert_eq!((&found["a"], found["b"].len()), (&whole, 4 * 256 + 3));
        assert_eq!(found["c"], "0".repeat(256) + "...");
    }

    #[test]
    fn podshapers_own_keys_are_kept_beside_any_number_of_others() {
        let mut members = small(50_000);
        members.insert(LIMIT.into(), "10M".into());
        members.insert(MIRROR.into(), "u-1".into());
        let found = kept(&json!(members));
        assert_eq!((found.get(LIMIT), found.mirrored()), (Ok(Some("10M")), Some("u-1")));
        let bytes: usize = found.values.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(bytes < MAX_BYTES + 1024, "{bytes}");
        assert_eq!(kept(&json!({ "rate": "1M" })).get("rate"), Ok(Some("1M")));
    }

    #[test]
    fn a_key_that_may_be_left_out_is_not_taken_for_absent() {
        // Each of the small keys has eight bytes with its value.
        for (count, expected) in [(MAX_BYTES / 8 - 1, Ok(Some("1M"))), (MAX_BYTES / 8, Err(LeftOut))] {
            let mut members = small(count);
            assert_eq!(kept(&json!(members)).get("rate"), Ok(None), "{count}: all are kept");
            members.insert("rate".into(), "1M".into());
            let found = kept(&json!(members));
            assert_eq!(
                (found.get("rate"), found.get("a000000"), found.get(LIMIT)),
                (expected, Ok(Some("x")), Ok(None))
            );
        }
        // Podshaper's own keys leave the same room to others.
        let mut members = small(MAX_BYTES / 8 - 1);
        members.extend([(LIMIT, "10M"), ("rate", "1M")].map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert_eq!(kept(&json!(members)).get("rate"), Ok(Some("1M")));
    }
}
