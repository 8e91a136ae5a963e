//! The record of whose an attachment is, in the only map that belongs to one attachment. The record lives and dies with
//! the pins.

use std::{os::fd::AsFd, path::Path};

use super::refusal::refused;
use crate::{
    error::{Code, Error, Result},
    owner::Owner,
    pins::OWNER,
    sys,
};

/// Bytes of the longest record. The names in it have bounds of their own.
const MAX_BYTES: usize = 4096;
/// Bytes that are left free for changes: [`Owner::changed`], [`Owner::followed`], and larger numbers for the limits
/// that are asked for and allowed.
const SPARE_BYTES: usize = 256;

/// Writes the record into a map of its own, and pins the map.
///
/// # Errors
/// [`Code::Kernel`] with the kernel's error; [`Code::Config`] if the names are too long.
pub fn pin(owner: &Owner, directory: &Path) -> Result<()> {
    let mut json = json(owner)?;
    json.resize((json.len() + SPARE_BYTES).next_multiple_of(8), 0);
    let path = directory.join(OWNER);
    let pinned = sys::new_element(OWNER, &json).and_then(|map| sys::pin(map.as_fd(), &path));
    pinned.map_err(|cause| refused(format!("write {}", path.display()), &cause))
}

/// Writes the record again, into the map that is pinned.
///
/// # Errors
/// Those of [`pin`].
pub fn write(owner: &Owner, directory: &Path) -> Result<()> {
    let (json, path) = (json(owner)?, directory.join(OWNER));
    let written = sys::open_pin(&path).and_then(|map| sys::set_element_bytes(map.as_fd(), &json));
    written.map_err(|cause| refused(format!("write {}", path.display()), &cause))
}

fn json(owner: &Owner) -> Result<Vec<u8>> {
    let text = "record whose attachment this is";
    let json = serde_json::to_vec(owner).map_err(|cause| Error::because(Code::Config, text, cause))?;
    if json.len() > MAX_BYTES {
        let text = format!("{text}: its names take {} bytes, more than the {MAX_BYTES} there may be", json.len());
        return Err(Error::new(Code::Config, text));
    }
    Ok(json)
}
