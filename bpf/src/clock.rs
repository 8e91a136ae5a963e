//! The pod clock under its lock: the one place where a meter changes.
//!
//! All CPUs and both egress hooks share the clock. Instruction set v1, the only one that every kernel from 5.10 on loads, has
//! no compare-and-exchange, and an idle clock must be moved *up to* a time as well as *by* one: hence a spin lock
//! (`bpf_spin_lock`, which disables interrupts while it is held). It is held for a few stores; the division is done before.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_spin_lock, bpf_spin_unlock};
use podshaper_abi::{Clock, Meter, backlog_bucket, transmit_time};

use crate::maps;

/// Of a packet: its sender is held by TCP's pacing, or by its acknowledgements.
pub const IS_PACED: u64 = 1 << 0;
/// Of a packet: it goes before the backlog, as a sparse flow's that nothing paces.
pub const IS_SPARSE: u64 = 1 << 1;
/// Of a packet: it gets a departure time.
pub const DEPARTS: u64 = 1 << 2;
/// Of a packet: the congestion mark is to be set on it, or was.
pub const IS_MARKED: u64 = 1 << 3;
/// Of a packet: nothing paces its flow, which has waited for the backlog before it nevertheless.
pub const HAS_TURN: u64 = 1 << 4;

/// Now, as the clock counts: CLOCK_MONOTONIC, which is also what TCP's pacing timer and fq's departure times use.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// Virtual backlog of a direction in nanoseconds that `wire_bytes` more would leave; 0 without a limit. `is_bulk` (1 or 0): as those see
/// it that leave the last of the burst to others. Read without the lock: a number that is one packet old makes one segment's pace a little
/// wrong, and the next one, which sees both, makes up for it.
///
/// A global function, as all that follow and for all of them: the verifier checks it by itself, once, and not together with every way
/// that leads to it. Its check is much of the time an ADD takes. They can be given numbers only, and give one back.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn backlog(direction: u64, wire_bytes: u64, is_bulk: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return 0 };
    // SAFETY: the verifier checked the pointer; an aligned u64 is loaded whole. Volatile: other CPUs write it.
    let next_ns = unsafe { (&raw const (*meter).clock.next_ns).read_volatile() };
    let now_ns = now_ns();
    let caught_up_ns = Clock::caught_up_ns(next_ns, now_ns, limit.burst_ns);
    let kept_ns = limit.kept_ns * is_bulk;
    Clock::backlog_ns(caught_up_ns + kept_ns + transmit_time(wire_bytes, limit.rate_bits_per_s).ns, now_ns)
}

/// What is to be done with a packet that leaves this backlog: of the flags above those that it has. TCP, sparse flows and those whose turn it is may go
/// up to the horizon, others while the backlog is short. What is ECN-capable is told before that.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn judge(direction: u64, backlog_ns: u64, is_paced: u64, has_credit: u64, takes_turn: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return 0 };
    let (flags, mark_ns) = if is_paced != 0 {
        (IS_PACED, limit.paced_mark_ns)
    } else if has_credit != 0 && has_room_for_sparse(meter) {
        (IS_SPARSE, limit.horizon_ns)
    } else {
        (limit.departs * DEPARTS | takes_turn * HAS_TURN, limit.unpaced_bound_ns / 2)
    };
    flags | (backlog_ns > mark_ns) as u64 * IS_MARKED
}

/// Whether sparse flows have had less than their part of the rate lately. Read without the lock, as in [`backlog`].
#[inline(always)]
fn has_room_for_sparse(meter: *const Meter) -> bool {
    // SAFETY: as in `backlog`.
    let next_ns = unsafe { (&raw const (*meter).sparse.next_ns).read_volatile() };
    next_ns <= now_ns()
}

/// Counts a packet with these flags: moves the direction's clock and returns the number of segments that pass, all or none: 0 where
/// the backlog is beyond what such a packet may find. Then it must be dropped.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admit(direction: u64, bytes: u64, segments: u64, flags: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return segments };
    let bound_ns = if flags & (IS_PACED | IS_SPARSE | DEPARTS | HAS_TURN) == 0 {
        limit.unpaced_bound_ns
    } else {
        limit.horizon_ns
    };
    let now_ns = now_ns();
    let time = transmit_time(bytes, limit.rate_bits_per_s);
    // SAFETY: `meter` points to a whole value of METERS, whose first field is the lock.
    unsafe { bpf_spin_lock(meter.cast()) };
    // SAFETY: the lock is held: nobody else reads or writes these fields but `backlog` and `judge`, which expect it. The verifier allows
    // no call under the lock, so all of what follows is inlined.
    let Meter { clock, sparse, counters, .. } = unsafe { &mut *meter };
    let backlog_ns = Clock::backlog_ns(clock.next_ns, now_ns);
    counters.max_backlog_ns = counters.max_backlog_ns.max(backlog_ns);
    let admitted = backlog_ns <= bound_ns;
    if admitted {
        clock.advance(now_ns, &limit, time);
        sparse.advance_sparse(now_ns, &limit, time, flags & IS_SPARSE);
        counters.bytes += bytes;
        counters.packets += segments;
        counters.marks += (flags & IS_MARKED) / IS_MARKED * segments;
        counters.backlog[backlog_bucket(backlog_ns)] += segments;
    } else {
        counters.drops += segments;
    }
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(meter.cast()) };
    if admitted { segments } else { 0 }
}
