//! The pod clock under its lock: the one place where a meter changes.
//!
//! All CPUs and both egress hooks share the clock. Instruction set v1, the only one that every kernel from 5.10 on loads, has
//! no compare-and-exchange, and an idle clock must be moved *up to* a time as well as *by* one: hence a spin lock
//! (`bpf_spin_lock`, which disables interrupts while it is held). It is held for a few stores; the division is done before.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_spin_lock, bpf_spin_unlock};
use podshaper_abi::{Clock, Limit, Meter, backlog_bucket, transmit_time};

use crate::maps;

/// Flag of [`admit`]: the packet goes before the backlog, as a sparse flow's that no socket paces.
pub const IS_SPARSE: u64 = 1;
/// Flag of [`admit`]: a congestion mark was set on it.
pub const IS_MARKED: u64 = 2;

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

/// Counts a packet of a direction: moves the clock and returns 1, or returns 0 where the backlog is beyond `bound_ns`. Then the
/// packet must be dropped.
///
/// A global function, and so the verifier checks it by itself, once, and not together with every way that leads to it: the check is
/// most of the time an ADD takes. It can be given numbers only.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admit(direction: u64, bytes: u64, segments: u64, bound_ns: u64, flags: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return 1 };
    let now_ns = now_ns();
    let time = transmit_time(bytes, limit.rate_bits_per_s);
    // SAFETY: `meter` points to a whole value of METERS, whose first field is the lock.
    unsafe { bpf_spin_lock(meter.cast()) };
    // SAFETY: the lock is held: nobody else reads or writes these fields but `backlog_with`, which expects it. The verifier allows
    // no call under the lock, so all of what follows is inlined.
    let Meter { clock, sparse, counters, .. } = unsafe { &mut *meter };
    let backlog_ns = Clock::backlog_ns(clock.next_ns, now_ns);
    if backlog_ns > counters.max_backlog_ns {
        counters.max_backlog_ns = backlog_ns;
    }
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
    admitted.into()
}
