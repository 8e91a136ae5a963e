//! `podshaper list`: every attachment, a line for each direction.

use std::time::Duration;

use clap::Args;

use super::{
    attachments::{self, Attachment, Measured, OtherPaths},
    chart,
    output::Output,
    table::{Left, NOTHING, Right, Table},
};
use crate::error::Result;

const BAR_WIDTH: usize = 8;

#[derive(Args)]
pub struct Arguments {
    /// For how many seconds to look at what passes; 0: only what has passed so far, at once
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    sample: Duration,
    #[command(flatten)]
    output: Output,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let mut found = attachments::read_for(self.sample)?;
        attachments::look_whether_held(&mut found);
        self.output.print(&found, || table(&found).text() + &not_held(&found))
    }
}

/// The table that `list` prints, and `top` without a terminal.
pub fn table(found: &[Attachment]) -> Table {
    let mut table = Table::new(&[
        ("POD", Left),
        ("INTERFACE", Left),
        ("DIRECTION", Left),
        ("LIMIT", Right),
        ("BURST", Right),
        ("BY", Left),
        ("NOW", Right),
        ("USED", Left),
        ("BYTES", Right),
        ("OTHERS", Right),
        ("DROPS", Right),
        ("MARKS", Right),
        ("P99", Right),
        ("AGE", Right),
        ("LINKS", Left),
        ("CGROUP", Left),
    ]);
    for attachment in found {
        for (direction, measured) in attachment.directions() {
            table.row(row(attachment, direction.name(), cells(measured)));
        }
        // An attachment that cannot be read still gets a line.
        if attachment.directions().next().is_none() {
            table.row(row(attachment, NOTHING, std::array::from_fn(|_| NOTHING.to_owned())));
        }
    }
    table
}

/// A line for each attachment that is not in force as it was made, with the reason.
fn not_held(found: &[Attachment]) -> String {
    let line = |found: &Attachment| {
        let (name, interface) = (found.name(), &found.place.interface);
        Some(format!("{name} {interface}: not held: {}\n", found.not_held.as_ref()?))
    };
    found.iter().filter_map(line).collect()
}

fn row(attachment: &Attachment, direction: &str, numbers: [String; 10]) -> Vec<String> {
    let age = attachment.age().map_or(NOTHING.to_owned(), chart::age);
    let cgroup = attachments::below_mount(&attachment.owner.cgroup);
    let mut cells = vec![attachment.name(), attachment.place.interface.clone(), direction.to_owned()];
    cells.extend(numbers);
    let links = if attachment.problem.is_some() {
        format!("{}, unread", attachment.links.text())
    } else {
        attachment.links.text()
    };
    cells.extend([age, links, cgroup]);
    cells
}

fn cells(measured: &Measured) -> [String; 10] {
    let Measured { rate, burst, by, counters, others, passing } = measured;
    let now = passing.as_ref().map_or(NOTHING.to_owned(), |passing| chart::short(passing.bits_per_s));
    let used = measured
        .used()
        .map_or(NOTHING.to_owned(), |used| format!("{} {:>3.0}%", chart::bar(used, BAR_WIDTH), used * 100.0));
    let p99 =
        chart::percentile_ns(&counters.backlog, 0.99).map_or(NOTHING.to_owned(), |ns| format!("<{}", chart::time(ns)));
    [
        rate.to_string(),
        burst.to_string(),
        by.clone(),
        now,
        used,
        chart::short(counters.bytes as f64),
        other_paths(others),
        counters.drops.to_string(),
        counters.marks.to_string(),
        p99,
    ]
}

/// The packets that did not pass the pod's sockets: their number, or that they are not counted or not limited.
pub fn other_paths(others: &OtherPaths) -> String {
    match others {
        OtherPaths::Held(others) => chart::short(others.bytes as f64),
        OtherPaths::ByTbf => "tbf".to_owned(),
        OtherPaths::Free | OtherPaths::Lost(_) => "not held".to_owned(),
        OtherPaths::OfNone => NOTHING.to_owned(),
    }
}

/// A number of seconds, as an argument.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|seconds| seconds.as_secs() < 3600).ok_or_else(|| "not a number of seconds below 3600".to_owned())
}
