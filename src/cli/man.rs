//! `podshaper man`: the manual pages, generated from the same text as `--help`.

use clap::{Args, CommandFactory};
use clap_mangen::Man;

use super::{Cli, output};
use crate::error::{Code, Error, Result, quoted};

#[derive(Args)]
pub struct Arguments {
    /// The command whose page to print [default: podshaper's own]
    command: Option<String>,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut cli = Cli::command();
        cli.build();
        let page = match &self.command {
            None => cli,
            Some(name) => {
                let no_such =
                    || Error::new(Code::Config, format!("print the page of {}: no such command", quoted(name)));
                let command = cli.find_subcommand(name).cloned().ok_or_else(no_such)?;
                command.display_name(format!("podshaper-{name}"))
            }
        };
        let mut text = Vec::new();
        let rendered = Man::new(page).render(&mut text);
        rendered.map_err(|cause| Error::because(Code::Io, "write the manual page", cause))?;
        output::print(&String::from_utf8_lossy(&text))
    }
}
