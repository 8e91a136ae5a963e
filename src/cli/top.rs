//! `podshaper top`: what the limits let pass, reading after reading. On a terminal a table that can be sorted, with the last minute of
//! each direction; else the lines of `list`, again and again.

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
    attachments::{self, Attachment, Direction},
    chart, list, output,
};
use crate::error::Result;

/// Readings that are kept of each direction.
const HISTORY: usize = 60;
/// Shorter ones would be all of what the command does.
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
            let mut now = attachments::read()?;
            attachments::compare(&before, &mut now);
            // A reader that has gone away ends it.
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
struct Row {
    pod: String,
    interface: String,
    direction: &'static str,
    is_dead: bool,
    limit: String,
    by: String,
    bits_per_s: f64,
    used: f64,
    history: String,
    bytes: u64,
    drops: u64,
    marks: u64,
    p99_ns: Option<u64>,
}

/// Readings, and what they were before.
#[derive(Default)]
struct Watch {
    last: Vec<Attachment>,
    history: HashMap<(PathBuf, &'static str), VecDeque<f64>>,
}

impl Watch {
    fn read(&mut self) -> Result<()> {
        let mut now = attachments::read()?;
        attachments::compare(&self.last, &mut now);
        let mut history = HashMap::new();
        for attachment in &now {
            for (name, direction) in attachment.directions() {
                let key = (attachment.directory.clone(), name);
                let mut shares = self.history.remove(&key).unwrap_or_default();
                shares.extend(direction.used());
                while shares.len() > HISTORY {
                    shares.pop_front();
                }
                history.insert(key, shares);
            }
        }
        // What has gone is forgotten.
        self.history = history;
        self.last = now;
        Ok(())
    }

    fn rows(&self, sort: Sort) -> Vec<Row> {
        let directions =
            self.last.iter().flat_map(|attachment| attachment.directions().map(move |found| (attachment, found)));
        let mut rows: Vec<Row> =
            directions.map(|(attachment, (name, direction))| self.row(attachment, name, direction)).collect();
        // Stable: equals stay in the order of their names.
        rows.sort_by(|a, b| (&a.pod, &a.interface, a.direction).cmp(&(&b.pod, &b.interface, b.direction)));
        match sort {
            Sort::Now => rows.sort_by(|a, b| b.bits_per_s.total_cmp(&a.bits_per_s)),
            Sort::Used => rows.sort_by(|a, b| b.used.total_cmp(&a.used)),
            Sort::P99 => rows.sort_by_key(|row| std::cmp::Reverse(row.p99_ns)),
            Sort::Drops => rows.sort_by_key(|row| std::cmp::Reverse(row.drops)),
            Sort::Pod => {}
        }
        rows
    }

    fn row(&self, attachment: &Attachment, name: &'static str, direction: &Direction) -> Row {
        let history = self.history.get(&(attachment.directory.clone(), name));
        let passing = direction.passing.as_ref();
        Row {
            pod: attachment.name(),
            interface: attachment.place.interface.clone(),
            direction: name,
            is_dead: !attachment.links.faults().is_empty(),
            limit: direction.rate.to_string(),
            by: direction.by.clone(),
            bits_per_s: passing.map_or(0.0, |passing| passing.bits_per_s),
            used: direction.used().unwrap_or_default(),
            history: chart::sparkline(history.into_iter().flatten().copied()),
            bytes: direction.counters.bytes,
            drops: direction.counters.drops,
            marks: direction.counters.marks,
            p99_ns: passing.and_then(|passing| chart::percentile_ns(&passing.backlog, 0.99)),
        }
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
