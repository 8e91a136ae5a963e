//! podshaper's eBPF programs: hook, what each is called for, and what its return value means. How they work is in the modules:
//! [`turn`] (which packet leaves at once and which waits), [`clock`] (the pod clock), [`pace`] (TCP out), [`window`] (TCP in), [`flow`] (what
//! is remembered of a socket), [`other_paths`] (what no socket of the pod sends or gets), [`requests`] and [`waited`] (when connections are opened),
//! [`namespace`] (whether a socket is in the pod's), [`packet`] (bytes on the wire), [`subnets`] (what is exempt), [`maps`].
//!
//! A node has the programs and maps once. A program learns from the storage of the cgroup for which it runs which attachments are on that,
//! and finds their numbers in the maps. All programs run in the context of whoever sends, on any CPU, many at once; what they share is in
//! `METERS`, under its lock.
#![no_std]
#![no_main]
// For the one instruction that adds for all CPUs at once.
#![feature(asm_experimental_arch)]

mod clock;
mod coming;
mod covered;
mod flow;
mod maps;
mod namespace;
mod other_paths;
mod pace;
mod packet;
mod requests;
mod room;
mod subnets;
mod tcp;
mod turn;
mod waited;
mod window;

use core::ptr::NonNull;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RWND_INIT, bpf_sock,
    },
    helpers::{bpf_skb_ecn_set_ce, bpf_tcp_sock},
    macros::{cgroup_skb, cgroup_sockopt, classifier, sock_ops},
    programs::{SkBuffContext, SockOpsContext, SockoptContext, TcContext},
};
use podshaper_abi::{
    DATAGRAM, EGRESS, FRESH, HELD_DATAGRAM, HTB_QUEUE, INGRESS, ORDERED, QDISC_MAJOR, QUEUE_FQ, QUEUE_HTB, STREAM,
    Scope, WAITED,
};

use crate::{
    clock::Link,
    flow::Flow,
    packet::Wire,
    subnets::Remote,
    tcp::FIRST_FLIGHT_BYTES,
    turn::{Packet, SPARSE_BYTES},
};

/// cgroup_skb/egress: the packet goes on.
const PASS: i32 = 1;
/// cgroup_skb/egress: the packet is dropped and the sender told as by a full qdisc (NET_XMIT_DROP), so that a UDP sendto() still
/// succeeds. 0 would be an error, EPERM, in the application (include/linux/bpf-cgroup.h, "drop packet and cn").
const DROP: i32 = 2;
/// cgroup_skb/ingress: the packet is dropped.
const DROP_INGRESS: i32 = 0;
/// sock_ops and cgroup/setsockopt: go on.
const CONTINUE: i32 = 1;

/// Called for every packet a socket of the pod sends, before the qdisc and before a GSO packet is cut. Counts it on the clock, and has it
/// wait if its sender has not.
#[cgroup_skb(egress)]
pub fn count_egress(ctx: SkBuffContext) -> i32 {
    let socket = packet::full_socket(&ctx);
    let Some(scope) = scope_of(&ctx, Remote::DESTINATION) else {
        leave(socket);
        return PASS;
    };
    // SAFETY: `full_socket` returns what `bpf_sk_fullsock` gave.
    let mut flow = socket.and_then(|socket| unsafe { maps::flow_or_new(socket) });
    if flow.as_deref_mut().is_some_and(|flow| namespace::is_foreign(&ctx, flow, &scope, true)) {
        leave(socket);
        return PASS;
    }
    let mut edt_ns = 0;
    if let Some(flow) = flow.as_deref_mut() {
        flow.slot = scope.slot.into();
        edt_ns = core::mem::take(&mut flow.window.hold_until_ns).max(answer_edt_ns(&ctx, flow));
    }
    let Some(link) = Link::of(scope.slot, EGRESS) else {
        // Of a pod with an ingress limit alone.
        set_edt(&ctx, edt_ns);
        return PASS;
    };
    let wire = Wire::of(&ctx);
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let class = match answer_of(&ctx, &link, &wire, socket, now_ns) {
        Answer::ChargedLater => return PASS,
        Answer::InTime => WAITED,
        Answer::Not => class_of(EGRESS, &link, &wire, socket, flow.as_deref_mut()),
    };
    if matches!(class, STREAM | DATAGRAM | ORDERED) {
        match link.limit().queue {
            QUEUE_FQ => edt_ns = edt_ns.max(now_ns + before_ns),
            QUEUE_HTB => wait_in_htb(&ctx),
            _ => {}
        }
    }
    set_edt(&ctx, edt_ns);
    if !admit(&ctx, &link, &wire, class, before_ns) {
        return DROP;
    }
    if let Some(flow) = flow {
        flow.out_covered.charge(&wire, scope.slot, &link, now_ns);
    }
    PASS
}

/// Called for every packet that reaches a socket of the pod, as a whole (GRO). Counts it on the clock.
#[cgroup_skb(ingress)]
pub fn count_ingress(ctx: SkBuffContext) -> i32 {
    let Some(scope) = scope_of(&ctx, Remote::SOURCE) else {
        // What a listener accepts inherits what is known of the listener.
        leave(packet::full_socket(&ctx).filter(|socket| packet::listens(*socket)));
        return PASS;
    };
    let Some(link) = Link::of(scope.slot, INGRESS) else { return PASS };
    let socket = packet::full_socket(&ctx);
    // SAFETY: as in `count_egress`.
    let mut flow = socket.and_then(|socket| unsafe { maps::flow_or_new(socket) });
    if flow.as_deref_mut().is_some_and(|flow| namespace::is_foreign(&ctx, flow, &scope, false)) {
        return PASS;
    }
    let is_for_listener = socket.is_some_and(packet::listens);
    if let Some(flow) = flow.as_deref_mut().filter(|_| is_for_listener) {
        // What it accepts inherits that, and has sent nothing yet when its first window is set.
        flow.slot = scope.slot.into();
        flow.is_answering = 1;
    }
    if other_paths::has_been_charged(&ctx, scope.slot) {
        if let Some(flow) = flow {
            flow.into_covered.open(scope.slot);
        }
        return PASS;
    }
    let wire = Wire::of(&ctx);
    let now_ns = clock::now_ns();
    if let Some(flow) = flow.as_deref_mut() {
        flow.into_covered.charge(&wire, scope.slot, &link, now_ns);
    }
    // A listening socket is no flow: each packet to it is of a new one.
    let flow = if is_for_listener { None } else { flow };
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let class = class_of(INGRESS, &link, &wire, socket, flow);
    if admit(&ctx, &link, &wire, class, before_ns) { PASS } else { DROP_INGRESS }
}

/// Called with the events of every TCP socket of the pod, the socket locked. Egress.
#[sock_ops]
pub fn pace_tcp(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            tcp::ask_for(&ctx, tcp::SEGMENTS);
        }
        // A pure ACK has no payload, and is not paced by TCP either.
        BPF_SOCK_OPS_HDR_OPT_LEN_CB if tcp::is_segment(&ctx) && tcp::payload_bytes(&ctx) != 0 => {
            pace::pace(&ctx, pace::of_segment);
        }
        BPF_SOCK_OPS_RTT_CB => pace::pace(&ctx, pace::raised),
        _ => {}
    }
    CONTINUE as u32
}

/// The same for ingress.
#[sock_ops]
pub fn hold_acks(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_RWND_INIT => window::announce(&ctx),
        op @ (BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB | BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) => {
            tcp::ask_for(&ctx, tcp::SEGMENTS);
            window::open(&ctx, op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB);
        }
        BPF_SOCK_OPS_HDR_OPT_LEN_CB if tcp::is_segment(&ctx) => window::acknowledge(&ctx),
        _ => {}
    }
    CONTINUE as u32
}

/// Called for every setsockopt() in the pod, before the kernel does it: learns the application's own pacing rate and window clamp, which
/// [`pace`] and [`window`] would otherwise overwrite.
#[cgroup_sockopt(setsockopt)]
pub fn note_setsockopt(ctx: SockoptContext) -> i32 {
    note_pacing_rate(&ctx);
    note_window_clamp(&ctx);
    keep_large_option(&ctx);
    CONTINUE
}

/// tc, ingress of the host's end of the pod's veth: called for every packet that comes out of the pod. What a hook of the cgroup has charged
/// goes on; anything else is charged, and waits its turn.
#[classifier]
pub fn out_of_pod(ctx: TcContext) -> i32 {
    other_paths::out_of_pod(&ctx)
}

/// tc, egress of the host's end: called for every packet that goes into the pod. What a hook of the cgroup will charge goes on; anything else
/// is charged, and waits its turn.
#[classifier]
pub fn into_pod(ctx: TcContext) -> i32 {
    other_paths::into_pod(&ctx)
}

/// tc, egress of the waiting room: gives a packet its departure time.
#[classifier]
pub fn wait_here(ctx: TcContext) -> i32 {
    room::wait_here(&ctx)
}

/// tc, ingress of the waiting room's other end: the packet has waited, and goes on from where it came.
#[classifier]
pub fn go_back(ctx: TcContext) -> i32 {
    room::go_back(&ctx)
}

/// What a packet is to the hook.
enum Answer {
    /// The answer to a request for a connection, which is charged at the host's end.
    ChargedLater,
    /// Such an answer, which leaves at once.
    InTime,
    /// Another packet, or one answer too many.
    Not,
}

/// Whether a packet answers a request for a connection. It has the listener's socket, or no full one. fq takes that off it (`fq_classify`), so
/// that the host's end does not know it and charges it, if there is a host's end.
#[inline(always)]
fn answer_of(ctx: &SkBuffContext, link: &Link, wire: &Wire, socket: Option<NonNull<bpf_sock>>, now_ns: u64) -> Answer {
    if !socket.is_none_or(packet::listens) || !packet::Segment::of(ctx, 0).is_answer() {
        return Answer::Not;
    }
    let Some(others) = maps::others(link.slot(), EGRESS) else { return Answer::Not };
    if link.limit().queue == QUEUE_FQ && now_ns < others.answers_here_until_ns {
        Answer::ChargedLater
    } else if requests::answer_passes(link, others, wire, now_ns) {
        Answer::InTime
    } else {
        Answer::Not
    }
}

/// The attachment that the packet is for: the packet goes by its interface, and the remote address is not exempt.
#[inline(always)]
fn scope_of(ctx: &SkBuffContext, remote: Remote) -> Option<Scope> {
    // SAFETY: cgroup_skb programs may read ifindex; at egress it is that of the interface the route chose.
    let scope = maps::scope(unsafe { (*ctx.skb.skb).ifindex })?;
    (!subnets::are_exempt(ctx, scope.list, remote)).then_some(scope)
}

/// The socket now sends what is no attachment's: it is not paced any more.
#[inline(always)]
fn leave(socket: Option<NonNull<bpf_sock>>) {
    // SAFETY: as in `count_egress`.
    if let Some(flow) = socket.and_then(|socket| unsafe { maps::flow(socket) }) {
        flow.slot = 0;
        flow.is_answering = 0;
    }
}

/// The class of a packet.
#[inline(always)]
fn class_of(
    direction: u32,
    link: &Link,
    wire: &Wire,
    socket: Option<NonNull<bpf_sock>>,
    flow: Option<&mut Flow>,
) -> u64 {
    let is_stream = is_stream(socket);
    let Some(flow) = flow else {
        // What TCP sends without a full socket (a SYN-ACK, an ACK in TIME-WAIT), or memory was short: as new as a flow can be.
        let is_fresh = link.has_room(FRESH, clock::now_ns());
        return if is_fresh {
            FRESH
        } else if is_stream {
            STREAM
        } else if direction == INGRESS && socket.is_some_and(packet::listens) {
            // The request has waited in the waiting room, and the acknowledgement that completes it, or the data behind that, comes soon after:
            // what is lost of these is sent again after 200 ms or a second.
            HELD_DATAGRAM
        } else {
            DATAGRAM
        };
    };
    let decided = core::mem::take(&mut flow.decided);
    if direction == EGRESS && decided != 0 {
        return decided - 1;
    }
    let turn = if direction == EGRESS { &mut flow.out } else { &mut flow.into };
    let packet = if direction == INGRESS {
        Packet::received(wire, is_stream)
    } else {
        Packet {
            bytes: wire.bytes,
            segments: wire.segments,
            credit_bytes: SPARSE_BYTES,
            bulk_bytes: 0,
            is_stream,
            is_bulk: false,
            has_arrived: is_stream && has_arrived(socket),
            queue: link.limit().queue,
        }
    };
    if direction == INGRESS && is_stream {
        // Its acknowledgements hold its sender, but for the first flight, which has left before there is one.
        let delivered_ns = turn.note(link, &packet);
        if received_bytes(socket) < FIRST_FLIGHT_BYTES {
            flow.answer_from_ns = flow.answer_from_ns.max(delivered_ns);
        }
        requests::note_bytes(flow, link.slot(), wire.bytes);
        return STREAM;
    }
    turn.decide(link, &packet).class
}

/// Whether the packet is of a TCP connection, whose sender hears of what is dropped and of what waits. Also true for what TCP sends without a
/// full socket: small, and not repeated by anybody who could be told to wait. A raw socket for TCP is nobody's connection.
#[inline(always)]
fn is_stream(socket: Option<NonNull<bpf_sock>>) -> bool {
    const SOCK_STREAM: u32 = 1;
    // SAFETY: cgroup_skb programs may read protocol, type and state of a full socket.
    socket.is_none_or(|socket| unsafe {
        let socket = socket.as_ref();
        socket.protocol == u32::from(packet::IPPROTO_TCP) && socket.type_ == SOCK_STREAM
    }) && !socket.is_some_and(packet::listens)
}

/// Whether all that a TCP socket sent before has been acknowledged.
#[inline(always)]
fn has_arrived(socket: Option<NonNull<bpf_sock>>) -> bool {
    // SAFETY: the helper takes a full socket, which `full_socket` gave; it is null where that is not TCP.
    socket.and_then(|socket| unsafe { bpf_tcp_sock(socket.as_ptr()).as_ref() }).is_some_and(|tcp| tcp.packets_out == 0)
}

/// Bytes of payload that a TCP socket has received before this packet.
#[inline(always)]
fn received_bytes(socket: Option<NonNull<bpf_sock>>) -> u64 {
    // SAFETY: as in `has_arrived`.
    socket
        .and_then(|socket| unsafe { bpf_tcp_sock(socket.as_ptr()).as_ref() })
        .map_or(u64::MAX, |tcp| tcp.bytes_received)
}

/// When an answer may leave to what the remote sent in its first flight. A request that would have waited in a queue at the limit's rate is
/// answered no earlier than that queue would have allowed, so a pod's clients, who send the next one then, keep to the limit. The pure
/// acknowledgement is not held so long: the remote would take its request for lost.
#[inline(always)]
fn answer_edt_ns(ctx: &SkBuffContext, flow: &mut Flow) -> u64 {
    if flow.answer_from_ns == 0 {
        return 0;
    }
    if clock::now_ns() >= flow.answer_from_ns {
        flow.answer_from_ns = 0;
    }
    if packet::Segment::of(ctx, 0).is_acknowledgement() { 0 } else { flow.answer_from_ns }
}

/// Gives a packet a departure time, which fq honours. An application's own (SO_TXTIME), and TCP's, hold where they are later. 0: none.
#[inline(always)]
fn set_edt(ctx: &SkBuffContext, edt_ns: u64) {
    // SAFETY: cgroup_skb programs may read and write tstamp.
    unsafe {
        if edt_ns > (*ctx.skb.skb).tstamp {
            (*ctx.skb.skb).tstamp = edt_ns;
        }
    }
}

/// Sends a packet into the class of htb in which packets wait.
#[inline(always)]
fn wait_in_htb(ctx: &SkBuffContext) {
    // SAFETY: cgroup_skb programs may write priority.
    unsafe { (*ctx.skb.skb).priority = u32::from(QDISC_MAJOR) << 16 | u32::from(HTB_QUEUE) };
}

/// Counts a packet on a direction's clock, and marks it if it is to be; false if it must be dropped.
#[inline(always)]
fn admit(ctx: &SkBuffContext, link: &Link, wire: &Wire, class: u64, before_ns: u64) -> bool {
    // SAFETY: cgroup_skb programs may call it. It returns 1 where the packet is ECN-capable and now marked.
    let is_marked = link.is_marked(class, before_ns) && unsafe { bpf_skb_ecn_set_ce(ctx.skb.skb) } == 1;
    link.admits(wire.bytes, wire.segments, class, is_marked)
}

#[inline(always)]
fn note_pacing_rate(ctx: &SockoptContext) {
    const SOL_SOCKET: i32 = 1;
    if !is_option(ctx, SOL_SOCKET, pace::SO_MAX_PACING_RATE) {
        return;
    }
    // As sk_setsockopt() reads it: an unsigned long where there is room for one, else an unsigned int, all ones meaning none.
    let rate = match (option_value::<u64>(ctx), option_value::<u32>(ctx)) {
        (Some(rate), _) => rate,
        (None, Some(u32::MAX)) => u64::MAX,
        (None, Some(rate)) => u64::from(rate),
        (None, None) => return,
    };
    if let Some(flow) = option_flow(ctx) {
        flow.application_bytes_per_s = if rate == u64::MAX { 0 } else { rate };
        // The kernel's own is about to be overwritten.
        flow.set_bytes_per_s = 0;
    }
}

/// Learns the application's own window clamp, which [`window`] would otherwise overwrite.
#[inline(always)]
fn note_window_clamp(ctx: &SockoptContext) {
    if !is_option(ctx, window::IPPROTO_TCP, window::TCP_WINDOW_CLAMP) {
        return;
    }
    if let (Some(bytes), Some(flow)) = (option_value::<u32>(ctx), option_flow(ctx)) {
        flow.application_window_bytes = u64::from(bytes);
    }
}

#[inline(always)]
fn is_option(ctx: &SockoptContext, level: i32, name: i32) -> bool {
    // SAFETY: cgroup/setsockopt programs may read level and optname.
    unsafe { (*ctx.sockopt).level == level && (*ctx.sockopt).optname == name }
}

/// The option's value; `None` where the call has fewer bytes.
#[inline(always)]
fn option_value<T: Copy>(ctx: &SockoptContext) -> Option<T> {
    // SAFETY: all fields may be read; the option's bytes are between optval and optval_end, which the verifier sees compared.
    // Unaligned: to the verifier they are packet data, two bytes off where an architecture minds.
    unsafe {
        let option = &*ctx.sockopt;
        let start = option.__bindgen_anon_2.optval as usize;
        let end = option.__bindgen_anon_3.optval_end as usize;
        let has_room = start + size_of::<T>() <= end && option.optlen >= size_of::<T>() as i32;
        has_room.then(|| (start as *const T).read_unaligned())
    }
}

/// The flow of the socket that the call is for.
#[inline(always)]
fn option_flow<'a>(ctx: &SockoptContext) -> Option<&'a mut Flow> {
    // SAFETY: `sk` may be read, and is the full socket of the call.
    unsafe { NonNull::new((*ctx.sockopt).__bindgen_anon_1.sk).and_then(|socket| maps::flow_or_new(socket)) }
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
