//! Whose turn it is: the one place that decides which packet leaves at once and which packet waits for the backlog
//! before it.
//!
//! ```text
//!   there is no backlog                                     the packet leaves at once
//!   its flow is *sparse*, and sparse flows have share left  the packet leaves at once
//!   its sender has waited since the packet before           the packet leaves at once, unless the backlog is long
//!   else                                                    the packet waits, in order, until the backlog has drained
//! ```
//!
//! A sender has waited if TCP's pacing made it wait (see [`crate::pace`]), if the sender paces itself, or if it
//! blocked. This module does not ask which. TCP does not pace a flow's first ten segments
//! (`tcp_update_skb_after_send`), MPTCP's options leave no room for the callback that pacing needs, and UDP senders are
//! not known to pace: all of these wait in the queue below, where a socket's own packets hold the socket back (TCP
//! small queues, SO_SNDBUF).
//!
//! A flow is *sparse* while it sends less than two segments in twice the time that the backlog takes to drain, or small
//! packets at less than a sixteenth of the limit. A request, a reply or a DNS query then leaves at once beside any
//! number of bulk flows, with the latency of an idle pod. A pod gains nothing by many sparse flows: all sparse flows
//! together have a quarter of the limit, and new flows, which a pod's clients make in numbers, have an eighth of their
//! own.

use podshaper_abi::{
    DATAGRAM, FRESH, ORDERED, QUEUE_HTB, QUEUE_NONE, SMALL_COST, SPARSE, STREAM, WAITED, wait_slack_ns,
};

use crate::{
    clock::{self, Link},
    flow::Turn,
    packet::Wire,
};

/// Bytes on the wire that a flow may send as a sparse one: two full packets of the usual MTU. (For sent TCP it is two
/// segments.)
pub const SPARSE_BYTES: u64 = 2 * 1500;
/// The shortest time for one credit, for a backlog that is shorter than any timer.
const SPARSE_GAP_NS: u64 = 1_000_000;
/// How long a flow is new: a connection that is opened for one request is over by then.
const FRESH_NS: u64 = 100_000_000;
/// Up to this many bytes on the wire a packet of a sparse flow is small: a request or reply of an RPC, an
/// acknowledgement.
const SMALL_BYTES: u64 = 512;
/// How far the clock of a flow's small packets may lag: some small packets come at once, after one read of many
/// requests.
const SMALL_LAG_NS: u64 = 20_000_000;
/// A flow counts as no more than this of a backlog: a first flight of TCP. Other flows are to give way to the flow's
/// packets in the queue, but not so far that the backlog grows without end.
const MAX_BURST_BYTES: u64 = 1 << 14;
/// Each flow whose sender has waited is ahead of the limit by a packet. Hundreds of such flows at a low rate would be
/// ahead by seconds: beyond this backlog their packets leave in order.
const MAX_AHEAD_NS: u64 = 50_000_000;
/// A packet up to this size is taken for an acknowledgement where nothing else is known: 40 bytes of IPv6 and the
/// longest header of TCP.
pub const ACKNOWLEDGEMENT_BYTES: u64 = 100;
/// How late htb may be, whose timer is one of the kernel's. After this time a flow's packets have certainly left htb,
/// and the flow's next packet may take another path without overtaking them.
const HTB_LATE_NS: u64 = 50_000_000;

/// The facts about a packet that decide its turn.
pub struct Packet {
    /// Bytes on the wire.
    pub bytes: u64,
    /// Segments that the packet will be cut into.
    pub segments: u64,
    /// Bytes that a sparse flow may send at once.
    pub credit_bytes: u64,
    /// Packets smaller than this do not delay the refill of a sparse flow's credit.
    pub bulk_bytes: u64,
    /// Whether the packet belongs to a TCP connection, whose sender notices a queue.
    pub is_stream: bool,
    /// Whether the packet belongs to a bulk flow that leaves the last of the burst to other packets.
    pub is_bulk: bool,
    /// Whether all packets that the flow sent before are known to have arrived: none of them can be waiting in a queue.
    pub has_arrived: bool,
    /// The queue in which the packet waits, if it must: [`QUEUE_NONE`] and so on.
    pub queue: u64,
}

impl Packet {
    /// A packet that enters the pod. Only packets of `bulk_bytes` or more delay the refill of a credit here: a client
    /// that sends its next request when the backlog has drained sends as often as a bulk flow sends segments, and its
    /// requests would otherwise wait for ever. For sent packets every size counts: the short ends of a bulk flow's
    /// writes would otherwise give that flow an advantage.
    #[inline(always)]
    pub fn received(wire: &Wire, is_stream: bool) -> Self {
        Self {
            bytes: wire.bytes,
            segments: wire.segments,
            credit_bytes: SPARSE_BYTES,
            bulk_bytes: SPARSE_BYTES / 4,
            is_stream,
            is_bulk: false,
            has_arrived: false,
            queue: QUEUE_NONE,
        }
    }
}

/// The decision about a packet.
#[derive(Clone, Copy)]
pub struct Decision {
    /// `WAITED`, `SPARSE`, `FRESH`, `STREAM`, `DATAGRAM` or `ORDERED`.
    pub class: u64,
    /// How long the sender is to wait after the packet, in nanoseconds.
    pub wait_ns: u64,
}

/// The state of the clock when a packet comes.
struct Moment {
    now_ns: u64,
    /// The backlog before the packet.
    before_ns: u64,
    /// How long the link takes for the packet.
    own_ns: u64,
    /// The backlog including the packet, as far as the packet's flow is to wait for it.
    backlog_ns: u64,
}

impl Turn {
    /// Decides about a packet, and updates the flow's state for its next packets.
    #[inline(always)]
    pub fn decide(&mut self, link: &Link, packet: &Packet) -> Decision {
        let now_ns = clock::now_ns();
        let before_ns = link.backlog_ns(now_ns, 0, false);
        let own_ns = link.transmit_ns(packet.bytes, packet.segments);
        let backlog_ns = if packet.is_bulk { link.backlog_ns(now_ns, own_ns, true) } else { before_ns + own_ns };
        let privilege = self.privilege(packet, now_ns, backlog_ns, own_ns);
        let moment = Moment { now_ns, before_ns, own_ns, backlog_ns };
        let was_queued = self.queued_until_ns != 0;
        if packet.has_arrived || now_ns >= self.queued_until_ns {
            self.queued_until_ns = 0;
        }
        let follows = self.queued_until_ns != 0;
        // A datagram of a flow that has become sparse overtakes the flow's earlier datagrams.
        if (!follows || !packet.is_stream) && privilege != WAITED && link.has_room(privilege, now_ns) {
            return Decision { class: privilege, wait_ns: own_ns };
        }
        let has_waited = self.due_ns != 0 && now_ns >= self.due_ns;
        if has_waited {
            // Also if the packet follows others into the queue: bytes sent before the wait are not part of this burst.
            self.burst_bytes = 0;
        }
        let is_ordered = before_ns > MAX_AHEAD_NS && packet.queue != QUEUE_NONE;
        // A packet in order overtakes no packet before it.
        if has_waited && (!follows || is_ordered) || !follows && before_ns == 0 {
            self.wait(link, packet, moment, was_queued && !is_ordered)
        } else {
            self.queue(link, packet, moment)
        }
    }

    /// The packet leaves, and the flow waits for its part of the backlog. If the flow's earlier packets were in the
    /// queue, the flow waits once for the whole backlog. The queued packets still leave at their departure times, so a
    /// packet that a flow sends at once after it has left the queue is beyond the limit; the long wait keeps this to
    /// one packet of each flow.
    #[inline(always)]
    fn wait(&mut self, link: &Link, packet: &Packet, moment: Moment, was_queued: bool) -> Decision {
        let Moment { now_ns, before_ns, own_ns, backlog_ns } = moment;
        self.burst_bytes = packet.bytes;
        let fair_ns = link.fair_wait_ns(packet.bytes, self.burst_bytes, own_ns, backlog_ns);
        let wait_ns = if was_queued { backlog_ns } else { fair_ns };
        let late_ns = if self.due_ns == 0 { 0 } else { now_ns.max(self.due_ns) - self.due_ns };
        let due_ns = now_ns + wait_ns;
        self.due_ns = due_ns - wait_slack_ns(wait_ns, late_ns).min(wait_ns);
        if before_ns <= MAX_AHEAD_NS || packet.queue == QUEUE_NONE {
            return Decision { class: WAITED, wait_ns };
        }
        self.queued_until_ns = now_ns + before_ns;
        Decision { class: ORDERED, wait_ns }
    }

    /// The packet waits, and the flow waits until the packet leaves.
    #[inline(always)]
    fn queue(&mut self, link: &Link, packet: &Packet, moment: Moment) -> Decision {
        let Moment { now_ns, before_ns, own_ns, backlog_ns } = moment;
        let class = if packet.is_stream { STREAM } else { DATAGRAM };
        self.burst_bytes = (self.burst_bytes + packet.bytes).min(MAX_BURST_BYTES);
        let leaves_ns = now_ns + before_ns;
        let late_ns = if packet.queue == QUEUE_HTB { HTB_LATE_NS } else { 0 };
        // Counted for the other flows. The result is of no use for this flow, whose wait is the queue.
        link.fair_wait_ns(packet.bytes, self.burst_bytes, own_ns, backlog_ns);
        if packet.queue == QUEUE_NONE {
            // The packet passes or is dropped. A dropped packet is no reason for the next packet to wait longer.
            self.due_ns = if self.due_ns == 0 { leaves_ns } else { self.due_ns };
        } else if !packet.is_stream || packet.bytes > ACKNOWLEDGEMENT_BYTES {
            // Data that a pure acknowledgement overtakes is not out of order.
            self.queued_until_ns = leaves_ns + late_ns;
            self.due_ns = leaves_ns;
        }
        Decision { class, wait_ns: before_ns + own_ns }
    }

    /// Notes a packet that has passed already, of a flow that acknowledgements hold. Returns when a link of the limit
    /// would have delivered the packet, in the clock's nanoseconds. Returns 0 for a packet of a sparse flow, which
    /// would not have waited.
    #[inline(always)]
    pub fn note(&mut self, link: &Link, packet: &Packet) -> u64 {
        let now_ns = clock::now_ns();
        let own_ns = link.transmit_ns(packet.bytes, packet.segments);
        let backlog_ns = link.backlog_ns(now_ns, own_ns, false);
        if self.privilege(packet, now_ns, backlog_ns, own_ns) == WAITED { now_ns + backlog_ns } else { 0 }
    }

    /// The class that the flow's credit gives the packet: `SPARSE`, `FRESH`, or `WAITED` for none. Uses up that credit.
    ///
    /// If the packet is larger than the rest of the credit, the flow has no credit until twice the time that this
    /// backlog takes to drain. So a bulk flow, which waits for just the backlog, never has credit, even if its timer is
    /// late.
    #[inline(always)]
    fn privilege(&mut self, packet: &Packet, now_ns: u64, backlog_ns: u64, own_ns: u64) -> u64 {
        let again_ns = now_ns + 2 * backlog_ns + SPARSE_GAP_NS;
        if self.known_from_ns == 0 {
            self.known_from_ns = now_ns + FRESH_NS;
        }
        let is_known = now_ns >= self.known_from_ns;
        if now_ns > self.filled_ns {
            self.filled_ns = again_ns.max(self.known_from_ns);
            self.credit_bytes = packet.credit_bytes;
        }
        if packet.bytes <= self.credit_bytes {
            self.credit_bytes -= packet.bytes;
            return if is_known { SPARSE } else { FRESH };
        }
        if is_known && packet.bytes <= SMALL_BYTES && self.small_ns <= now_ns {
            self.small_ns = self.small_ns.max(now_ns - SMALL_LAG_NS) + own_ns * SMALL_COST;
            return SPARSE;
        }
        if packet.bytes >= packet.bulk_bytes {
            self.filled_ns = self.filled_ns.max(again_ns);
        }
        self.credit_bytes = 0;
        WAITED
    }
}
