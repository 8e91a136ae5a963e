//! Output for a person: the only module that writes to stdout and stderr.

use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::error::{Code, Error, Result};

/// `-o`, of every command that prints a table.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Output {
    /// Form of the output
    #[arg(short = 'o', long = "output", value_enum, default_value = "table", value_name = "FORM")]
    form: Form,
    /// The same as -o json
    #[arg(long, conflicts_with = "form")]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people
    #[default]
    Table,
    /// For programs: stable keys, numbers in the unit their key names
    Json,
}

impl Output {
    /// Prints `value` as JSON, or the text of `table`.
    pub fn print<T: Serialize + ?Sized>(self, value: &T, table: impl FnOnce() -> String) -> Result<()> {
        if self.json || self.form == Form::Json {
            let json = serde_json::to_string_pretty(value);
            let json = json.map_err(|cause| Error::because(Code::Io, "write the answer as JSON", cause))?;
            return print(&(json + "\n"));
        }
        print(&table())
    }
}

/// Prints to stdout. A closed pipe is not an error.
pub fn print(text: &str) -> Result<()> {
    print_to_reader(text).map(drop)
}

/// Prints to stdout. Returns whether the reader still reads.
pub fn print_to_reader(text: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map_err(|cause| Error::because(Code::Io, "write to stdout", cause)).map(|()| true),
    }
}

/// Prints a line to stderr. A failure is ignored: there is no other place to report it.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "podshaper: {text}");
}

/// The width of the terminal on stdout. `None` if stdout is not a terminal; then lines may have any length.
pub fn terminal_width() -> Option<usize> {
    io::stdout().is_terminal().then(crossterm::terminal::size)?.ok().map(|(columns, _)| columns.into())
}
