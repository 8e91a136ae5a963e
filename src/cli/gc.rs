//! `podshaper gc`: removes attachments that no DEL will remove. A runtime's own GC, which names the attachments in use,
//! is a CNI verb.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{
    attachments::{self, Attachment},
    output::Output,
    run, sync,
    table::{Left, Table},
};
use crate::{
    attachment::{self, End},
    cgroup,
    delegate::record::{self, Stale},
    error::{self, Result},
    owner::Owner,
};

#[derive(Args)]
pub struct Arguments {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Directory in which the runtime's CNI library keeps the results of its calls
    #[arg(long, value_name = "DIR", default_value = sync::CACHE_DIR)]
    cache_dir: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// A leftover to remove.
#[derive(Serialize)]
#[serde(untagged)]
enum Removed<'a> {
    Attachment(&'a Attachment),
    Record(&'a Stale),
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut stale: Vec<_> = attachments::read()?.into_iter().filter(is_stale).collect();
        let mut records = record::stale(&self.cache_dir)?;
        let mut results = Vec::new();
        if !self.dry_run {
            let mut is_done = |done: Result<bool>| {
                done.unwrap_or_else(|error| {
                    results.push(Err(error));
                    false
                })
            };
            stale.retain(|attachment| is_done(remove(attachment)));
            records.retain(|record| is_done(record.remove().map(|()| true)));
            results.push(attachment::lock().and_then(|pins| pins.map_or(Ok(()), |pins| attachment::settle_all(&pins))));
        }
        let attachments = stale.iter().map(Removed::Attachment);
        let removed: Vec<Removed<'_>> = attachments.chain(records.iter().map(Removed::Record)).collect();
        self.output.print(&removed, || {
            let done = if self.dry_run { "WOULD REMOVE" } else { "REMOVED" };
            let mut table = Table::new(&[(done, Left), ("INTERFACE", Left), ("WHERE", Left)]);
            removed.iter().for_each(|removed| table.row(removed.cells()));
            table.text()
        })?;
        error::all(results)
    }
}

impl Removed<'_> {
    fn cells(&self) -> Vec<String> {
        match self {
            Self::Attachment(Attachment { place, directory, .. }) => {
                vec![place.pod.clone(), place.interface.clone(), directory.display().to_string()]
            }
            Self::Record(Stale { container_id, interface, record }) => {
                vec![container_id.clone(), interface.clone(), record.display().to_string()]
            }
        }
    }
}

/// Removes an attachment that was found stale. Returns whether it was removed: another attachment, which is not stale,
/// may have replaced it.
pub fn remove(found: &Attachment) -> Result<bool> {
    let is_stale =
        |directory: &Path, _: Option<&Owner>| is_stale(&Attachment::read(found.place.clone(), directory.to_path_buf()));
    let is_removed = matches!(attachment::remove(&found.place, is_stale)?, End::Removed);
    if is_removed {
        let cgroup = Path::new(&found.owner.cgroup);
        run::remove_cgroup_of_the_dead(cgroup);
        if has_ended(cgroup) && attachment::lock()?.is_none_or(|pins| !pins.has_pod(&found.place.pod)) {
            attachment::remove_cgroup_if_ours(cgroup);
        }
    }
    Ok(is_removed)
}

/// Whether the attachment can never work again. Either its links are dead and the cgroup is gone; or the cgroup is that
/// of a killed `podshaper run`; or, on a hybrid host, the cgroup is that of an ended pod and only podshaper will remove
/// it.
pub fn is_stale(attachment: &Attachment) -> bool {
    let cgroup = Path::new(&attachment.owner.cgroup);
    let is_known = !attachment.owner.cgroup.is_empty();
    let is_gone = attachment.links.are_dead_for_good() || (attachment.links.are_dead() && !cgroup.exists());
    is_known && (is_gone || run::is_of_the_dead(cgroup) || has_ended(cgroup))
}

fn has_ended(cgroup: &Path) -> bool {
    attachments::hierarchies().is_some_and(|hierarchies| cgroup::has_ended(hierarchies, cgroup))
}
