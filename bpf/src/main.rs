//! podshaper's eBPF programs: hook, what each is called for, and what its return value means. How they work is in the modules:
//! [`clock`] (the pod clock), [`pace`] (TCP out), [`window`] (TCP in), [`flow`] (sparse flows), [`packet`] (bytes on the wire),
//! [`subnets`] (what is exempt), [`maps`].
//!
//! Every attachment is a load of its own, with its own maps. All programs run in the context of whoever sends, on any CPU, many
//! at once; what they share is in `METERS`, under its lock.
#![no_std]
#![no_main]

mod clock;
mod flow;
mod maps;
mod pace;
mod packet;
mod subnets;
mod tcp;
mod window;

use core::ptr::NonNull;

use aya_ebpf::{
    Global,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RWND_INIT, bpf_sock,
    },
    helpers::bpf_skb_ecn_set_ce,
    macros::{cgroup_skb, cgroup_sockopt, sock_ops},
    programs::{SkBuffContext, SockOpsContext, SockoptContext},
};
use podshaper_abi::{EGRESS, INGRESS, LOOPBACK_IFINDEX, Limit, Meter};

use crate::{
    flow::{Credit, Flow},
    packet::Wire,
    subnets::Remote,
};

/// The attachment's interface, in the pod's network namespace. 0: every interface but loopback.
#[unsafe(no_mangle)]
static IFINDEX: Global<u32> = Global::new(0);

/// cgroup_skb/egress: the packet goes on.
const PASS: i32 = 1;
/// cgroup_skb/egress: the packet is dropped and the sender told as by a full qdisc (NET_XMIT_DROP), so that a UDP sendto() still
/// succeeds. 0 would be an error, EPERM, in the application (include/linux/bpf-cgroup.h, "drop packet and cn").
const DROP: i32 = 2;
/// cgroup_skb/ingress: the packet is dropped.
const DROP_INGRESS: i32 = 0;
/// sock_ops and cgroup/setsockopt: go on.
const CONTINUE: i32 = 1;

/// Called for every packet a socket of the pod sends, before the qdisc and before a GSO packet is cut. Counts it on the clock.
#[cgroup_skb(egress)]
pub fn count_egress(ctx: SkBuffContext) -> i32 {
    let socket = packet::full_socket(&ctx);
    if !is_ours(&ctx, Remote::DESTINATION) {
        leave(socket);
        return PASS;
    }
    // SAFETY: `full_socket` returns what `bpf_sk_fullsock` gave.
    let mut flow = socket.and_then(|socket| unsafe { maps::flow_or_new(socket) });
    if let Some(flow) = flow.as_deref_mut() {
        flow.is_ours = 1;
        hold_back(&ctx, flow);
    }
    let credit = flow.map(|flow| &mut flow.out);
    if admit(&ctx, EGRESS, socket, credit) { PASS } else { DROP }
}

/// Called for every packet that reaches a socket of the pod, as a whole (GRO). Counts it on the clock.
#[cgroup_skb(ingress)]
pub fn count_ingress(ctx: SkBuffContext) -> i32 {
    if !is_ours(&ctx, Remote::SOURCE) {
        return PASS;
    }
    let socket = packet::full_socket(&ctx);
    // SAFETY: as in `count_egress`.
    let flow = socket.and_then(|socket| unsafe { maps::flow_or_new(socket) });
    let credit = flow.map(|flow| &mut flow.into);
    if admit(&ctx, INGRESS, socket, credit) { PASS } else { DROP_INGRESS }
}

/// Called with the events of every TCP socket of the pod, the socket locked. Egress.
#[sock_ops]
pub fn pace_tcp(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            tcp::ask_for(&ctx, tcp::SEGMENTS | tcp::ACKNOWLEDGEMENTS);
        }
        BPF_SOCK_OPS_HDR_OPT_LEN_CB if tcp::is_segment(&ctx) => pace::pace_segment(&ctx),
        BPF_SOCK_OPS_RTT_CB => pace::raise(&ctx),
        _ => {}
    }
    CONTINUE as u32
}

/// The same for ingress.
#[sock_ops]
pub fn hold_acks(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_RWND_INIT => ctx.set_reply(window::first_segments() as u32),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            tcp::ask_for(&ctx, tcp::SEGMENTS);
            window::open(&ctx);
        }
        BPF_SOCK_OPS_HDR_OPT_LEN_CB if tcp::is_segment(&ctx) => window::acknowledge(&ctx),
        _ => {}
    }
    CONTINUE as u32
}

/// Called for every setsockopt() in the pod, before the kernel does it: learns the application's own pacing rate, which
/// [`pace`] would otherwise overwrite.
#[cgroup_sockopt(setsockopt)]
pub fn note_setsockopt(ctx: SockoptContext) -> i32 {
    note_pacing_rate(&ctx);
    keep_large_option(&ctx);
    CONTINUE
}

/// Whether the packet is this attachment's: it goes by its interface, and its remote address is not exempt. Loopback never counts:
/// the pod talks to itself.
#[inline(always)]
fn is_ours(ctx: &SkBuffContext, remote: Remote) -> bool {
    // SAFETY: cgroup_skb programs may read ifindex; at egress it is that of the interface the route chose.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let wanted = IFINDEX.load();
    ifindex != LOOPBACK_IFINDEX && (wanted == 0 || ifindex == wanted) && !subnets::are_exempt(ctx, remote)
}

/// The socket now sends what is not this attachment's: it is not paced for it any more.
#[inline(always)]
fn leave(socket: Option<NonNull<bpf_sock>>) {
    // SAFETY: as in `count_egress`.
    if let Some(flow) = socket.and_then(|socket| unsafe { maps::flow(socket) }) {
        flow.is_ours = 0;
    }
}

/// Gives a pure ACK the departure time that `hold_acks` chose for it a moment ago, in the same transmission.
#[inline(always)]
fn hold_back(ctx: &SkBuffContext, flow: &mut Flow) {
    if flow.window.hold_until_ns != 0 {
        // SAFETY: cgroup_skb programs may write tstamp. TCP has marked it as a departure time already (`__tcp_transmit_skb`).
        unsafe { (*ctx.skb.skb).tstamp = flow.window.hold_until_ns };
        flow.window.hold_until_ns = 0;
    }
}

/// Whether TCP's pacing, or its acknowledgements, hold the packet's sender. Also true for what TCP sends and receives without a
/// full socket (a SYN-ACK, an ACK in TIME-WAIT): small, and not repeated by anybody who could be told to wait.
#[inline(always)]
fn is_paced(socket: Option<NonNull<bpf_sock>>) -> bool {
    // SAFETY: cgroup_skb programs may read the protocol of a full socket.
    socket.is_none_or(|socket| unsafe { socket.as_ref().protocol } == u32::from(packet::IPPROTO_TCP))
}

/// Gives a packet that no socket paces the time at which the backlog before it has drained. It waits in fq and counts against its
/// socket's send buffer there, so that its sender is slowed instead of its packets dropped.
#[inline(always)]
fn depart(ctx: &SkBuffContext, meter: *const Meter, limit: &Limit, now_ns: u64) {
    // SAFETY: cgroup_skb programs may write tstamp.
    unsafe { (*ctx.skb.skb).tstamp = now_ns + clock::backlog_with(meter, limit, now_ns, 0) };
}

/// Counts a packet on a direction's clock; false if it must be dropped. TCP and sparse flows may go up to the horizon, others
/// while the backlog is short. What is ECN-capable is told before that.
#[inline(always)]
fn admit(ctx: &SkBuffContext, direction: u32, socket: Option<NonNull<bpf_sock>>, credit: Option<&mut Credit>) -> bool {
    let (Some(limit), Some(meter)) = (maps::limit(direction), maps::meter(direction)) else { return true };
    let wire = Wire::of(ctx);
    let now_ns = clock::now_ns();
    let backlog_ns = clock::backlog_with(meter, &limit, now_ns, wire.bytes);
    let is_paced = is_paced(socket);
    let has_credit = credit.is_some_and(|credit| credit.is_sparse(now_ns, backlog_ns, wire.bytes, limit.sparse_bytes));
    let is_sparse = has_credit && !is_paced && clock::has_room_for_sparse(meter, now_ns);
    let (bound_ns, mark_ns) = if is_paced {
        (limit.horizon_ns, limit.paced_mark_ns)
    } else if is_sparse {
        (limit.horizon_ns, limit.horizon_ns)
    } else if limit.departs != 0 {
        depart(ctx, meter, &limit, now_ns);
        (limit.horizon_ns, limit.unpaced_bound_ns / 2)
    } else {
        (limit.unpaced_bound_ns, limit.unpaced_bound_ns / 2)
    };
    // SAFETY: cgroup_skb programs may call it. It returns 1 where the packet is ECN-capable and now marked.
    let is_marked = backlog_ns > mark_ns && unsafe { bpf_skb_ecn_set_ce(ctx.skb.skb) } == 1;
    let flags = is_sparse as u64 * clock::IS_SPARSE + is_marked as u64 * clock::IS_MARKED;
    clock::admit(direction.into(), wire.bytes, wire.segments, bound_ns, flags) == 1
}

#[inline(always)]
fn note_pacing_rate(ctx: &SockoptContext) {
    const SOL_SOCKET: i32 = 1;
    // SAFETY: all fields may be read in cgroup/setsockopt; the option's bytes between optval and optval_end, which the verifier
    // sees compared; `sk` is the full socket of the call.
    unsafe {
        let option = &*ctx.sockopt;
        if option.level != SOL_SOCKET || option.optname != pace::SO_MAX_PACING_RATE {
            return;
        }
        let start = option.__bindgen_anon_2.optval as usize;
        let end = option.__bindgen_anon_3.optval_end as usize;
        // Unaligned: to the verifier they are packet data, two bytes off where an architecture minds.
        // As sk_setsockopt() reads it: an unsigned long where there is room for one, else an unsigned int, all ones meaning none.
        let rate = if start + 8 <= end && option.optlen >= 8 {
            (start as *const u64).read_unaligned()
        } else if start + 4 <= end {
            match (start as *const u32).read_unaligned() {
                u32::MAX => u64::MAX,
                rate => u64::from(rate),
            }
        } else {
            return;
        };
        let socket = NonNull::new(option.__bindgen_anon_1.sk);
        if let Some(flow) = socket.and_then(|socket| maps::flow_or_new(socket)) {
            flow.application_bytes_per_s = if rate == u64::MAX { 0 } else { rate };
            // The kernel's own is about to be overwritten.
            flow.set_bytes_per_s = 0;
        }
    }
}

/// A program sees the first page of an option only, and the kernel refuses longer ones (EFAULT: iptables inside the pod) unless
/// told to take the application's own bytes: optlen 0 (kernel/bpf/cgroup.c, `__cgroup_bpf_run_filter_setsockopt`).
#[inline(always)]
fn keep_large_option(ctx: &SockoptContext) {
    const PAGE_SIZE: i32 = 4096;
    // SAFETY: optlen may be read and written in cgroup/setsockopt.
    unsafe {
        if (*ctx.sockopt).optlen > PAGE_SIZE {
            (*ctx.sockopt).optlen = 0;
        }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Not reachable: the verifier would refuse a program that could get here and loop.
    loop {}
}

/// Read by the kernel: helpers such as bpf_ktime_get_ns are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
