//! `podshaper show POD`: everything that is known about the attachments of one pod.

use std::time::Duration;

use clap::Args;
use podshaper_abi::{BACKLOG_BUCKETS, Counters, Others, backlog_bucket_end_ns};

use super::{
    attachments::{self, Attachment, Measured, OtherPaths},
    chart, list,
    output::Output,
    select::Selector,
};
use crate::{direction::Direction, error::Result, owner::Owner, units::Rate};

const BAR_WIDTH: usize = 40;

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    pod: Selector,
    /// For how many seconds to look at what passes; 0: only what has passed so far, at once
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = list::seconds)]
    sample: Duration,
    #[command(flatten)]
    output: Output,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        // A wrong name is reported before the wait.
        let before = self.pod.select(attachments::read()?)?;
        let mut found = before;
        if !self.sample.is_zero() {
            let before = std::mem::take(&mut found);
            std::thread::sleep(self.sample);
            found = self.pod.select(attachments::read()?)?;
            attachments::compare(&before, &mut found);
        }
        attachments::look_whether_held(&mut found);
        self.output.print(&found, || found.iter().map(text).collect::<Vec<_>>().join("\n"))
    }
}

fn text(attachment: &Attachment) -> String {
    let Owner { container_id, network, interface, cgroup, changed, .. } = &attachment.owner;
    let mut text = String::new();
    let mut line = |what: &str, value: &str| {
        if !value.is_empty() {
            text += &format!("{what:<12}{value}\n");
        }
    };
    line("Name", &attachment.name());
    line("Interface", &attachment.place.interface);
    line("Key", &attachment.place.pod);
    line("Container", container_id);
    line("Network", network);
    line("Netns", interface.netns.as_deref().unwrap_or_default());
    line("Cgroup", cgroup);
    line("Pins", &attachment.directory.display().to_string());
    line("Age", &attachment.age().map(chart::age).unwrap_or_default());
    line("Links", &attachment.links.text());
    attachment.links.faults().iter().for_each(|fault| line("", fault));
    line("Not held", attachment.not_held.as_deref().unwrap_or_default());
    line("Problem", attachment.problem.as_deref().unwrap_or_default());
    line("Limits", if *changed { "changed by podshaper set; a new sandbox has the pod's own again" } else { "" });
    for (direction, measured) in attachment.directions() {
        text += &format!("\n{}", direction_text(direction, measured, attachment.owner.max(direction)));
    }
    text
}

fn direction_text(direction: Direction, measured: &Measured, max: Option<Rate>) -> String {
    let Measured { rate, burst, by, counters, others, passing } = measured;
    let Counters { bytes, packets, drops, marks, max_backlog_ns, backlog } = counters;
    let max = max.map(|max| format!(", at most {max}")).unwrap_or_default();
    let mut text = format!("{direction:<12}{rate}bit/s, burst {burst}bit, by {by}{max}\n");
    if let (Some(passing), Some(used)) = (passing, measured.used()) {
        let bar = chart::bar(used, BAR_WIDTH);
        text += &format!("  now       {}bit/s {bar} {:.0}%\n", chart::short(passing.bits_per_s), used * 100.0);
    }
    text += &format!("  passed    {bytes} bytes in {packets} packets, {marks} of them marked; {drops} dropped\n");
    text += &match others {
        OtherPaths::Held(Others { bytes, packets, drops, .. }) => format!(
            "  others    {bytes} bytes in {packets} packets by other paths than the pod's sockets; {drops} dropped\n"
        ),
        OtherPaths::ByTbf => {
            "  others    what passes by other paths than the pod's sockets is held by tbf, too\n".to_owned()
        }
        OtherPaths::Free | OtherPaths::Lost(_) => {
            "  others    what passes by other paths than the pod's sockets is not held\n".to_owned()
        }
        OtherPaths::OfNone => String::new(),
    };
    text += &format!("  backlog   {} at most; packets by what they found:\n", chart::time(*max_backlog_ns));
    text + &histogram(backlog)
}

/// A line for each bucket, from the first to the last that has a packet.
fn histogram(backlog: &[u64; BACKLOG_BUCKETS]) -> String {
    let most = backlog.iter().copied().max().unwrap_or_default();
    let first = backlog.iter().position(|count| *count > 0);
    let last = backlog.iter().rposition(|count| *count > 0);
    let (Some(first), Some(last)) = (first, last) else { return "            none yet\n".to_owned() };
    let line = |bucket: usize| {
        let end = backlog_bucket_end_ns(bucket).map_or("longer".to_owned(), |ns| format!("<{}", chart::time(ns)));
        let count = backlog.get(bucket).copied().unwrap_or_default();
        format!("{end:>12}{count:>12} {}\n", chart::bar(count as f64 / most as f64, BAR_WIDTH)).replace(" \n", "\n")
    };
    (first..=last).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_histogram_begins_and_ends_where_there_are_packets() {
        let mut backlog = [0; BACKLOG_BUCKETS];
        assert_eq!(histogram(&backlog), "            none yet\n");
        backlog[2] = 50;
        backlog[4] = 100;
        let drawn: Vec<String> = histogram(&backlog).lines().map(|line| line.trim_end().to_owned()).collect();
        let half = "█".repeat(BAR_WIDTH / 2);
        assert_eq!(
            drawn,
            [
                format!("      <4.1us          50 {half}"),
                "      <8.2us           0".to_owned(),
                format!("       <16us         100 {half}{half}"),
            ]
        );
    }
}
