//! The line-by-line diff of an edit for a person: a single hunk, since install changes one place of a file.

/// The number of unchanged lines around the change.
const CONTEXT: usize = 3;

/// A unified diff; empty if nothing changes.
pub(super) fn unified(name: &str, before: &str, after: &str) -> String {
    if before == after {
        return String::new();
    }
    let (old, new): (Vec<&str>, Vec<&str>) =
        (before.split_inclusive('\n').collect(), after.split_inclusive('\n').collect());
    let same = |(a, b): &(&&str, &&str)| a == b;
    let head = old.iter().zip(&new).take_while(same).count();
    let tail = old[head..].iter().rev().zip(new[head..].iter().rev()).take_while(same).count();
    let from = head.saturating_sub(CONTEXT);
    let to = |lines: &[&str]| (lines.len() - tail + CONTEXT).min(lines.len());
    let (old_to, new_to) = (to(&old), to(&new));
    let mut diff = format!(
        "--- {name}\n+++ {name}\n@@ -{},{} +{},{} @@\n",
        if old_to == 0 { 0 } else { from + 1 },
        old_to - from,
        from + 1,
        new_to - from
    );
    let parts = [
        (' ', &old[from..head]),
        ('-', &old[head..old.len() - tail]),
        ('+', &new[head..new.len() - tail]),
        (' ', &new[new.len() - tail..new_to]),
    ];
    for (mark, lines) in parts {
        for line in lines {
            diff.push(mark);
            diff.push_str(line);
            if !line.ends_with('\n') {
                diff.push_str("\n\\ No newline at end of file\n");
            }
        }
    }
    diff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_shows_the_change_and_three_lines_around_it() {
        let before: String = (1..=9).map(|line| format!("{line}\n")).collect();
        for (before, after, expected) in [
            (before.as_str(), before.as_str(), ""),
            (
                &before,
                &before.replace("5\n", "five\nand\n"),
                "--- f\n+++ f\n@@ -2,7 +2,8 @@\n 2\n 3\n 4\n-5\n+five\n+and\n 6\n 7\n 8\n",
            ),
            (
                "a",
                "b",
                "--- f\n+++ f\n@@ -1,1 +1,1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n",
            ),
            ("", "b\n", "--- f\n+++ f\n@@ -0,0 +1,1 @@\n+b\n"),
        ] {
            assert_eq!(unified("f", before, after), expected);
        }
    }
}
