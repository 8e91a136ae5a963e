//! Received TCP: hold back the pod's acknowledgements, and size the receive window.
//!
//! A program on this node cannot pace a remote sender, and a sender whose packets are dropped slows to a crawl. But the
//! remote sends as acknowledgements allow. So the pod's own pure ACKs get the ingress clock as their departure time,
//! which fq on the pod's interface honours: an ACK leaves when a link of the pod's rate would have delivered the data
//! that the ACK acknowledges. The application has the data already, and neither ping nor small replies wait behind the
//! ACKs.
//!
//! Held ACKs alone would let the remote's window grow with the backlog without end. So the receive window follows the
//! backlog:
//!
//! ```text
//!   backlog beyond the remote's patience for ACKs:  window = one segment, or less
//!   backlog above TARGET:  window *= (rtt + TARGET) / (rtt + backlog), not below half
//!   else, if it was used:  window += a quarter of the usual window            once per max(rtt + backlog, 1 ms)
//! ```
//!
//! All windows shrink by the same factor and grow by the same amount. Additive increase with multiplicative decrease
//! makes the windows even. A window that has met no backlog yet doubles.
//!
//! TARGET is 5 ms plus a quarter of the round trip. Windows of fewer than four segments, which are those of many flows,
//! get 7 ms more.
//!
//! The window is set as TCP_WINDOW_CLAMP before each ACK chooses the window to advertise, since the kernel's autotuning
//! raises the window in between.

use aya_ebpf::{helpers::bpf_setsockopt, programs::SockOpsContext};
use podshaper_abi::{INGRESS, Limit, QUEUE_NONE};

use crate::{
    clock::{self, Link},
    flow::{Flow, Window},
    maps, tcp, waited,
};

pub const IPPROTO_TCP: i32 = 6;
/// uapi/linux/tcp.h. sock_ops programs may set this option since Linux 5.11.
pub const TCP_WINDOW_CLAMP: i32 = 10;

/// The backlog that windows aim for on a short path: long enough that the clock does not fall idle when a timer is
/// late.
const MIN_TARGET_NS: u64 = 5_000_000;
/// How much longer the target backlog is for windows of fewer segments than [`FEW_SEGMENTS`], which are those of many
/// flows. Each window costs a wake-up of both ends. With two segments at a time the wake-ups are so many that a busy
/// CPU answers too late, and the clock falls idle.
const FEW_MORE_NS: u64 = 7_000_000;
const FEW_SEGMENTS: u64 = 4;
/// The shortest time between two changes of a window: a shorter round trip is noise.
const MIN_ROUND_NS: u64 = 1_000_000;
/// A remote repeats the last of its segments after twice its estimate of the round trip and two ticks
/// (`tcp_schedule_loss_probe`). Kernels have 250 to 1000 ticks a second. The remote's retransmission timer is later.
const LOSS_PROBE_NS: u64 = 2_000_000;
/// For a single packet in flight the remote's probe waits 200 ms more, for a delayed acknowledgement (`TCP_RTO_MIN`).
/// The value leaves some of the 200 ms to the network.
const LOSS_PROBE_OF_ONE_NS: u64 = 150_000_000;
/// Beyond this backlog a remote that has more to send is to pause for its persist timer. A few dozen requests that
/// arrive at once are a shorter backlog, and their answers wait for that backlog anyway.
const LONG_NS: u64 = 700_000_000;
/// A backlog that exceeds twice the round trip by this much is too long for the flow's window. The value is larger than
/// [`LOSS_PROBE_NS`]: the round trip of a new flow does not include a hold yet, and such a flow is to grow in a backlog
/// as long as the other flows aim for.
const TOO_LONG_NS: u64 = 4_000_000;
/// Up to this backlog a flow has two segments in flight, so that its sender builds whole segments: see
/// [`part_of_segment`].
const WHOLE_SEGMENTS_NS: u64 = 25_000_000;
/// How long the first flight may take at the limit, if that is between one segment and [`MAX_INITIAL_RWND`]. The
/// backlog of a few flows that begin together is then shorter than their senders' patience.
const FIRST_FLIGHT_NS: u64 = 4_000_000;
/// How long the first flight may take where the remote has opened the connection. Such a remote sends a request. The
/// answer waits until the link would have delivered the request. If the window has no room for the end of the request,
/// the end also waits for the sender's persist timer.
const FIRST_REQUEST_NS: u64 = 20_000_000;
/// The first flight of a sender that has no limit (RFC 6928).
const MAX_INITIAL_RWND: u64 = 10;
/// The smallest window of a connection whose data waits at the host end of the veth, as the time that the limit takes
/// to carry the window. A window is one or two packets of the sender, and each packet costs a timer of htb and a
/// wake-up of both ends.
const WAITING_NS: u64 = 1_000_000;
/// The smallest such window of an MPTCP connection.
const MULTIPATH_NS: u64 = 10_000_000;
/// A sender builds no larger packets (GSO without BIG TCP), and neither of the two smallest windows above exceeds this.
pub const LARGEST_PACKET_BYTES: u64 = 1 << 16;
/// Beyond this backlog the windows of data that waits at the host end become smaller than those two.
const LONG_AT_HOST_NS: u64 = 100_000_000;
/// How long a first flight may wait at the host end: its sender repeats the flight after this time (`TCP_RTO_MIN`).
const FIRST_WAIT_NS: u64 = 200_000_000;
/// Segments that a connection is assumed to bring, at most. With a higher number the first clients of a pod would wait
/// for data that never comes.
const USUAL_REQUEST_SEGMENTS: u64 = 4;
/// Payload of a full packet, where the connection's own segment size is not known yet.
const USUAL_MSS: u64 = 1448;
/// How long after an acknowledgement rode on data the next acknowledgements are expected to ride on data as well.
const RIDES_FOR_NS: u64 = 1_000_000_000;
/// Few receive buffers are larger. TCP itself can announce at most four times as much.
const MAX_WINDOW_BYTES: u64 = 1 << 28;
/// The round trip of a connection whose round trip is not known yet is 71 minutes (`tcp_init_sock`). With this bound no
/// product of a time and a window, or a rate, overflows.
const MAX_RTT_NS: u64 = 1 << 34;

/// A connection is about to open: reports its first window, in segments, to the kernel if the connection may be
/// limited. The interface by which the socket will send is not known yet.
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
    // The data that the remote then sends waits at the host end, and the remote waits for the acknowledgement. The wait
    // must not be so long that the remote repeats the data.
    let backlog_ns = if limit.queue == QUEUE_NONE { 0 } else { link.backlog_ns(clock::now_ns(), 0, false) };
    if backlog_ns > FIRST_WAIT_NS {
        return 2;
    }
    usual_rwnd(limit, is_answered)
}

/// The first window where there is no backlog, in segments.
#[inline(always)]
fn usual_rwnd(limit: &Limit, is_answered: bool) -> u64 {
    let flight_ns = if is_answered { FIRST_REQUEST_NS } else { FIRST_FLIGHT_NS };
    (link_bytes(limit, flight_ns) / USUAL_MSS).clamp(1, MAX_INITIAL_RWND)
}

/// Bytes that a connection opened by a remote is assumed to bring before any connection has been measured: the size of
/// the first window, but at most a size that few requests exceed.
#[inline(always)]
pub fn usual_first_bytes(limit: &Limit) -> u64 {
    usual_rwnd(limit, true).min(USUAL_REQUEST_SEGMENTS) * USUAL_MSS
}

/// A connection is established: its window starts small. From the first acknowledgement on the window may be smaller
/// than the first flight.
#[inline(always)]
pub fn open(ctx: &SockOpsContext, is_answered: bool) {
    let Some((flow, link)) = limited(ctx) else { return };
    if maps::only_scope().is_some_and(|scope| !tcp::may_be_ours(ctx, &scope)) {
        // The socket has inherited the slot of its listener, which also serves the pod itself and exempt clients.
        flow.slot = 0;
        return;
    }
    let mss = tcp::mss(ctx);
    let first_bytes = initial_rwnd(&link, is_answered) * mss;
    // A remote that has seen a larger window sends into a window shorter than a segment only by its persist timer.
    let least_bytes = if first_bytes < 2 * mss { part_of_segment(ctx) } else { 2 * mss };
    flow.window.bytes = first_bytes.min(link_bytes(link.limit(), MIN_ROUND_NS)).max(least_bytes);
    flow.window.changed_ns = clock::now_ns();
    flow.window.right_edge = first_bytes;
    flow.window.held_ns = if is_answered { waited::waited_ns(ctx, link.slot()) } else { 0 };
    // Whether the connection's data waits at the host end, and whether the connection is MPTCP, is known by the first
    // acknowledgement.
    if link.limit().queue == QUEUE_NONE {
        clamp(ctx, flow.window.bytes, flow.application_window_bytes);
    }
}

/// A segment is about to leave. For a pure ACK: decides when the ACK may leave, and with which window.
#[inline(always)]
pub fn acknowledge(ctx: &SockOpsContext) {
    if tcp::opens_or_closes(ctx) {
        return;
    }
    let Some((flow, link)) = limited(ctx) else { return };
    let now_ns = clock::now_ns();
    let is_held = flow.waiting.is_held(now_ns);
    if tcp::payload_bytes(ctx) != 0 {
        // Data carries the newest acknowledgement. The data is not held, since its latency is the application's
        // latency.
        note_ride(ctx, flow, now_ns);
        if !is_held {
            return;
        }
    }
    let backlog_ns = link.backlog_ns(now_ns, 0, false);
    if is_held {
        // The acknowledged data has waited at the host end. The round trips that the pod measures may include that
        // wait, except the shortest.
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
    // The remote's estimate of the round trip includes the time for which its acknowledgements were held, and the
    // remote waits for at least twice the estimate. The pod's own packets may wait for long, for the egress or for the
    // ingress limit, and the remote's estimate does not include that wait: hence the shortest round trip.
    let two_rtt_ns = 2 * (tcp::shortest_rtt_ns(ctx) + flow.window.held_ns);
    // The remote of a sparse flow may need the acknowledgement before it sends the rest of a request. But where one
    // packet of each flow is a long backlog already, the first packets of a flow must be held as well.
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

/// Notes that data carries the acknowledgement of a segment: the host end then holds the packets that come to the
/// connection, if it can. The answer to a small request acknowledges less than a segment and does not count.
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

/// Whether the remote cannot have sent more than one packet since the last acknowledgement. In a window of a whole
/// segment the remote can have sent more: the kernel rounds that window up to a value that the header's 16 bits can
/// express (`__tcp_select_window`), and a remote sends the few extra bytes too.
#[inline(always)]
fn has_one_in_flight(ctx: &SockOpsContext, window: &Window) -> bool {
    window.right_edge - window.acknowledged_bytes <= part_of_segment(ctx)
}

/// A window for one packet. A remote never builds segments of more than half the largest window it has seen
/// (`tcp_bound_to_half_wnd`). If the largest window was one segment, this window has room for one such half. If the
/// largest window was more, the remote finds no room for a whole segment, and sends the part that fits by its persist
/// timer, 200 ms later or more (`tcp_probe_timer`).
#[inline(always)]
fn part_of_segment(ctx: &SockOpsContext) -> u64 {
    tcp::mss(ctx) * 3 / 4
}

#[inline(always)]
fn hold(window: &mut Window, now_ns: u64, hold_ns: u64) {
    // As in `tcp_rtt_estimator`: each sample counts for an eighth.
    window.held_ns = window.held_ns / 8 * 7 + hold_ns / 8;
    window.hold_until_ns = if hold_ns == 0 { 0 } else { now_ns + hold_ns };
}

/// The backlog is longer than the remote's patience with two packets in flight. The window becomes one segment, and
/// beyond [`LONG_NS`] one packet, for which the remote waits longer.
#[inline(always)]
fn collapse(ctx: &SockOpsContext, window: &mut Window, now_ns: u64, backlog_ns: u64) {
    window.met_backlog = 1;
    window.bytes = if backlog_ns > LONG_NS { part_of_segment(ctx) } else { least_bytes(ctx, window) };
    window.changed_ns = now_ns;
    window.received_bytes = tcp::received_bytes(ctx);
}

/// The smallest window that does not make the remote pause. The remote does not wait for a delayed ACK when the window
/// is used up: the application's read sends an acknowledgement at once (`__tcp_cleanup_rbuf`).
#[inline(always)]
fn least_bytes(ctx: &SockOpsContext, window: &Window) -> u64 {
    let mss = tcp::mss(ctx);
    if window.largest_bytes < 2 * mss { part_of_segment(ctx) } else { mss }
}

#[inline(always)]
fn resize(ctx: &SockOpsContext, link: &Link, window: &mut Window, now_ns: u64, backlog_ns: u64, rtt_ns: u64) {
    let rtt_ns = rtt_ns.min(MAX_RTT_NS);
    let is_of_few = window.bytes < FEW_SEGMENTS * tcp::mss(ctx);
    let target_ns = target_ns(rtt_ns) + if is_of_few { FEW_MORE_NS } else { 0 };
    // The effect of a change shows when all packets in flight have passed.
    let round_ns = (rtt_ns + backlog_ns).max(MIN_ROUND_NS);
    if now_ns - window.changed_ns <= round_ns {
        return;
    }
    let received_bytes = tcp::received_bytes(ctx);
    let used_bytes = received_bytes - window.received_bytes;
    let mut bytes = window.bytes;
    if backlog_ns > target_ns {
        window.met_backlog = 1;
        // checked_div: the compiler does not see that the divisor is above the target, and a panic is not possible
        // here.
        let shrunk = (bytes * (rtt_ns + target_ns)).checked_div(rtt_ns + backlog_ns).unwrap_or(bytes);
        bytes = shrunk.max(bytes / 2);
    } else if used_bytes >= bytes / 2 {
        // A window that was not used does not show how much the link would carry.
        let growth_bytes = growth_bytes(link, bytes, round_ns);
        bytes += if window.met_backlog == 0 { bytes } else { growth_bytes };
    }
    let least_bytes = if backlog_ns <= WHOLE_SEGMENTS_NS { 2 * tcp::mss(ctx) } else { least_bytes(ctx, window) };
    window.bytes = bytes.min(most_bytes(link.limit(), rtt_ns)).max(least_bytes);
    window.changed_ns = now_ns;
    window.received_bytes = received_bytes;
}

/// Bytes by which a window of `bytes` grows in a round: a quarter of the usual window, which is the window that lets
/// through as many bytes per second as the others do.
#[inline(always)]
fn growth_bytes(link: &Link, bytes: u64, round_ns: u64) -> u64 {
    // Never 0: a round is at least a millisecond.
    let round_us = (round_ns / 1_000).max(1);
    let usual_bytes_per_s = link.window_bytes_per_s(bytes * 1_000_000 / round_us);
    // Among larger windows a small window grows by half of itself at most, so that its flow does not send a lump of
    // packets.
    (usual_bytes_per_s / 4 * round_us / 1_000_000).min(bytes / 2)
}

/// The backlog that windows aim for. The target includes part of a long round trip, since a window finds its size only
/// by overshooting by a quarter and shrinking again. Only acknowledgements see this backlog as latency.
#[inline(always)]
fn target_ns(rtt_ns: u64) -> u64 {
    MIN_TARGET_NS + rtt_ns / 4
}

/// The largest window that a single flow can use: two round trips, since the measured one is an estimate, and twice the
/// target backlog. A larger window would only grow while an idle clock lags, and all of it would then be in flight at
/// once.
#[inline(always)]
fn most_bytes(limit: &Limit, rtt_ns: u64) -> u64 {
    link_bytes(limit, 2 * (rtt_ns + target_ns(rtt_ns))).min(MAX_WINDOW_BYTES)
}

/// Bytes that a link of the limit carries in a time.
#[inline(always)]
fn link_bytes(limit: &Limit, time_ns: u64) -> u64 {
    // Divided by 1000 twice, and not by a million once: no product may overflow, and a low rate must not become 0. The
    // rates below 8 kbit/s do: the callers have a least window.
    limit.rate_bits_per_s / 8_000 * (time_ns / 1_000) / 1_000
}

/// Sets the window of the acknowledgement that is about to leave. Returns whether the kernel accepts the window.
#[inline(always)]
fn advertise(ctx: &SockOpsContext, flow: &mut Flow) -> bool {
    let window = &mut flow.window;
    window.acknowledged_bytes = tcp::received_bytes(ctx);
    // A window never takes back bytes that it has granted.
    window.right_edge = window.right_edge.max(window.acknowledged_bytes + window.bytes);
    window.largest_bytes = window.largest_bytes.max(window.right_edge - window.acknowledged_bytes);
    clamp(ctx, window.bytes, flow.application_window_bytes)
}

/// Sets TCP_WINDOW_CLAMP. `own_bytes`: the application's own clamp, which wins where it is smaller. 0: the application
/// has set none.
#[inline(always)]
fn clamp(ctx: &SockOpsContext, bytes: u64, own_bytes: u64) -> bool {
    let mut value = if own_bytes == 0 { bytes } else { bytes.min(own_bytes) } as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack.
    // Linux 5.10 does not know the option here: windows then grow until packets are dropped at the bound.
    unsafe {
        let (value, bytes) = ((&raw mut value).cast(), size_of::<u32>() as i32);
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_WINDOW_CLAMP, value, bytes) == 0
    }
}
