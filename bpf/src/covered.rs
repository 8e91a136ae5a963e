//! The bytes that the cgroup's hooks have charged for a socket, and those that have passed the host end for that
//! charge.

use core::arch::asm;

use podshaper_abi::{HostEnd, MAX_HORIZON_NS};

use crate::{clock::Link, flow::Covered, packet::Wire};

impl Covered {
    /// Notes a packet of the socket that was charged at the host end: the socket's next packets need not be.
    #[inline(always)]
    pub fn open(&mut self, slot: u32) {
        if self.slot != slot.into() {
            *self = Self { slot: slot.into(), charged_bytes: 0, passed_bytes: 0, older_bytes: 0, next_look_ns: 0 };
        }
    }

    /// Notes a packet that was charged to an attachment. Bytes charged to another attachment are of no use at this
    /// attachment's host end, and are forgotten.
    #[inline(always)]
    pub fn charge(&mut self, wire: &Wire, slot: u32, link: &Link, now_ns: u64) {
        /// A larger datagram may be cut into fragments, each with a header of its own.
        const UNCUT_BYTES: u64 = 1500;
        const MIN_MTU: u64 = 1280;
        const FRAGMENT_HEADER_BYTES: u64 = 48;
        self.open(slot);
        if now_ns >= self.next_look_ns {
            self.forfeit();
            self.next_look_ns = now_ns + link.limit().horizon_ns.min(MAX_HORIZON_NS);
        }
        let is_cut = wire.segments == 1 && wire.bytes > UNCUT_BYTES;
        let headers = if is_cut { wire.bytes / MIN_MTU * FRAGMENT_HEADER_BYTES } else { 0 };
        add(&mut self.charged_bytes, wire.bytes + headers);
    }

    /// Forfeits bytes that were charged and have not reached the host end for so long: their packets were dropped in
    /// the pod. Else a pod could save these bytes up and send all of them at once.
    #[inline(always)]
    fn forfeit(&mut self) {
        // SAFETY: as in `passes`. The bytes that a packet adds meanwhile may be lost: such a packet may then pass once
        // more.
        unsafe {
            if (&raw const self.passed_bytes).read_volatile() < self.older_bytes {
                (&raw mut self.passed_bytes).write_volatile(self.older_bytes);
            }
            self.older_bytes = (&raw const self.charged_bytes).read_volatile();
        }
    }

    /// Whether a packet passes for bytes that were charged, or for at most `ahead_bytes` that may be charged later. If
    /// so, counts the packet as passed.
    #[inline(always)]
    pub fn passes(&mut self, end: &HostEnd, bytes: u64, ahead_bytes: u64) -> bool {
        // SAFETY: the verifier checked the pointers; an aligned u64 is loaded whole. Volatile: other CPUs write it.
        let (charged, passed) = unsafe {
            ((&raw const self.charged_bytes).read_volatile(), (&raw const self.passed_bytes).read_volatile())
        };
        let passes = (self.slot == end.slot.into() || end.is_shared != 0) && passed + bytes <= charged + ahead_bytes;
        if passes {
            add(&mut self.passed_bytes, bytes);
        }
        passes
    }
}

/// Adds atomically across CPUs.
#[inline(always)]
pub fn add(to: &mut u64, bytes: u64) {
    // SAFETY: an aligned u64 of a map's value, which this instruction takes; the instruction is in the first
    // instruction set.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) &raw mut *to, in(reg) bytes) };
}
