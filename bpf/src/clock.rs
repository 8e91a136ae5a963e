//! The pod clock under its lock: the one place where a meter changes.
//!
//! All CPUs and all hooks share the clock. Instruction set v1, the only one that every kernel from 5.10 on loads, has
//! no compare-and-exchange. An idle clock must be moved *up to* a time as well as *by* a time: hence a spin lock
//! (`bpf_spin_lock`, which disables interrupts while it is held). The lock is held for a few stores; the division is
//! done before.

use core::ptr::NonNull;

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_spin_lock, bpf_spin_unlock};
use podshaper_abi::{
    Clock, DATAGRAM, DIRECTIONS, FRESH, FRESH_COST, HELD_DATAGRAM, Limit, Meter, Meters, OTHER, OTHER_FRESH, SPARSE,
    SPARSE_COST, STREAM, advance_privilege, backlog_bucket, fair_wait_ns, usual_bytes,
};

use crate::maps;

/// The present time of the clock: CLOCK_MONOTONIC, which TCP's pacing timer and fq's departure times use as well.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// The virtual link of one direction of an attachment: its limit and its clock.
#[derive(Clone, Copy)]
pub struct Link {
    /// The attachment and the direction, as one number: see [`admit`].
    key: u64,
    limit: Limit,
    meters: NonNull<Meters>,
    direction: usize,
}

impl Link {
    /// The link of a direction; `None` where the direction has no limit.
    #[inline(always)]
    pub fn of(slot: u32, direction: u32) -> Option<Self> {
        let direction = direction as usize;
        let limit = maps::limits(slot)?[direction];
        let meters = maps::meters(slot)?;
        // Both or neither are 0; the verifier must see that the divisor is not 0.
        if limit.rate_bits_per_s == 0 || limit.link_bits_per_s == 0 {
            return None;
        }
        Some(Self { key: u64::from(slot) << 1 | direction as u64, limit, meters, direction })
    }

    /// The attachment.
    #[inline(always)]
    pub fn slot(&self) -> u32 {
        (self.key >> 1) as u32
    }

    /// Its limit.
    #[inline(always)]
    pub fn limit(&self) -> &Limit {
        &self.limit
    }

    /// The virtual backlog in nanoseconds, after a packet that takes `own_ns`. `is_bulk`: the backlog for a bulk flow,
    /// which leaves the last of the burst to other packets. Read without the lock: with a value that is one packet old,
    /// the pace of one segment is slightly wrong, and the next segment, which sees both packets, corrects that.
    #[inline(always)]
    pub fn backlog_ns(&self, now_ns: u64, own_ns: u64, is_bulk: bool) -> u64 {
        // SAFETY: the verifier checked the pointer; an aligned u64 is loaded whole. Volatile: other CPUs write it.
        let next_ns = unsafe { (&raw const (*self.meter()).clock.next_ns).read_volatile() };
        let caught_up_ns = Clock::caught_up_ns(next_ns, now_ns, self.limit.burst_ns);
        let reserve_ns = if is_bulk { self.limit.reserve_ns } else { 0 };
        Clock::backlog_ns(caught_up_ns + reserve_ns + own_ns, now_ns)
    }

    /// How long the link takes to send a packet, in nanoseconds.
    #[inline(always)]
    pub fn transmit_ns(&self, wire_bytes: u64, segments: u64) -> u64 {
        self.limit.transmit_time(wire_bytes, segments).ns
    }

    /// Whether the flows of this class, `SPARSE` or `FRESH`, have used less than their part of the rate lately. Read
    /// without the lock, as in [`Link::backlog_ns`].
    #[inline(always)]
    pub fn has_room(&self, class: u64, now_ns: u64) -> bool {
        // SAFETY: as in `backlog_ns`.
        let (sparse_ns, fresh_ns) = unsafe {
            (
                (&raw const (*self.meter()).sparse_ns).read_volatile(),
                (&raw const (*self.meter()).fresh_ns).read_volatile(),
            )
        };
        (if class == SPARSE { sparse_ns } else { fresh_ns }) <= now_ns
    }

    /// How long the sender of a packet is to wait after the packet: until the packet has drained, plus the sender's
    /// part of the backlog before the packet. Counts the packet in the mean of the bytes that flows send between two
    /// waits. `burst`: these bytes of the packet's flow, including the packet.
    #[inline(always)]
    pub fn fair_wait_ns(&self, wire_bytes: u64, burst: u64, own_ns: u64, backlog_ns: u64) -> u64 {
        let own_ns = own_ns.min(backlog_ns);
        // SAFETY: the verifier checked the pointer; an aligned u64 is loaded and stored whole. Volatile: other CPUs
        // write it. If two CPUs write at once, the mean loses one packet.
        let before = unsafe {
            let mean = &raw mut (*self.meter()).usual_bytes;
            let before = mean.read_volatile();
            mean.write_volatile(mean_of(before, burst, own_ns, backlog_ns));
            before
        };
        fair_wait(backlog_ns, own_ns, wire_bytes, before)
    }

    /// The mean of the bytes on the wire that a flow sends between two waits.
    #[inline(always)]
    pub fn usual_bytes(&self) -> u64 {
        // SAFETY: as in `backlog_ns`.
        unsafe { (&raw const (*self.meter()).usual_bytes).read_volatile() }
    }

    /// The mean of the bytes per second that the last growing windows let through. Counts a window that lets through
    /// `bytes_per_s`.
    #[inline(always)]
    pub fn window_bytes_per_s(&self, bytes_per_s: u64) -> u64 {
        // SAFETY: as in `fair_wait_ns`.
        unsafe {
            let mean = &raw mut (*self.meter()).window_bytes_per_s;
            let before = mean.read_volatile();
            let after = if before == 0 { bytes_per_s } else { before - before / 8 + bytes_per_s / 8 };
            mean.write_volatile(after);
            after
        }
    }

    /// Whether a packet of this class that finds this backlog is to be marked with CE, if it is ECN-capable.
    #[inline(always)]
    pub fn is_marked(&self, class: u64, backlog_ns: u64) -> bool {
        let mark_ns = match class {
            STREAM => self.limit.stream_mark_ns,
            DATAGRAM => self.limit.datagram_mark_ns,
            _ => u64::MAX,
        };
        backlog_ns > mark_ns
    }

    /// Counts a packet of this class; false if the packet must be dropped. `is_marked`: the packet has the congestion
    /// mark.
    #[inline(always)]
    pub fn admits(&self, bytes: u64, segments: u64, class: u64, is_marked: bool) -> bool {
        admit(self.key, bytes, segments, class, is_marked.into()) != 0
    }

    #[inline(always)]
    fn meter(&self) -> *mut Meter {
        // SAFETY: the direction is one of two.
        unsafe { (&raw mut (*self.meters.as_ptr()).of).cast::<Meter>().add(self.direction) }
    }
}

/// [`usual_bytes`], as a global function: the verifier checks a global function by itself, once, and not together with
/// every path that leads to the call. A global function takes numbers only, and returns one number.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn mean_of(before: u64, burst: u64, own_ns: u64, backlog_ns: u64) -> u64 {
    usual_bytes(before, burst, own_ns, backlog_ns)
}

/// [`fair_wait_ns`], as a global function.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn fair_wait(backlog_ns: u64, own_ns: u64, wire_bytes: u64, before: u64) -> u64 {
    fair_wait_ns(backlog_ns, own_ns, wire_bytes, before)
}

/// Counts a packet of this class and moves the clock. Returns the number of segments if the packet passes. Returns 0,
/// and does not move the clock, if the backlog is beyond the bound of the class: the packet must then be dropped.
/// `key`: the attachment's slot, with the direction in the lowest bit. `is_marked` (1 or 0): the packet has the
/// congestion mark.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admit(key: u64, bytes: u64, segments: u64, class: u64, is_marked: u64) -> u64 {
    let (slot, direction) = ((key >> 1) as u32, key as usize & (DIRECTIONS - 1));
    let (Some(limits), Some(meters)) = (maps::limits(slot), maps::meters(slot)) else { return segments };
    let limit = limits[direction];
    if limit.link_bits_per_s == 0 {
        return segments;
    }
    let bound_ns = match class {
        STREAM => limit.horizon_ns,
        DATAGRAM => limit.datagram_bound_ns,
        OTHER | HELD_DATAGRAM => limit.others_bound_ns,
        // These packets are few, or their senders have waited: a flood is neither.
        _ => u64::MAX,
    };
    let sparse_cost = if class == SPARSE { SPARSE_COST } else { 0 };
    let fresh_cost = if class == FRESH || class == OTHER_FRESH { FRESH_COST } else { 0 };
    let now_ns = now_ns();
    let time = limit.transmit_time(bytes, segments);
    let meters = meters.as_ptr();
    // SAFETY: `meters` points to a whole value of METERS, whose first field is the lock.
    unsafe { bpf_spin_lock(meters.cast()) };
    // SAFETY: the lock is held: no other program reads or writes these fields, except the functions above, which expect
    // such writes. The verifier allows no call under the lock, so all code up to the unlock is inlined.
    let Meter { clock, sparse_ns, fresh_ns, counters, .. } = unsafe { &mut (&mut (*meters).of)[direction] };
    let backlog_ns = Clock::backlog_ns(clock.next_ns, now_ns);
    // Packets of other paths have counters of their own.
    let counted = u64::from(class != OTHER && class != OTHER_FRESH);
    counters.max_backlog_ns = counters.max_backlog_ns.max(backlog_ns * counted);
    let admitted = backlog_ns <= bound_ns;
    if admitted {
        clock.advance(now_ns, &limit, time);
        *sparse_ns = advance_privilege(*sparse_ns, now_ns, limit.burst_ns, time.ns, sparse_cost);
        *fresh_ns = advance_privilege(*fresh_ns, now_ns, limit.burst_ns, time.ns, fresh_cost);
        counters.bytes += bytes * counted;
        counters.packets += segments * counted;
        counters.marks += is_marked * segments;
        counters.backlog[backlog_bucket(backlog_ns)] += segments * counted;
    } else {
        counters.drops += segments * counted;
    }
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(meters.cast()) };
    if admitted { segments } else { 0 }
}
