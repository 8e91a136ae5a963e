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
/// How much longer than twice the last one an acknowledgement may be held. The remote's retransmission timer (200 ms above its
/// round-trip estimate at least) must see the round trip grow, not jump.
const HOLD_STEP_NS: u64 = 150_000_000;
/// How long the first flight may take at the limit, if that is between [`FIRST_LEAST_SEGMENTS`] and [`FIRST_MOST_SEGMENTS`]: the backlog of a
/// few flows that begin together is then not longer than their senders will wait.
const FIRST_FLIGHT_NS: u64 = 4_000_000;
/// A sender never builds segments of more than half the largest window it has seen (`tcp_bound_to_half_wnd`).
const FIRST_LEAST_SEGMENTS: u64 = 2;
/// The first flight of a sender that nobody limits (RFC 6928).
const FIRST_MOST_SEGMENTS: u64 = 10;
/// Payload of a full packet, where the connection's own is not known yet.
const USUAL_MSS: u64 = 1448;
/// One segment in flight is what a sender waits 200 ms for before it sends it again; for two it would wait two ticks and two round
/// trips (`tcp_schedule_loss_probe`). And it need not wait for a delayed ACK: with a window that was used up the application's read
/// is answered at once (`__tcp_cleanup_rbuf`).
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
    hold(&mut flow.window, now_ns, backlog_ns, flow.into.is_left());
    resize(ctx, &limit, &mut flow.window, now_ns, backlog_ns);
    clamp(ctx, flow.window.bytes);
}

#[inline(always)]
fn hold(window: &mut Window, now_ns: u64, backlog_ns: u64, is_sparse: bool) {
    let longest_ns = 2 * window.held_ns + HOLD_STEP_NS;
    let hold_ns = if is_sparse { 0 } else { backlog_ns.min(longest_ns) };
    window.held_ns = hold_ns;
    window.hold_until_ns = if hold_ns == 0 { 0 } else { now_ns + hold_ns };
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

#[inline(always)]
fn clamp(ctx: &SockOpsContext, bytes: u64) {
    let mut value = bytes as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack. Linux 5.10
    // does not know it here: windows then grow until the bound drops.
    unsafe {
        bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_WINDOW_CLAMP, (&raw mut value).cast(), size_of::<u32>() as i32);
    }
}
