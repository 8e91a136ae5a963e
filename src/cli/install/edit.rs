//! One file that podshaper is put into: its present text and its new text.

use std::path::PathBuf;

use super::{files, place, report::Report};
use crate::error::Result;

/// A file to write.
pub(super) struct Edit {
    pub(super) path: PathBuf,
    /// The present text; `None` if the file does not exist.
    pub(super) before: Option<String>,
    pub(super) after: String,
    /// The file whose mode and owner the new file gets.
    pub(super) like: PathBuf,
    pub(super) what: What,
}

/// The kind of file that podshaper is put into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The network's file. The present text is kept for uninstall.
    Network,
    /// Our list, made of a lone configuration.
    OwnList,
    /// Our list, which delegates to the network's.
    Delegating,
}

impl Edit {
    /// Writes the backup first, then the file.
    ///
    /// # Errors
    /// A file could not be written, or another program has written the file since its text was read.
    pub(super) fn perform(&self, report: &mut Report) -> Result<()> {
        let Self { path, before, after, like, what } = self;
        report.change(path, before.as_deref().unwrap_or_default(), after);
        if before.as_ref() == Some(after) {
            report.unchanged(format!("{} has podshaper already", path.display()));
            return Ok(());
        }
        if report.dry_run {
            return Ok(());
        }
        // A text with podshaper in it must not become the backup that uninstall restores.
        let backup = before.as_ref().filter(|before| *what == What::Network && !place::has_podshaper(before));
        if let Some(before) = backup {
            files::replace(&files::backup(path), before.as_bytes(), path)?;
        }
        files::replace_text(path, before.as_deref(), after, like)?;
        let (path, of, like) = (path.display(), files::backup(path), like.display());
        report.say(match what {
            What::Network => format!("{path}: podshaper is in it; as it was: {}", of.display()),
            What::OwnList => format!("{path}: what {like} says, and podshaper"),
            What::Delegating => {
                format!("{path}: podshaper, which calls the plugins of {like} as it stands at each call")
            }
        });
        Ok(())
    }
}
