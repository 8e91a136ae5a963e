//! TCP in: hold back the acknowledgements, and size the window.
//!
//! A remote sender cannot be paced from here, and dropping its packets makes it crawl. But it sends what acknowledgements let
//! it: the pod's own pure ACKs get the ingress clock as their departure time (fq on the pod's interface honours it), so that they
//! leave as a link of the pod's rate would have delivered what they acknowledge. The application has the data already, and
//! neither ping nor small replies are behind it.
//!
//! Alone that would let the remote's window grow with the backlog without end. So the receive window follows the backlog:
//!
//! ```text
//!   backlog beyond what the remote waits for acknowledgements:  window = one segment, or less
//!   backlog above TARGET:  window *= (rtt + TARGET) / (rtt + backlog), not below half
//!   else, if it was used:  window += a quarter of what windows are            once per max(rtt + backlog, 1 ms)
//! ```
//!
//! All shrink by the same part, and all grow by the same amount, which is what makes them even (additive increase, multiplicative decrease). A
//! window that has met no backlog yet doubles.
//!
//! TARGET is 5 ms and a quarter of the round trip; windows of fewer than four segments, those of many flows, have 7 ms more.
//!
//! It is set as TCP_WINDOW_CLAMP before each ACK chooses its window, since the kernel's autotuning raises it in between.

use aya_ebpf::{helpers::bpf_setsockopt, programs::SockOpsContext};
use podshaper_abi::{INGRESS, Limit, QUEUE_NONE};

use crate::{
    clock::{self, Link},
    flow::{Flow, Window},
    maps, tcp, waited,
};

pub const IPPROTO_TCP: i32 = 6;
/// uapi/linux/tcp.h. Taken from sock_ops since Linux 5.11.
pub const TCP_WINDOW_CLAMP: i32 = 10;

/// The backlog that windows aim for on a short path: enough that a late timer does not leave the clock idle.
const MIN_TARGET_NS: u64 = 5_000_000;
/// How much longer it may be for windows of fewer segments than [`FEW_SEGMENTS`], which are those of many flows: each window is a wake-up of
/// both ends, and two segments at a time are so many that a busy CPU answers too late and the clock falls idle after all.
const FEW_MORE_NS: u64 = 7_000_000;
const FEW_SEGMENTS: u64 = 4;
/// How often a window may change at most: shorter than this a round trip is noise.
const MIN_ROUND_NS: u64 = 1_000_000;
/// A remote sends the last of its segments again after twice its estimate of the round trip and two ticks, of which a kernel has 250
/// to 1000 in a second (`tcp_schedule_loss_probe`); its retransmission timer is later.
const LOSS_PROBE_NS: u64 = 2_000_000;
/// For a single packet it allows 200 ms more for a delayed acknowledgement (`TCP_RTO_MIN`). Some of that is the network's.
const LOSS_PROBE_OF_ONE_NS: u64 = 150_000_000;
/// Beyond this backlog a remote that has more to send is to pause for its persist timer. A few dozen requests that came at once are less than
/// this, and their answers wait for it anyway.
const LONG_NS: u64 = 700_000_000;
/// A backlog that is longer than twice the round trip by this is too much for the flow's window. Not as short as [`LOSS_PROBE_NS`]: a
/// new flow, whose round trip does not count a hold yet, is to grow in a backlog that is as long as others aim for.
const TOO_LONG_NS: u64 = 4_000_000;
/// Up to this backlog a flow has two segments in flight, which is what makes its sender build whole ones: see [`part_of_segment`].
const WHOLE_SEGMENTS_NS: u64 = 25_000_000;
/// How long the first flight may take at the limit, if that is between one segment and [`MAX_INITIAL_RWND`]: the backlog of a few flows
/// that begin together is then not longer than their senders will wait.
const FIRST_FLIGHT_NS: u64 = 4_000_000;
/// How long it may take where the remote has opened the connection. It sends a request, whose answer waits until the link would have delivered
/// it; a request that finds no room for its end waits for its sender's persist timer besides.
const FIRST_REQUEST_NS: u64 = 20_000_000;
/// The first flight of a sender that nobody limits (RFC 6928).
const MAX_INITIAL_RWND: u64 = 10;
/// The least window of a connection whose data waits at the host's end, by what the limit carries in this time. A window is one packet or two of its
/// sender, and each packet is a timer of htb and a wake-up of both ends.
const WAITING_NS: u64 = 1_000_000;
/// The same of MPTCP.
const MULTIPATH_NS: u64 = 10_000_000;
/// A sender builds no larger packets (GSO without BIG TCP), and neither of these windows is more than this.
pub const LARGEST_PACKET_BYTES: u64 = 1 << 16;
/// Beyond this backlog such windows become smaller than that.
const LONG_AT_HOST_NS: u64 = 100_000_000;
/// How long a first flight may wait at the host's end: its sender sends it again after so long (`TCP_RTO_MIN`).
const FIRST_WAIT_NS: u64 = 200_000_000;
/// Segments of what a connection is taken to bring. More would let the first clients of a pod wait for what they do not bring.
const USUAL_REQUEST_SEGMENTS: u64 = 4;
/// Payload of a full packet, where the connection's own is not known yet.
const USUAL_MSS: u64 = 1448;
/// How long after an acknowledgement that rode on data the next ones are expected to.
const RIDES_FOR_NS: u64 = 1_000_000_000;
/// Above this the clamp limits nothing: 8 MB in 5 ms are 13 Gbit/s.
const MAX_WINDOW_BYTES: u64 = 8 << 20;

/// A connection is about to open: says its first window, in segments, if the connection may be limited. By which interface it will send is
/// not known yet.
#[inline(always)]
pub fn announce(ctx: &SockOpsContext) {
    let Some(scope) = maps::only_scope().filter(|scope| tcp::may_be_ours(ctx, scope)) else { return };
    if let Some(link) = Link::of(scope.slot, INGRESS) {
        ctx.set_reply(initial_rwnd(&link, tcp::is_request(ctx)) as u32);
    }
}

/// The first window, in segments. `is_answered`: the remote has opened the connection.
#[inline(always)]
fn initial_rwnd(link: &Link, is_answered: bool) -> u64 {
    let limit = link.limit();
    // What the remote then sends waits at the host's end, and the remote for its acknowledgement: no longer than until it sends it again.
    let backlog_ns = if limit.queue == QUEUE_NONE { 0 } else { link.backlog_ns(clock::now_ns(), 0, false) };
    if backlog_ns > FIRST_WAIT_NS {
        return 2;
    }
    usual_rwnd(limit, is_answered)
}

/// The same where nothing waits.
#[inline(always)]
fn usual_rwnd(limit: &Limit, is_answered: bool) -> u64 {
    let flight_ns = if is_answered { FIRST_REQUEST_NS } else { FIRST_FLIGHT_NS };
    (link_bytes(limit, flight_ns) / USUAL_MSS).clamp(1, MAX_INITIAL_RWND)
}

/// What a connection that a remote opens is taken to bring before any has: what the first window has room for, but for the most that few
/// requests need.
#[inline(always)]
pub fn usual_first_bytes(limit: &Limit) -> u64 {
    usual_rwnd(limit, true).min(USUAL_REQUEST_SEGMENTS) * USUAL_MSS
}

/// A connection is established: its window starts small. From the first acknowledgement on it may be smaller than the first flight.
#[inline(always)]
pub fn open(ctx: &SockOpsContext, is_answered: bool) {
    let Some((flow, link)) = limited(ctx) else { return };
    if maps::only_scope().is_some_and(|scope| !tcp::may_be_ours(ctx, &scope)) {
        // It has inherited the slot of a listener that others ask as well: the pod itself, and who is exempt.
        flow.slot = 0;
        return;
    }
    let mss = tcp::mss(ctx);
    let first_bytes = initial_rwnd(&link, is_answered) * mss;
    // A remote that has seen a larger window sends nothing into one that is shorter than a segment, but by its persist timer.
    let least_bytes = if first_bytes < 2 * mss { part_of_segment(ctx) } else { 2 * mss };
    flow.window.bytes = first_bytes.min(link_bytes(link.limit(), MIN_ROUND_NS)).max(least_bytes);
    flow.window.changed_ns = clock::now_ns();
    flow.window.right_edge = first_bytes;
    flow.window.held_ns = if is_answered { waited::waited_ns(ctx, link.slot()) } else { 0 };
    // What waits at the host's end is known by the first acknowledgement, and whether it is of MPTCP.
    if link.limit().queue == QUEUE_NONE {
        clamp(ctx, flow.window.bytes, flow.application_window_bytes);
    }
}

/// A segment is about to leave. If it is a pure ACK: when it may, and with which window.
#[inline(always)]
pub fn acknowledge(ctx: &SockOpsContext) {
    if tcp::opens_or_closes(ctx) {
        return;
    }
    let Some((flow, link)) = limited(ctx) else { return };
    let now_ns = clock::now_ns();
    let is_held = flow.waiting.is_held(now_ns);
    if tcp::payload_bytes(ctx) != 0 {
        // Data carries the newest acknowledgement. It is not held, since its latency is the application's.
        note_ride(ctx, flow, now_ns);
        if !is_held {
            return;
        }
    }
    let backlog_ns = link.backlog_ns(now_ns, 0, false);
    if is_held {
        // What it acknowledges has waited. The round trips that the pod sees may count that, too, but for the shortest.
        flow.window.held_ns = 0;
        flow.window.hold_until_ns = 0;
        let rtt_ns = tcp::shortest_rtt_ns(ctx);
        let is_long = backlog_ns > 2 * rtt_ns + LONG_AT_HOST_NS;
        if is_long {
            collapse(ctx, &mut flow.window, now_ns, backlog_ns);
        } else {
            resize(ctx, &link, &mut flow.window, now_ns, backlog_ns, rtt_ns);
        }
        if flow.waiting.is_multipath != 0 || !is_long {
            let least_ns = if flow.waiting.is_multipath != 0 { MULTIPATH_NS } else { WAITING_NS };
            flow.window.bytes = flow.window.bytes.max(link_bytes(link.limit(), least_ns).min(LARGEST_PACKET_BYTES));
        }
        flow.waiting.has_windows = advertise(ctx, flow).into();
        return;
    }
    // The remote's estimate counts what its acknowledgements were held. It waits for two of it, whatever else. What the pod itself sends may
    // wait for long, in either direction's name, and the remote's estimate does not count that.
    let two_rtt_ns = 2 * (tcp::shortest_rtt_ns(ctx) + flow.window.held_ns);
    // Of a sparse flow the remote may wait for it before it sends the rest of a request. But where a packet of each flow is a long
    // backlog already, its first ones count.
    let is_sparse = flow.into.is_sparse() && backlog_ns <= LOSS_PROBE_OF_ONE_NS;
    let patience_ns =
        two_rtt_ns + if has_one_in_flight(ctx, &flow.window) { LOSS_PROBE_OF_ONE_NS } else { LOSS_PROBE_NS };
    hold(&mut flow.window, now_ns, if is_sparse { 0 } else { backlog_ns.min(patience_ns) });
    if backlog_ns > two_rtt_ns + TOO_LONG_NS {
        collapse(ctx, &mut flow.window, now_ns, backlog_ns);
    } else {
        resize(ctx, &link, &mut flow.window, now_ns, backlog_ns, tcp::rtt_ns(ctx));
    }
    advertise(ctx, flow);
}

/// Notes that data carries an acknowledgement of a segment: the host's end of the interface then holds what comes, if it can. The answer to a
/// small request carries none of these.
#[inline(always)]
fn note_ride(ctx: &SockOpsContext, flow: &mut Flow, now_ns: u64) {
    let received_bytes = tcp::received_bytes(ctx);
    let before_bytes = flow.window.acknowledged_bytes.max(flow.window.ridden_bytes);
    flow.window.ridden_bytes = received_bytes;
    if received_bytes >= before_bytes + part_of_segment(ctx) {
        flow.waiting.until_ns = now_ns + RIDES_FOR_NS;
    }
}

/// The flow of a socket whose ingress is limited.
#[inline(always)]
fn limited<'a>(ctx: &SockOpsContext) -> Option<(&'a mut Flow, Link)> {
    let flow = tcp::flow(ctx)?;
    let link = Link::of(flow.slot as u32, INGRESS)?;
    Some((flow, link))
}

/// Whether the remote cannot have sent more than one packet since the last acknowledgement. In the window of a whole segment it can: the
/// kernel rounds that up, to what it can say in the header's 16 bits (`__tcp_select_window`), and a remote sends the few bytes too.
#[inline(always)]
fn has_one_in_flight(ctx: &SockOpsContext, window: &Window) -> bool {
    window.right_edge - window.acknowledged_bytes <= part_of_segment(ctx)
}

/// A window for one packet. A remote never builds segments of more than half the largest window it has seen (`tcp_bound_to_half_wnd`): if
/// that was one segment, this is room for one of its halves. If it was more, the remote finds no room for a whole segment, and sends what
/// there is room for by its persist timer, 200 ms later or more (`tcp_probe_timer`).
#[inline(always)]
fn part_of_segment(ctx: &SockOpsContext) -> u64 {
    tcp::mss(ctx) * 3 / 4
}

#[inline(always)]
fn hold(window: &mut Window, now_ns: u64, hold_ns: u64) {
    // `tcp_rtt_estimator`: an eighth of each.
    window.held_ns = window.held_ns / 8 * 7 + hold_ns / 8;
    window.hold_until_ns = if hold_ns == 0 { 0 } else { now_ns + hold_ns };
}

/// The backlog is longer than the remote will wait with two packets in flight: one segment from here on, and at last one packet, for
/// which it waits longer.
#[inline(always)]
fn collapse(ctx: &SockOpsContext, window: &mut Window, now_ns: u64, backlog_ns: u64) {
    window.met_backlog = 1;
    window.bytes = if backlog_ns > LONG_NS { part_of_segment(ctx) } else { least_bytes(ctx, window) };
    window.changed_ns = now_ns;
    window.received_bytes = tcp::received_bytes(ctx);
}

/// The smallest window that is no pause. The remote of a window that is used up need not wait for a delayed ACK: the application's read is
/// answered at once (`__tcp_cleanup_rbuf`).
#[inline(always)]
fn least_bytes(ctx: &SockOpsContext, window: &Window) -> u64 {
    let mss = tcp::mss(ctx);
    if window.largest_bytes < 2 * mss { part_of_segment(ctx) } else { mss }
}

#[inline(always)]
fn resize(ctx: &SockOpsContext, link: &Link, window: &mut Window, now_ns: u64, backlog_ns: u64, rtt_ns: u64) {
    let is_of_few = window.bytes < FEW_SEGMENTS * tcp::mss(ctx);
    let target_ns = target_ns(rtt_ns) + if is_of_few { FEW_MORE_NS } else { 0 };
    // What a change does is seen when all that is in flight has passed.
    let round_ns = (rtt_ns + backlog_ns).max(MIN_ROUND_NS);
    if now_ns - window.changed_ns <= round_ns {
        return;
    }
    let received_bytes = tcp::received_bytes(ctx);
    let used_bytes = received_bytes - window.received_bytes;
    let mut bytes = window.bytes;
    if backlog_ns > target_ns {
        window.met_backlog = 1;
        // checked_div: the compiler does not see that the divisor is above the target, and a panic has no place here.
        let shrunk = (bytes * (rtt_ns + target_ns)).checked_div(rtt_ns + backlog_ns).unwrap_or(bytes);
        bytes = shrunk.max(bytes / 2);
    } else if used_bytes >= bytes / 2 {
        // A window that was not used says nothing about what the link would bear.
        let growth_bytes = growth_bytes(link, bytes, round_ns);
        bytes += if window.met_backlog == 0 { bytes } else { growth_bytes };
    }
    let least_bytes = if backlog_ns <= WHOLE_SEGMENTS_NS { 2 * tcp::mss(ctx) } else { least_bytes(ctx, window) };
    window.bytes = bytes.min(most_bytes(link.limit(), rtt_ns)).max(least_bytes);
    window.changed_ns = now_ns;
    window.received_bytes = received_bytes;
}

/// By how much a window of so many bytes grows in a round: by a quarter of what one usually is that lets through as much as others do.
#[inline(always)]
fn growth_bytes(link: &Link, bytes: u64, round_ns: u64) -> u64 {
    // Not 0: a round is a millisecond at least.
    let round_us = (round_ns / 1_000).max(1);
    let usual_bytes_per_s = link.window_bytes_per_s(bytes * 1_000_000 / round_us);
    // Among larger ones a small window grows by half of itself, so that its flow does not bring a lump.
    (usual_bytes_per_s / 4 * round_us / 1_000_000).min(bytes / 2)
}

/// The backlog that windows aim for. Part of a long round trip, since a window only finds its size by going past it by a quarter and
/// back. It is no latency but in the acknowledgements.
#[inline(always)]
fn target_ns(rtt_ns: u64) -> u64 {
    MIN_TARGET_NS + rtt_ns / 4
}

/// What a single flow has use for: two round trips (they are a guess) and twice the backlog aimed for. More would only grow in the
/// time that an idle clock lags, and then be in flight all at once.
#[inline(always)]
fn most_bytes(limit: &Limit, rtt_ns: u64) -> u64 {
    link_bytes(limit, 2 * (rtt_ns + target_ns(rtt_ns))).min(MAX_WINDOW_BYTES)
}

/// What a link of the limit carries in a time.
#[inline(always)]
fn link_bytes(limit: &Limit, time_ns: u64) -> u64 {
    // By 1000 and by 1000 again, and not by a million: neither may a product overflow, nor a low rate become nothing.
    limit.rate_bits_per_s / 8_000 * (time_ns / 1_000) / 1_000
}

/// Sets the window of the acknowledgement that is about to leave; whether it can be.
#[inline(always)]
fn advertise(ctx: &SockOpsContext, flow: &mut Flow) -> bool {
    let window = &mut flow.window;
    window.acknowledged_bytes = tcp::received_bytes(ctx);
    // A window never takes back what it has given.
    window.right_edge = window.right_edge.max(window.acknowledged_bytes + window.bytes);
    window.largest_bytes = window.largest_bytes.max(window.right_edge - window.acknowledged_bytes);
    clamp(ctx, window.bytes, flow.application_window_bytes)
}

/// `own_bytes`: the application's own clamp, which holds where it is the smaller one. 0: there is none.
#[inline(always)]
fn clamp(ctx: &SockOpsContext, bytes: u64, own_bytes: u64) -> bool {
    let mut value = if own_bytes == 0 { bytes } else { bytes.min(own_bytes) } as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack. Linux 5.10
    // does not know it here: windows then grow until the bound drops.
    unsafe {
        let (value, bytes) = ((&raw mut value).cast(), size_of::<u32>() as i32);
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_WINDOW_CLAMP, value, bytes) == 0
    }
}
