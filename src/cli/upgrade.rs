//! `podshaper upgrade`: gives running pods this program's eBPF programs.

use clap::Args;

use super::output;
use crate::{
    attachment::{self, Upgrade},
    error::Result,
};

#[derive(Args)]
pub struct Arguments {}

impl Arguments {
    pub fn run(self) -> Result<()> {
        output::print(&text(&attachment::upgrade()?))
    }
}

/// The report: a line for each action.
pub fn text(upgrade: &Upgrade) -> String {
    let Upgrade { links, left } = upgrade;
    let done = match links {
        0 => "the node's programs are this podshaper's already, or there are none\n".to_owned(),
        links => format!("{links} programs on pods' cgroups are this podshaper's now\n"),
    };
    let left = match left {
        0 => String::new(),
        left => format!(
            "{left} attachments keep the programs that they have: they do not share the node's, or are of another layout; a pod's \
             next sandbox gets new ones\n"
        ),
    };
    done + &left
}
