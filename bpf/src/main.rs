//! podshaper's eBPF programs: the hook of each program, when the kernel calls the program, and the meaning of its
//! return value. The modules explain how the programs work: [`turn`] (which packet leaves at once and which waits),
//! [`clock`] (the pod clock), [`pace`] (sent TCP), [`window`] (received TCP), [`flow`] (the state of a socket),
//! [`other_paths`] (packets that no socket of the pod sends or receives), [`coming`] (the kinds of packets that enter a
//! pod), [`covered`] (which bytes a hook has charged), [`room`] (the waiting room), [`requests`] and [`waited`] (when
//! SYNs enter), [`namespace`] (whether a socket is in the pod's namespace), [`packet`] (bytes on the wire), [`subnets`]
//! (exempt addresses), [`tcp`] (facts about a TCP socket), [`maps`].
//!
//! A node has the programs and maps once. A program reads the storage of the cgroup for which it runs, which lists the
//! attachments on that cgroup, and finds their limits and clocks in the maps. A program runs in the context that sends
//! or receives the packet, on any CPU, and many run at once. Their shared clocks and counters are in `METERS`, under
//! its lock.
#![no_std]
#![no_main]
// For the one instruction that adds atomically across CPUs.
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
/// cgroup_skb/egress: the packet is dropped and the sender is told as by a full qdisc (NET_XMIT_DROP), so that a UDP
/// sendto() still succeeds. 0 would be an error, EPERM, in the application (include/linux/bpf-cgroup.h, "drop packet
/// and cn").
const DROP: i32 = 2;
/// cgroup_skb/ingress: the packet is dropped.
const DROP_INGRESS: i32 = 0;
/// sock_ops and cgroup/setsockopt: go on.
const CONTINUE: i32 = 1;

/// cgroup_skb, egress: called for every packet that a socket of the pod sends, before the qdisc and before a GSO packet
/// is cut. Counts the packet on the clock, and makes it wait if its turn has not come.
#[cgroup_skb(egress)]
pub fn count_egress(ctx: SkBuffContext) -> i32 {
    let socket = packet::full_socket(&ctx);
    let Some(scope) = scope_of(&ctx, Remote::DESTINATION) else {
        leave(socket);
        return PASS;
    };
    // SAFETY: `full_socket` returns a socket from `bpf_sk_fullsock`.
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
        // The pod has an ingress limit alone.
        set_edt(&ctx, edt_ns);
        return PASS;
    };
    let wire = Wire::of(&ctx);
    let now_ns = clock::now_ns();
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let class = match answer_of(&ctx, &link, &wire, socket, now_ns) {
        Answer::ChargedLater => return PASS,
        Answer::InTime => WAITED,
        // A listening socket is no flow: each SYN-ACK belongs to a new flow, and a socket that the listener accepts
        // inherits the listener's state.
        Answer::Not => {
            let is_of_listener = socket.is_some_and(packet::listens);
            class_of(EGRESS, &link, &wire, socket, flow.as_deref_mut().filter(|_| !is_of_listener))
        }
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

/// cgroup_skb, ingress: called for every packet that reaches a socket of the pod, as a whole (GRO). Counts the packet
/// on the clock.
#[cgroup_skb(ingress)]
pub fn count_ingress(ctx: SkBuffContext) -> i32 {
    let Some(scope) = scope_of(&ctx, Remote::SOURCE) else {
        // A socket that the listener accepts inherits the listener's flow.
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
        // A socket that the listener accepts inherits these fields. It has sent no packet yet when its first window is
        // set.
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
    // A listening socket is no flow: each packet to it belongs to a new flow.
    let flow = if is_for_listener { None } else { flow };
    let before_ns = link.backlog_ns(now_ns, 0, false);
    let class = class_of(INGRESS, &link, &wire, socket, flow);
    if admit(&ctx, &link, &wire, class, before_ns) { PASS } else { DROP_INGRESS }
}

/// sock_ops: called with the events of every TCP socket of the pod, with the socket locked. Handles egress.
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

/// sock_ops: called with the events of every TCP socket of the pod, with the socket locked. Handles ingress.
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

/// cgroup/setsockopt: called for every setsockopt() in the pod, before the kernel executes it. Learns the application's
/// own pacing rate and window clamp, which [`pace`] and [`window`] would otherwise overwrite.
#[cgroup_sockopt(setsockopt)]
pub fn note_setsockopt(ctx: SockoptContext) -> i32 {
    note_pacing_rate(&ctx);
    note_window_clamp(&ctx);
    keep_large_option(&ctx);
    CONTINUE
}

/// tc, ingress of the host end of the pod's veth: called for every packet that leaves the pod. A packet that a hook of
/// the cgroup has charged goes on; any other packet is charged, and waits its turn.
#[classifier]
pub fn out_of_pod(ctx: TcContext) -> i32 {
    other_paths::out_of_pod(&ctx)
}

/// tc, egress of the host end of the pod's veth: called for every packet that enters the pod. A packet that a hook of
/// the cgroup will charge goes on; any other packet is charged, and waits its turn.
#[classifier]
pub fn into_pod(ctx: TcContext) -> i32 {
    other_paths::into_pod(&ctx)
}

/// tc, egress of the waiting room: gives a packet its departure time.
#[classifier]
pub fn wait_here(ctx: TcContext) -> i32 {
    room::wait_here(&ctx)
}

/// tc, ingress of the waiting room's other end: the packet has waited, and returns to the interface from which it was
/// taken.
#[classifier]
pub fn go_back(ctx: TcContext) -> i32 {
    room::go_back(&ctx)
}

/// Whether a packet is a SYN-ACK, and what the egress hook does with it.
enum Answer {
    /// A SYN-ACK, which is charged at the host end.
    ChargedLater,
    /// A SYN-ACK, which leaves at once.
    InTime,
    /// Another packet, or a SYN-ACK beyond the share of SYN-ACKs.
    Not,
}

/// Whether a packet is a SYN-ACK. A SYN-ACK has the listener's socket, or no full socket. fq removes that socket from
/// the packet (`fq_classify`), so the host end, if there is one, does not recognise the packet and charges it.
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

/// The attachment that limits the packet: the packet passes the attachment's interface, and the remote address is not
/// exempt.
#[inline(always)]
fn scope_of(ctx: &SkBuffContext, remote: Remote) -> Option<Scope> {
    // SAFETY: cgroup_skb programs may read ifindex; at egress it is that of the interface that the route chose.
    let scope = maps::scope(unsafe { (*ctx.skb.skb).ifindex })?;
    (!subnets::are_exempt(ctx, scope.list, remote)).then_some(scope)
}

/// The socket's traffic now belongs to no attachment.
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
        // TCP sends the packet without a full socket (a SYN-ACK, an ACK in TIME-WAIT), or there was no memory for the
        // flow: the packet counts as one of a new flow.
        let is_fresh = link.has_room(FRESH, clock::now_ns());
        return if is_fresh {
            FRESH
        } else if is_stream {
            STREAM
        } else if direction == INGRESS && socket.is_some_and(packet::listens) {
            // The SYN has waited in the waiting room. The acknowledgement that completes the connection, or the data
            // behind it, comes soon after. If one of these is lost, the client repeats it only after 200 ms or a
            // second.
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
        // Held acknowledgements slow the sender down, except in the first flight, which has left before there is any
        // acknowledgement.
        let delivered_ns = turn.note(link, &packet);
        if received_bytes(socket) < FIRST_FLIGHT_BYTES {
            flow.answer_from_ns = flow.answer_from_ns.max(delivered_ns);
        }
        requests::note_bytes(flow, link.slot(), wire.bytes);
        return STREAM;
    }
    turn.decide(link, &packet).class
}

/// Whether the packet belongs to a TCP connection, whose sender notices drops and waits. Also true for packets that TCP
/// sends without a full socket: these are small, and have no sender that could be told to wait. A raw socket for TCP is
/// no connection.
#[inline(always)]
fn is_stream(socket: Option<NonNull<bpf_sock>>) -> bool {
    const SOCK_STREAM: u32 = 1;
    // SAFETY: cgroup_skb programs may read protocol, type and state of a full socket.
    socket.is_none_or(|socket| unsafe {
        let socket = socket.as_ref();
        socket.protocol == u32::from(packet::IPPROTO_TCP) && socket.type_ == SOCK_STREAM
    }) && !socket.is_some_and(packet::listens)
}

/// Whether all bytes that a TCP socket sent before have been acknowledged.
#[inline(always)]
fn has_arrived(socket: Option<NonNull<bpf_sock>>) -> bool {
    // SAFETY: the helper takes a full socket, which `full_socket` gave; its result is null where the socket is not TCP.
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

/// When an answer to the remote's first flight may leave. If a request would have waited in a queue at the limit's
/// rate, its answer leaves no earlier than that queue would have allowed. So a pod's clients, which then send the next
/// request, keep to the limit. The pure acknowledgement is not held so long: the remote would consider its request
/// lost.
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

/// Gives a packet a departure time, which fq honours. A departure time of the application's own (SO_TXTIME), or of
/// TCP's, wins where it is later. 0: none.
#[inline(always)]
fn set_edt(ctx: &SkBuffContext, edt_ns: u64) {
    // SAFETY: cgroup_skb programs may read and write tstamp.
    unsafe {
        if edt_ns > (*ctx.skb.skb).tstamp {
            (*ctx.skb.skb).tstamp = edt_ns;
        }
    }
}

/// Directs a packet into the htb class in which packets wait.
#[inline(always)]
fn wait_in_htb(ctx: &SkBuffContext) {
    // SAFETY: cgroup_skb programs may write priority.
    unsafe { (*ctx.skb.skb).priority = u32::from(QDISC_MAJOR) << 16 | u32::from(HTB_QUEUE) };
}

/// Counts a packet on a direction's clock, and marks the packet if the backlog calls for it; false if the packet must
/// be dropped.
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
    // As sk_setsockopt() reads the option: an unsigned long if the value has room for one, else an unsigned int. All
    // ones mean none.
    let rate = match (option_value::<u64>(ctx), option_value::<u32>(ctx)) {
        (Some(rate), _) => rate,
        (None, Some(u32::MAX)) => u64::MAX,
        (None, Some(rate)) => u64::from(rate),
        (None, None) => return,
    };
    if let Some(flow) = option_flow(ctx) {
        flow.application_bytes_per_s = if rate == u64::MAX { 0 } else { rate };
        // The kernel is about to overwrite the rate that was set here.
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

/// The option's value; `None` where the call passes fewer bytes.
#[inline(always)]
fn option_value<T: Copy>(ctx: &SockoptContext) -> Option<T> {
    // SAFETY: all fields may be read; the option's bytes are between optval and optval_end, which the verifier sees
    // compared. Unaligned: to the verifier the bytes are packet data, which is two bytes off where an architecture
    // minds.
    unsafe {
        let option = &*ctx.sockopt;
        let start = option.__bindgen_anon_2.optval as usize;
        let end = option.__bindgen_anon_3.optval_end as usize;
        let has_room = start + size_of::<T>() <= end && option.optlen >= size_of::<T>() as i32;
        has_room.then(|| (start as *const T).read_unaligned())
    }
}

/// The flow of the socket of the setsockopt() call.
#[inline(always)]
fn option_flow<'a>(ctx: &SockoptContext) -> Option<&'a mut Flow> {
    // SAFETY: `sk` may be read, and is the full socket of the call.
    unsafe { NonNull::new((*ctx.sockopt).__bindgen_anon_1.sk).and_then(|socket| maps::flow_or_new(socket)) }
}

/// A program sees the first page of an option only. The kernel refuses longer options (EFAULT: iptables inside the pod)
/// unless the program tells it to use the application's own bytes: optlen 0 (kernel/bpf/cgroup.c,
/// `__cgroup_bpf_run_filter_setsockopt`).
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
    // Not reachable: the verifier would refuse a program that could get here and loop for ever.
    loop {}
}

/// The kernel reads this: helpers such as bpf_ktime_get_ns are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
