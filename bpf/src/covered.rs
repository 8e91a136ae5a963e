//! What the cgroup's hooks have charged of a socket, and what has passed the host's end for that.

use core::arch::asm;

use podshaper_abi::{HostEnd, MAX_HORIZON_NS};

use crate::{clock::Link, flow::Covered, packet::Wire};

impl Covered {
    /// Notes a packet of the socket that was charged at the host's end: the next ones need not be.
    #[inline(always)]
    pub fn open(&mut self, slot: u32) {
        if self.slot != slot.into() {
            *self = Self { slot: slot.into(), charged_bytes: 0, passed_bytes: 0, older_bytes: 0, next_look_ns: 0 };
        }
    }

    /// Notes a packet that was charged to an attachment. What was charged to another one is of no use for its host's end.
    #[inline(always)]
    pub fn charge(&mut self, wire: &Wire, slot: u32, link: &Link, now_ns: u64) {
        /// A datagram of more than this may be cut into fragments, each with a header of its own.
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

    /// What was charged and has not come by for so long was dropped in the pod. A pod could else save it up, and send all of it at once.
    #[inline(always)]
    fn forfeit(&mut self) {
        // SAFETY: as in `passes`. What a packet adds meanwhile may be lost: it is then one that may pass once more.
        unsafe {
            if (&raw const self.passed_bytes).read_volatile() < self.older_bytes {
                (&raw mut self.passed_bytes).write_volatile(self.older_bytes);
            }
            self.older_bytes = (&raw const self.charged_bytes).read_volatile();
        }
    }

    /// Whether a packet passes for what was charged, or may be charged later: `ahead_bytes` at most. Notes it then.
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

/// Adds, all CPUs at once.
#[inline(always)]
pub fn add(to: &mut u64, bytes: u64) {
    // SAFETY: an aligned u64 of a map's value, which is what this instruction takes, from the first set on.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) &raw mut *to, in(reg) bytes) };
}
