//! When requests for connections (SYN) enter a pod whose first flights nothing else holds: as fast as the link can carry what they bring.

/// The longest wait: a client asks again after a second (RFC 6298, 2.1).
pub const BOUND_NS: u64 = 800_000_000;
/// How many requests wait at most: the node's waiting room has no place for a flood of them.
pub const MAX_WAITING: u64 = 1 << 12;
/// The backlog that requests aim for. While it is longer, fewer of them enter than the link could serve, else more.
const TARGET_NS: u64 = 12_000_000;
/// Up to this backlog a request enters that no other one is before: bulk flows at a low rate have as much.
const AHEAD_NS: u64 = 100_000_000;
/// What counts of a connection in the mean of what requests bring. What comes later is held by acknowledgements.
pub const MAX_BYTES: u64 = 64 << 10;
/// What a connection brings besides data, in bytes on the wire: the request, the acknowledgements of its answer and of the data's, and the end.
pub const CONNECTION_BYTES: u64 = 60 + 3 * 52;
/// Of how many requests that mean is.
const REQUESTS: u64 = 32;
/// The least mean, in bytes on the wire: a request brings itself at least. 0 is the mean of none.
const MIN_BYTES: u64 = 60;

/// When a request enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How long it waits, in nanoseconds.
    pub wait_ns: u64,
    /// When the one after it may enter.
    pub next_ns: u64,
}

/// When a request may enter that comes now, finds this backlog, and has no other before it.
#[inline(always)]
pub fn free_ns(next_ns: u64, now_ns: u64, backlog_ns: u64) -> u64 {
    next_ns.max(now_ns + backlog_ns.max(AHEAD_NS) - AHEAD_NS)
}

/// When a request enters. `free_ns` is what the function of that name said, and `first_ns` how long the link takes for what a request brings.
#[inline(always)]
pub fn entry(free_ns: u64, now_ns: u64, backlog_ns: u64, first_ns: u64) -> Entry {
    let gap_ns = if backlog_ns > TARGET_NS { first_ns + first_ns / 4 } else { first_ns - first_ns / 8 };
    let wait_ns = (free_ns - now_ns).min(BOUND_NS);
    // Those that wait for long are closer and closer. At the bound all that came meanwhile would else enter at once.
    let closer_ns = (2 * (BOUND_NS - wait_ns)).min(BOUND_NS);
    let step_ns = (gap_ns.min(BOUND_NS) * closer_ns / BOUND_NS).max(BOUND_NS / MAX_WAITING);
    Entry { wait_ns, next_ns: now_ns + wait_ns + step_ns }
}

/// The mean of what requests bring, in bytes on the wire, once another one has entered. `before` is the mean without it.
#[inline(always)]
pub fn mean_with_request(before_bytes: u64) -> u64 {
    (before_bytes - before_bytes / REQUESTS).max(MIN_BYTES)
}

/// What is added to that mean when so many bytes on the wire have come on a connection that such a request has opened.
#[inline(always)]
pub fn part_of_mean(wire_bytes: u64) -> u64 {
    wire_bytes.min(MAX_BYTES) / REQUESTS
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    /// Ten segments at 10 Mbit/s.
    const FIRST_NS: u64 = 12 * MS;

    /// When each of so many requests enters that all come at the same moment, an hour after the machine's start.
    fn enter(requests: usize, backlog_ns: u64, first_ns: u64) -> Vec<u64> {
        let (now_ns, mut next_ns) = (3_600_000 * MS, 0);
        let one = |_| {
            let entry = entry(free_ns(next_ns, now_ns, backlog_ns), now_ns, backlog_ns, first_ns);
            next_ns = entry.next_ns;
            entry.wait_ns
        };
        (0..requests).map(one).collect()
    }

    #[test]
    fn one_that_comes_alone_does_not_wait() {
        assert_eq!(enter(1, 0, FIRST_NS), [0]);
        assert_eq!(enter(1, AHEAD_NS, FIRST_NS), [0]);
        assert_eq!(enter(1, AHEAD_NS + MS, FIRST_NS), [MS]);
    }

    #[test]
    fn those_that_come_together_enter_as_fast_as_the_link_carries_what_they_bring() {
        let waits = enter(32, 0, FIRST_NS);
        let gaps: Vec<u64> = waits.windows(2).map(|two| two[1] - two[0]).collect();
        assert!(gaps.iter().all(|gap| (FIRST_NS / 8 * 7..=FIRST_NS).contains(gap)), "{gaps:?}");
        // Beside a backlog they are slower than the link.
        assert_eq!(enter(2, TARGET_NS + 1, FIRST_NS), [0, FIRST_NS / 4 * 5]);
    }

    #[test]
    fn none_waits_beyond_the_bound_and_those_near_it_come_closer() {
        for first_ns in [0, 1, FIRST_NS, u64::MAX / 2] {
            let waits = enter(10_000, 0, first_ns);
            assert!(waits.iter().all(|wait| *wait <= BOUND_NS));
            assert!(waits.is_sorted());
        }
        let waits = enter(200, 0, FIRST_NS);
        let before = |ns: u64| waits.iter().filter(|wait| **wait < ns).count();
        assert!(before(BOUND_NS) - before(BOUND_NS / 2) > before(BOUND_NS / 2), "{waits:?}");
    }

    #[test]
    fn not_more_wait_than_the_waiting_room_has_places_for() {
        let waits = enter(2 * MAX_WAITING as usize, 0, 0);
        assert!(waits.iter().filter(|wait| **wait < BOUND_NS).count() <= MAX_WAITING as usize + 1);
    }

    #[test]
    fn the_mean_is_what_requests_bring() {
        let mut mean = 14_480;
        for _ in 0..1_000 {
            mean = mean_with_request(mean);
            // In two packets, as it comes.
            mean += part_of_mean(6_000) + part_of_mean(4_000);
        }
        assert!((9_500..=10_500).contains(&mean), "{mean} bytes");
        // Requests that bring nothing make nobody wait.
        for _ in 0..1_000 {
            mean = mean_with_request(mean);
        }
        assert_eq!(mean, MIN_BYTES);
    }
}
