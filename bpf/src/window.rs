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
//!   backlog beyond what the remote waits for an acknowledgement:  window = one segment
//!   backlog above TARGET:  window *= (rtt + TARGET) / (rtt + backlog), not below half
//!   else, if it was used:  window *= 1.25 (2 until the first backlog)         once per max(rtt + backlog, 1 ms)
//! ```
//!
//! It is set as TCP_WINDOW_CLAMP before each ACK chooses its window, since the kernel's autotuning raises it in between.

use aya_ebpf::{helpers::bpf_setsockopt, programs::SockOpsContext};
use podshaper_abi::{INGRESS, Limit};

use crate::{clock, flow::Window, maps, tcp};

const IPPROTO_TCP: i32 = 6;
/// uapi/linux/tcp.h. Taken from sock_ops since Linux 5.11.
const TCP_WINDOW_CLAMP: i32 = 10;

/// The backlog that windows aim for on a short path: enough that a late timer does not leave the clock idle.
const SHORTEST_TARGET_NS: u64 = 5_000_000;
/// How often a window may change at most: shorter than this a round trip is noise.
const SHORTEST_ROUND_NS: u64 = 1_000_000;
/// A remote sends the last of its segments again after twice its estimate of the round trip and two ticks, of which a kernel has 250
/// to 1000 in a second (`tcp_schedule_loss_probe`); its retransmission timer is later.
const LOSS_PROBE_NS: u64 = 4_000_000;
/// For a single segment it allows 200 ms more for a delayed acknowledgement (`TCP_RTO_MIN`). Some of that is the network's.
const LOSS_PROBE_OF_ONE_NS: u64 = 150_000_000;
/// How long the first flight may take at the limit, if that is between [`FIRST_LEAST_SEGMENTS`] and [`FIRST_MOST_SEGMENTS`]: the backlog of a
/// few flows that begin together is then not longer than their senders will wait.
const FIRST_FLIGHT_NS: u64 = 4_000_000;
/// A sender never builds segments of more than half the largest window it has seen (`tcp_bound_to_half_wnd`).
const FIRST_LEAST_SEGMENTS: u64 = 2;
/// The first flight of a sender that nobody limits (RFC 6928).
const FIRST_MOST_SEGMENTS: u64 = 10;
/// Payload of a full packet, where the connection's own is not known yet.
const USUAL_MSS: u64 = 1448;
/// One segment in flight is what a sender waits for longest (see [`patience_ns`]). And it need not wait for a delayed ACK: with a window
/// that was used up the application's read is answered at once (`__tcp_cleanup_rbuf`).
const LEAST_SEGMENTS: u64 = 1;
/// Above this the clamp limits nothing: 8 MB in 5 ms are 13 Gbit/s.
const MOST_BYTES: u64 = 8 << 20;

/// The first window, in segments.
#[inline(always)]
pub fn first_segments() -> u64 {
    let limit = maps::limit(INGRESS);
    let flight_bytes = limit.map_or(0, |limit| link_bytes(&limit, FIRST_FLIGHT_NS));
    (flight_bytes / USUAL_MSS).clamp(FIRST_LEAST_SEGMENTS, FIRST_MOST_SEGMENTS)
}

/// A connection is established: its window starts small. From the first acknowledgement on it may be smaller than the first flight.
#[inline(always)]
pub fn open(ctx: &SockOpsContext) {
    let (Some(limit), Some(flow)) = (maps::limit(INGRESS), tcp::flow(ctx)) else { return };
    let mss = tcp::mss(ctx);
    flow.window.bytes = (first_segments() * mss).min(link_bytes(&limit, SHORTEST_ROUND_NS)).max(LEAST_SEGMENTS * mss);
    flow.window.changed_ns = clock::now_ns();
    flow.window.edge_bytes = first_segments() * mss;
    clamp(ctx, flow.window.bytes);
}

/// A segment is about to leave. If it is a pure ACK: when it may, and with which window.
#[inline(always)]
pub fn acknowledge(ctx: &SockOpsContext) {
    // Data carries acknowledgements too; it is not held, since its latency is the application's.
    if tcp::payload_bytes(ctx) != 0 || tcp::opens_or_closes(ctx) {
        return;
    }
    let (Some(limit), Some(flow)) = (maps::limit(INGRESS), tcp::flow(ctx)) else { return };
    let backlog_ns = clock::backlog(INGRESS.into(), 0, 0);
    let now_ns = clock::now_ns();
    let patience_ns = patience_ns(ctx, &flow.window);
    hold(&mut flow.window, now_ns, if flow.into.is_left() { 0 } else { backlog_ns.min(patience_ns) });
    if backlog_ns > patience_ns {
        collapse(ctx, &mut flow.window, now_ns);
    } else {
        resize(ctx, &limit, &mut flow.window, now_ns, backlog_ns);
    }
    advertise(ctx, &mut flow.window);
}

/// How long the remote will wait for the acknowledgement of all it has sent before it sends some again.
#[inline(always)]
fn patience_ns(ctx: &SockOpsContext, window: &Window) -> u64 {
    let unacknowledged_bytes = window.edge_bytes - window.acknowledged_bytes;
    // A half more: a window is rounded up (`__tcp_select_window`).
    let is_one = unacknowledged_bytes <= LEAST_SEGMENTS * tcp::mss(ctx) * 3 / 2;
    let beyond_ns = if is_one { LOSS_PROBE_OF_ONE_NS } else { LOSS_PROBE_NS };
    2 * (tcp::rtt_ns(ctx) + window.held_ns) + beyond_ns
}

#[inline(always)]
fn hold(window: &mut Window, now_ns: u64, hold_ns: u64) {
    // `tcp_rtt_estimator`: an eighth of each.
    window.held_ns = window.held_ns / 8 * 7 + hold_ns / 8;
    window.hold_until_ns = if hold_ns == 0 { 0 } else { now_ns + hold_ns };
}

/// The backlog is longer than the remote will wait: one segment from here on, for which it waits longer.
#[inline(always)]
fn collapse(ctx: &SockOpsContext, window: &mut Window, now_ns: u64) {
    window.met_backlog = 1;
    window.bytes = LEAST_SEGMENTS * tcp::mss(ctx);
    window.changed_ns = now_ns;
    window.received_bytes = tcp::received_bytes(ctx);
}

#[inline(always)]
fn resize(ctx: &SockOpsContext, limit: &Limit, window: &mut Window, now_ns: u64, backlog_ns: u64) {
    let rtt_ns = tcp::rtt_ns(ctx);
    let target_ns = target_ns(rtt_ns);
    // What a change does is seen when all that is in flight has passed.
    let round_ns = (rtt_ns + backlog_ns).max(SHORTEST_ROUND_NS);
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
        bytes += if window.met_backlog == 0 { bytes } else { bytes / 4 };
    }
    window.bytes = bytes.min(most_bytes(limit, rtt_ns)).max(LEAST_SEGMENTS * tcp::mss(ctx));
    window.changed_ns = now_ns;
    window.received_bytes = received_bytes;
}

/// The backlog that windows aim for. Part of a long round trip, since a window only finds its size by going past it by a quarter and
/// back. It is no latency but in the acknowledgements.
#[inline(always)]
fn target_ns(rtt_ns: u64) -> u64 {
    SHORTEST_TARGET_NS + rtt_ns / 4
}

/// What a single flow has use for: two round trips (they are a guess) and twice the backlog aimed for. More would only grow in the
/// time that an idle clock lags, and then be in flight all at once.
#[inline(always)]
fn most_bytes(limit: &Limit, rtt_ns: u64) -> u64 {
    link_bytes(limit, 2 * (rtt_ns + target_ns(rtt_ns))).min(MOST_BYTES)
}

/// What a link of the limit carries in a time.
#[inline(always)]
fn link_bytes(limit: &Limit, time_ns: u64) -> u64 {
    // By 1000 and by 1000 again, and not by a million: neither may a product overflow, nor a low rate become nothing.
    limit.rate_bits_per_s / 8_000 * (time_ns / 1_000) / 1_000
}

/// Sets the window of the acknowledgement that is about to leave.
#[inline(always)]
fn advertise(ctx: &SockOpsContext, window: &mut Window) {
    window.acknowledged_bytes = tcp::received_bytes(ctx);
    // A window never takes back what it has given.
    window.edge_bytes = window.edge_bytes.max(window.acknowledged_bytes + window.bytes);
    clamp(ctx, window.bytes);
}

#[inline(always)]
fn clamp(ctx: &SockOpsContext, bytes: u64) {
    let mut value = bytes as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack. Linux 5.10
    // does not know it here: windows then grow until the bound drops.
    unsafe {
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_WINDOW_CLAMP, (&raw mut value).cast(), size_of::<u32>() as i32);
    }
}
