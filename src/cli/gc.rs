//! `podshaper gc`: removes what no DEL will come for. A runtime's own GC, which names what is in use, is a CNI verb.

use std::path::Path;

use clap::Args;

use super::{
    attachments::{self, Attachment},
    detach,
    output::Output,
    run,
    table::{Left, Table},
};
use crate::{
    error::Result,
    pins::{BPFFS, Pins},
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
        let stale: Vec<_> = attachments::read()?.into_iter().filter(is_stale).collect();
        if !self.dry_run {
            for attachment in &stale {
                detach::remove(attachment)?;
                run::remove_cgroup_of_the_dead(Path::new(&attachment.owner.cgroup));
            }
            if let Some(pins) = Pins::existing(Path::new(BPFFS)) {
                pins.lock()?.settle_all()?;
            }
        }
        self.output.print(&stale, || {
            let done = if self.dry_run { "WOULD REMOVE" } else { "REMOVED" };
            let mut table = Table::new(&[(done, Left), ("INTERFACE", Left), ("PINS", Left)]);
            for Attachment { place, directory, .. } in &stale {
                table.row(vec![place.pod.clone(), place.interface.clone(), directory.display().to_string()]);
            }
            table.text()
        })
    }
}

/// Whether nothing can come back to life: the links are dead and the cgroup is gone, or it is that of a `podshaper run` that was
/// killed.
fn is_stale(attachment: &Attachment) -> bool {
    let cgroup = Path::new(&attachment.owner.cgroup);
    let is_known = !attachment.owner.cgroup.is_empty();
    let is_gone = attachment.links.are_dead_for_good() || (attachment.links.are_dead() && !cgroup.exists());
    is_known && (is_gone || run::is_of_the_dead(cgroup))
}
