//! podshaper-report: compares podshaper with its alternatives in one run, in turns; tables and plots of the
//! measurements.
//!
//! `measure` appends each single measurement to `raw.jsonl`; `draw` makes the report from that file, without
//! measuring. [`workloads`] lists the measurements, [`figures`] lists the drawings. `tests/run report` does
//! everything.

#[path = "../../harness/mod.rs"]
mod harness;

/// The drawings and their order.
mod figures;
/// The comparisons in which podshaper is not the first.
mod judge;
mod machine;
mod measure;
mod plot;
mod record;
/// The report's text.
mod text;
mod workloads;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser};

use harness::{note, stop_on_signals, stopped};

/// The exit status that a shell reports of a program that Ctrl-C ended.
const EXIT_STOPPED: u8 = 130;

/// Measures podshaper beside what people would use instead, and writes the report
#[derive(Parser)]
#[command(name = "podshaper-report")]
enum Command {
    /// Measure on this kernel, or in User Mode Linux
    Measure(Measure),
    /// Make the report of what was measured
    Draw {
        /// Where raw.jsonl is, and the report will be
        directory: PathBuf,
    },
}

#[derive(Args)]
struct Measure {
    /// Append to raw.jsonl in this directory; "-" prints
    #[arg(long)]
    out: PathBuf,
    /// Fewer and shorter
    #[arg(long)]
    quick: bool,
    /// In User Mode Linux, which has fq
    #[arg(long)]
    uml: bool,
    /// Where a bandwidth plugin of another version is, with its version in the file `version`
    #[arg(long)]
    newer_bandwidth: Option<PathBuf>,
    /// What podshaper's programs were built from
    #[arg(long, default_value = "unknown")]
    commit: String,
    /// Of the workloads only these, by name
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Say what would be measured, and how long that takes
    #[arg(long)]
    plan: bool,
}

fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let result = stop_on_signals().and_then(|()| match command {
        Command::Measure(options) if options.uml => measure::in_uml(&options),
        Command::Measure(options) => measure::measure(&options),
        Command::Draw { directory } => text::draw(&directory),
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if stopped() => ExitCode::from(EXIT_STOPPED),
        Err(error) => {
            note(format_args!("podshaper-report: {error}"));
            ExitCode::FAILURE
        }
    }
}
