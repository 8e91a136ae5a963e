//! What passes the pod's interface and no hook of its cgroup has seen: of a tunnel, a bridge or a nested namespace made in the pod, of AF_PACKET,
//! of another cgroup's socket, forwarded, the kernel's own. The programs here are on the host's end of the pod's veth, where the pod cannot
//! take them off.
//!
//! For each socket the cgroup's hooks count the bytes that they have charged, and the host's end counts those that it has let pass for that
//! ([`Covered`]). Out of the pod, a packet still knows its socket: `skb->sk` outlives a veth. Into the pod, the socket is looked up in the pod's
//! namespace. What is not covered has come another way, whatever its addresses, marks or headers say: nothing that a pod can forge is
//! looked at. It is charged to the pod clock, and waits in the *waiting room*, a veth of the node's with fq or htb, from which it comes back to
//! where it was taken, and to the filters of others there.
//!
//! ```text
//!   pod eth0 ─► host's end, ingress: out_of_pod ─┬─ covered, or its turn ─► filters of others, bridge, routes
//!                           ▲                    └─ else ─► podshaper-wait: wait_here, fq or htb ─► podshaper-back: go_back ─┐
//!                           └────────────────────────────────────────────────────────────────────────────────────────────────┘
//!   the same into the pod, from the egress of the host's end: into_pod
//! ```
//!
//! What comes to the pod's own connections waits there, too, where their acknowledgements cannot be held ([`hold`]): those that ride on data, and all
//! of a pod without fq. So do datagrams for the pod's sockets ([`hold_datagram`]). What waits in fq leaves when the clock says. htb knows nothing
//! of the clock, so while some of it waits, whatever else goes into the pod passes another class of the same htb, which never waits and takes its
//! part of the limit.

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::{bpf_set_hash, bpf_sk_fullsock, bpf_skb_ecn_set_ce},
    programs::{SkBuffContext, TcContext},
};
use podshaper_abi::{
    DATAGRAM, EGRESS, FRESH, HELD_DATAGRAM, HostEnd, INGRESS, ORDERED, OTHER, OTHER_FRESH, Others, ROOM_INTO_AT_ONCE,
    ROOM_INTO_QUEUE, ROOM_OUT, STREAM, WAITED,
};

use crate::{
    clock::{self, Link},
    coming::{Coming, Stretch, coming},
    covered::add,
    flow::{Flow, Waiting},
    maps,
    packet::{self, ETHERNET_HEADER_BYTES, IPPROTO_TCP, Segment, TC_ACT_SHOT, TC_ACT_UNSPEC, Wire},
    requests,
    room::{IS_BACK, IS_BACK_TO_BE_CHARGED, IS_REQUEST_BACK, PLACE, wait},
    subnets::{self, Remote},
    turn::Packet,
    waited::Client,
};

/// How late fq or htb may be with a packet. After so long what waited has left for sure, and the next one may pass without overtaking it.
const LATE_NS: u64 = 50_000_000;
/// What the others count as of the backlog: a first flight of TCP.
const OTHERS_BURST_BYTES: u64 = 1 << 14;
/// What passes at once of a connection whose acknowledgements cannot be held: as much as the windows aim for, so that a late timer does not
/// leave the clock idle.
const AHEAD_NS: u64 = 5_000_000;
/// Up to this backlog a request for a connection, or what else comes before a connection is open, is not dropped.
const REQUEST_BOUND_NS: u64 = 500_000_000;
/// How long after the answer to such a request the hook leaves the next one to be charged here.
const ANSWERS_HERE_NS: u64 = 1_000_000_000;

impl Waiting {
    /// Whether a packet is a copy of what waits here, for which its sender did not wait long enough.
    #[inline(always)]
    fn has(&self, segment: Segment, now_ns: u64) -> bool {
        let ahead = segment.sequence.wrapping_add(segment.payload).wrapping_sub(self.next_sequence as u32) as i32;
        segment.payload != 0 && ahead <= 0 && now_ns + LATE_NS < self.waits_until_ns
    }
}

/// See [`crate::out_of_pod`].
#[inline(always)]
pub fn out_of_pod(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: tc programs may read and write mark.
    unsafe {
        if (*skb).mark == IS_BACK {
            (*skb).mark = 0;
            return TC_ACT_UNSPEC;
        }
    }
    let Some(end) = host_end(skb) else { return TC_ACT_UNSPEC };
    let packet = SkBuffContext::new(skb);
    let wire = Wire::after(&packet, ETHERNET_HEADER_BYTES);
    let is_exempt = || subnets::are_exempt(&packet, end.list, Remote::DESTINATION.after(ETHERNET_HEADER_BYTES));
    if is_charged(skb, end, wire.bytes) || is_exempt() || is_answer_in_time(&packet, end, &wire) {
        TC_ACT_UNSPEC
    } else {
        charge(skb, end, EGRESS, &wire)
    }
}

/// Whether a packet is the answer to a request for a connection, and has its part of the limit. fq takes the socket off such an answer
/// (`fq_classify`). So it is charged here. The hook would charge it as well, on the kernels on which the hook sees it, and leaves it
/// alone while answers come here. Whoever forges one has no more than that part.
#[inline(always)]
fn is_answer_in_time(packet: &SkBuffContext, end: &HostEnd, wire: &Wire) -> bool {
    let is_tcp = packet::transport(packet, ETHERNET_HEADER_BYTES).is_some_and(|(protocol, ..)| protocol == IPPROTO_TCP);
    if !is_tcp || !Segment::of(packet, ETHERNET_HEADER_BYTES).is_answer() {
        return false;
    }
    let (Some(link), Some(others)) = (Link::of(end.slot, EGRESS), maps::others(end.slot, EGRESS)) else {
        return false;
    };
    let now_ns = clock::now_ns();
    others.answers_here_until_ns = now_ns + ANSWERS_HERE_NS;
    let passes = requests::answer_passes(&link, others, wire, now_ns);
    if passes {
        link.admits(wire.bytes, wire.segments, WAITED, false);
    }
    passes
}

/// See [`crate::into_pod`].
#[inline(always)]
pub fn into_pod(ctx: &TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: tc programs may read and write cb.
    unsafe {
        let place = (*skb).cb[PLACE];
        if matches!(place, IS_BACK | IS_BACK_TO_BE_CHARGED | IS_REQUEST_BACK) {
            (*skb).cb[PLACE] = 0;
            if let Some(end) = host_end(skb).filter(|_| place != IS_BACK_TO_BE_CHARGED) {
                mark_charged(skb, end);
                if place == IS_REQUEST_BACK {
                    requests::note_entry(end.slot);
                }
            }
            return TC_ACT_UNSPEC;
        }
    }
    let Some(end) = host_end(skb) else { return TC_ACT_UNSPEC };
    let packet = SkBuffContext::new(skb);
    let wire = Wire::after(&packet, ETHERNET_HEADER_BYTES);
    let is_exempt = || subnets::are_exempt(&packet, end.list, Remote::SOURCE.after(ETHERNET_HEADER_BYTES));
    let verdict = match coming(&packet, end, wire.bytes) {
        Coming::ToBeCharged if end.holds_streams == 0 => return TC_ACT_UNSPEC,
        Coming::ToBeCharged if is_exempt() => return TC_ACT_UNSPEC,
        Coming::ToBeCharged => return pass_on(skb, end),
        _ if is_exempt() => return TC_ACT_UNSPEC,
        Coming::ToBeHeld(flow, stretch) if stretch.is_datagram => hold_datagram(skb, end, &wire, flow),
        Coming::ToBeHeld(flow, stretch) => hold(&packet, end, &wire, flow, stretch),
        Coming::ToListener(client) => queue_request(&packet, end, &wire, client),
        Coming::Other => charge(skb, end, INGRESS, &wire),
    };
    if verdict == TC_ACT_UNSPEC {
        mark_charged(skb, end);
    }
    verdict
}

/// Tells the hook of a socket that may get the packet that it has been charged: a socket's first packet, a raw socket's, the fragments of a
/// datagram, whose whole has the hash of its first. No other field of a packet outlives the way into another namespace and can be read there.
/// Whoever forges it gains nothing: what a hook has not charged does not pass the host's end.
#[inline(always)]
fn mark_charged(skb: *mut __sk_buff, end: &HostEnd) {
    // SAFETY: tc programs may call it.
    unsafe { bpf_set_hash(skb, end.slot) };
}

/// Whether the host's end has charged a packet that a hook sees to this attachment. Slots are random, as hashes are.
#[inline(always)]
pub fn has_been_charged(ctx: &SkBuffContext, slot: u32) -> bool {
    // SAFETY: cgroup_skb programs may read hash.
    unsafe { (*ctx.skb.skb).hash == slot }
}

#[inline(always)]
fn host_end<'a>(skb: *mut __sk_buff) -> Option<&'a HostEnd> {
    // SAFETY: tc programs may read ifindex.
    maps::host_end(unsafe { (*skb).ifindex })
}

/// Charges a packet that no hook charges. It goes on if it is its turn, else it waits, or is dropped.
#[inline(always)]
fn charge(skb: *mut __sk_buff, end: &HostEnd, direction: u32, wire: &Wire) -> i32 {
    let (Some(link), Some(others)) = (Link::of(end.slot, direction), maps::others(end.slot, direction)) else {
        return TC_ACT_UNSPEC;
    };
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    // SAFETY: as in `Covered::passes`.
    let is_alone = now_ns >= unsafe { (&raw const others.waits_until_ns).read_volatile() };
    let is_fresh = is_alone && link.has_room(FRESH, now_ns);
    if !link.admits(wire.bytes, wire.segments, if is_fresh { OTHER_FRESH } else { OTHER }, false) {
        add(&mut others.drops, wire.segments);
        return TC_ACT_SHOT;
    }
    add(&mut others.bytes, wire.bytes);
    add(&mut others.packets, wire.segments);
    if is_fresh || is_alone && before_ns == 0 || end.waiting_ifindex == 0 {
        return at_once(skb, end, direction, others, now_ns);
    }
    let own_ns = link.transmit_ns(wire.bytes, wire.segments);
    link.fair_wait_ns(wire.bytes, OTHERS_BURST_BYTES, own_ns, before_ns + own_ns);
    let edt_ns = now_ns + before_ns;
    // SAFETY: as above. What two CPUs lose is that a packet overtakes one of the other.
    unsafe { (&raw mut others.waits_until_ns).write_volatile(edt_ns + LATE_NS) };
    wait(skb, end, direction, if direction == INGRESS { ROOM_INTO_QUEUE } else { ROOM_OUT }, edt_ns)
}

/// Charges a packet of a connection whose acknowledgements cannot be held: they ride on the pod's own data, which would be late with them, or
/// pass them (fq lets data do that since Linux 6.7), or there is no fq. So the packets wait here, until the backlog is as long as windows aim
/// for.
#[inline(always)]
fn hold(packet: &SkBuffContext, end: &HostEnd, wire: &Wire, flow: &mut Flow, stretch: Stretch) -> i32 {
    let Stretch { segment, has_arrived, has_windows, .. } = stretch;
    let (Some(link), Some(others)) = (Link::of(end.slot, INGRESS), maps::others(end.slot, INGRESS)) else {
        return TC_ACT_UNSPEC;
    };
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let waiting = &mut flow.waiting;
    waiting.held_ns = now_ns;
    if waiting.has(segment, now_ns) {
        return TC_ACT_SHOT;
    }
    if !has_windows && before_ns > link.limit().others_bound_ns {
        add(&mut others.drops, wire.segments);
        return TC_ACT_SHOT;
    }
    let class =
        flow.into.decide(&link, &Packet { has_arrived, queue: end.queue(), ..Packet::received(wire, true) }).class;
    let skb = packet.skb.skb;
    // SAFETY: tc programs may call it. It returns 1 where the packet is ECN-capable and now marked.
    let is_marked = link.is_marked(STREAM, before_ns) && unsafe { bpf_skb_ecn_set_ce(skb) } == 1;
    if !link.admits(wire.bytes, wire.segments, class, is_marked) {
        return TC_ACT_SHOT;
    }
    let follows = !has_arrived && now_ns < waiting.waits_until_ns;
    let waits = matches!(class, STREAM | ORDERED) && before_ns > AHEAD_NS;
    if end.waiting_ifindex == 0 || !follows && !waits {
        return at_once(skb, end, INGRESS, others, now_ns);
    }
    // The clock never goes back, and so nor do these times: packets of a connection stay in their order.
    let edt_ns = now_ns + before_ns.max(AHEAD_NS) - AHEAD_NS;
    waiting.waits_until_ns = edt_ns + LATE_NS;
    waiting.next_sequence = segment.sequence.wrapping_add(segment.payload).into();
    wait_for_turn(skb, end, others, edt_ns)
}

/// Charges a datagram for a socket of the pod. A sender that gives way (QUIC, TCP within a tunnel) needs a queue to know its rate by: of what is only
/// dropped it sends the more, the shorter its round trip is.
#[inline(always)]
fn hold_datagram(skb: *mut __sk_buff, end: &HostEnd, wire: &Wire, flow: &mut Flow) -> i32 {
    let (Some(link), Some(others)) = (Link::of(end.slot, INGRESS), maps::others(end.slot, INGRESS)) else {
        return TC_ACT_UNSPEC;
    };
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let class = flow.into.decide(&link, &Packet { queue: end.queue(), ..Packet::received(wire, false) }).class;
    // SAFETY: as in `hold`.
    let is_marked = link.is_marked(class, before_ns) && unsafe { bpf_skb_ecn_set_ce(skb) } == 1;
    let counted = if class == DATAGRAM { HELD_DATAGRAM } else { class };
    if !link.admits(wire.bytes, wire.segments, counted, is_marked) {
        return TC_ACT_SHOT;
    }
    let waits = matches!(class, DATAGRAM | ORDERED);
    // QUIC takes a datagram for lost that three later ones have overtaken.
    let follows = now_ns < flow.waiting.waits_until_ns;
    if !waits || before_ns <= AHEAD_NS && !follows {
        return at_once(skb, end, INGRESS, others, now_ns);
    }
    let edt_ns = now_ns + before_ns.max(AHEAD_NS) - AHEAD_NS;
    flow.waiting.waits_until_ns = edt_ns + LATE_NS;
    wait_for_turn(skb, end, others, edt_ns)
}

/// Charges the request for a connection, or what else comes before a connection is open. It is of a new flow. If new flows have had their part
/// of the rate, the request waits, and beyond [`REQUEST_BOUND_NS`] it is dropped: what asks without end is a flood.
#[inline(always)]
fn queue_request(packet: &SkBuffContext, end: &HostEnd, wire: &Wire, client: Client) -> i32 {
    let (Some(link), Some(others)) = (Link::of(end.slot, INGRESS), maps::others(end.slot, INGRESS)) else {
        return TC_ACT_UNSPEC;
    };
    let skb = packet.skb.skb;
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let is_fresh = link.has_room(FRESH, now_ns);
    if !is_fresh && before_ns > REQUEST_BOUND_NS {
        return TC_ACT_SHOT;
    }
    link.admits(wire.bytes, wire.segments, if is_fresh { FRESH } else { STREAM }, false);
    if end.holds_streams == 0 {
        let Some(edt_ns) = requests::edt_ns(&link, others, now_ns, before_ns, is_of_node(skb)) else {
            return TC_ACT_SHOT;
        };
        client.note(end.slot, edt_ns - now_ns);
        if edt_ns == now_ns {
            requests::note_entry(end.slot);
            return TC_ACT_UNSPEC;
        }
        let verdict = wait(skb, end, INGRESS, ROOM_INTO_QUEUE, edt_ns);
        // SAFETY: tc programs may write cb.
        unsafe { (*skb).cb[PLACE] = IS_REQUEST_BACK };
        return verdict;
    }
    if is_fresh || end.waiting_ifindex == 0 || before_ns <= AHEAD_NS {
        return at_once(skb, end, INGRESS, others, now_ns);
    }
    wait(skb, end, INGRESS, ROOM_INTO_QUEUE, now_ns + before_ns - AHEAD_NS)
}

/// A packet for a socket of the pod waits, and while it does the others know.
#[inline(always)]
fn wait_for_turn(skb: *mut __sk_buff, end: &HostEnd, others: &mut Others, edt_ns: u64) -> i32 {
    // SAFETY: as in `charge`.
    unsafe { (&raw mut others.streams_wait_until_ns).write_volatile(edt_ns + LATE_NS) };
    wait(skb, end, INGRESS, ROOM_INTO_QUEUE, edt_ns)
}

/// A packet goes on. While others wait in htb it goes by there, so that htb takes its part of the limit from them. fq knows of the clock.
#[inline(always)]
fn at_once(skb: *mut __sk_buff, end: &HostEnd, direction: u32, others: &Others, now_ns: u64) -> i32 {
    // SAFETY: as in `charge`.
    let others_wait = now_ns < unsafe { (&raw const others.streams_wait_until_ns).read_volatile() };
    if direction == INGRESS && end.waiting_class != 0 && others_wait {
        wait(skb, end, INGRESS, ROOM_INTO_AT_ONCE, 0)
    } else {
        TC_ACT_UNSPEC
    }
}

/// A packet that its socket's hook charges goes on, as one that has been charged does.
#[inline(always)]
fn pass_on(skb: *mut __sk_buff, end: &HostEnd) -> i32 {
    let Some(others) = maps::others(end.slot, INGRESS) else { return TC_ACT_UNSPEC };
    let verdict = at_once(skb, end, INGRESS, others, clock::now_ns());
    if verdict != TC_ACT_UNSPEC {
        // SAFETY: tc programs may write cb.
        unsafe { (*skb).cb[PLACE] = IS_BACK_TO_BE_CHARGED };
    }
    verdict
}

/// Whether a process of the node has sent a packet on its way into the pod: it has come by no interface.
#[inline(always)]
fn is_of_node(skb: *mut __sk_buff) -> bool {
    // SAFETY: tc programs may read ingress_ifindex.
    unsafe { (*skb).ingress_ifindex == 0 }
}

/// Whether the cgroup's hook has charged as many bytes of the packet's socket. That answers to opened connections (SYN-ACK), and what closed
/// ones say last, have no full socket: they pass, since whether a hook has seen them depends on the kernel.
#[inline(always)]
fn is_charged(skb: *mut __sk_buff, end: &HostEnd, bytes: u64) -> bool {
    // SAFETY: tc programs may read sk; the helper takes any socket that is not NULL.
    let (has_socket, socket): (bool, Option<NonNull<bpf_sock>>) = unsafe {
        match NonNull::new((*skb).__bindgen_anon_2.sk) {
            Some(socket) => (true, NonNull::new(bpf_sk_fullsock(socket.as_ptr()))),
            None => (false, None),
        }
    };
    match socket {
        // SAFETY: it is what `bpf_sk_fullsock` gave.
        Some(socket) => unsafe { maps::flow(socket) }.is_some_and(|flow| flow.out_covered.passes(end, bytes, 0)),
        None => has_socket,
    }
}
