//! Requests for connections to a pod with fq: when they enter.
//!
//! What a remote sends before its first acknowledgement, nothing holds. With clients that open a connection for each of their requests that is
//! most of what comes, and many of them would bring seconds of the limit at once. So it is the connections that are paced: each
//! request (SYN) enters when the link could carry what those before it bring, which is taken to be as much as connections brought lately. The
//! round trip that a client sees first is then as long as its request has waited, and the client as patient: it takes neither its first flight
//! for lost nor, later, what waits for an acknowledgement that is held ([`crate::window`]).
//!
//! A request waits at the host's end of the interface, in fq of the waiting room.

use aya_ebpf::programs::SockOpsContext;
use podshaper_abi::{Others, REQUESTS_WAITED, Waited};

use crate::{clock::Link, maps, packet::Wire, tcp, window};

/// The longest wait: a client asks again after a second (RFC 6298, 2.1).
pub const BOUND_NS: u64 = 800_000_000;
/// The backlog that requests aim for. While it is longer, fewer of them enter than the link could serve, else more.
const TARGET_NS: u64 = 12_000_000;
/// Up to this backlog a request enters that no other one is before: bulk flows at a low rate have as much.
const AHEAD_NS: u64 = 100_000_000;
/// Requests from near pass the others, up to one of so many: kubelet's probes are among them, which wait for a second, and a pod whose
/// probes fail is killed.
const NEAR_COST: u64 = 8;
/// What counts of a connection in the mean of what they bring. What comes later is held by acknowledgements.
pub const MOST_BYTES: u64 = 64 << 10;
/// Of how many connections that mean is.
const CONNECTIONS: u64 = 32;

/// When a request enters that comes now and finds this backlog. `is_near`: a process of the node has sent it, or a pod on the same bridge.
#[inline(always)]
pub fn edt_ns(link: &Link, others: &mut Others, now_ns: u64, before_ns: u64, is_near: bool) -> u64 {
    let (mean, next) = (&raw const others.first_bytes, &raw mut others.next_request_ns);
    let next_near = &raw mut others.next_near_request_ns;
    // SAFETY: aligned u64s of a map's value are loaded and stored whole. Volatile: other CPUs write them. What two CPUs lose is that two
    // requests enter at once.
    unsafe {
        let first_ns = link.transmit_ns(known(link, mean.read_volatile()), 1);
        let gap_ns = if before_ns > TARGET_NS { first_ns + first_ns / 4 } else { first_ns - first_ns / 8 };
        let from_ns = next.read_volatile().max(now_ns + before_ns.max(AHEAD_NS) - AHEAD_NS);
        let is_first = is_near && next_near.read_volatile() <= now_ns;
        if is_first {
            next_near.write_volatile(now_ns + NEAR_COST * first_ns);
        }
        let wait_ns = (from_ns - now_ns).min(BOUND_NS);
        // Those that wait for long are closer and closer. At the bound all that came meanwhile would else enter at once.
        let closer_ns = (2 * (BOUND_NS - wait_ns)).min(BOUND_NS);
        next.write_volatile(now_ns + wait_ns + gap_ns.min(BOUND_NS) * closer_ns / BOUND_NS);
        if is_first { now_ns } else { now_ns + wait_ns }
    }
}

/// Whether the answer to a request (SYN-ACK) leaves at once, whatever the backlog: its client would ask again after a second, and the pod's
/// stack begin the connection with a window of one segment. All answers together have an eighth of the limit for that.
#[inline(always)]
pub fn answer_passes(link: &Link, others: &mut Others, wire: &Wire, now_ns: u64) -> bool {
    const COST: u64 = 8;
    /// Dozens of clients ask at once.
    const LAG_NS: u64 = 50_000_000;
    let next = &raw mut others.next_answer_ns;
    // SAFETY: as in `edt_ns`. What two CPUs lose is one answer.
    unsafe {
        let next_ns = next.read_volatile();
        if next_ns > now_ns {
            return false;
        }
        next.write_volatile(next_ns.max(now_ns - LAG_NS) + COST * link.transmit_ns(wire.bytes, 1));
    }
    true
}

/// Notes bytes on the wire of what comes on a connection that a remote has opened, which has received so much payload before.
#[inline(always)]
pub fn note_first(link: &Link, others: &mut Others, wire_bytes: u64, received_bytes: u64) {
    let mean = &raw mut others.first_bytes;
    // SAFETY: as in `edt_ns`. What two CPUs lose is a packet of a mean.
    unsafe {
        let before = known(link, mean.read_volatile());
        let left = if received_bytes == 0 { before - before / CONNECTIONS } else { before };
        mean.write_volatile(left + wire_bytes / CONNECTIONS);
    }
}

/// The mean, or before there is one what the first window has room for.
#[inline(always)]
fn known(link: &Link, mean_bytes: u64) -> u64 {
    if mean_bytes == 0 { window::first_bytes(link.limit()) } else { mean_bytes }
}

/// Whoever asks for a connection: the last word of its address, and its port, in the order of the machine. Others may be the same.
#[derive(Clone, Copy)]
pub struct Client(u32);

impl Client {
    #[inline(always)]
    pub fn new(address: u32, port: u16) -> Self {
        Self(address ^ u32::from(port) << 16 ^ u32::from(port))
    }

    /// The remote of a connection.
    #[inline(always)]
    fn of(ctx: &SockOpsContext) -> Self {
        let (address, port) = tcp::remote(ctx);
        Self::new(address, port)
    }

    /// Where it is noted how long its request has waited.
    #[inline(always)]
    fn waited<'a>(self) -> Option<&'a mut Waited> {
        /// 2^32 by the golden ratio: spreads what differs in few bits (Knuth).
        const SPREAD: u32 = 0x9e37_79b9;
        maps::waited(self.0.wrapping_mul(SPREAD) >> (u32::BITS - REQUESTS_WAITED.ilog2()))
    }

    /// Notes how long its request waits.
    #[inline(always)]
    pub fn note(self, wait_ns: u64) {
        if let Some(waited) = self.waited() {
            *waited = Waited { client: self.0, us: (wait_ns / 1000) as u32 };
        }
    }
}

/// How long the request has waited of a connection that a remote has opened. 0 where that is not known any more.
#[inline(always)]
pub fn waited_ns(ctx: &SockOpsContext) -> u64 {
    let client = Client::of(ctx);
    client.waited().filter(|waited| waited.client == client.0).map_or(0, |waited| u64::from(waited.us) * 1000)
}
