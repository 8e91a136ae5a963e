//! What each ADD leaves for its DEL: the list that it was made by, a file for each interface of each sandbox.
//!
//! The network's list may be another one by then, or be called otherwise. What the runtime keeps of an ADD holds podshaper's list and not
//! the network's, and podshaper's own pins are there for limited pods alone and go with a reboot, after which IPAM still has to be told.
//! A file that cannot be read is as good as none. One whose DEL never comes here, because podshaper was taken out meanwhile, stays until a
//! GC or `uninstall --remove-binary`, as libcni's own does.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rscni_plugin::types::GcAttachment;

use super::list::List;
use crate::error::{self, Code, Error, Result};
use crate::request::Endpoint;

/// Beside libcni's own (its `CacheDir`), which is on every node that has a runtime, and lasting.
pub const DIRECTORY: &str = "/var/lib/cni/podshaper";

/// Neither name can hold a colon.
fn name(container_id: &str, ifname: &str) -> String {
    format!("{container_id}:{ifname}")
}

fn file(endpoint: &Endpoint) -> PathBuf {
    Path::new(DIRECTORY).join(name(&endpoint.container_id, &endpoint.ifname))
}

/// Leaves the list of an ADD.
///
/// # Errors
/// [`Code::Io`]: a pod whose network nobody could remove is not made.
pub(super) fn keep(endpoint: &Endpoint, list: &List) -> Result<()> {
    let path = file(endpoint);
    let text = || format!("write {}, by which DEL knows the network's plugins", path.display());
    write(&path, list).map_err(|cause| Error::because(Code::Io, text(), cause))
}

fn write(path: &Path, list: &List) -> io::Result<()> {
    // A list may hold a token.
    DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(list)?)
}

/// The list of an ADD; `None` if none was left.
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

/// Removes what an ADD has left.
pub(super) fn forget(endpoint: &Endpoint) -> Result<()> {
    remove(&file(endpoint))
}

/// Removes what is of none of these attachments.
pub(super) fn forget_all_but(valid: &[GcAttachment]) -> Result<()> {
    let kept: Vec<String> = valid.iter().map(|valid| name(&valid.container_id, &valid.ifname)).collect();
    let entries = match fs::read_dir(DIRECTORY) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|cause| Error::because(Code::Io, format!("list {DIRECTORY}"), cause))?,
    };
    let stale = entries.flatten().filter(|entry| !kept.iter().any(|kept| entry.file_name() == kept.as_str()));
    error::all(stale.map(|entry| remove(&entry.path())))
}

/// Removes all, with the directory.
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
