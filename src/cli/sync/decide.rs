//! Decides what to do for one interface of one pod. A pure comparison of the limits that are asked for now with those
//! in force.

use crate::{
    direction::Direction,
    owner::{Amount, Asked},
    request::{Limit, Limits},
};

/// An attachment as it was found.
#[derive(Clone, Debug)]
pub struct InForce {
    /// The limits; `None` if they cannot be read because they are of another layout.
    pub limits: Option<Limits>,
    /// What was asked for when the limits last followed it; `None` in the record of an earlier version.
    pub asked: Option<Asked>,
    /// Whether a person has changed the limits since.
    pub by_hand: bool,
    /// Whether the attachment was made for this sandbox.
    pub is_of_sandbox: bool,
    /// Whether all programs are attached.
    pub is_whole: bool,
}

/// The action for one interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Keep,
    /// Make an attachment, or replace the present one.
    Attach(Limits),
    /// Change the limits of the present attachment.
    Change(Limits),
    /// Remove the attachment.
    Remove,
}

/// Compares what is asked for with what is in force.
pub fn decide(asked: &Limits, found: Option<&InForce>) -> Step {
    let Some(found) = found.filter(|found| found.is_of_sandbox) else {
        // The limits of an earlier sandbox of the pod, also those set by hand, ended with that sandbox.
        return match (asked.is_empty(), found) {
            (true, None) => Step::Keep,
            (true, Some(_)) => Step::Remove,
            (false, _) => Step::Attach(*asked),
        };
    };
    let now = found.limits.unwrap_or_default();
    let wanted = Limits {
        egress: wanted(Direction::Egress, asked, &now, found),
        ingress: wanted(Direction::Ingress, asked, &now, found),
    };
    let has = |limits: &Limits| Direction::BOTH.map(|direction| limits.of(direction).is_some());
    if wanted.is_empty() {
        return Step::Remove;
    }
    if !found.is_whole || found.limits.is_none() || has(&wanted) != has(&now) {
        return Step::Attach(wanted);
    }
    // Also a change if only the record is outdated: a limit that is set by hand later is compared with the record.
    let is_recorded = found.asked.is_none_or(|recorded| recorded == Asked::of(asked));
    if Asked::of(&wanted) == Asked::of(&now) && is_recorded { Step::Keep } else { Step::Change(wanted) }
}

/// The limit that a direction is to have. A limit that was set by hand stays as long as the same limit is asked for as
/// before.
fn wanted(direction: Direction, asked: &Limits, now: &Limits, found: &InForce) -> Option<Limit> {
    let (asked, now) = (asked.of(direction).copied(), now.of(direction).copied());
    let is_the_same = match found.asked {
        Some(recorded) => recorded.in_direction(direction) == asked.map(Amount::of),
        // An earlier version recorded only that the limits were changed.
        None => found.by_hand,
    };
    if is_the_same && found.by_hand { now.or(asked) } else { asked }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{request::Source, units::Rate};

    fn limit(mbit: u64) -> Option<Limit> {
        (mbit > 0).then(|| Limit::of(Rate::bits_per_s(mbit * 1_000_000).unwrap(), Source::Annotation))
    }

    /// Egress and ingress in Mbit/s, 0 for none.
    fn limits([egress, ingress]: [u64; 2]) -> Limits {
        Limits { egress: limit(egress), ingress: limit(ingress) }
    }

    fn in_force(now: [u64; 2], asked: [u64; 2]) -> InForce {
        InForce {
            limits: Some(limits(now)),
            asked: Some(Asked::of(&limits(asked))),
            by_hand: now != asked,
            is_of_sandbox: true,
            is_whole: true,
        }
    }

    fn attach(wanted: [u64; 2]) -> Step {
        Step::Attach(limits(wanted))
    }

    fn change(wanted: [u64; 2]) -> Step {
        Step::Change(limits(wanted))
    }

    #[test]
    fn a_pod_that_has_nothing_gets_what_it_asks_for() {
        assert_eq!(decide(&limits([0, 0]), None), Step::Keep);
        assert_eq!(decide(&limits([10, 0]), None), attach([10, 0]));
        assert_eq!(decide(&limits([0, 20]), None), attach([0, 20]));
    }

    #[test]
    fn what_is_in_force_follows_what_is_asked_for() {
        for (asked, now, step) in [
            ([10, 0], [10, 0], Step::Keep),
            ([10, 20], [10, 20], Step::Keep),
            ([50, 0], [10, 0], change([50, 0])),
            ([10, 50], [10, 20], change([10, 50])),
            // One direction more needs other programs, and so does one direction less.
            ([10, 20], [10, 0], attach([10, 20])),
            ([10, 0], [10, 20], attach([10, 0])),
            ([0, 20], [10, 20], attach([0, 20])),
            ([0, 0], [10, 20], Step::Remove),
        ] {
            assert_eq!(decide(&limits(asked), Some(&in_force(now, now))), step, "{asked:?} {now:?}");
        }
    }

    #[test]
    fn what_was_set_by_hand_stays_until_something_else_is_asked_for() {
        for (asked, now, recorded, step) in [
            ([10, 0], [50, 0], [10, 0], Step::Keep),
            ([10, 20], [50, 20], [10, 20], Step::Keep),
            ([20, 0], [50, 0], [10, 0], change([20, 0])),
            // Each direction is decided separately.
            ([10, 30], [50, 20], [10, 20], change([50, 30])),
            ([10, 20], [50, 0], [10, 0], attach([50, 20])),
            ([10, 0], [50, 60], [10, 20], attach([50, 0])),
            ([0, 0], [50, 0], [10, 0], Step::Remove),
            // The limit that was set by hand is now asked for: from here on it does not count as set by hand.
            ([50, 0], [50, 0], [10, 0], change([50, 0])),
        ] {
            let found = in_force(now, recorded);
            let found = InForce { by_hand: true, ..found };
            assert_eq!(decide(&limits(asked), Some(&found)), step, "{asked:?} {now:?} {recorded:?}");
        }
    }

    #[test]
    fn a_record_without_what_was_asked_for_says_only_whether_a_hand_was_there() {
        let found = |by_hand| InForce { asked: None, by_hand, ..in_force([50, 0], [50, 0]) };
        assert_eq!(decide(&limits([10, 0]), Some(&found(true))), Step::Keep);
        assert_eq!(decide(&limits([10, 0]), Some(&found(false))), change([10, 0]));
        assert_eq!(decide(&limits([50, 0]), Some(&found(false))), Step::Keep);
    }

    #[test]
    fn another_sandbox_gets_what_is_asked_for_and_nothing_that_was_set() {
        let found = InForce { is_of_sandbox: false, by_hand: true, ..in_force([50, 0], [10, 0]) };
        assert_eq!(decide(&limits([10, 0]), Some(&found)), attach([10, 0]));
        assert_eq!(decide(&limits([0, 0]), Some(&found)), Step::Remove);
    }

    #[test]
    fn what_is_not_whole_is_made_anew_with_what_was_set() {
        let whole = in_force([50, 0], [10, 0]);
        let broken = InForce { is_whole: false, ..whole.clone() };
        assert_eq!(decide(&limits([10, 0]), Some(&broken)), attach([50, 0]));
        let of_another_layout = InForce { limits: None, ..whole };
        assert_eq!(decide(&limits([10, 0]), Some(&of_another_layout)), attach([10, 0]));
        assert_eq!(decide(&limits([0, 0]), Some(&of_another_layout)), Step::Remove);
    }

    #[test]
    fn another_burst_is_another_limit() {
        let mut asked = limits([10, 0]);
        asked.egress = asked.egress.map(|limit| Limit { burst: "400k".parse().unwrap(), ..limit });
        let step = decide(&asked, Some(&in_force([10, 0], [10, 0])));
        assert_eq!(step, Step::Change(asked));
    }
}
