//! The eBPF programs among the limiters with which podshaper is compared: Cilium's bandwidth manager, and a policer
//! of the pod's sockets.
//!
//! Cilium's scheme has two halves. Egress packets get a departure time at the first device that has fq, and are
//! dropped if that time is more than two seconds away (`depart`). Ingress packets are dropped if a bucket of one
//! second of the limit is empty (`admit`). The policer drops at both hooks of the pod's cgroup, with a bucket of 100
//! ms (`police_out`, `police_in`).
//!
//! Each direction of a pod has its own copy of the program that limits it, and so its own static variables: the
//! loader sets the rate.
#![no_std]
#![no_main]

use core::ptr;

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    helpers::bpf_ktime_get_ns,
    macros::{cgroup_skb, classifier},
    programs::{SkBuffContext, TcContext},
};

const NS_PER_S: u64 = 1_000_000_000;
/// The horizon: the most time between the arrival of a packet and its departure.
const HORIZON_NS: u64 = 2 * NS_PER_S;
/// The burst that a pod may receive, as time at the limit.
const ADMITTED_NS: u64 = NS_PER_S;
/// The burst that passes the policer, as time at the limit.
const POLICED_NS: u64 = 100_000_000;

/// cgroup_skb/egress: drops the packet, and TCP gets the same answer as from a full qdisc.
const DROP_OUT: i32 = 2;
const DROP_IN: i32 = 0;
const PASS: i32 = 1;

/// The limit, set by the loader.
#[unsafe(no_mangle)]
static BYTES_PER_S: u64 = 1;

/// When a link with the limit's rate has sent everything that has passed so far.
static mut SENT_AT_NS: u64 = 0;

fn sent_at_ns() -> u64 {
    // SAFETY: the kernel reads and writes the word in one piece.
    unsafe { ptr::read_volatile(&raw const SENT_AT_NS) }
}

fn set_sent_at_ns(ns: u64) {
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut SENT_AT_NS, ns) };
}

fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// The time that a link with the limit's rate needs for this number of bytes.
fn time_of(bytes: u64) -> u64 {
    // SAFETY: a reference to a static; volatile, since the loader writes what the compiler takes for a constant.
    let bytes_per_s = unsafe { ptr::read_volatile(&raw const BYTES_PER_S) };
    bytes * NS_PER_S / bytes_per_s.max(1)
}

/// Takes the packet's time from a bucket of this depth, and returns whether the bucket had enough. Two CPUs at the
/// same moment may take the same tokens, as in Cilium's own program.
fn is_in_bucket(bytes: u64, depth_ns: u64) -> bool {
    let now_ns = now_ns();
    let next_ns = sent_at_ns().max(now_ns) + time_of(bytes);
    if next_ns - now_ns > depth_ns {
        return false;
    }
    set_sent_at_ns(next_ns);
    true
}

/// The bytes of all packets into which this one will be cut.
fn wire_bytes(ctx: &TcContext) -> u64 {
    // SAFETY: the context is the kernel's, for as long as the program runs.
    unsafe { (*ctx.skb.skb).wire_len }.into()
}

/// Runs at the egress of the device with fq.
#[classifier]
pub fn depart(ctx: TcContext) -> i32 {
    let now_ns = now_ns();
    // SAFETY: as above.
    let wanted_ns = unsafe { (*ctx.skb.skb).tstamp }.max(now_ns);
    let next_ns = sent_at_ns() + time_of(wire_bytes(&ctx));
    if next_ns <= wanted_ns {
        set_sent_at_ns(wanted_ns);
        return TC_ACT_OK;
    }
    if next_ns - now_ns >= HORIZON_NS {
        return TC_ACT_SHOT;
    }
    set_sent_at_ns(next_ns);
    // SAFETY: as above; programs of this type may write this field.
    unsafe { (*ctx.skb.skb).tstamp = next_ns };
    TC_ACT_OK
}

/// Runs at the egress of the host end of the pod's interface.
#[classifier]
pub fn admit(ctx: TcContext) -> i32 {
    if is_in_bucket(wire_bytes(&ctx), ADMITTED_NS) { TC_ACT_OK } else { TC_ACT_SHOT }
}

#[cgroup_skb(egress)]
pub fn police_out(ctx: SkBuffContext) -> i32 {
    if is_in_bucket(ctx.len().into(), POLICED_NS) { PASS } else { DROP_OUT }
}

#[cgroup_skb(ingress)]
pub fn police_in(ctx: SkBuffContext) -> i32 {
    if is_in_bucket(ctx.len().into(), POLICED_NS) { PASS } else { DROP_IN }
}

/// The kernel permits some helpers only to programs with a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Not reachable: the verifier would refuse a program that could get here and loop.
    loop {}
}
