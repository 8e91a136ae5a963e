//! The outcome of each stage, and the summary.

use std::fmt;
use std::time::Duration;

use crate::output::{Results, last_line};
use crate::plan;

/// The exit status of the scripts of tests/lab if there is no kernel.
const NO_KERNEL: i32 = 125;

/// At most this many failures are tried again: more failures are not caused by a disturbance.
const FEW: usize = 8;

#[derive(Debug, PartialEq)]
pub enum Outcome {
    Passed(String),
    Failed(String),
    /// The requirements of the stage are not available here.
    NotRun(String),
}

/// A line of the summary.
#[derive(Debug)]
pub struct Line {
    pub name: String,
    pub outcome: Outcome,
    pub took: Duration,
}

impl fmt::Display for Line {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outcome = match &self.outcome {
            Outcome::Passed(said) => said.clone(),
            Outcome::Failed(said) => format!("FAILED: {said}"),
            Outcome::NotRun(why) => format!("NOT RUN: {why}"),
        };
        write!(formatter, "{}: {outcome} ({} s)", self.name, self.took.as_secs())
    }
}

/// Whether the whole run counts as passed. A run of everything has not passed if a stage could not be run.
pub fn has_passed(lines: &[Line], everything: bool) -> bool {
    lines.iter().all(|line| match line.outcome {
        Outcome::Passed(_) => true,
        Outcome::Failed(_) => false,
        Outcome::NotRun(_) => !everything,
    })
}

/// The tests of a failed run that may be tried again: all failed tests, if they are all known, all measure a time or
/// a rate, and are few. Other tests must pass at the first try.
pub fn may_be_tried_again(results: &Results) -> Option<&[String]> {
    let known = results.failed == results.names.len();
    let few = (1..=FEW).contains(&results.failed);
    (known && few && results.names.iter().all(|name| plan::measures(name))).then_some(&results.names)
}

/// The outcome of a run of tests in which some failed at first and passed at a later try. `first` has the results of
/// the first try.
pub fn passed_at(which_try: &str, first: &Results) -> Outcome {
    let passed = first.passed + first.failed;
    Outcome::Passed(format!("{passed} passed, 0 failed (at the {which_try} try: {})", first.names.join(", ")))
}

/// The outcome of a run of tests, from its exit status and its output.
pub fn judge(code: i32, output: &str) -> Outcome {
    let results = Results::of(output);
    let counts = match results.names.as_slice() {
        [] => format!("{} passed, {} failed", results.passed, results.failed),
        names => format!("{} passed, {} failed: {}", results.passed, results.failed, names.join(", ")),
    };
    match code {
        0 if results.passed == 0 => Outcome::Failed("not one test ran".into()),
        0 => Outcome::Passed(counts),
        // A failed test, as reported by Rust's harness, cargo and tests/node.
        1 | 101 if results.binaries > 0 => Outcome::Failed(counts),
        NO_KERNEL if !results.started => Outcome::NotRun(last_line(output)),
        _ => Outcome::Failed(format!("it broke off, exit status {code}: {}", last_line(output))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: &str = "test result: ok. 7 passed; 0 failed; 0 ignored\n";
    const FAILED: &str = "test chain::rate::x ... FAILED\ntest result: FAILED. 6 passed; 1 failed; 0 ignored\n";

    fn failures(names: &[&str]) -> Results {
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        Results { started: true, binaries: 1, passed: 3, failed: names.len(), names }
    }

    #[test]
    fn only_tests_that_measure_are_tried_again() {
        let rate = "chain::rate::ten_mbit_are_ten_mbit";
        assert_eq!(may_be_tried_again(&failures(&[rate])), Some(&[rate.to_owned()][..]));
        assert_eq!(may_be_tried_again(&failures(&["kernel::attach::an_add_pins_and_a_del_removes"])), None);
        assert_eq!(
            may_be_tried_again(&failures(&[rate, "kernel::attach::x"])),
            None,
            "one that does not measure fails all"
        );
        assert_eq!(may_be_tried_again(&failures(&[])), None);
        assert_eq!(may_be_tried_again(&failures(&[rate; FEW + 1])), None);
        let unnamed = Results { failed: 2, ..failures(&[rate]) };
        assert_eq!(may_be_tried_again(&unnamed), None, "nobody knows what the other one was");
    }

    #[test]
    fn a_run_is_judged_by_its_status_and_its_results() {
        assert_eq!(judge(0, PASSED), Outcome::Passed("7 passed, 0 failed".into()));
        assert_eq!(judge(101, FAILED), Outcome::Failed("6 passed, 1 failed: chain::rate::x".into()));
        let late = format!("{FAILED}uml: killed\n");
        assert_eq!(judge(124, &late), Outcome::Failed("it broke off, exit status 124: uml: killed".into()));
        assert_eq!(
            judge(101, "error: could not compile\n"),
            Outcome::Failed("it broke off, exit status 101: error: could not compile".into())
        );
        let no_kernel = "uml: could not install user-mode-linux\n";
        assert_eq!(judge(125, no_kernel), Outcome::NotRun(no_kernel.trim().into()));
        let died = "running 9 tests\numl: the kernel died\n";
        assert_eq!(judge(125, died), Outcome::Failed("it broke off, exit status 125: uml: the kernel died".into()));
        assert_eq!(judge(0, ""), Outcome::Failed("not one test ran".into()), "a filter that matches nothing");
    }

    #[test]
    fn what_passed_at_a_later_try_says_so() {
        let expected = Outcome::Passed("7 passed, 0 failed (at the second try: chain::rate::x)".into());
        assert_eq!(passed_at("second", &Results::of(FAILED)), expected);
    }

    #[test]
    fn what_could_not_be_run_is_no_failure_unless_everything_was_asked_for() {
        let line = |outcome| Line { name: "x".into(), outcome, took: Duration::from_secs(3) };
        let lines = [line(Outcome::Passed("1 passed, 0 failed".into())), line(Outcome::NotRun("no kernel".into()))];
        assert!(has_passed(&lines, false) && !has_passed(&lines, true));
        assert_eq!(lines[1].to_string(), "x: NOT RUN: no kernel (3 s)");
        assert!(!has_passed(&[line(Outcome::Failed("1 failed".into()))], false));
    }
}
