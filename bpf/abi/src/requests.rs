//! When SYNs enter a pod whose first flights nothing else holds: as fast as the link can carry the data that the
//! connections bring.

/// The longest wait of a SYN: a client repeats its SYN after a second (RFC 6298, 2.1).
pub const BOUND_NS: u64 = 800_000_000;
/// How many SYNs wait at most: the node's waiting room has no room for a SYN flood.
pub const MAX_WAITING: u64 = 1 << 12;
/// The target backlog. While the backlog is longer, fewer SYNs enter than the link could serve; else more enter.
const TARGET_NS: u64 = 12_000_000;
/// Up to this backlog a SYN enters at once if no other SYN is before it: bulk flows at a low rate have as much backlog.
const AHEAD_NS: u64 = 100_000_000;
/// Bytes of a connection that count in the mean, at most. Held acknowledgements hold the bytes that come later.
pub const MAX_BYTES: u64 = 64 << 10;
/// Bytes on the wire that a connection brings in addition to data: the SYN, the acknowledgements of the SYN-ACK and of
/// the pod's data, and the FIN.
pub const CONNECTION_BYTES: u64 = 60 + 3 * 52;
/// The number of SYNs over which the mean is taken.
const REQUESTS: u64 = 32;
/// The smallest mean, in bytes on the wire: a connection brings at least its SYN. A mean of 0 stands for no SYN yet.
const MIN_BYTES: u64 = 60;

/// When a SYN enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How long the SYN waits, in nanoseconds.
    pub wait_ns: u64,
    /// When the next SYN may enter.
    pub next_ns: u64,
}

/// When a SYN may enter that comes now, finds this backlog, and has no other SYN before it.
#[inline(always)]
pub fn free_ns(next_ns: u64, now_ns: u64, backlog_ns: u64) -> u64 {
    next_ns.max(now_ns + backlog_ns.max(AHEAD_NS) - AHEAD_NS)
}

/// When a SYN enters. `free_ns` is the result of the function of that name. `first_ns` is the time that the link takes
/// for the bytes that a connection brings.
#[inline(always)]
pub fn entry(free_ns: u64, now_ns: u64, backlog_ns: u64, first_ns: u64) -> Entry {
    let gap_ns = if backlog_ns > TARGET_NS { first_ns + first_ns / 4 } else { first_ns - first_ns / 8 };
    let wait_ns = (free_ns - now_ns).min(BOUND_NS);
    // SYNs that wait longer are closer together. Else all SYNs that reach the bound would enter at once.
    let closer_ns = (2 * (BOUND_NS - wait_ns)).min(BOUND_NS);
    let step_ns = (gap_ns.min(BOUND_NS) * closer_ns / BOUND_NS).max(BOUND_NS / MAX_WAITING);
    Entry { wait_ns, next_ns: now_ns + wait_ns + step_ns }
}

/// The mean of the bytes on the wire that connections bring, after another SYN has entered. `before_bytes` is the mean
/// without that SYN.
#[inline(always)]
pub fn mean_with_request(before_bytes: u64) -> u64 {
    (before_bytes - before_bytes / REQUESTS).max(MIN_BYTES)
}

/// The increase of that mean when so many bytes on the wire have come on a connection.
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

    /// The waits of so many SYNs that all come at the same moment, an hour after the machine's start.
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
        // With a backlog, SYNs enter more slowly than the link could serve them.
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
            // In two packets, as the data of a connection comes.
            mean += part_of_mean(6_000) + part_of_mean(4_000);
        }
        assert!((9_500..=10_500).contains(&mean), "{mean} bytes");
        // SYNs of connections that bring nothing make no other SYN wait.
        for _ in 0..1_000 {
            mean = mean_with_request(mean);
        }
        assert_eq!(mean, MIN_BYTES);
    }
}
