//! Parses the output of tests: the lines of Rust's test harness, which the scripts of tests/node print as well.

/// The result of a run of tests, for all its binaries together.
#[derive(Debug, Default, PartialEq)]
pub struct Results {
    /// Whether the first test was reached.
    pub started: bool,
    /// The number of binaries that printed their result; 0 if the run was aborted before the first one had ended.
    pub binaries: usize,
    pub passed: usize,
    pub failed: usize,
    /// The names of the failed tests, as far as they are known: a test that prints past the harness hides its own
    /// name.
    pub names: Vec<String>,
}

impl Results {
    pub fn of(output: &str) -> Self {
        let mut results = Self::default();
        for line in without_colours(output).lines() {
            results.started |= line.starts_with("running ") || line.starts_with("test ");
            if let Some((passed, failed)) = counts(line) {
                results.binaries += 1;
                results.passed += passed;
                results.failed += failed;
            } else if let Some(name) = failed_test(line) {
                results.names.push(name.to_owned());
            }
        }
        results
    }
}

/// The name in "test NAME ... FAILED". In tests/node the line also has the seconds that the test took.
fn failed_test(line: &str) -> Option<&str> {
    let (name, outcome) = line.strip_prefix("test ")?.split_once(" ... ")?;
    outcome.starts_with("FAILED").then_some(name)
}

/// The numbers in "test result: ok. 3 passed; 0 failed; ..".
fn counts(line: &str) -> Option<(usize, usize)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = counts.split("; ");
    let passed = counts.next()?.strip_suffix(" passed")?.parse().ok()?;
    let failed = counts.next()?.strip_suffix(" failed")?.parse().ok()?;
    Some((passed, failed))
}

/// The last line that is not empty, for a run that was aborted.
pub fn last_line(output: &str) -> String {
    let text = without_colours(output);
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing").trim().to_owned()
}

/// Removes the escape sequences that tests print in User Mode Linux: ESC [ .. letter, and ESC ( letter.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => {
                characters.next();
                characters.by_ref().find(char::is_ascii_alphabetic);
            }
            '\r' => {}
            _ => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binaries_are_added_up_and_failures_named() {
        let output = "running 3 tests\ntest a::fine ... ok\ntest a::bad ... FAILED\ntest b ... ignored, needs root\n\
            test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            running 2 tests\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1s\n";
        let expected = Results { started: true, binaries: 2, passed: 3, failed: 1, names: vec!["a::bad".into()] };
        assert_eq!(Results::of(output), expected);
    }

    #[test]
    fn a_terminals_colours_are_no_part_of_a_name_or_a_result() {
        let output = "test a::bad ... \x1b[31mFAILED\x1b(B\x1b[m\r\n\
            test result: \x1b[31mFAILED\x1b(B\x1b[m. 194 passed; 1 failed; 0 ignored; 0 measured\r\n";
        let expected = Results { started: true, binaries: 1, passed: 194, failed: 1, names: vec!["a::bad".into()] };
        assert_eq!(Results::of(output), expected);
    }

    #[test]
    fn tests_of_nodes_say_their_seconds() {
        let output = "test node 1: a pod is limited ... FAILED (12 s)\ntest a pod answers ... ok (3 s)\n    test x ... FAILED\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        assert_eq!(Results::of(output).names, ["node 1: a pod is limited"]);
    }

    #[test]
    fn what_breaks_off_has_no_result_and_a_last_line() {
        let output =
            "running 9 tests\ntest a ... ok\n\x1b[1muml: killed: the command had not ended after 5 s\x1b[m\n\n";
        assert_eq!(Results::of(output), Results { started: true, ..Results::default() });
        assert_eq!(Results::of("uml: could not install user-mode-linux\n"), Results::default());
        assert_eq!(last_line(output), "uml: killed: the command had not ended after 5 s");
        assert_eq!(last_line("\n"), "it printed nothing");
    }
}
