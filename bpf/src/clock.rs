//! The pod clock under its lock: the one place where a meter changes.
//!
//! All CPUs and both egress hooks share the clock. Instruction set v1, the only one that every kernel from 5.10 on loads, has
//! no compare-and-exchange, and an idle clock must be moved *up to* a time as well as *by* one: hence a spin lock
//! (`bpf_spin_lock`, which disables interrupts while it is held). It is held for a few stores; the division is done before.

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_spin_lock, bpf_spin_unlock};
use podshaper_abi::{
    Clock, DATAGRAM, FRESH, FRESH_COST, Meter, QUEUE_HTB, SPARSE, SPARSE_COST, STREAM, advance_privilege,
    backlog_bucket, fair_wait_ns, usual_bytes,
};

use crate::maps;

/// Now, as the clock counts: CLOCK_MONOTONIC, which is also what TCP's pacing timer and fq's departure times use.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// Virtual backlog of a direction in nanoseconds that a packet of `own_ns` more would leave; 0 without a limit. `is_bulk` (1 or 0): as those see
/// it that leave the last of the burst to others. Read without the lock: a number that is one packet old makes one segment's pace a little
/// wrong, and the next one, which sees both, makes up for it.
///
/// A global function, as all that follow and for all of them: the verifier checks it by itself, once, and not together with every way
/// that leads to it. Its check is much of the time an ADD takes. They can be given numbers only, and give one back.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn backlog(direction: u64, own_ns: u64, is_bulk: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return 0 };
    // SAFETY: the verifier checked the pointer; an aligned u64 is loaded whole. Volatile: other CPUs write it.
    let next_ns = unsafe { (&raw const (*meter).clock.next_ns).read_volatile() };
    let now_ns = now_ns();
    let caught_up_ns = Clock::caught_up_ns(next_ns, now_ns, limit.burst_ns);
    let kept_ns = limit.kept_ns * is_bulk;
    Clock::backlog_ns(caught_up_ns + kept_ns + own_ns, now_ns)
}

/// How long the virtual link takes for a packet, in nanoseconds; 0 without a limit.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn transmit_ns(direction: u64, wire_bytes: u64, segments: u64) -> u64 {
    maps::limit(direction as u32).map_or(0, |limit| limit.transmit_time(wire_bytes, segments).ns)
}

/// Whether the flows of this class, `SPARSE` or `FRESH`, have had less than their part of the rate lately (1 or 0). Read without the lock,
/// as in [`backlog`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn has_room(direction: u64, class: u64) -> u64 {
    let Some(meter) = maps::meter(direction as u32) else { return 0 };
    // SAFETY: as in `backlog`.
    let next_ns = unsafe {
        if class == SPARSE {
            (&raw const (*meter).sparse_ns).read_volatile()
        } else {
            (&raw const (*meter).fresh_ns).read_volatile()
        }
    };
    (next_ns <= now_ns()).into()
}

/// How long the sender of a packet is to wait after it: for itself to drain, and for what is before it in proportion to its part. Counts the
/// packet in the mean of what flows send between two waits (`burst`: this one, with this packet).
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn fair_wait(direction: u64, wire_bytes: u64, burst: u64, own_ns: u64, backlog_ns: u64) -> u64 {
    let Some(meter) = maps::meter(direction as u32) else { return 0 };
    let own_ns = own_ns.min(backlog_ns);
    // SAFETY: the verifier checked the pointer; an aligned u32 is loaded and stored whole. Volatile: other CPUs write it. What two of
    // them lose is one packet of a mean.
    let mean = unsafe { &raw mut (*meter).usual_bytes };
    let before = u64::from(unsafe { mean.read_volatile() });
    unsafe { mean.write_volatile(usual_bytes(before, burst, own_ns, backlog_ns) as u32) };
    fair_wait_ns(backlog_ns, own_ns, wire_bytes, before)
}

/// By how much the queue of a direction may be late, if it is htb: `late_ns`. fq is not.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn queue_is_late(direction: u64, late_ns: u64) -> u64 {
    maps::limit(direction as u32).filter(|limit| limit.queue == QUEUE_HTB).map_or(0, |_| late_ns)
}

/// Whether a packet of this class that finds this backlog is to be marked (1 or 0), if it is ECN-capable.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn is_marked(direction: u64, class: u64, backlog_ns: u64) -> u64 {
    let Some(limit) = maps::limit(direction as u32) else { return 0 };
    let mark_ns = match class {
        STREAM => limit.stream_mark_ns,
        DATAGRAM => limit.datagram_mark_ns,
        _ => u64::MAX,
    };
    (backlog_ns > mark_ns).into()
}

/// Counts a packet of this class: moves the direction's clock and returns the number of segments that pass, all or none: 0 where
/// the backlog is beyond what such a packet may find. Then it must be dropped. `is_marked` (1 or 0): it has the congestion mark.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admit(direction: u64, bytes: u64, segments: u64, class: u64, is_marked: u64) -> u64 {
    let direction = direction as u32;
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return segments };
    let bound_ns = match class {
        STREAM => limit.horizon_ns,
        DATAGRAM => limit.datagram_bound_ns,
        // They are few, or have waited: what comes without end is neither.
        _ => u64::MAX,
    };
    let sparse_cost = if class == SPARSE { SPARSE_COST } else { 0 };
    let fresh_cost = if class == FRESH { FRESH_COST } else { 0 };
    let now_ns = now_ns();
    let time = limit.transmit_time(bytes, segments);
    // SAFETY: `meter` points to a whole value of METERS, whose first field is the lock.
    unsafe { bpf_spin_lock(meter.cast()) };
    // SAFETY: the lock is held: nobody else reads or writes these fields but the functions above, which expect it. The verifier allows
    // no call under the lock, so all of what follows is inlined.
    let Meter { clock, sparse_ns, fresh_ns, counters, .. } = unsafe { &mut *meter };
    let backlog_ns = Clock::backlog_ns(clock.next_ns, now_ns);
    counters.max_backlog_ns = counters.max_backlog_ns.max(backlog_ns);
    let admitted = backlog_ns <= bound_ns;
    if admitted {
        clock.advance(now_ns, &limit, time);
        *sparse_ns = advance_privilege(*sparse_ns, now_ns, limit.burst_ns, time.ns, sparse_cost);
        *fresh_ns = advance_privilege(*fresh_ns, now_ns, limit.burst_ns, time.ns, fresh_cost);
        counters.bytes += bytes;
        counters.packets += segments;
        counters.marks += is_marked * segments;
        counters.backlog[backlog_bucket(backlog_ns)] += segments;
    } else {
        counters.drops += segments;
    }
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(meter.cast()) };
    if admitted { segments } else { 0 }
}
