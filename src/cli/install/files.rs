//! The files of a node that install changes: which one the runtime reads, and how one is replaced so that the runtime reads the old
//! or the new one, whole.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::delegate::{self, list};
use crate::error::{Code, Error, Result};

/// Behind the name of a file as it was before install. No runtime reads such a name.
const BACKUP: &str = ".before-podshaper";

/// What follows the stem in the name of a list that was made of a lone configuration. '-' sorts before '.'.
const OWN_LIST: &str = "-podshaper.conflist";

/// Every network of the directory, in the order in which runtimes try them.
pub fn networks(directory: &Path) -> Result<Vec<PathBuf>> {
    list::configurations(directory).map_err(|cause| {
        Error::because(Code::Io, format!("list {} (--conf-dir names another directory)", directory.display()), cause)
    })
}

pub(super) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|cause| Error::because(Code::Io, format!("read {}", path.display()), cause))
}

/// Our list of a lone configuration that stays where it is: its name sorts directly before, so that runtimes take this one.
pub(super) fn own_list(lone: &Path) -> PathBuf {
    let mut name = lone.file_stem().unwrap_or_default().to_owned();
    name.push(OWN_LIST);
    lone.with_file_name(name)
}

/// The lone configurations that a list of ours can have been made of; `None` if it is not ours.
pub(super) fn lone_of(list: &Path) -> Option<[PathBuf; 2]> {
    let name = list.file_name()?.to_str().filter(|name| *name != delegate::FILE)?;
    let stem = name.strip_suffix(OWN_LIST)?;
    Some(["conf", "json"].map(|extension| list.with_file_name(format!("{stem}.{extension}"))))
}

/// What is in a file, or None if there is no such file.
pub(super) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::because(Code::Io, format!("read {}", path.display()), cause)),
    }
}

/// Whether both are one file.
pub(super) fn is_same(one: &File, other: &Path) -> bool {
    let [one, other] = [one.metadata(), fs::metadata(other)].map(|found| found.map(|found| (found.dev(), found.ino())));
    matches!((one, other), (Ok(one), Ok(other)) if one == other)
}

/// Where the file is kept as it was.
pub(super) fn backup(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(BACKUP);
    PathBuf::from(name)
}

/// Makes `path` a file of these bytes, in one step, with the mode and owner of `like`.
pub(super) fn replace(path: &Path, bytes: &[u8], like: &Path) -> Result<()> {
    let metadata =
        fs::metadata(like).map_err(|cause| Error::because(Code::Io, format!("look at {}", like.display()), cause))?;
    put(path, bytes, metadata.mode(), Some(&metadata))
}

/// Makes `path` a program of these bytes, in one step: a runtime may be starting it.
pub(super) fn replace_program(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, 0o755, None)
}

/// Makes `path` a file of these bytes that everybody may read, in one step.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, 0o644, None)
}

fn put(path: &Path, bytes: &[u8], mode: u32, owner: Option<&Metadata>) -> Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".podshaper-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write(&temporary, bytes, mode, owner).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|cause| {
        let _ = fs::remove_file(&temporary);
        Error::because(Code::Io, format!("write {} (through {})", path.display(), temporary.display()), cause)
    })?;
    // The rename is lasting once the directory is; without it the node has the old file after a power cut, which is no harm.
    let _ = File::open(path.parent().unwrap_or(Path::new("/"))).and_then(|directory| directory.sync_all());
    Ok(())
}

fn write(path: &Path, bytes: &[u8], mode: u32, owner: Option<&Metadata>) -> io::Result<()> {
    // In a container the process has the same id each time: a file that a killed one left is in the way, and ours.
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        _ => {}
    }
    // A conflist may hold a token: nobody reads it before it has its mode.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // The mode first: of a file of another owner only CAP_FOWNER changes it, which the DaemonSet's container has not.
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
    let own = file.metadata()?;
    // Only if it has to be: in a container without capabilities it may not.
    if let Some(owner) = owner.filter(|owner| (owner.uid(), owner.gid()) != (own.uid(), own.gid())) {
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(bytes)?;
    file.sync_all()
}

/// Gives a file another name in its directory.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    let doing = || format!("rename {} to {}", from.display(), to.display());
    fs::rename(from, to).map_err(|cause| Error::because(Code::Io, doing(), cause))
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(Error::because(Code::Io, format!("remove {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}
