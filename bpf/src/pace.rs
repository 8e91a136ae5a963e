//! TCP out: the pace of each socket.
//!
//! The kernel calls a sock_ops program for every segment it is about to send, if asked to (it means to let it add header
//! options: BPF_SOCK_OPS_HDR_OPT_LEN_CB, called from `tcp_established_options` with the socket locked). Here that is the place
//! to say when the *next* segment of this socket may leave: when the pod's virtual backlog, this segment included, has drained.
//!
//! ```text
//!   pacing rate of the socket = bytes of this segment / backlog          next segment = now + bytes / pacing rate
//! ```
//!
//! TCP's own pacing timer does the waiting, inside the sender, before the packet exists: nothing queues and nothing drops. N
//! bulk flows wait for the same backlog and so send the same; the backlog settles at N packets. A packet that is smaller or larger
//! than the pod's others waits for less or more than the others' part of it: each flow gets the bytes of its share, whatever it builds.
//!
//! The value is an upper bound to the kernel (SO_MAX_PACING_RATE), so congestion control goes on below it. It is lowered at
//! once and raised with an ACK only (`tcp_update_pacing_rate`, bbr's `bbr_set_pacing_rate`): see [`raised`].

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
/// asm-generic/socket.h; the same on x86-64 and arm64.
pub const SO_MAX_PACING_RATE: i32 = 47;

/// The helper takes 32 bits: 34 Gbit/s. All ones mean "not paced" to the kernel, and that is what anything above becomes; once
/// the flow has a backlog, its pace is below that again.
const NOT_PACED: u64 = u32::MAX as u64;

/// TCP does not pace the first of a flow's segments (`tcp_update_skb_after_send`). A pace would do nothing then but let fewer of them into
/// the queue at a time (`tcp_small_queue_check`): the last of an answer would wait in it twice.
const FIRST_SEGMENTS: u64 = 10;
/// How many segments a flow may send unpaced so that its congestion window opens: see [`is_opening`]. From ten segments to packets of 64 KiB the
/// window doubles four times, and that takes 150 segments.
const OPENING_SEGMENTS: u64 = 256;
/// Where a wait is as long as this, fewer is better: all flows' first segments would be more than the horizon.
const LONG_WAIT_NS: u64 = NANOS_PER_SECOND;

/// Segments that a sparse flow may send before it waits.
const SPARSE_SEGMENTS: u64 = 2;

/// Until the next segment the pace is raised to this many times the last one ..
const RAISE: u64 = 2;
/// .. or, if that is more, to this many packets of the least size a second: up to there the pace does not change how large TCP builds them.
const MIN_RAISE_PACKETS_PER_S: u64 = 1_000;

/// The kernel builds a packet of what a flow sends at its pace in 2^-10 s (`sk_pacing_shift`, `tcp_tso_autosize`).
const PACKET_SHIFT: u64 = 10;
/// Each time that a round trip is longer by 2^19 ns, packets are half as large (as by `tcp_tso_rtt_log`): on a long path are buffers for less.
const RTT_SHIFT: u64 = 19;

/// A flow whose segment leaves no backlog goes on at this many times the limit.
const CATCH_UP: u64 = 2;

/// Waits shorter than this are not worth a timer, and not worth pacing the socket: a socket that was paced once keeps its timer, at
/// congestion control's rate, and gets a fifth less of a fast link (`sk_pacing_status` never goes back).
const MIN_WAIT_NS: u64 = 1_000;

/// Sets the pace that `choose` says, which is in bytes/s; 0 leaves the one that is in force.
#[inline(always)]
pub fn pace(ctx: &SockOpsContext, choose: impl FnOnce(&SockOpsContext, &mut Flow, &Link) -> u64) {
    let Some(flow) = tcp::flow(ctx) else { return };
    // Where the attachment is gone, what was set before must not stay for ever.
    let link = Link::of(flow.slot as u32, EGRESS);
    let chosen_bytes_per_s = link.map_or(NOT_PACED, |link| choose(ctx, flow, &link));
    let bytes_per_s = to_set(chosen_bytes_per_s, flow.application_bytes_per_s, flow.set_bytes_per_s);
    if bytes_per_s == 0 {
        return;
    }
    flow.set_bytes_per_s = bytes_per_s;
    let mut value = bytes_per_s as u32;
    // SAFETY: sock_ops programs may set this option on the locked socket of their context; the value is on the stack. It cannot
    // fail for a value of four bytes.
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

/// The pace for the segment that is about to leave, in bytes/s, by what its turn is: the sender waits that long after it.
#[inline(always)]
pub fn of_segment(ctx: &SockOpsContext, flow: &mut Flow, link: &Link) -> u64 {
    ask_to_be_raised(ctx, link);
    let payload = tcp::payload_bytes(ctx);
    let mss = tcp::mss(ctx);
    // As TCP counts them (`tcp_skb_pcount`): the rest of a write is one too.
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
    // `count_egress`, which runs next, for this segment, is told.
    flow.decided = decision.class + 1;
    let sent_segments = tcp::sent_segments(ctx) + segments;
    let is_unpaced = sent_segments < FIRST_SEGMENTS
        || sent_segments < OPENING_SEGMENTS && flow.set_bytes_per_s == 0 && is_opening(ctx, link, mss);
    flow.paced_bytes_per_s =
        if is_unpaced && decision.wait_ns < LONG_WAIT_NS { 0 } else { wait_for(payload, decision.wait_ns) };
    flow.paced_bytes_per_s
}

/// An acknowledgement has come: lets the kernel raise the pacing rate of the socket, which it does with acknowledgements only,
/// right after this callback. Without it a shorter wait would begin one segment late, and a pod that waits for the longer of its
/// last two backlogs loses rate. The next segment, which is told before it leaves, lowers it to what it then is.
#[inline(always)]
pub fn raised(ctx: &SockOpsContext, flow: &mut Flow, link: &Link) -> u64 {
    let paced_bytes_per_s = flow.paced_bytes_per_s;
    // Once for each segment, not for each acknowledgement.
    flow.paced_bytes_per_s = 0;
    if paced_bytes_per_s == 0 {
        return 0;
    }
    let as_large = packet_bytes(link, tcp::shortest_rtt_ns(ctx)) << PACKET_SHIFT;
    raise(link, paced_bytes_per_s, tcp::mss(ctx)).max(as_large)
}

/// Whether the congestion window is still to open. TCP builds packets of at most half the window (`tcp_cwnd_test`), and the window grows only while
/// it is used up (`tcp_is_cwnd_limited`). A paced flow whose round trip is shorter than its wait has one packet in flight, which is half of the
/// window: it would send packets of ten segments for ever. What the flow sends until then waits in the queue, in the order of the backlog, as its
/// first segments do.
#[inline(always)]
fn is_opening(ctx: &SockOpsContext, link: &Link, mss: u64) -> bool {
    // Without a queue what is sent unpaced would be dropped.
    if link.limit().queue == QUEUE_NONE {
        return false;
    }
    let Some(window_segments) = tcp::opening_window_segments(ctx) else { return false };
    let least_bytes = link.limit().min_tso_segs * mss;
    let wanted_bytes = packet_bytes(link, tcp::shortest_rtt_ns(ctx)).max(least_bytes).min(LARGEST_PACKET_BYTES);
    window_segments * mss < 2 * wanted_bytes
}

/// How large the flow's next packet may be: larger packets are fewer, and each is a timer and a way through the stack. The fewer flows there
/// are, the larger are their packets, and what waits for the backlog of all of them waits no longer for that.
#[inline(always)]
fn packet_bytes(link: &Link, rtt_ns: u64) -> u64 {
    let usual_bytes = link.usual_bytes();
    let usual_ns = link.transmit_ns(usual_bytes, 1).max(1);
    let backlog_ns = link.backlog_ns(clock::now_ns(), 0, false).max(usual_ns);
    // All of them together take as long as one that is alone may: the backlog is at least a packet.
    let bytes = (usual_bytes * MAX_PACKET_NS).checked_div(backlog_ns).unwrap_or(0);
    bytes >> (rtt_ns >> RTT_SHIFT).min(16)
}

/// The pace, in bytes/s, at which a sender waits so long after so many bytes of payload.
#[inline(always)]
fn wait_for(payload: u64, wait_ns: u64) -> u64 {
    if wait_ns < MIN_WAIT_NS {
        return NOT_PACED;
    }
    // 0 would turn pacing off (`tcp_update_skb_after_send`).
    (payload * NANOS_PER_SECOND).checked_div(wait_ns).unwrap_or(0).max(1)
}

/// Asks for the acknowledgements of a socket, that [`raised`] may be called, where the limit is one that a packet can wait for.
#[inline(always)]
fn ask_to_be_raised(ctx: &SockOpsContext, link: &Link) {
    if ctx.cb_flags() & tcp::ACKNOWLEDGEMENTS == 0 && is_waited_for(link, tcp::mss(ctx)) {
        tcp::ask_for(ctx, tcp::ACKNOWLEDGEMENTS);
    }
}

/// Whether the least packet of a bulk flow takes so long at the limit that it is worth a timer: up to 23 Gbit/s.
#[inline(always)]
fn is_waited_for(link: &Link, mss: u64) -> bool {
    link.transmit_ns(link.limit().min_tso_segs * mss, 0) >= MIN_WAIT_NS
}

/// The pace until the next segment, of a socket whose last one had the pace `paced_bytes_per_s`.
#[inline(always)]
fn raise(link: &Link, paced_bytes_per_s: u64, mss: u64) -> u64 {
    let at_least = link.limit().min_tso_segs * mss * MIN_RAISE_PACKETS_PER_S;
    // One that was not paced is from here on: else a flow that begins sends one more round before it is told. But faster than the limit,
    // which is how a pod that was stopped for a while, and has a lag, makes up for it.
    let most = link.limit().rate_bits_per_s / 8 * if paced_bytes_per_s == NOT_PACED { CATCH_UP } else { 1 };
    (RAISE * paced_bytes_per_s).max(at_least).min(most)
}

/// What SO_MAX_PACING_RATE is to be, in bytes/s, where `chosen` is wanted, the application's is `own` and it was last set to `set`.
/// 0: it is that already, or nothing is wanted.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn to_set(chosen: u64, own: u64, set: u64) -> u64 {
    if chosen == 0 {
        return 0;
    }
    // The lower of the two wins: an application may pace itself.
    let wanted = if own == 0 { chosen } else { chosen.min(own) }.min(NOT_PACED);
    // A socket that nobody has paced is not; a flow below its limit would else set the same with every segment.
    let in_force = if set == 0 { NOT_PACED } else { set };
    if wanted == in_force { 0 } else { wanted }
}
