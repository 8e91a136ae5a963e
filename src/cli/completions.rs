//! `podshaper completions SHELL`

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use super::{Cli, output};
use crate::error::Result;

#[derive(Args)]
pub struct Arguments {
    /// For bash, where to put it: /usr/share/bash-completion/completions/podshaper
    shell: Shell,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut script = Vec::new();
        generate(self.shell, &mut Cli::command(), "podshaper", &mut script);
        output::print(&String::from_utf8_lossy(&script))
    }
}
