//! A fingerprint of the directories that the units watch: names, times, sizes, and the text of the conflists. At its
//! end a run compares the fingerprint with the directories, and keeps it for the next run ([`Seen::keep`]).
//!
//! The time of a directory is not enough. Writing a file in place does not change the time of the directory. The kernel
//! counts times in ticks, so two changes within one tick have the same time.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::probe;

/// The file in [`probe::MEMORY`].
const FILE: &str = "seen";

/// A fingerprint of directories. Another version of podshaper computes another one and then runs once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen(u64);

impl Seen {
    /// The present fingerprint: for the directory of the conflists it covers the files' text, for the other directories
    /// only the times of the files. A file that cannot be read counts as missing.
    pub(super) fn now(conflists: &Path, others: &[PathBuf]) -> Self {
        let mut hasher = DefaultHasher::new();
        for file in files(conflists) {
            let text = if file.is_file() { fs::read(&file).ok() } else { None };
            (times(&file), text, file).hash(&mut hasher);
        }
        for directory in others {
            for file in files(directory) {
                (times(&file), file).hash(&mut hasher);
            }
        }
        Self(hasher.finish())
    }

    /// Keeps the fingerprint for [`Seen::recall`]. If it cannot be kept, the next run may do unneeded work.
    pub(super) fn keep(self) {
        let memory = Path::new(probe::MEMORY);
        let kept = probe::make_memory(memory).and_then(|()| fs::write(memory.join(FILE), self.0.to_string()));
        if let Err(cause) = kept {
            log::debug!("the next run looks again: write {}: {cause}", memory.join(FILE).display());
        }
    }

    /// The fingerprint that the last complete run has kept.
    pub(super) fn recall() -> Option<Self> {
        fs::read_to_string(Path::new(probe::MEMORY).join(FILE)).ok()?.parse().ok().map(Self)
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Values that change when a file is replaced, or when its bytes or its owner change.
fn times(file: &Path) -> Option<[i64; 4]> {
    let found = fs::metadata(file).ok()?;
    Some([found.ino() as i64, found.size() as i64, found.ctime(), found.ctime_nsec()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_done_to_a_file_is_seen() {
        let node = tempfile::tempdir().unwrap();
        let [conf, results] = ["net.d", "results"].map(|name| node.path().join(name));
        let now = || Seen::now(&conf, std::slice::from_ref(&results));
        let mut before = now();
        let mut is_seen = |what: &str| {
            let seen = now();
            assert_ne!(seen, before, "{what}");
            assert_eq!(seen, now(), "{what}: twice the same");
            before = seen;
        };
        fs::create_dir(&conf).unwrap();
        fs::create_dir(&results).unwrap();
        let list = conf.join("10.conflist");
        fs::write(&list, "one").unwrap();
        is_seen("a conflist");
        // Written in place, with the same length, within the same tick.
        fs::write(&list, "two").unwrap();
        is_seen("a conflist that is written in place");
        fs::write(conf.join(".new"), "two").unwrap();
        is_seen("a file beside it");
        fs::rename(conf.join(".new"), &list).unwrap();
        is_seen("a conflist that is replaced by an equal one");
        fs::write(results.join("a"), "").unwrap();
        is_seen("a result");
        fs::write(results.join("a"), "{}").unwrap();
        is_seen("a result that is written");
        fs::remove_file(results.join("a")).unwrap();
        is_seen("a result that is removed");
    }
}
