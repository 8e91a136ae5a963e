//! The files of a node that install changes: which one the runtime reads, and how a file is replaced so that the
//! runtime reads either the complete old file or the complete new one.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::delegate::{self, list};
use crate::error::{Code, Error, Result};

/// The suffix of the backup of a file. No runtime reads a file of such a name.
const BACKUP: &str = ".before-podshaper";

/// The end of the name of a list that was made of a lone configuration, after the stem. '-' sorts before '.'.
const OWN_LIST: &str = "-podshaper.conflist";

/// Every network configuration of the directory, in the order in which runtimes try them.
pub fn networks(directory: &Path) -> Result<Vec<PathBuf>> {
    list::configurations(directory).map_err(|cause| {
        Error::because(Code::Io, format!("list {} (--conf-dir names another directory)", directory.display()), cause)
    })
}

pub(super) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|cause| Error::because(Code::Io, format!("read {}", path.display()), cause))
}

/// The path of our list for a lone configuration, which stays in place. Its name sorts directly before that of the lone
/// configuration, so that runtimes use the list.
pub(super) fn own_list(lone: &Path) -> PathBuf {
    let mut name = lone.file_stem().unwrap_or_default().to_owned();
    name.push(OWN_LIST);
    lone.with_file_name(name)
}

/// The lone configurations that a list of ours can have been made of; `None` if the list is not ours.
pub(super) fn lone_of(list: &Path) -> Option<[PathBuf; 2]> {
    let name = list.file_name()?.to_str().filter(|name| *name != delegate::FILE)?;
    let stem = name.strip_suffix(OWN_LIST)?;
    Some(["conf", "json"].map(|extension| list.with_file_name(format!("{stem}.{extension}"))))
}

/// The content of a file; `None` if the file does not exist.
pub(super) fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::because(Code::Io, format!("read {}", path.display()), cause)),
    }
}

/// The text of a file; `None` if the file does not exist.
pub(super) fn text_if_there(path: &Path) -> Result<Option<String>> {
    Ok(read_if_there(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Whether both are the same file.
pub(super) fn is_same(one: &File, other: &Path) -> bool {
    let [one, other] = [one.metadata(), fs::metadata(other)].map(|found| found.map(|found| (found.dev(), found.ino())));
    matches!((one, other), (Ok(one), Ok(other)) if one == other)
}

/// The path of the backup of a file.
pub(super) fn backup(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(BACKUP);
    PathBuf::from(name)
}

/// Atomically makes `path` a file with these bytes, and with the mode and owner of `like`.
pub(super) fn replace(path: &Path, bytes: &[u8], like: &Path) -> Result<()> {
    let like = metadata(like)?;
    put(path, bytes, like.mode(), Some(&like), || Ok(()))
}

/// Does what [`replace`] does to a file whose text was read before: `before`, or `None` if it did not exist.
///
/// # Errors
/// The file has another text by now. Another program's text must not be lost.
pub(super) fn replace_text(path: &Path, before: Option<&str>, after: &str, like: &Path) -> Result<()> {
    let like = metadata(like)?;
    put(path, after.as_bytes(), like.mode(), Some(&like), || check_still(path, before))
}

/// Atomically makes `path` a program with these bytes: a runtime may be starting the program at this moment.
pub(super) fn replace_program(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, 0o755, None, || Ok(()))
}

/// Atomically makes `path` a file with these bytes that everybody may read.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    put(path, bytes, 0o644, None, || Ok(()))
}

fn metadata(path: &Path) -> Result<Metadata> {
    fs::metadata(path).map_err(|cause| Error::because(Code::Io, format!("look at {}", path.display()), cause))
}

/// Checks that a file still has this text.
fn check_still(path: &Path, text: Option<&str>) -> Result<()> {
    if text_if_there(path)?.as_deref() == text {
        return Ok(());
    }
    let text = format!("another program has written {} meanwhile, and its text stays: call this again", path.display());
    Err(Error::new(Code::Io, text))
}

/// Writes a temporary file and renames it. The check comes directly before the rename: writing the temporary file takes
/// the time until the disk has it. Nothing locks a conflist, so what is written between check and rename is lost.
fn put(
    path: &Path,
    bytes: &[u8],
    mode: u32,
    owner: Option<&Metadata>,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".podshaper-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let failed =
        |cause| Error::because(Code::Io, format!("write {} (through {})", path.display(), temporary.display()), cause);
    let written = write(&temporary, bytes, mode, owner).map_err(failed).and_then(|()| check());
    written.and_then(|()| fs::rename(&temporary, path).map_err(failed)).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })?;
    // The rename is durable once the directory is synced. Without the sync a node may have the old file after a power
    // cut, which does no harm.
    let _ = File::open(path.parent().unwrap_or(Path::new("/"))).and_then(|directory| directory.sync_all());
    Ok(())
}

fn write(path: &Path, bytes: &[u8], mode: u32, owner: Option<&Metadata>) -> io::Result<()> {
    // In a container the process id is the same each time. A temporary file of a killed run may have the same name; it
    // is ours, and is removed.
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        _ => {}
    }
    // A conflist may hold a token: the file is private until it gets its final mode.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // The mode is set before the owner: changing the mode of another owner's file takes CAP_FOWNER, which the
    // DaemonSet's container does not have.
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
    let own = file.metadata()?;
    // The owner is set only if it differs: a container without capabilities may not set it.
    if let Some(owner) = owner.filter(|owner| (owner.uid(), owner.gid()) != (own.uid(), own.gid())) {
        fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(bytes)?;
    file.sync_all()
}

/// Renames a file within its directory.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    let doing = || format!("rename {} to {}", from.display(), to.display());
    fs::rename(from, to).map_err(|cause| Error::because(Code::Io, doing(), cause))
}

/// Removes a file, if it exists.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(Error::because(Code::Io, format!("remove {}", path.display()), cause))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn what_another_program_has_written_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("10.conflist");
        for (read, there) in [(Some("old"), "anew"), (Some("old"), ""), (None, "new")] {
            fs::write(&list, there).unwrap();
            let error = replace_text(&list, read, "podshaper's", &list).unwrap_err().to_string();
            assert!(error.contains("10.conflist meanwhile, and its text stays: call this again"), "{error}");
            assert_eq!(fs::read_to_string(&list).unwrap(), there);
            assert_eq!(names(directory.path()), ["10.conflist"]);
        }
        replace_text(&list, Some("new"), "podshaper's", &list).unwrap();
        assert_eq!(fs::read_to_string(&list).unwrap(), "podshaper's");
        // A file that was removed meanwhile does not come back; a new file is made where none was.
        let other = directory.path().join("20.conflist");
        assert!(replace_text(&other, Some("old"), "podshaper's", &list).is_err());
        assert_eq!(names(directory.path()), ["10.conflist"]);
        replace_text(&other, None, "podshaper's", &list).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "podshaper's");
    }

    #[test]
    fn a_file_is_looked_at_again_after_the_temporary_file_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("10.conflist");
        fs::write(&list, "old").unwrap();
        let check = || {
            let temporary = names(directory.path()).into_iter().find(|name| name != "10.conflist").unwrap();
            assert_eq!(fs::read(directory.path().join(temporary)).unwrap(), b"podshaper's");
            fs::write(&list, "anew").unwrap();
            check_still(&list, Some("old"))
        };
        assert!(put(&list, b"podshaper's", 0o644, None, check).is_err());
        assert_eq!(fs::read_to_string(&list).unwrap(), "anew");
        assert_eq!(names(directory.path()), ["10.conflist"]);
    }
}
