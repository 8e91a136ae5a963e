//! When SYNs to a pod with fq enter the pod.
//!
//! Nothing holds the packets that a remote sends before its first acknowledgement. If clients open a connection for
//! each of their requests, these packets are most of the ingress traffic, and many clients at once would bring seconds
//! of the limit. So podshaper paces the connections: each SYN enters when the link could carry the data of the
//! connections before it. A connection is assumed to bring as much as connections brought lately. The first round trip
//! that a client measures is then as long as its SYN has waited. The client waits longer than that before it repeats
//! its first flight, or data whose acknowledgement is held ([`crate::window`]).
//!
//! A SYN waits at the host end of the veth, in fq of the waiting room.

use podshaper_abi::{INGRESS, Others, requests};

use crate::{clock::Link, flow::Flow, maps, packet::Wire, turn::ACKNOWLEDGEMENT_BYTES, window};

/// One SYN of the node itself overtakes the others in the time that the link needs for the data of this many
/// connections. Kubelet's probes are among these SYNs: a probe waits for a second, and the kubelet kills a pod whose
/// probes fail.
const NODE_COST: u64 = 8;

/// When a SYN enters that comes now and finds this backlog; `None` if too many SYNs wait already. `is_of_node`: a
/// process of the node has sent the SYN.
#[inline(always)]
pub fn edt_ns(link: &Link, others: &mut Others, now_ns: u64, backlog_ns: u64, is_of_node: bool) -> Option<u64> {
    let (mean, next) = (&raw const others.mean_first_bytes, &raw mut others.next_request_ns);
    let next_of_node = &raw mut others.next_node_request_ns;
    // SAFETY: aligned u64s of a map's value are loaded and stored whole. Volatile: other CPUs write them. If two CPUs
    // write at once, two SYNs enter at the same time.
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

/// Whether a SYN-ACK leaves at once, whatever the backlog: without it the client would repeat its SYN after a second,
/// and the pod's stack would begin the connection with a congestion window of one segment. All SYN-ACKs together have
/// an eighth of the limit.
#[inline(always)]
pub fn answer_passes(link: &Link, others: &mut Others, wire: &Wire, now_ns: u64) -> bool {
    const COST: u64 = 8;
    /// Dozens of clients connect at once.
    const AT_ONCE: u64 = 64;
    const LAG_NS: u64 = 50_000_000;
    let cost_ns = COST * link.transmit_ns(wire.bytes, 1);
    let lag_ns = (AT_ONCE * cost_ns).max(LAG_NS);
    let next = &raw mut others.next_answer_ns;
    // SAFETY: as in `edt_ns`. If two CPUs write at once, one SYN-ACK is not counted.
    unsafe {
        let next_ns = next.read_volatile();
        if next_ns > now_ns {
            return false;
        }
        next.write_volatile(next_ns.max(now_ns.max(lag_ns) - lag_ns) + cost_ns);
    }
    true
}

/// A SYN enters: counts it in the mean of the bytes that connections bring. The SYN counts when it has waited and not
/// when it comes, since the data of the connections before it comes in between.
#[inline(always)]
pub fn note_entry(slot: u32) {
    let (Some(link), Some(others)) = (Link::of(slot, INGRESS), maps::others(slot, INGRESS)) else { return };
    let mean = &raw mut others.mean_first_bytes;
    // SAFETY: as in `edt_ns`. If two CPUs write at once, the mean loses one SYN.
    unsafe { mean.write_volatile(requests::mean_with_request(known(&link, mean.read_volatile()))) };
}

/// Counts bytes on the wire that come on a connection which a SYN has opened.
#[inline(always)]
pub fn note_bytes(flow: &mut Flow, slot: u32, wire_bytes: u64) {
    // The value is 1 where no data has come yet, and 0 where no remote has opened the connection. Acknowledgements do
    // not count.
    let noted_bytes = flow.is_answering;
    if noted_bytes == 0 || noted_bytes > requests::MAX_BYTES || wire_bytes <= ACKNOWLEDGEMENT_BYTES {
        return;
    }
    let Some(others) = maps::others(slot, INGRESS) else { return };
    // A connection that brings data also brings the packets without data that every connection has.
    let wire_bytes = if noted_bytes == 1 { wire_bytes + requests::CONNECTION_BYTES } else { wire_bytes };
    flow.is_answering += wire_bytes;
    let mean = &raw mut others.mean_first_bytes;
    // SAFETY: as in `edt_ns`. If two CPUs write at once, the mean loses one packet.
    unsafe { mean.write_volatile(mean.read_volatile() + requests::part_of_mean(wire_bytes)) };
}

/// The mean, or an estimate from the first window while there is no mean yet.
#[inline(always)]
fn known(link: &Link, mean_bytes: u64) -> u64 {
    if mean_bytes == 0 { window::usual_first_bytes(link.limit()) } else { mean_bytes }
}
