//! The pod clock under its lock: the one place where a meter changes.
//!
//! All CPUs and both egress hooks share the clock. Instruction set v1, the only one that every kernel from 5.10 on loads, has
//! no compare-and-exchange, and an idle clock must be moved *up to* a time as well as *by* one: hence a spin lock
//! (`bpf_spin_lock`, which disables interrupts while it is held). It is held for a few stores; the division is done before.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_spin_lock, bpf_spin_unlock};
use podshaper_abi::{Clock, Limit, Meter, TransmitTime, backlog_bucket, transmit_time};

use crate::packet::Wire;

/// What is known of a packet before the clock is locked.
pub struct Verdict {
    /// Backlog beyond which it is dropped.
    pub bound_ns: u64,
    /// Whether it goes before the backlog, as a sparse flow's that no socket paces.
    pub is_sparse: bool,
    /// Whether a congestion mark was set on it.
    pub is_marked: bool,
}

/// Now, as the clock counts: CLOCK_MONOTONIC, which is also what TCP's pacing timer and fq's departure times use.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// Virtual backlog in nanoseconds that `wire_bytes` more would leave. Read without the lock: a number that is one packet old
/// makes one segment's pace a little wrong, and the next one, which sees both, makes up for it.
#[inline(always)]
pub fn backlog_with(meter: *const Meter, limit: &Limit, now_ns: u64, wire_bytes: u64) -> u64 {
    // SAFETY: the verifier checked the pointer; an aligned u64 is loaded whole. Volatile: other CPUs write it.
    let next_ns = unsafe { (&raw const (*meter).clock.next_ns).read_volatile() };
    let caught_up_ns = Clock::caught_up_ns(next_ns, now_ns, limit.burst_ns);
    Clock::backlog_ns(caught_up_ns + transmit_time(wire_bytes, limit.rate_bits_per_s).ns, now_ns)
}

/// Whether sparse flows have had less than their part of the rate lately. Read without the lock, like the above.
#[inline(always)]
pub fn has_room_for_sparse(meter: *const Meter, now_ns: u64) -> bool {
    // SAFETY: as in `backlog_with`.
    let next_ns = unsafe { (&raw const (*meter).sparse.next_ns).read_volatile() };
    next_ns <= now_ns
}

/// Counts a packet: moves the clock and returns true, or returns false where the backlog is beyond `bound_ns`. Then the packet
/// must be dropped.
#[inline(always)]
pub fn admit(meter: *mut Meter, limit: &Limit, now_ns: u64, wire: &Wire, verdict: &Verdict) -> bool {
    let time = transmit_time(wire.bytes, limit.rate_bits_per_s);
    // SAFETY: `meter` points to a whole value of METERS, whose first field is the lock.
    unsafe { bpf_spin_lock(meter.cast()) };
    let admitted = admit_locked(meter, limit, now_ns, wire, verdict, time);
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(meter.cast()) };
    admitted
}

/// The part under the lock. The verifier allows no call there, so all of it is inlined.
#[inline(always)]
fn admit_locked(
    meter: *mut Meter,
    limit: &Limit,
    now_ns: u64,
    wire: &Wire,
    verdict: &Verdict,
    time: TransmitTime,
) -> bool {
    // SAFETY: the lock is held: nobody else reads or writes these fields but `backlog_with`, which expects it.
    let Meter { clock, sparse, counters, .. } = unsafe { &mut *meter };
    let backlog_ns = Clock::backlog_ns(clock.next_ns, now_ns);
    if backlog_ns > counters.max_backlog_ns {
        counters.max_backlog_ns = backlog_ns;
    }
    if backlog_ns > verdict.bound_ns {
        counters.drops += wire.segments;
        return false;
    }
    clock.advance(now_ns, limit, time);
    // By multiplication, here and for the marks: a branch on what is known to be 0 or 1 would make the verifier check all that
    // led here once for each.
    sparse.advance_sparse(now_ns, limit, time, verdict.is_sparse as u64);
    counters.bytes += wire.bytes;
    counters.packets += wire.segments;
    counters.marks += verdict.is_marked as u64 * wire.segments;
    counters.backlog[backlog_bucket(backlog_ns)] += wire.segments;
    true
}
