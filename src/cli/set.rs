//! `podshaper set POD`: changes the limit of a running pod. The new limit is only in the pins: the pod's next sandbox
//! has the limit of its annotation again.

use clap::Args;

use super::{
    attachments::{self, Attachment},
    output,
    select::Selector,
};
use crate::{
    attachment::{self, Change},
    direction::Direction,
    error::{Code, Error, Result},
    request::{Limit, Limits, Source},
    units::{Burst, Rate},
};

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    pod: Selector,
    #[command(flatten)]
    asked: ChangeArguments,
    /// Go beyond the administrator's max
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
#[group(id = "change", required = true, multiple = true)]
struct ChangeArguments {
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

/// The limits of a direction before and after the change.
struct Changed {
    direction: Direction,
    before: Limit,
    after: Limit,
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let place = self.pod.select_one(attachments::read()?)?.place;
        let (mut lines, mut links) = (String::new(), None);
        attachment::change(&place, |present| {
            let found = Attachment::read(place.clone(), present.directory.clone());
            let changes = self.changes(&found)?;
            lines = changes.iter().map(|change| change.text(&found)).collect();
            links = Some(found.links);
            let after =
                |direction| changes.iter().find(|change| change.direction == direction).map(|change| change.after);
            let limits = Limits { egress: after(Direction::Egress), ingress: after(Direction::Ingress) };
            Ok(Change { limits, owner: present.owner.by_hand(&present.limits.unwrap_or_default()) })
        })?;
        if let Some(links) = links.filter(|links| !links.faults().is_empty()) {
            log::warn!("not all of its programs are attached ({}): podshaper show says why", links.text());
        }
        output::print(&lines)
    }

    fn changes(&self, found: &Attachment) -> Result<Vec<Changed>> {
        if let Some(problem) = &found.problem {
            return Err(Error::new(Code::Mismatch, format!("change the limits of {}: {problem}", found.name())));
        }
        let ChangeArguments { egress, ingress, burst } = self.asked;
        let limits = found.limits();
        let names_a_rate = egress.is_some() || ingress.is_some();
        let mut changes = Vec::new();
        for (direction, rate) in [(Direction::Egress, egress), (Direction::Ingress, ingress)] {
            let now = limits.of(direction).copied();
            // A burst without a rate applies only to directions that are limited.
            if rate.is_none() && (names_a_rate || now.is_none()) {
                continue;
            }
            let before = now.ok_or_else(|| not_limited(found, direction))?;
            let limit = Limit::of(rate.unwrap_or(before.rate), Source::Operator);
            let after = Limit { burst: burst.unwrap_or(limit.burst), ..limit };
            self.check_max(found, direction, after.rate)?;
            changes.push(Changed { direction, before, after });
        }
        Ok(changes)
    }

    fn check_max(&self, found: &Attachment, direction: Direction, rate: Rate) -> Result<()> {
        match found.owner.max(direction).filter(|max| rate > *max && !self.force) {
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

impl Changed {
    fn text(&self, found: &Attachment) -> String {
        let Self { direction, before, after } = self;
        let show = |limit: &Limit| format!("{}bit/s, burst {}bit", limit.rate, limit.burst);
        let (name, interface) = (found.name(), &found.place.interface);
        format!("{name} {interface}: {direction} {} (was {})\n", show(after), show(before))
    }
}

/// The error for a direction without a limit. Programs are attached only for directions that are limited at ADD, and a
/// connection is paced from its beginning or never.
fn not_limited(found: &Attachment, direction: Direction) -> Error {
    let owner = &found.owner;
    let remedy = if owner.network.is_empty() {
        format!("attach it again with --{direction}")
    } else {
        format!(
            "annotate it with {}: `podshaper sync` follows (with a kubeconfig), and paces new connections",
            direction.annotation()
        )
    };
    let text = format!(
        "set {direction} of {}: it had no such limit when it was made, so none of its connections is paced and nothing is attached \
         that could hold it; {remedy}",
        found.name()
    );
    Error::new(Code::Mismatch, text)
}
