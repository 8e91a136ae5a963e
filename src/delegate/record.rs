//! The record that each ADD leaves for its DEL: the list that was used. There is one file for each interface of each
//! sandbox.
//!
//! The network's list may have changed or have another name at the time of the DEL. The runtime's cache of an ADD holds
//! podshaper's list and not the network's. Podshaper's own pins exist only for limited pods, and a reboot removes them;
//! after a reboot IPAM must still free the address.
//!
//! A DEL treats an unreadable file as missing. If the DEL never reaches podshaper, because podshaper was taken out in
//! the meantime, the file stays until the runtime's GC, until `uninstall --remove-binary`, or until sync or
//! `podshaper gc` finds that its sandbox is gone ([`stale`]).

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rscni_plugin::types::GcAttachment;
use serde::{Deserialize, Serialize};

use super::list::List;
use crate::error::{self, Code, Error, Result};
use crate::request::Endpoint;
use crate::sandboxes::{Results, entries, is_namespace};

/// The directory beside libcni's own (its `CacheDir`), which exists on every node that has a runtime and survives a
/// reboot.
pub const DIRECTORY: &str = "/var/lib/cni/podshaper";

/// Separates container and interface in the name of a file. Neither can hold a colon.
const BETWEEN: char = ':';

/// The content of a file.
#[derive(Serialize)]
struct Kept<'a> {
    #[serde(flatten)]
    list: &'a List,
    netns: Option<&'a Path>,
}

/// The record of a sandbox that is gone.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stale {
    /// `CNI_CONTAINERID` of the ADD.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// The path of the file.
    pub record: PathBuf,
}

fn name(container_id: &str, ifname: &str) -> String {
    format!("{container_id}{BETWEEN}{ifname}")
}

fn file(endpoint: &Endpoint) -> PathBuf {
    Path::new(DIRECTORY).join(name(&endpoint.container_id, &endpoint.ifname))
}

/// Keeps the list of an ADD into a network namespace.
///
/// # Errors
/// [`Code::Io`]: the ADD must fail then, since no DEL could remove the pod's network.
pub(super) fn keep(endpoint: &Endpoint, netns: Option<&Path>, list: &List) -> Result<()> {
    let path = file(endpoint);
    let text = || format!("write {}, by which DEL knows the network's plugins", path.display());
    write(&path, &Kept { list, netns }).map_err(|cause| Error::because(Code::Io, text(), cause))
}

fn write(path: &Path, kept: &Kept<'_>) -> io::Result<()> {
    // A list may hold a token.
    DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(kept)?)
}

/// The list of an ADD; `None` if no record was left.
///
/// # Errors
/// [`Code::Io`] and [`Code::Decode`].
pub(super) fn of(endpoint: &Endpoint) -> Result<Option<List>> {
    let path = file(endpoint);
    let reading = |code, cause: Box<dyn std::error::Error + Send + Sync>| {
        Error::because(code, format!("read {}, the network's list at ADD", path.display()), cause)
    };
    match fs::read_to_string(&path) {
        Ok(text) => List::of_record(&text).map(Some).map_err(|error| reading(Code::Decode, error.into())),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(reading(Code::Io, cause.into())),
    }
}

/// Removes the record of an ADD.
pub(super) fn forget(endpoint: &Endpoint) -> Result<()> {
    remove(&file(endpoint))
}

/// Removes every record except those of these attachments.
pub(super) fn forget_all_but(valid: &[GcAttachment]) -> Result<()> {
    let kept: Vec<String> = valid.iter().map(|valid| name(&valid.container_id, &valid.ifname)).collect();
    let is_kept = |path: &PathBuf| kept.iter().any(|kept| path.file_name().is_some_and(|name| name == kept.as_str()));
    error::all(entries(Path::new(DIRECTORY))?.iter().filter(|path| !is_kept(path)).map(|path| remove(path)))
}

/// The records of sandboxes that are gone: the runtime keeps no result of the sandbox in this directory, and its
/// network namespace does not exist. A result without a namespace is left by a reboot, and its DEL is still to come. A
/// namespace without a result belongs to an ADD that is running, or to one that could not be undone. If a DEL comes
/// nevertheless, it uses the present list.
///
/// # Errors
/// [`Code::Io`]: a directory that cannot be listed.
pub fn stale(cache_dir: &Path) -> Result<Vec<Stale>> {
    // The records are listed before the results: a DEL that ends in between removes its own record.
    let records = entries(Path::new(DIRECTORY))?;
    if records.is_empty() {
        return Ok(Vec::new());
    }
    let results = Results::list(cache_dir)?;
    Ok(records.into_iter().filter_map(|record| Stale::of(record, &results)).collect())
}

impl Stale {
    fn of(record: PathBuf, results: &Results) -> Option<Self> {
        #[derive(Deserialize)]
        struct Place {
            #[serde(default)]
            netns: Option<PathBuf>,
        }
        let (container_id, interface) = record.file_name()?.to_str()?.split_once(BETWEEN)?;
        if results.has(container_id, interface) {
            return None;
        }
        // A file that is being written at this moment cannot be parsed yet; it is skipped.
        let Place { netns } = serde_json::from_slice(&fs::read(&record).ok()?).ok()?;
        let (container_id, interface) = (container_id.to_owned(), interface.to_owned());
        netns.is_some_and(|netns| !is_namespace(&netns)).then_some(Self { container_id, interface, record })
    }

    /// Removes the record.
    ///
    /// # Errors
    /// [`Code::Io`].
    pub fn remove(&self) -> Result<()> {
        remove(&self.record)
    }
}

/// Removes all records, with the directory.
///
/// # Errors
/// [`Code::Io`].
pub fn forget_all() -> Result<()> {
    match fs::remove_dir_all(DIRECTORY) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(Error::because(Code::Io, format!("remove {DIRECTORY}"), cause))
        }
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(Error::because(Code::Io, format!("remove {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}
