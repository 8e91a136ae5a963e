//! Markdown tables, aligned so that they are also readable on a terminal.

use std::io::{self, Write};

/// The first column is text, the others are numbers.
pub fn markdown(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header.get(column).map_or(0, |name| name.chars().count()), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("| {} |\n", padded.collect::<Vec<_>>().join(" | "))
    };
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(column, width)| if column == 0 { "-".repeat(*width) } else { "-".repeat(width - 1) + ":" })
        .collect();
    let mut text = line(header.to_vec()) + &line(rule.iter().map(String::as_str).collect());
    rows.iter().for_each(|row| text += &line(row.iter().map(String::as_str).collect()));
    text
}

/// Prints to stdout; a closed pipe is no error.
pub fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Bits per second as `100.1 Mbit/s`.
pub fn rate(bits_per_s: f64) -> String {
    let mega = bits_per_s / 1e6;
    match mega {
        ..9.995 => format!("{mega:.2} Mbit/s"),
        ..10_000.0 => format!("{mega:.1} Mbit/s"),
        _ => format!("{:.1} Gbit/s", mega / 1e3),
    }
}

/// A limit as it was asked for: `100 Mbit/s`.
pub fn limit(bits_per_s: u64) -> String {
    let mega = bits_per_s as f64 / 1e6;
    if mega >= 1e3 { format!("{} Gbit/s", mega / 1e3) } else { format!("{mega} Mbit/s") }
}

/// A share of the limit as `100.1 %`.
pub fn percent(bits_per_s: f64, limit: u64) -> String {
    format!("{:.1} %", bits_per_s * 100.0 / limit as f64)
}

/// Microseconds as `0.05 ms`.
pub fn millis(us: f64) -> String {
    if us < 9_950.0 { format!("{:.2} ms", us / 1e3) } else { format!("{:.1} ms", us / 1e3) }
}

/// Shown in a table where there is no value.
pub const NONE: &str = "-";

/// A rate on the command line: `100M`, `1G`, `9600`; decimal, bits per second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['k', 'M', 'G']);
    let factor = match text.strip_prefix(digits) {
        Some("") => 1,
        Some("k") => 1_000,
        Some("M") => 1_000_000,
        Some("G") => 1_000_000_000,
        _ => return Err(format!("{text:?} is not a rate such as 100M")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a rate such as 100M"))?;
    number.checked_mul(factor).ok_or_else(|| format!("{text} is more than 2^64 bit/s"))
}

/// How long to measure. The first second is reported separately, so the time must be longer.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (2.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("{text:?} is not a number of seconds from 2 to 3600")),
    }
}
