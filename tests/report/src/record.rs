//! The record of a measurement: a line of raw.jsonl.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::harness::limiter::Limiter;
use crate::harness::{Context, Result};
use crate::machine::Machine;

/// The raw data, beside the report.
pub const FILE: &str = "raw.jsonl";

/// The parameters of a workload.
pub type Parameters = BTreeMap<String, Value>;

/// A line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The machine of the following lines.
    Machine(Box<Machine>),
    Measurement(Measurement),
}

/// One pod, or one set of pods, measured once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    pub kernel: String,
    pub workload: String,
    pub parameters: Parameters,
    pub limiter: Limiter,
    pub round: usize,
    /// The part of the CPUs' time that the host of a virtual machine took meanwhile.
    pub stolen: f64,
    /// The time of the measurement, including the preparation; lines of earlier versions have none.
    #[serde(default)]
    pub seconds: f64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Found(Found),
    /// The reason of the failure.
    Failed(String),
}

/// The results: single numbers, and series of numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    pub metrics: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub series: BTreeMap<String, Vec<f64>>,
}

impl Found {
    /// Adds a number. A value that is not finite (such as a rate of nothing) is left out.
    pub fn put(&mut self, name: &str, value: f64) {
        if value.is_finite() {
            self.metrics.insert(name.to_owned(), compact(value));
        }
    }

    pub fn put_series(&mut self, name: &str, values: impl IntoIterator<Item = f64>) {
        self.series.insert(name.to_owned(), values.into_iter().map(compact).collect());
    }
}

/// Rounds to four digits, which is more than measurements reproduce.
fn compact(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    let factor = 10f64.powi(digits.clamp(-12, 12));
    (value * factor).round() / factor
}

/// The destination of lines.
pub struct Sink(Box<dyn Write>);

impl Sink {
    pub fn open(out: &Path) -> Result<Self> {
        if out.as_os_str() == "-" {
            return Ok(Self(Box::new(io::stdout())));
        }
        Ok(Self(Box::new(append(out)?)))
    }

    pub fn put(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line).context("write a measurement")?;
        text.push(b'\n');
        self.0.write_all(&text).and_then(|()| self.0.flush()).context("write a measurement")
    }
}

/// Opens raw.jsonl in a directory, and makes the directory if it is missing.
pub fn append(directory: &Path) -> Result<File> {
    fs::create_dir_all(directory).context(format_args!("make {}", directory.display()))?;
    let path = directory.join(FILE);
    File::options().append(true).create(true).open(&path).context(format_args!("open {}", path.display()))
}

pub fn read(directory: &Path) -> Result<Vec<Line>> {
    let path = directory.join(FILE);
    let text = fs::read_to_string(&path).context(format_args!("read {}", path.display()))?;
    let line = |line| serde_json::from_str(line).context(format_args!("read {}: {line}", path.display()));
    text.lines().map(line).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_four_digits() {
        for (value, kept) in [(123_456.0, 123_500.0), (0.012_345_6, 0.012_35), (0.0, 0.0), (-98.765_4, -98.77)] {
            assert_eq!(compact(value), kept);
        }
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let mut found = Found::default();
        found.put("part", 99.9);
        found.put("nothing", f64::NAN);
        found.put_series("rates", [1.0, 2.0]);
        for outcome in [Outcome::Found(found), Outcome::Failed("why".into())] {
            let measurement = Measurement {
                kernel: "6.1".into(),
                workload: "bulk".into(),
                parameters: Parameters::from([("flows".into(), 4.into())]),
                limiter: Limiter::FqCodel,
                round: 1,
                stolen: 0.0,
                seconds: 4.7,
                outcome,
            };
            let text = serde_json::to_string(&Line::Measurement(measurement)).unwrap();
            let read: Line = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
            assert!(!text.contains("nothing"), "{text}");
        }
    }
}
