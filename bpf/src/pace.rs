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
use podshaper_abi::{EGRESS, Meter, fair_wait_ns, transmit_time, usual_packet_bytes};

use crate::{clock, flow::Flow, maps, packet, tcp};

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const SOL_SOCKET: i32 = 1;
/// asm-generic/socket.h; the same on x86-64 and arm64.
pub const SO_MAX_PACING_RATE: i32 = 47;

/// The helper takes 32 bits: 34 Gbit/s. All ones mean "not paced" to the kernel, and that is what anything above becomes; once
/// the flow has a backlog, its pace is below that again.
const NOT_PACED: u64 = u32::MAX as u64;

/// Segments that a sparse flow may send before it waits.
const SPARSE_SEGMENTS: u64 = 2;

/// TCP does not pace the first of a flow's segments (`tcp_update_skb_after_send`).
const FIRST_SEGMENTS: u64 = 10;

/// Until the next segment the pace is raised to this many times the last one ..
const RAISE: u64 = 2;
/// .. or, if that is more, to this many full packets a second: up to there the pace does not change how large TCP builds them (a
/// millisecond's worth, `tcp_tso_autosize`, but no fewer than the least), so that nothing is lost by raising it at once.
const RAISE_AT_LEAST_PACKETS_PER_S: u64 = 1_000;

/// A flow whose segment leaves no backlog goes on at this many times the limit.
const CATCH_UP: u64 = 2;

/// Waits shorter than this are not worth a timer, and not worth pacing the socket: a socket that was paced once keeps its timer, at
/// congestion control's rate, and gets a fifth less of a fast link (`sk_pacing_status` never goes back).
const SHORTEST_WAIT_NS: u64 = 1_000;

/// Sets the pace that `choose` says, which is in bytes/s; 0 leaves the one that is in force.
#[inline(always)]
pub fn pace(ctx: &SockOpsContext, choose: impl FnOnce(&SockOpsContext, &mut Flow) -> u64) {
    let Some(flow) = tcp::flow(ctx) else { return };
    let chosen_bytes_per_s = choose(ctx, flow);
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

/// The pace for the segment that is about to leave.
#[inline(always)]
pub fn of_segment(ctx: &SockOpsContext, flow: &mut Flow) -> u64 {
    let payload = tcp::payload_bytes(ctx);
    let mss = tcp::mss(ctx);
    let wire_bytes = packet::wire_bytes_of_tcp(payload, mss, tcp::is_ipv6(ctx).into());
    let backlog_ns = clock::backlog(EGRESS.into(), wire_bytes, 1);
    let is_sparse = flow.out.is_sparse(backlog_ns, wire_bytes, SPARSE_SEGMENTS * mss, 0);
    flow.paced_bytes_per_s = if is_sparse {
        at_the_limit(payload)
    } else {
        wait_for(backlog_ns, wire_bytes, payload, tcp::sent_segments(ctx))
    };
    flow.paced_bytes_per_s
}

/// An acknowledgement has come: lets the kernel raise the pacing rate of the socket, which it does with acknowledgements only,
/// right after this callback. Without it a shorter wait would begin one segment late, and a pod that waits for the longer of its
/// last two backlogs loses rate. The next segment, which is told before it leaves, lowers it to what it then is.
#[inline(always)]
pub fn raised(ctx: &SockOpsContext, flow: &mut Flow) -> u64 {
    let paced_bytes_per_s = flow.paced_bytes_per_s;
    // Once for each segment, not for each acknowledgement.
    flow.paced_bytes_per_s = 0;
    raise(paced_bytes_per_s, tcp::mss(ctx))
}

/// The pace of a sparse flow's segment, in bytes/s: the limit. 0 without one.
///
/// A global function, as those that follow, for the same reason as those of [`clock`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn at_the_limit(payload: u64) -> u64 {
    let Some(limit) = maps::limit(EGRESS) else { return 0 };
    let is_short = transmit_time(payload, limit.rate_bits_per_s).ns < SHORTEST_WAIT_NS;
    if is_short { NOT_PACED } else { limit.rate_bits_per_s / 8 }
}

/// The pace, in bytes/s, of a segment of so many bytes that leaves this backlog, of a socket that has sent so many segments before it: it
/// waits for itself to drain, and for what is before it in proportion to its size. 0 without a limit.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn wait_for(backlog_ns: u64, wire_bytes: u64, payload: u64, sent_segments: u64) -> u64 {
    let (Some(limit), Some(meter)) = (maps::limit(EGRESS), maps::meter(EGRESS)) else { return 0 };
    if backlog_ns < SHORTEST_WAIT_NS {
        return NOT_PACED;
    }
    let own_ns = transmit_time(wire_bytes, limit.rate_bits_per_s).ns.min(backlog_ns);
    // Those of the first round are part of a backlog that all have made alike, and say nothing of what TCP builds later.
    let wait_ns = if sent_segments < FIRST_SEGMENTS {
        backlog_ns
    } else {
        fair_wait_ns(backlog_ns, own_ns, payload, count_packet(meter, payload, own_ns, backlog_ns))
    };
    // 0 would turn pacing off (`tcp_update_skb_after_send`).
    (payload * NANOS_PER_SECOND).checked_div(wait_ns).unwrap_or(0).max(1)
}

/// Counts a packet in the mean of what the pod's bulk flows build, and returns what that was before. TCP builds larger ones the shorter the
/// round trip is, whatever the pace: twelve segments at 2 us, two from 6 us on (`tcp_tso_autosize`).
#[inline(always)]
fn count_packet(meter: *mut Meter, payload: u64, own_ns: u64, backlog_ns: u64) -> u64 {
    // SAFETY: the verifier checked the pointer; an aligned u32 is loaded and stored whole. Volatile: other CPUs write it. What two of
    // them lose is one packet of a mean.
    let mean = unsafe { &raw mut (*meter).bulk_packet_bytes };
    let before = u64::from(unsafe { mean.read_volatile() });
    unsafe { mean.write_volatile(usual_packet_bytes(before, payload, own_ns, backlog_ns) as u32) };
    before
}

/// Asks for the acknowledgements of a socket, that [`raised`] may be called, where the limit is one that a packet can wait for.
#[inline(always)]
pub fn ask_to_be_raised(ctx: &SockOpsContext) {
    if ctx.cb_flags() & tcp::ACKNOWLEDGEMENTS == 0 && is_waited_for(tcp::mss(ctx)) != 0 {
        tcp::ask_for(ctx, tcp::ACKNOWLEDGEMENTS);
    }
}

/// Whether the least packet of a bulk flow takes so long at the limit that it is worth a timer: up to 23 Gbit/s.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn is_waited_for(mss: u64) -> u64 {
    let Some(limit) = maps::limit(EGRESS) else { return 0 };
    (transmit_time(limit.bulk_segments * mss, limit.rate_bits_per_s).ns >= SHORTEST_WAIT_NS).into()
}

/// The pace until the next segment, of a socket whose last one had the pace `paced_bytes_per_s`.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn raise(paced_bytes_per_s: u64, mss: u64) -> u64 {
    let Some(limit) = maps::limit(EGRESS) else { return 0 };
    if paced_bytes_per_s == 0 {
        return 0;
    }
    let at_least = limit.bulk_segments * mss * RAISE_AT_LEAST_PACKETS_PER_S;
    // One that was not paced is from here on: else a flow that begins sends one more round before it is told. But faster than the limit,
    // which is how a pod that was stopped for a while, and has a lag, makes up for it.
    let most = limit.rate_bits_per_s / 8 * if paced_bytes_per_s == NOT_PACED { CATCH_UP } else { 1 };
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
