//! One file that podshaper is put into, as it is and as it is to be.

use std::path::PathBuf;

use super::{files, place, report::Report};
use crate::error::Result;

/// A file as it is to be.
pub(super) struct Edit {
    pub(super) path: PathBuf,
    /// What is there; nothing, if there is no such file.
    pub(super) before: Option<String>,
    pub(super) after: String,
    /// Whose mode and owner it has.
    pub(super) like: PathBuf,
    pub(super) what: What,
}

/// What a file is that podshaper is put into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The network's. What is there is kept for uninstall.
    Network,
    /// Ours, made of a lone configuration.
    OwnList,
    /// Ours, which delegates to the network's.
    Delegating,
}

impl Edit {
    /// The backup first, then the file.
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
        // What has podshaper in it is not what uninstall is to bring back.
        let backup = before.as_ref().filter(|before| *what == What::Network && !place::has_podshaper(before));
        if let Some(before) = backup {
            files::replace(&files::backup(path), before.as_bytes(), path)?;
        }
        files::replace(path, after.as_bytes(), like)?;
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
