//! Runs stages one after the other, prints their output, and records their outcomes.

use std::io::{self, Write};
use std::process::Command;
use std::time::Instant;

use crate::output::Results;
use crate::processes;
use crate::summary::{Line, Outcome, judge, may_be_tried_again, passed_at};

/// Names of the further tries of tests that measure.
const AGAIN: [&str; 2] = ["second", "third"];

/// Stages that run one after the other.
#[derive(Default)]
pub struct Lane {
    /// The output of the stages, where another lane has the terminal.
    kept: Option<Vec<u8>>,
    pub lines: Vec<Line>,
}

/// A run of tests. Some of the tests can be repeated.
pub struct Tests<'a> {
    pub name: String,
    /// The command without the arguments for the tests.
    pub command: &'a [&'a str],
    /// The tests to run, and how.
    pub arguments: Vec<&'a str>,
}

impl Lane {
    /// A lane whose output is kept until [`Lane::append`].
    pub fn beside() -> Self {
        Self { kept: Some(Vec::new()), lines: Vec::new() }
    }

    /// Prints the kept output of another lane, and takes over its lines of the summary.
    pub fn append(&mut self, other: Self) {
        self.print(&other.kept.unwrap_or_default());
        self.lines.extend(other.lines);
    }

    fn print(&mut self, output: &[u8]) {
        match &mut self.kept {
            Some(kept) => kept.extend_from_slice(output),
            // An error is ignored: the output may have no reader.
            None => drop(io::stdout().write_all(output).and_then(|()| io::stdout().flush())),
        }
    }

    pub fn say(&mut self, text: &str) {
        self.print(format!("tests/run: {text}\n").as_bytes());
    }

    pub fn note(&mut self, name: impl Into<String>, outcome: Outcome, since: Instant) {
        let line = Line { name: name.into(), outcome, took: since.elapsed() };
        self.say(&line.to_string());
        self.lines.push(line);
    }

    /// Runs a command. Returns its exit status and its output. The exit status is 127, as in a shell, if the command
    /// cannot be started.
    pub fn run(&mut self, command: &mut Command) -> (i32, String) {
        let mut output = Vec::new();
        let status = processes::run(command, |printed| {
            self.print(printed);
            output.extend_from_slice(printed);
        });
        let text = String::from_utf8_lossy(&output).into_owned();
        match status {
            Ok(status) => (processes::code(status), text),
            Err(error) => (127, format!("{text}\ncannot run {command:?}: {error}")),
        }
    }

    /// A stage that passes if the command does.
    pub fn check(&mut self, name: &str, command: &mut Command) {
        self.say(&format!("on {name} .."));
        let start = Instant::now();
        let outcome = match self.run(command) {
            (0, _) => Outcome::Passed("nothing found".into()),
            (code, _) => Outcome::Failed(format!("exit status {code}, the messages are above")),
        };
        self.note(name, outcome, start);
    }

    /// A stage of tests. If only tests that measure have failed, these run again.
    pub fn tests(&mut self, tests: &Tests<'_>) {
        let name = &tests.name;
        self.say(&format!("on {name} .."));
        let start = Instant::now();
        let run = |lane: &mut Self, arguments: &[&str]| {
            let (program, first) = (tests.command[0], &tests.command[1..]);
            lane.run(processes::command(program).args(first).args(arguments))
        };
        let (code, output) = run(self, &tests.arguments);
        let mut outcome = judge(code, &output);
        let first = Results::of(&output);
        let mut failed = if code == 0 { None } else { may_be_tried_again(&first).map(<[String]>::to_vec) };
        for which_try in AGAIN {
            let Some(names) = failed else { break };
            self.say(&format!("on {name} once more: {} ..", names.join(" ")));
            let mut arguments = vec!["--include-ignored", "--test-threads=1", "--exact"];
            arguments.extend(names.iter().map(String::as_str));
            let (code, output) = run(self, &arguments);
            if code == 0 {
                outcome = passed_at(which_try, &first);
                break;
            }
            failed = may_be_tried_again(&Results::of(&output)).map(<[String]>::to_vec);
        }
        self.note(name.as_str(), outcome, start);
    }
}
