//! Checks of JSON that serde does not make: whether an object is an object, and which value stands in the place of a
//! string.
//!
//! A derived `Deserialize` also accepts an array for a struct, by position. Stdin is untrusted, and arrays would be a
//! second spelling of every configuration; [`object`] refuses them.

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

/// Decodes a JSON object, and no other JSON value, into a struct or map.
///
/// # Errors
/// serde's error, with line and column within `text`.
pub(super) fn object<'a, T: Deserialize<'a>>(text: &'a (impl AsRef<[u8]> + ?Sized)) -> serde_json::Result<T> {
    let text = text.as_ref();
    match text.trim_ascii_start().first() {
        Some(b'{') | None => serde_json::from_slice(text),
        // For text that is not JSON, serde gives the error and its position.
        Some(_) => serde_json::from_slice::<serde::de::IgnoredAny>(text)
            .and_then(|_| Err(serde_json::Error::custom("not an object"))),
    }
}

/// A string.
///
/// # Errors
/// The value as it may be shown in an error, if it is not a string.
pub(super) fn string(raw: &RawValue) -> Result<String, String> {
    serde_json::from_str(raw.get()).map_err(|_| crate::error::quoted(raw.get()))
}
