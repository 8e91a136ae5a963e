//! JSON as serde does not check it: that an object is one, and what a value is that should have been a string.
//!
//! A derived `Deserialize` also takes an array for a struct, by position. Stdin is foreign, so that would be a second
//! spelling of every configuration; [`object`] closes it.

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

/// Decodes a JSON object, and nothing else, into a struct or map.
///
/// # Errors
/// serde's, with line and column within `text`.
pub(super) fn object<'a, T: Deserialize<'a>>(text: &'a (impl AsRef<[u8]> + ?Sized)) -> serde_json::Result<T> {
    let text = text.as_ref();
    match text.trim_ascii_start().first() {
        Some(b'{') | None => serde_json::from_slice(text),
        // What is no JSON at all is told by serde, with its place.
        Some(_) => serde_json::from_slice::<serde::de::IgnoredAny>(text)
            .and_then(|_| Err(serde_json::Error::custom("not an object"))),
    }
}

/// A string.
///
/// # Errors
/// The value as it may be shown in an error.
pub(super) fn string(raw: &RawValue) -> Result<String, String> {
    serde_json::from_str(raw.get()).map_err(|_| crate::error::quoted(raw.get()))
}
