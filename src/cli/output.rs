//! What is printed, and how: the one place that writes to stdout and stderr for a person.

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
    /// Prints `value`, or what `table` makes of it.
    pub fn print<T: Serialize + ?Sized>(self, value: &T, table: impl FnOnce() -> String) -> Result<()> {
        if self.json || self.form == Form::Json {
            let json = serde_json::to_string_pretty(value);
            let json = json.map_err(|cause| Error::because(Code::Io, "write the answer as JSON", cause))?;
            return print(&(json + "\n"));
        }
        print(&table())
    }
}

/// Prints to stdout. A reader that has seen enough is no error.
pub fn print(text: &str) -> Result<()> {
    print_to_reader(text).map(drop)
}

/// The same; whether anybody is still reading.
pub fn print_to_reader(text: &str) -> Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map_err(|cause| Error::because(Code::Io, "write to stdout", cause)).map(|()| true),
    }
}

/// A line on stderr. Nobody can be told if that fails.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "podshaper: {text}");
}

/// The width of the terminal on stdout; `None` if it is none, where lines may be of any length.
pub fn terminal_width() -> Option<usize> {
    io::stdout().is_terminal().then(crossterm::terminal::size)?.ok().map(|(columns, _)| columns.into())
}
