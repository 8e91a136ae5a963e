//! `podshaper detach`: takes the limit off a cgroup or a pod.

use std::{path::Path, thread, time::Duration};

use clap::Args;

use super::{
    attachments::{self, Attachment},
    output,
    select::Selector,
};
use crate::{
    attachment::{self, End},
    direction::Direction,
    error::{self, Code, Error, Result},
    owner::Owner,
};

/// How long to wait between lifting a limit and removing the programs. The kernel keeps a socket's pacing rate when the
/// programs are removed, so the limit is lifted first. Lifting takes the pacing rate and the window clamp off the
/// sockets that the cgroup's processes have open, and off every other connection that sends within this time.
pub const LET_GO: Duration = Duration::from_secs(1);

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
        let wanted = match self.cgroup {
            Some(cgroup) => Selector::of_cgroup(cgroup, self.interface),
            None => Selector::new(self.pod.unwrap_or_default(), self.interface),
        };
        let (gone, done) = take_off(&wanted.select(attachments::read()?)?);
        output::print(&gone)?;
        done
    }
}

/// Takes limits off, and pacing rates and window clamps off their connections. Returns a line for each limit that is
/// gone.
pub fn take_off(found: &[Attachment]) -> (String, Result<()>) {
    let lifted = found.iter().map(|attachment| {
        let is_meant = |directory: &Path, owner: &Owner| attachment.is_still(directory, Some(owner));
        attachment::lift(&attachment.place, &Direction::BOTH, is_meant)
    });
    let lifted = error::all(lifted);
    if lifted.is_err() {
        return (String::new(), lifted);
    }
    if found.iter().any(|attachment| !attachment.links.are_dead()) {
        thread::sleep(LET_GO);
    }
    let mut gone = String::new();
    let removed = found.iter().map(|attachment| {
        remove(attachment)?;
        gone += &line(attachment);
        Ok(())
    });
    let removed = error::all(removed);
    (gone, removed)
}

/// The line that reports a removed limit.
pub fn line(attachment: &Attachment) -> String {
    format!("{} {}: no limit any more\n", attachment.name(), attachment.place.interface)
}

/// Removes an attachment with everything that was made for it.
pub fn remove(attachment: &Attachment) -> Result<()> {
    let is_meant = |directory: &Path, owner: Option<&Owner>| attachment.is_still(directory, owner);
    match attachment::remove(&attachment.place, is_meant)? {
        End::Nothing | End::Removed => Ok(()),
        End::Another(_) => {
            let text = format!(
                "take the limit off {} {}: it has just been replaced by another one, which stays; call podshaper detach again to \
                 take that one off",
                attachment.name(),
                attachment.place.interface
            );
            Err(Error::new(Code::Mismatch, text))
        }
    }
}
