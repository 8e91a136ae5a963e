//! `podshaper gc`: removes what no DEL will come for. A runtime's own GC, which names what is in use, is a CNI verb.

use std::path::Path;

use clap::Args;

use super::{
    attachments::{self, Attachment},
    output::Output,
    run,
    table::{Left, Table},
};
use crate::{
    attachment::{self, End},
    cgroup,
    error::{self, Result},
    owner::Owner,
};

#[derive(Args)]
pub struct Arguments {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    output: Output,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut stale: Vec<_> = attachments::read()?.into_iter().filter(is_stale).collect();
        let mut results = Vec::new();
        if !self.dry_run {
            stale.retain(|attachment| {
                remove(attachment).unwrap_or_else(|error| {
                    results.push(Err(error));
                    false
                })
            });
            results.push(attachment::lock().and_then(|pins| pins.map_or(Ok(()), |pins| attachment::settle_all(&pins))));
        }
        self.output.print(&stale, || {
            let done = if self.dry_run { "WOULD REMOVE" } else { "REMOVED" };
            let mut table = Table::new(&[(done, Left), ("INTERFACE", Left), ("PINS", Left)]);
            for Attachment { place, directory, .. } in &stale {
                table.row(vec![place.pod.clone(), place.interface.clone(), directory.display().to_string()]);
            }
            table.text()
        })?;
        error::all(results)
    }
}

/// Removes an attachment that was found stale; whether it did. What is there by now may be another one, which is not stale.
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

/// Whether nothing can come back to life: the links are dead and the cgroup is gone, or it is that of a `podshaper run` that was
/// killed, or on a hybrid host that of a pod that has ended, which nobody else removes.
pub fn is_stale(attachment: &Attachment) -> bool {
    let cgroup = Path::new(&attachment.owner.cgroup);
    let is_known = !attachment.owner.cgroup.is_empty();
    let is_gone = attachment.links.are_dead_for_good() || (attachment.links.are_dead() && !cgroup.exists());
    is_known && (is_gone || run::is_of_the_dead(cgroup) || has_ended(cgroup))
}

fn has_ended(cgroup: &Path) -> bool {
    attachments::hierarchies().is_some_and(|hierarchies| cgroup::has_ended(hierarchies, cgroup))
}
