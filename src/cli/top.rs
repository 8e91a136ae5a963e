//! `podshaper top`: the traffic under each limit, refreshed at each reading. On a terminal it is a table that can be
//! sorted, with a history of each direction; otherwise the lines of `list` are printed again and again.

mod screen;

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IsTerminal},
    path::PathBuf,
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};

use super::{
    attachments::{self, Attachment, Measured},
    chart, list, output,
};
use crate::{direction::Direction, error::Result};

/// How many readings of each direction are kept.
const HISTORY: usize = 60;
/// After how many readings links and owners are read again.
const WHOLE_READING_EVERY: u64 = 10;
/// The shortest interval. With a shorter one the command would do nothing but read.
const SHORTEST: Duration = Duration::from_millis(100);

#[derive(Args)]
pub struct Arguments {
    /// Seconds between readings, 0.1 at least
    #[arg(short = 'n', long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// What to sort by
    #[arg(short, long, value_enum, default_value = "now")]
    sort: Sort,
    /// End after so many readings
    #[arg(short, long, value_name = "NUMBER")]
    count: Option<u64>,
    /// Print lines, on a terminal too
    #[arg(long)]
    plain: bool,
}

/// By what rows are sorted; the largest is on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sort {
    /// What passes now
    Now,
    /// What part of the limit that is
    Used,
    /// The backlog that 99 % of the packets stay below
    P99,
    /// What was dropped
    Drops,
    /// The pod's name
    Pod,
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Now => Self::Used,
            Self::Used => Self::P99,
            Self::P99 => Self::Drops,
            Self::Drops => Self::Pod,
            Self::Pod => Self::Now,
        }
    }
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let is_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
        if is_terminal && !self.plain { screen::run(&self) } else { self.run_plain() }
    }

    fn run_plain(&self) -> Result<()> {
        let mut before = attachments::read()?;
        let mut left = self.count;
        while left != Some(0) {
            thread::sleep(self.interval);
            let mut now = attachments::read_after(&before)?;
            attachments::compare(&before, &mut now);
            // A closed pipe ends the command.
            if !output::print_to_reader(&(list::table(&now).text() + "\n"))? {
                return Ok(());
            }
            before = now;
            left = left.map(|left| left - 1);
        }
        Ok(())
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    list::seconds(text)
        .and_then(|interval| if interval < SHORTEST { Err("less than 0.1 seconds".to_owned()) } else { Ok(interval) })
}

/// One direction of an attachment, as the screen shows it.
struct Row<'a> {
    attachment: &'a Attachment,
    direction: Direction,
    measured: &'a Measured,
    history: Option<&'a VecDeque<f64>>,
}

impl Row<'_> {
    fn bits_per_s(&self) -> f64 {
        self.measured.passing.as_ref().map_or(0.0, |passing| passing.bits_per_s)
    }

    fn used(&self) -> f64 {
        self.measured.used().unwrap_or_default()
    }

    /// The 99th percentile of the last interval.
    fn p99_ns(&self) -> Option<u64> {
        let passing = self.measured.passing.as_ref();
        passing.and_then(|passing| chart::percentile_ns(&passing.backlog, 0.99))
    }
}

/// The readings, with the history.
#[derive(Default)]
struct Watch {
    last: Vec<Attachment>,
    readings: u64,
    history: HashMap<PathBuf, [VecDeque<f64>; 2]>,
}

impl Watch {
    fn read(&mut self) -> Result<()> {
        // Links rarely die.
        let is_whole = self.readings.is_multiple_of(WHOLE_READING_EVERY);
        let mut now = if is_whole { attachments::read()? } else { attachments::read_after(&self.last)? };
        self.readings += 1;
        attachments::compare(&self.last, &mut now);
        let mut before = std::mem::take(&mut self.history);
        // The history of removed attachments is dropped.
        for attachment in &now {
            let mut history = before.remove(&attachment.directory).unwrap_or_default();
            for (shares, measured) in history.iter_mut().zip([&attachment.egress, &attachment.ingress]) {
                shares.extend(measured.as_ref().and_then(Measured::used));
                if shares.len() > HISTORY {
                    shares.pop_front();
                }
            }
            self.history.insert(attachment.directory.clone(), history);
        }
        self.last = now;
        Ok(())
    }

    fn rows(&self, sort: Sort) -> Vec<Row<'_>> {
        let rows = self.last.iter().flat_map(|attachment| {
            let histories = self.history.get(&attachment.directory);
            attachment.directions().map(move |(direction, measured)| Row {
                attachment,
                direction,
                measured,
                history: histories.and_then(|both| both.get(direction.index() as usize)),
            })
        });
        let mut rows: Vec<Row<'_>> = rows.collect();
        // The sort is stable: equal rows keep the order of their pins.
        match sort {
            Sort::Now => rows.sort_by(|a, b| b.bits_per_s().total_cmp(&a.bits_per_s())),
            Sort::Used => rows.sort_by(|a, b| b.used().total_cmp(&a.used())),
            Sort::P99 => rows.sort_by_cached_key(|row| std::cmp::Reverse(row.p99_ns())),
            Sort::Drops => rows.sort_by_key(|row| std::cmp::Reverse(row.measured.counters.drops)),
            Sort::Pod => rows.sort_by_cached_key(|row| row.attachment.name()),
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_comes_round() {
        let mut sort = Sort::Now;
        for _ in Sort::value_variants() {
            sort = sort.next();
        }
        assert_eq!(sort, Sort::Now);
    }

    #[test]
    fn intervals_are_bounded() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "0.05", "-1", "nan", "inf", "3600", "x"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
