//! `podshaper detach`: takes a limit off, a cgroup's or a pod's.

use std::{path::Path, thread, time::Duration};

use clap::Args;

use super::{
    attachments::{self, Attachment},
    output,
    select::Selector,
};
use crate::{
    error::Result,
    ingress,
    pins::{self, BPFFS, Pins},
    request::{Limit, Limits, Source},
    shaper::Pinned,
    units::Rate,
};

/// The kernel keeps a socket's pace when the programs go. So the limit is lifted first, and every connection that sends within this
/// time is let go with it.
const LET_GO: Duration = Duration::from_secs(1);

#[derive(Args)]
pub struct Arguments {
    /// Name, namespace/name, UID or container id of the pod, or the beginning of one; or the cgroup's path
    #[arg(required_unless_present = "cgroup")]
    pod: Option<String>,
    /// The cgroup's path, as attach was given it
    #[arg(long, value_name = "PATH", conflicts_with = "pod")]
    cgroup: Option<String>,
    /// Only from this interface
    #[arg(short, long, value_name = "NAME")]
    interface: Option<String>,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let wanted = Selector::new(self.pod.or(self.cgroup).unwrap_or_default(), self.interface);
        let found = wanted.select(attachments::read()?)?;
        let live = found.iter().any(|attachment| !attachment.links.are_dead());
        for attachment in &found {
            lift(attachment)?;
        }
        if live {
            thread::sleep(LET_GO);
        }
        let gone = found.iter().map(|attachment| {
            remove(attachment)?;
            Ok(format!("{} {}: no limit any more\n", attachment.name(), attachment.place.interface))
        });
        output::print(&gone.collect::<Result<String>>()?)
    }
}

/// Takes an attachment away with all that was made for it.
///
/// # Errors
/// What the kernel says.
pub fn remove(attachment: &Attachment) -> Result<()> {
    let Some(pins) = Pins::existing(Path::new(BPFFS)) else { return Ok(()) };
    pins.lock()?.remove(&attachment.place)?;
    ingress::undo(&attachment.owner);
    Ok(())
}

fn lift(attachment: &Attachment) -> Result<()> {
    if !pins::is_current(&attachment.directory) || attachment.problem.is_some() {
        return Ok(());
    }
    let Some(pins) = Pins::existing(Path::new(BPFFS)) else { return Ok(()) };
    let pins = pins.lock()?;
    let Some(directory) = pins.find(&attachment.place) else { return Ok(()) };
    let unlimited = Limit::of(Rate::MAX, Source::Operator);
    let limits = Limits {
        egress: attachment.egress.as_ref().map(|_| unlimited),
        ingress: attachment.ingress.as_ref().map(|_| unlimited),
    };
    Pinned::at(&directory).change(&attachments::settings(&attachment.owner, limits), &attachment.owner)
}
