//! Requests for connections to a pod with fq: when they enter.
//!
//! What a remote sends before its first acknowledgement, nothing holds. With clients that open a connection for each of their requests that is
//! most of what comes, and many of them would bring seconds of the limit at once. So it is the connections that are paced: each
//! request (SYN) enters when the link could carry what those before it bring, which is taken to be as much as requests brought lately. The
//! round trip that a client sees first is then as long as its request has waited. The client waits for longer than that before it repeats
//! anything: its first flight, or what waits for an acknowledgement that is held ([`crate::window`]).
//!
//! A request waits at the host's end of the interface, in fq of the waiting room.

use podshaper_abi::{INGRESS, Others, requests};

use crate::{clock::Link, flow::Flow, maps, packet::Wire, turn::ACKNOWLEDGEMENT_BYTES, window};

/// One request of the node itself passes the others in the time that the link needs for what so many requests bring. Kubelet's probes are among
/// these: they wait for a second, and a pod whose probes fail is killed.
const NODE_COST: u64 = 8;

/// When a request enters that comes now and finds this backlog; `None` if too many wait already. `is_of_node`: a process of the node has sent it.
#[inline(always)]
pub fn edt_ns(link: &Link, others: &mut Others, now_ns: u64, backlog_ns: u64, is_of_node: bool) -> Option<u64> {
    let (mean, next) = (&raw const others.mean_first_bytes, &raw mut others.next_request_ns);
    let next_of_node = &raw mut others.next_node_request_ns;
    // SAFETY: aligned u64s of a map's value are loaded and stored whole. Volatile: other CPUs write them. What two CPUs lose is that two
    // requests enter at once.
    unsafe {
        let first_ns = link.transmit_ns(known(link, mean.read_volatile()), 1);
        let next_ns = next.read_volatile();
        let free_ns = requests::free_ns(next_ns, now_ns, backlog_ns);
        let passes = is_of_node && free_ns > now_ns && next_of_node.read_volatile() <= now_ns;
        if passes {
            next_of_node.write_volatile(now_ns + (NODE_COST * first_ns).min(requests::BOUND_NS));
        } else if next_ns > now_ns + requests::BOUND_NS {
            return None;
        }
        let entry = requests::entry(free_ns, now_ns, backlog_ns, first_ns);
        next.write_volatile(entry.next_ns);
        Some(if passes { now_ns } else { now_ns + entry.wait_ns })
    }
}

/// Whether the answer to a request (SYN-ACK) leaves at once, whatever the backlog: its client would ask again after a second, and the pod's
/// stack begin the connection with a window of one segment. All answers together have an eighth of the limit for that.
#[inline(always)]
pub fn answer_passes(link: &Link, others: &mut Others, wire: &Wire, now_ns: u64) -> bool {
    const COST: u64 = 8;
    /// Dozens of clients ask at once.
    const AT_ONCE: u64 = 64;
    const LAG_NS: u64 = 50_000_000;
    let cost_ns = COST * link.transmit_ns(wire.bytes, 1);
    let lag_ns = (AT_ONCE * cost_ns).max(LAG_NS);
    let next = &raw mut others.next_answer_ns;
    // SAFETY: as in `edt_ns`. What two CPUs lose is one answer.
    unsafe {
        let next_ns = next.read_volatile();
        if next_ns > now_ns {
            return false;
        }
        next.write_volatile(next_ns.max(now_ns.max(lag_ns) - lag_ns) + cost_ns);
    }
    true
}

/// A request enters: the mean of what they bring is of one more. So it is when the request has waited and not when it comes: what those before it
/// bring comes in between.
#[inline(always)]
pub fn note_entry(slot: u32) {
    let (Some(link), Some(others)) = (Link::of(slot, INGRESS), maps::others(slot, INGRESS)) else { return };
    let mean = &raw mut others.mean_first_bytes;
    // SAFETY: as in `edt_ns`. What two CPUs lose is a request of a mean.
    unsafe { mean.write_volatile(requests::mean_with_request(known(&link, mean.read_volatile()))) };
}

/// Notes bytes on the wire of what comes on such a connection.
#[inline(always)]
pub fn note_bytes(flow: &mut Flow, slot: u32, wire_bytes: u64) {
    // It is 1 where nothing has come yet, and 0 where the connection is not such a one. Acknowledgements bring nothing.
    let noted_bytes = flow.is_answering;
    if noted_bytes == 0 || noted_bytes > requests::MAX_BYTES || wire_bytes <= ACKNOWLEDGEMENT_BYTES {
        return;
    }
    let Some(others) = maps::others(slot, INGRESS) else { return };
    // A connection that brings data brings all that belongs to a connection.
    let wire_bytes = if noted_bytes == 1 { wire_bytes + requests::CONNECTION_BYTES } else { wire_bytes };
    flow.is_answering += wire_bytes;
    let mean = &raw mut others.mean_first_bytes;
    // SAFETY: as in `edt_ns`. What two CPUs lose is a packet of a mean.
    unsafe { mean.write_volatile(mean.read_volatile() + requests::part_of_mean(wire_bytes)) };
}

/// The mean, or before there is one what the first window has room for.
#[inline(always)]
fn known(link: &Link, mean_bytes: u64) -> u64 {
    if mean_bytes == 0 { window::usual_first_bytes(link.limit()) } else { mean_bytes }
}
