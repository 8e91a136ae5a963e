//! Packets that pass the pod's interface and that no hook of its cgroup has seen: packets of a tunnel, a bridge or a
//! nested namespace made in the pod, of an AF_PACKET socket, of a socket in another cgroup, forwarded packets, and the
//! kernel's own. The programs here are at the host end of the pod's veth, where the pod cannot detach them.
//!
//! For each socket the cgroup's hooks count the bytes that they have charged, and the host end counts the bytes that
//! it has let pass for that charge ([`Covered`](crate::flow::Covered)). A packet that leaves the pod still knows its
//! socket: `skb->sk` outlives a veth. For a packet that enters the pod, the socket is looked up in the pod's
//! namespace. A packet that is not covered has taken another path, whatever its addresses, marks or headers: the
//! programs look at nothing that a pod can forge. Such a packet is charged to the pod clock, and waits in the *waiting
//! room*, a veth of the node with fq or htb. From there the packet returns to the interface from which it was taken,
//! and to the filters of other tools there.
//!
//! ```text
//!   eth0 ─► host end, ingress: out_of_pod ─┬─ covered, or its turn ─► filters of other tools, bridge, routes
//!                       ▲                  └─ else ─► podshaper-wait: wait_here, fq/htb ─► podshaper-back: go_back ─┐
//!                       └───────────────────────────────────────────────────────────────────────────────────────────┘
//!   packets that enter the pod take the same path, from the egress of the host end: into_pod
//! ```
//!
//! Packets to the pod's own connections also wait in the waiting room if the acknowledgements of these connections
//! cannot be held ([`hold`]): acknowledgements that ride on data, and all acknowledgements of a pod without fq. So do
//! datagrams for the pod's sockets ([`hold_datagram`]). A packet in fq leaves at its departure time, which is taken
//! from the clock. htb does not know the clock. So while packets wait in htb, every other packet that enters the pod
//! passes another class of the same htb, which never delays packets but takes their part of the limit from those that
//! wait.

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

/// How late fq or htb may be with a packet. After this time a packet that waited has certainly left, and the next
/// packet may pass without overtaking it.
const LATE_NS: u64 = 50_000_000;
/// Bytes of the backlog that packets of other paths count as, like one flow: a first flight of TCP.
const OTHERS_BURST_BYTES: u64 = 1 << 14;
/// Backlog up to which packets of a connection whose acknowledgements cannot be held pass at once: as long as the
/// windows aim for, so that the clock does not fall idle when a timer is late.
const AHEAD_NS: u64 = 5_000_000;
/// Up to this backlog a SYN, or another packet before a connection is open, is not dropped.
const REQUEST_BOUND_NS: u64 = 500_000_000;
/// How long after a SYN-ACK the hook leaves the next SYN-ACK to be charged here.
const ANSWERS_HERE_NS: u64 = 1_000_000_000;

impl Waiting {
    /// Whether a packet is a copy of a packet that waits here: the sender repeated it too early. A packet that fills a
    /// gap is none: its original was lost on the way.
    #[inline(always)]
    fn has(&self, segment: Segment, now_ns: u64) -> bool {
        let [first, next] = [(self.sequences >> 32) as u32, self.sequences as u32];
        let is_behind = segment.sequence.wrapping_sub(first) as i32 >= 0;
        let ahead = segment.sequence.wrapping_add(segment.payload).wrapping_sub(next) as i32;
        segment.payload != 0 && is_behind && ahead <= 0 && now_ns + LATE_NS < self.waits_until_ns
    }

    /// Notes a packet that waits from now on, until `edt_ns`.
    #[inline(always)]
    fn add(&mut self, segment: Segment, now_ns: u64, edt_ns: u64) {
        let is_next = now_ns < self.waits_until_ns && segment.sequence == self.sequences as u32;
        let first = if is_next { self.sequences >> 32 } else { segment.sequence.into() };
        self.sequences = first << 32 | u64::from(segment.sequence.wrapping_add(segment.payload));
        self.waits_until_ns = edt_ns + LATE_NS;
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
    // Asked first: no hook charges exempt packets, so they must not pass for bytes that others were charged for.
    let is_exempt = subnets::are_exempt(&packet, end.list, Remote::DESTINATION.after(ETHERNET_HEADER_BYTES));
    if is_exempt || is_charged(skb, end, wire.bytes) || is_answer_in_time(&packet, end, &wire) {
        TC_ACT_UNSPEC
    } else {
        charge(skb, end, EGRESS, &wire)
    }
}

/// Whether a packet is a SYN-ACK within the share of SYN-ACKs. fq removes the socket from a SYN-ACK (`fq_classify`),
/// so the SYN-ACK is charged here. On kernels on which the hook sees SYN-ACKs, the hook would charge them as well, so
/// the hook leaves them alone while SYN-ACKs arrive here. A pod that forges SYN-ACKs gets no more than that share.
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
    // Asked first, as in `out_of_pod`.
    if subnets::are_exempt(&packet, end.list, Remote::SOURCE.after(ETHERNET_HEADER_BYTES)) {
        return TC_ACT_UNSPEC;
    }
    let verdict = match coming(&packet, end, wire.bytes) {
        Coming::OfRequest if !opens_within_limit(end, &wire) => return TC_ACT_SHOT,
        Coming::OfRequest | Coming::ToBeCharged if end.holds_streams == 0 => return TC_ACT_UNSPEC,
        Coming::OfRequest | Coming::ToBeCharged => return pass_on(skb, end),
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

/// Tells the hook of the receiving socket that the packet has been charged: a socket's first packet, a raw socket's
/// packet, or the fragments of a datagram, which has the hash of its first fragment once it is whole. No other field
/// of a packet outlives the way into another namespace and can be read there. A pod that forges the hash gains
/// nothing: the host end lets pass only bytes that a hook has charged.
#[inline(always)]
fn mark_charged(skb: *mut __sk_buff, end: &HostEnd) {
    // SAFETY: tc programs may call it.
    unsafe { bpf_set_hash(skb, end.slot) };
}

/// Whether the host end has charged a packet that a hook sees to this attachment. Slots are random, as hashes are.
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

/// Charges a packet that no hook charges. The packet goes on if it is its turn; else it waits, or is dropped.
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
        return refuse(others, wire);
    }
    add(&mut others.bytes, wire.bytes);
    add(&mut others.packets, wire.segments);
    if is_fresh || is_alone && before_ns == 0 || end.waiting_ifindex == 0 {
        return at_once(skb, end, direction, others, now_ns);
    }
    let own_ns = link.transmit_ns(wire.bytes, wire.segments);
    link.fair_wait_ns(wire.bytes, OTHERS_BURST_BYTES, own_ns, before_ns + own_ns);
    let edt_ns = now_ns + before_ns;
    // SAFETY: as above. If two CPUs write at once, a packet may overtake a packet of the other CPU.
    unsafe { (&raw mut others.waits_until_ns).write_volatile(edt_ns + LATE_NS) };
    wait(skb, end, direction, if direction == INGRESS { ROOM_INTO_QUEUE } else { ROOM_OUT }, edt_ns)
}

/// Charges a packet of a connection whose acknowledgements cannot be held: either they ride on the pod's own data,
/// which would be late with them or overtake them (fq lets data overtake since Linux 6.7), or there is no fq. So the
/// packets wait here, until the backlog is as long as windows aim for.
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
        return refuse(others, wire);
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
    // The clock never goes back, so these departure times do not either: packets of a connection stay in order.
    let edt_ns = now_ns + before_ns.max(AHEAD_NS) - AHEAD_NS;
    waiting.add(segment, now_ns, edt_ns);
    wait_for_turn(skb, end, others, edt_ns)
}

/// Charges a datagram for a socket of the pod. A sender with congestion control (QUIC, TCP within a tunnel) needs a
/// queue to find its rate. If excess datagrams were only dropped, a sender with a shorter round trip would send more.
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
    // QUIC considers a datagram lost when three later ones have overtaken it.
    let follows = now_ns < flow.waiting.waits_until_ns;
    if !waits || before_ns <= AHEAD_NS && !follows {
        return at_once(skb, end, INGRESS, others, now_ns);
    }
    let edt_ns = now_ns + before_ns.max(AHEAD_NS) - AHEAD_NS;
    flow.waiting.waits_until_ns = edt_ns + LATE_NS;
    wait_for_turn(skb, end, others, edt_ns)
}

/// Charges a SYN, or another packet that comes before a connection is open, as one of a new flow. If new flows have
/// used up their part of the rate, the packet counts as [`WAITED`], and beyond [`REQUEST_BOUND_NS`] it is dropped: an
/// endless stream of SYNs is a flood. A dropped packet is not charged. Where acknowledgements are held, the packet is
/// a SYN and waits as long as
/// [`requests::edt_ns`] says. Otherwise the packet waits for the backlog, unless new flows have room.
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
        return refuse(others, wire);
    }
    // No bound is in force for either class: the packet passes.
    let class = if is_fresh { FRESH } else { WAITED };
    if end.holds_streams == 0 {
        let Some(edt_ns) = requests::edt_ns(&link, others, now_ns, before_ns, is_of_node(skb)) else {
            return refuse(others, wire);
        };
        link.admits(wire.bytes, wire.segments, class, false);
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
    link.admits(wire.bytes, wire.segments, class, false);
    if is_fresh || end.waiting_ifindex == 0 || before_ns <= AHEAD_NS {
        return at_once(skb, end, INGRESS, others, now_ns);
    }
    wait(skb, end, INGRESS, ROOM_INTO_QUEUE, now_ns + before_ns - AHEAD_NS)
}

/// Whether a packet of a connection that is being opened passes. The kernel drops some of these packets before it asks
/// a hook (`tcp_v4_rcv`: a wrong checksum), and an AF_PACKET socket sees them. So all of them together have the limit,
/// on a clock of their own.
#[inline(always)]
fn opens_within_limit(end: &HostEnd, wire: &Wire) -> bool {
    let (Some(link), Some(others)) = (Link::of(end.slot, INGRESS), maps::others(end.slot, INGRESS)) else {
        return true;
    };
    let now_ns = clock::now_ns();
    let next = &raw mut others.next_answer_ns;
    // SAFETY: as in `charge`. If two CPUs write at once, one packet is not counted.
    unsafe {
        let next_ns = next.read_volatile().max(now_ns);
        if next_ns > now_ns + REQUEST_BOUND_NS {
            refuse(others, wire);
            return false;
        }
        next.write_volatile(next_ns + link.transmit_ns(wire.bytes, wire.segments));
    }
    true
}

/// Drops a packet that was not charged, and counts it.
#[inline(always)]
fn refuse(others: &mut Others, wire: &Wire) -> i32 {
    add(&mut others.drops, wire.segments);
    TC_ACT_SHOT
}

/// A packet for a socket of the pod waits. The pod's state notes until when, so that packets that leave at once
/// meanwhile take the path of [`at_once`] through htb.
#[inline(always)]
fn wait_for_turn(skb: *mut __sk_buff, end: &HostEnd, others: &mut Others, edt_ns: u64) -> i32 {
    // SAFETY: as in `charge`.
    unsafe { (&raw mut others.streams_wait_until_ns).write_volatile(edt_ns + LATE_NS) };
    wait(skb, end, INGRESS, ROOM_INTO_QUEUE, edt_ns)
}

/// A packet goes on. While other packets wait in htb, the packet passes htb as well, so that htb takes the packet's
/// part of the limit from the others. With fq the packet need not: departure times come from the clock.
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

/// A packet that its socket's hook will charge goes on, in the way of a packet that has been charged.
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

/// Whether a process of the node has sent a packet that enters the pod: such a packet has no ingress interface.
#[inline(always)]
fn is_of_node(skb: *mut __sk_buff) -> bool {
    // SAFETY: tc programs may read ingress_ifindex.
    unsafe { (*skb).ingress_ifindex == 0 }
}

/// Whether the cgroup's hook has charged enough bytes for the packet's socket. A SYN-ACK, and the last packets of
/// closed connections, have no full socket: they pass, since whether a hook has seen them depends on the kernel.
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
        // SAFETY: the socket comes from `bpf_sk_fullsock`.
        Some(socket) => unsafe { maps::flow(socket) }.is_some_and(|flow| flow.out_covered.passes(end, bytes, 0)),
        None => has_socket,
    }
}
