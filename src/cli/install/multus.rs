//! Multus' own file is the first of its directory. Multus' plugin makes no interface itself; it calls the cluster's
//! network, which makes the interface.
//!
//! podshaper goes into the cluster's network. If that network is a file of the directory (the file that Multus names,
//! or the next one), this file is edited. If a copy of it stands in Multus' file (the first of `delegates`), the copy
//! is edited in place.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::conflist::{self, Conflist};
use crate::delegate::list::MULTUS;
use crate::error::{Code, Error, Result};

/// The keys of Multus' file that are read.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Multus<'a> {
    #[serde(rename = "type")]
    kind: Option<String>,
    cluster_network: Option<String>,
    #[serde(borrow)]
    delegates: Option<Vec<&'a RawValue>>,
    #[serde(borrow)]
    plugins: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    plugins: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    name: String,
}

fn parse(text: &str) -> Multus<'_> {
    serde_json::from_str(text).unwrap_or_default()
}

/// Whether a network configuration is Multus'.
pub fn is(text: &str) -> bool {
    let Multus { kind, plugins, .. } = parse(text);
    let first = || serde_json::from_str::<Kind>(plugins?.first()?.get()).ok().map(|plugin| plugin.kind);
    kind.or_else(first).is_some_and(|kind| MULTUS.contains(&kind.as_str()))
}

/// The file among `others` with which Multus makes the cluster's network: the one that Multus names by path or by
/// network, else the first, as Multus itself chooses.
pub(super) fn cluster_network(text: &str, others: &[PathBuf]) -> Option<PathBuf> {
    let Some(named) = parse(text).cluster_network else { return others.first().cloned() };
    // In Multus' container the directory has another path.
    let by_file = others.iter().find(|path| path.file_name() == Path::new(&named).file_name());
    let has_name = |path: &&PathBuf| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        serde_json::from_str::<Kind>(&text).is_ok_and(|found| OsStr::new(&found.name) == OsStr::new(&named))
    };
    by_file.or_else(|| others.iter().find(has_name)).cloned()
}

/// The text with the copy of the cluster's network edited; the copy may be a lone configuration. `None` if there is no
/// copy.
///
/// # Errors
/// The errors of `edit`, and of a copy that cannot be put into a conflist.
pub(super) fn with_delegate(text: &str, edit: impl FnOnce(&str) -> Result<String>) -> Result<Option<String>> {
    let Some(delegate) = parse(text).delegates.and_then(|delegates| delegates.first().copied()) else {
        return Ok(None);
    };
    let wrong = |cause| Error::because(Code::Decode, "the first of its \"delegates\"", cause);
    let Kind { plugins, .. } = serde_json::from_str(delegate.get()).map_err(wrong)?;
    let list = if plugins.is_some() { delegate.get().to_owned() } else { conflist::from_lone(delegate.get())? };
    // Both pointers are into the same buffer: serde_json borrows from the text.
    let start = delegate.get().as_ptr().addr() - text.as_ptr().addr();
    let mut edited = text.to_owned();
    edited.replace_range(start..start + delegate.get().len(), edit(&list)?.trim_end());
    Ok(Some(edited))
}

/// Whether podshaper is in the copy of the cluster's network.
pub(super) fn has_podshaper(text: &str) -> bool {
    let delegate = parse(text).delegates.and_then(|delegates| delegates.first().copied());
    delegate.is_some_and(|delegate| Conflist::parse(delegate.get()).is_ok_and(|list| list.has(conflist::PODSHAPER)))
}

/// Whether Multus passes on the limits that a runtime has from a pod's annotations: Multus' own file has to declare the
/// capability.
pub(super) fn passes_bandwidth(text: &str) -> bool {
    let value: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    value["capabilities"]["bandwidth"] == true
}
