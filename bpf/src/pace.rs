//! Sent TCP: the pace of each socket.
//!
//! The kernel calls a sock_ops program for every segment that it is about to send, if the program asks for this
//! callback. The callback exists to let the program add header options (BPF_SOCK_OPS_HDR_OPT_LEN_CB, called from
//! `tcp_established_options` with the socket locked). This module uses the callback to decide when the *next* segment
//! of this socket may leave: when the pod's virtual backlog, this segment included, has drained.
//!
//! ```text
//!   pacing rate of the socket = bytes of this segment / backlog          next segment = now + bytes / pacing rate
//! ```
//!
//! TCP's own pacing timer does the waiting, inside the sender, before the packet exists: nothing queues and nothing is
//! dropped. N bulk flows wait for the same backlog and so send at the same rate; the backlog settles at N packets. A
//! packet that is smaller or larger than the pod's other packets waits for less or more than the others' part of the
//! backlog. So each flow gets its share of the bytes, whatever the size of its packets.
//!
//! To the kernel the value is an upper bound (SO_MAX_PACING_RATE), so congestion control still works below it. A lower
//! value takes effect at once, a higher one only with an ACK (`tcp_update_pacing_rate`, bbr's `bbr_set_pacing_rate`):
//! see [`raised`].

use aya_ebpf::{helpers::bpf_setsockopt, programs::SockOpsContext};
use podshaper_abi::{EGRESS, MAX_PACKET_NS, QUEUE_NONE};

use crate::{
    clock::{self, Link},
    flow::Flow,
    packet, tcp,
    turn::Packet,
    window::LARGEST_PACKET_BYTES,
};

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const SOL_SOCKET: i32 = 1;
/// asm-generic/socket.h; the value is the same on x86-64 and arm64.
pub const SO_MAX_PACING_RATE: i32 = 47;

/// The helper takes 32 bits: 34 Gbit/s. All ones mean "not paced" to the kernel, and any higher pace becomes all ones.
/// Once such a flow has a backlog, its pace is below 34 Gbit/s again.
const NOT_PACED: u64 = u32::MAX as u64;

/// TCP does not pace the first segments of a flow (`tcp_update_skb_after_send`). For these segments a pace would only
/// let fewer of them into the queue at a time (`tcp_small_queue_check`): the last segments of an answer would then wait
/// in the queue twice.
const FIRST_SEGMENTS: u64 = 10;
/// How many segments a flow may send unpaced so that its congestion window opens: see [`is_opening`]. Between ten
/// segments and room for packets of 64 KiB the window doubles four times, which takes 150 segments.
const OPENING_SEGMENTS: u64 = 256;
/// With a wait as long as this, fewer unpaced segments are better: the first segments of all flows would exceed the
/// horizon.
const LONG_WAIT_NS: u64 = NANOS_PER_SECOND;

/// Segments that a sparse flow may send before it waits.
const SPARSE_SEGMENTS: u64 = 2;

/// Until the next segment the pace is raised to this many times the pace of the last segment ..
const RAISE: u64 = 2;
/// .. or, if that is higher, to this many packets of the smallest size a second: up to that pace TCP builds packets of
/// the same size.
const MIN_RAISE_PACKETS_PER_S: u64 = 1_000;

/// The kernel builds a packet of the bytes that a flow sends at its pace in 2^-10 s (`sk_pacing_shift`,
/// `tcp_tso_autosize`).
const PACKET_SHIFT: u64 = 10;
/// For each 2^19 ns of round trip, packets are half as large (as by `tcp_tso_rtt_log`): buffers on a long path have
/// room for smaller bursts.
const RTT_SHIFT: u64 = 19;

/// A flow whose segment leaves no backlog continues at this many times the limit.
const CATCH_UP: u64 = 2;

/// Waits shorter than this are not worth a timer, and not worth pacing the socket. A socket that was paced once keeps
/// its timer, at congestion control's rate, and gets a fifth less of a fast link (`sk_pacing_status` never goes back).
const MIN_WAIT_NS: u64 = 1_000;

/// Sets the pace that `choose` returns, in bytes/s; 0 leaves the present pace in force.
#[inline(always)]
pub fn pace(ctx: &SockOpsContext, choose: impl FnOnce(&SockOpsContext, &mut Flow, &Link) -> u64) {
    let Some(flow) = tcp::flow(ctx) else { return };
    // If the attachment is gone, the pace that was set before must not stay for ever.
    let link = Link::of(flow.slot as u32, EGRESS);
    let chosen_bytes_per_s = link.map_or(NOT_PACED, |link| choose(ctx, flow, &link));
    let bytes_per_s = to_set(chosen_bytes_per_s, flow.application_bytes_per_s, flow.set_bytes_per_s);
    if bytes_per_s == 0 {
        return;
    }
    flow.set_bytes_per_s = bytes_per_s;
    let mut value = bytes_per_s as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack.
    // The call cannot fail for a value of four bytes.
    unsafe {
        bpf_setsockopt(
            ctx.ops.cast(),
            SOL_SOCKET,
            SO_MAX_PACING_RATE,
            (&raw mut value).cast(),
            size_of::<u32>() as i32,
        );
    }
}

/// The pace after the segment that is about to leave, in bytes/s. The decision about the segment's turn says how long
/// the sender waits after the segment.
#[inline(always)]
pub fn of_segment(ctx: &SockOpsContext, flow: &mut Flow, link: &Link) -> u64 {
    ask_to_be_raised(ctx, link);
    let payload = tcp::payload_bytes(ctx);
    let mss = tcp::mss(ctx);
    // As TCP counts them (`tcp_skb_pcount`): a short last segment of a write counts as one.
    let segments = payload.div_ceil(mss.max(1));
    let decision = flow.out.decide(
        link,
        &Packet {
            bytes: packet::wire_bytes_of_tcp(payload, mss, tcp::is_ipv6(ctx).into()),
            segments,
            credit_bytes: SPARSE_SEGMENTS * mss,
            bulk_bytes: 0,
            is_stream: true,
            is_bulk: true,
            has_arrived: tcp::has_arrived(ctx),
            queue: link.limit().queue,
        },
    );
    // Hands the class to `count_egress`, which runs next for this segment.
    flow.decided = decision.class + 1;
    let sent_segments = tcp::sent_segments(ctx) + segments;
    let is_unpaced = sent_segments < FIRST_SEGMENTS
        || sent_segments < OPENING_SEGMENTS && flow.set_bytes_per_s == 0 && is_opening(ctx, link, mss);
    flow.paced_bytes_per_s =
        if is_unpaced && decision.wait_ns < LONG_WAIT_NS { 0 } else { wait_for(payload, decision.wait_ns) };
    flow.paced_bytes_per_s
}

/// An acknowledgement has come: lets the kernel raise the pacing rate of the socket, which the kernel does with
/// acknowledgements only, right after this callback. Otherwise a shorter wait would begin one segment late, and a pod
/// that waits for the longer of its last two backlogs loses rate. Before the next segment leaves, its own callback
/// lowers the rate again.
#[inline(always)]
pub fn raised(ctx: &SockOpsContext, flow: &mut Flow, link: &Link) -> u64 {
    let paced_bytes_per_s = flow.paced_bytes_per_s;
    // Raised once for each segment, not for each acknowledgement.
    flow.paced_bytes_per_s = 0;
    if paced_bytes_per_s == 0 {
        return 0;
    }
    let as_large = packet_bytes(link, tcp::shortest_rtt_ns(ctx)) << PACKET_SHIFT;
    raise(link, paced_bytes_per_s, tcp::mss(ctx)).max(as_large)
}

/// Whether the congestion window is still to open. TCP builds packets of at most half the window (`tcp_cwnd_test`), and
/// the window grows only while it is used up (`tcp_is_cwnd_limited`). A paced flow whose round trip is shorter than its
/// wait has one packet in flight, which is half of the window: the flow would send packets of ten segments for ever.
/// The segments that the flow sends until the window is open wait in the queue, in the order of the backlog, as its
/// first segments do.
#[inline(always)]
fn is_opening(ctx: &SockOpsContext, link: &Link, mss: u64) -> bool {
    // Without a queue unpaced segments would be dropped.
    if link.limit().queue == QUEUE_NONE {
        return false;
    }
    let Some(window_segments) = tcp::opening_window_segments(ctx) else { return false };
    let least_bytes = link.limit().min_tso_segs * mss;
    let wanted_bytes = packet_bytes(link, tcp::shortest_rtt_ns(ctx)).max(least_bytes).min(LARGEST_PACKET_BYTES);
    window_segments * mss < 2 * wanted_bytes
}

/// How large the flow's next packet may be. Larger packets are fewer, and each packet costs a timer and a way through
/// the stack. The fewer flows there are, the larger their packets, so a packet that waits for the backlog of all flows
/// does not wait longer.
#[inline(always)]
fn packet_bytes(link: &Link, rtt_ns: u64) -> u64 {
    let usual_bytes = link.usual_bytes();
    let usual_ns = link.transmit_ns(usual_bytes, 1).max(1);
    let backlog_ns = link.backlog_ns(clock::now_ns(), 0, false).max(usual_ns);
    // One packet of each flow, all together, takes as long as the packet of a single flow may: the backlog is at least
    // one packet.
    let bytes = (usual_bytes * MAX_PACKET_NS).checked_div(backlog_ns).unwrap_or(0);
    bytes >> (rtt_ns >> RTT_SHIFT).min(16)
}

/// The pace, in bytes/s, at which a sender waits for `wait_ns` after `payload` bytes.
#[inline(always)]
fn wait_for(payload: u64, wait_ns: u64) -> u64 {
    if wait_ns < MIN_WAIT_NS {
        return NOT_PACED;
    }
    // 0 would turn pacing off (`tcp_update_skb_after_send`).
    (payload * NANOS_PER_SECOND).checked_div(wait_ns).unwrap_or(0).max(1)
}

/// Asks for the callback with each acknowledgement, which calls [`raised`], if packets take long enough at the limit to
/// wait for.
#[inline(always)]
fn ask_to_be_raised(ctx: &SockOpsContext, link: &Link) {
    if ctx.cb_flags() & tcp::ACKNOWLEDGEMENTS == 0 && is_waited_for(link, tcp::mss(ctx)) {
        tcp::ask_for(ctx, tcp::ACKNOWLEDGEMENTS);
    }
}

/// Whether the smallest packet of a bulk flow takes long enough at the limit to be worth a timer.
#[inline(always)]
fn is_waited_for(link: &Link, mss: u64) -> bool {
    link.transmit_ns(link.limit().min_tso_segs * mss, 0) >= MIN_WAIT_NS
}

/// The pace until the next segment, for a socket whose last segment had the pace `paced_bytes_per_s`.
#[inline(always)]
fn raise(link: &Link, paced_bytes_per_s: u64, mss: u64) -> u64 {
    let at_least = link.limit().min_tso_segs * mss * MIN_RAISE_PACKETS_PER_S;
    // A flow that was not paced is paced from here on: else a flow that begins sends one more round before its callback
    // sets a pace. Its pace is above the limit, so that a pod that was stopped for a while, and whose clock lags,
    // catches up.
    let most = link.limit().rate_bits_per_s / 8 * if paced_bytes_per_s == NOT_PACED { CATCH_UP } else { 1 };
    (RAISE * paced_bytes_per_s).max(at_least).min(most)
}

/// The SO_MAX_PACING_RATE to set, in bytes/s, where `chosen` is wanted, the application's own is `own`, and `set` was
/// set last. 0: the wanted rate is in force already, or no rate is wanted.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn to_set(chosen: u64, own: u64, set: u64) -> u64 {
    if chosen == 0 {
        return 0;
    }
    // The lower of the two wins: an application may pace its own socket.
    let wanted = if own == 0 { chosen } else { chosen.min(own) }.min(NOT_PACED);
    // A socket whose pace was never set is not paced. Otherwise a flow below its limit would set the same value with
    // every segment.
    let in_force = if set == 0 { NOT_PACED } else { set };
    if wanted == in_force { 0 } else { wanted }
}
