//! `podshaper set POD`: another limit for a running pod. It is in the pins alone: the pod's next sandbox has the limit that its
//! annotation asks for.

use std::path::Path;

use clap::Args;

use super::{
    attachments::{self, Attachment},
    output,
    select::Selector,
};
use crate::{
    error::{Code, Error, Result},
    ingress, packets,
    pins::{BPFFS, Pins},
    request::{Limit, Limits, Source},
    shaper::Pinned,
    units::{Burst, Rate},
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    pod: Selector,
    #[command(flatten)]
    asked: Asked,
    /// Go beyond the administrator's max
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
#[group(id = "change", required = true, multiple = true)]
struct Asked {
    /// Limit of what the pod sends, in bits per second: 10M, 1.5G, 512Ki
    #[arg(long, value_name = "RATE")]
    egress: Option<Rate>,
    /// Limit of what it receives
    #[arg(long, value_name = "RATE")]
    ingress: Option<Rate>,
    /// Burst, in bits, of the directions named, or of both [default: that of the new rate]
    #[arg(long, value_name = "BITS")]
    burst: Option<Burst>,
}

/// A direction before and after.
struct Change {
    direction: &'static str,
    before: Limit,
    after: Limit,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let place = self.pod.select_one(attachments::read()?)?.place;
        // Between the reading and the lock a DEL or an ADD may have come.
        let gone = || {
            let text = format!("change the limits of {} of pod {}: it is gone", place.interface, place.pod);
            Error::new(Code::Mismatch, text)
        };
        let pins = Pins::existing(Path::new(BPFFS)).ok_or_else(gone)?.lock()?;
        let directory = pins.find(&place).ok_or_else(gone)?;
        let found = Attachment::read(place.clone(), directory);
        let changes = self.changes(&found)?;
        let after = |name| changes.iter().find(|change| change.direction == name).map(|change| change.after);
        let limits = Limits { egress: after("egress"), ingress: after("ingress") };
        if let Some(limit) = &limits.ingress {
            ingress::change(&found.owner, limit)?;
        }
        if let Some(limit) = &limits.egress {
            ingress::change_egress(&found.owner, limit)?;
            // Without it the rate holds, in larger bursts.
            if let Err(error) = packets::change(&found.owner, limit.rate) {
                log::warn!("TCP may send larger packets than this limit is good for: {error}");
            }
        }
        Pinned::at(&found.directory).change(&attachments::settings(&found.owner, limits), &found.owner)?;
        drop(pins);
        if !found.links.faults().is_empty() {
            log::warn!("not all of its programs are attached ({}): podshaper show says why", found.links.text());
        }
        let lines = changes.iter().map(|change| change.text(&found));
        output::print(&lines.collect::<String>())
    }

    fn changes(&self, found: &Attachment) -> Result<Vec<Change>> {
        if let Some(problem) = &found.problem {
            return Err(Error::new(Code::Mismatch, format!("change the limits of {}: {problem}", found.name())));
        }
        let Asked { egress, ingress, burst } = self.asked;
        let Limits { egress: egress_now, ingress: ingress_now } = found.limits();
        let both = [
            ("egress", egress, egress_now, found.owner.max_egress),
            ("ingress", ingress, ingress_now, found.owner.max_ingress),
        ];
        let names_a_rate = egress.is_some() || ingress.is_some();
        let mut changes = Vec::new();
        for (direction, rate, now, max) in both {
            // A burst alone is for what is limited.
            if rate.is_none() && (names_a_rate || now.is_none()) {
                continue;
            }
            let before = now.ok_or_else(|| not_limited(found, direction))?;
            let limit = Limit::of(rate.unwrap_or(before.rate), Source::Operator);
            let after = Limit { burst: burst.unwrap_or(limit.burst), ..limit };
            self.check_max(found, direction, after.rate, max)?;
            changes.push(Change { direction, before, after });
        }
        Ok(changes)
    }

    fn check_max(&self, found: &Attachment, direction: &str, rate: Rate, max: Option<u64>) -> Result<()> {
        match max.and_then(|max| Rate::bits_per_s(max).ok()).filter(|max| rate > *max && !self.force) {
            None => Ok(()),
            Some(max) => {
                let text = format!(
                    "set {direction} of {} to {rate}: the configuration's \"max\" was {max} when the pod was made; --force goes \
                     beyond it",
                    found.name()
                );
                Err(Error::new(Code::Config, text))
            }
        }
    }
}

impl Change {
    fn text(&self, found: &Attachment) -> String {
        let Self { direction, before, after } = self;
        let show = |limit: &Limit| format!("{}bit/s, burst {}bit", limit.rate, limit.burst);
        let (name, interface) = (found.name(), &found.place.interface);
        format!("{name} {interface}: {direction} {} (was {})\n", show(after), show(before))
    }
}

/// Programs are attached for what is limited at ADD, and connections are paced from their beginning or not at all.
fn not_limited(found: &Attachment, direction: &str) -> Error {
    let owner = &found.owner;
    let remedy = if owner.network.is_empty() {
        format!("attach it again with --{direction}")
    } else {
        format!("annotate it with kubernetes.io/{direction}-bandwidth and let it be made anew")
    };
    let text = format!(
        "set {direction} of {}: it had no such limit when it was made, so none of its connections is paced and nothing is attached \
         that could hold it; {remedy}",
        found.name()
    );
    Error::new(Code::Mismatch, text)
}
