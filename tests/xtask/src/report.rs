//! `tests/run report`: compares podshaper with its alternatives, here and in User Mode Linux, and writes the report.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use crate::lane::Lane;
use crate::output::last_line;
use crate::processes::{self, command};
use crate::stages::{self, printed_by};
use crate::summary::Outcome;
use crate::{NEEDS_OF_APPS, prepare, sum_up};

/// The default directory of the report; the committed one is in tests/bench/report.
const DIRECTORY: &str = "target/report";
/// The file of the measurements, which are made anew.
const RAW: &str = "raw.jsonl";

struct Options {
    is_quick: bool,
    out: PathBuf,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self { is_quick: false, out: DIRECTORY.into() };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match (argument.as_str(), argument.strip_prefix("--out=")) {
                ("--quick", _) => options.is_quick = true,
                ("--out", _) => options.out = arguments.next().ok_or("--out takes a directory")?.into(),
                (_, Some(directory)) => options.out = directory.into(),
                _ => return Err(format!("{argument}: report takes [--quick] [--out DIR]")),
            }
        }
        Ok(options)
    }
}

/// The program that measures and draws.
struct Program<'a> {
    path: String,
    /// Arguments of each measurement.
    measuring: Vec<String>,
    out: &'a Path,
}

pub fn report(arguments: &[String]) -> Result<ExitCode, String> {
    let start = Instant::now();
    let options = Options::parse(arguments)?;
    processes::stop_on_signals().map_err(|error| format!("wait for signals: {error}"))?;
    let mut lane = Lane::default();
    prepare(&mut lane)?;
    stages::need(&mut lane, NEEDS_OF_APPS)?;
    let path = build(&mut lane)?;
    let peers = peers(&mut lane);
    // Before anything is written: if the tree has a committed report, writing the report makes the tree dirty.
    let commit = printed_by(command("git").args(["describe", "--always", "--dirty"]))?;
    remove_old(&options.out)?;
    let mut measuring = vec!["--commit".to_owned(), commit.trim().to_owned()];
    measuring.extend(options.is_quick.then(|| "--quick".to_owned()));
    measuring.extend(peers.into_iter().flat_map(|directory| ["--newer-bandwidth".to_owned(), directory]));
    let program = Program { path, measuring, out: &options.out };
    program.measure(&mut lane, "this machine's kernel", None);
    program.measure(&mut lane, "User Mode Linux", Some("--uml"));
    program.draw(&mut lane);
    Ok(sum_up(&lane, true, start))
}

/// Removes measurements of other programs, which do not belong in this report.
fn remove_old(directory: &Path) -> Result<(), String> {
    let raw = directory.join(RAW);
    match fs::remove_file(&raw) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("remove {}: {error}", raw.display())),
        _ => Ok(()),
    }
}

/// Builds the measured program and the measuring program. Returns the path of the latter.
fn build(lane: &mut Lane) -> Result<String, String> {
    // All packages, so that cargo builds shared crates with the same features as for the tests.
    const WHAT: [&str; 6] = ["--release", "--locked", "--workspace", "--bins", "--example", "traffic"];
    lane.say("building ..");
    let mut cargo = command("cargo");
    if lane.run(cargo.arg("build").args(WHAT)).0 != 0 {
        return Err("cargo could not build it; the messages are above".into());
    }
    let messages = printed_by(command("cargo").args(["build", "--quiet", "--message-format=json"]).args(WHAT))?;
    stages::executable(&messages, "bin", "podshaper-report")
}

/// The directory of Debian sid's bandwidth plugin. The report mentions if it is not available.
fn peers(lane: &mut Lane) -> Option<String> {
    let (code, said) = lane.run(&mut command("tests/report/peers"));
    (code == 0).then(|| last_line(&said))
}

impl Program<'_> {
    fn command(&self, verb: &str) -> Command {
        let mut program = command(&self.path);
        program.arg(verb);
        program
    }

    fn measure(&self, lane: &mut Lane, place: &str, argument: Option<&str>) {
        let mut measure = self.command("measure");
        measure.arg("--out").arg(self.out).args(&self.measuring).args(argument);
        run(lane, &format!("measurements, {place}"), &mut measure, "done".to_owned());
    }

    fn draw(&self, lane: &mut Lane) {
        let written = format!("{}/README.md", self.out.display());
        run(lane, "the report", self.command("draw").arg(self.out), written);
    }
}

fn run(lane: &mut Lane, name: &str, command: &mut Command, done: String) {
    let start = Instant::now();
    let outcome = match lane.run(command) {
        (0, _) => Outcome::Passed(done),
        (code, _) => Outcome::Failed(format!("exit status {code}, the messages are above")),
    };
    lane.note(name, outcome, start);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::parse(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_directory_is_taken_in_both_forms() {
        for arguments in [&["--quick", "--out", "x"][..], &["--out=x", "--quick"]] {
            let options = parse(arguments).unwrap();
            assert!(options.is_quick && options.out == Path::new("x"), "{arguments:?}");
        }
        assert!(!parse(&[]).unwrap().is_quick);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for arguments in [&["--out"][..], &["--fast"], &["x"]] {
            assert!(parse(arguments).is_err(), "{arguments:?}");
        }
    }
}
