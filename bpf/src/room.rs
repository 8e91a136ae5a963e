//! How packets enter the waiting room and leave it.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS},
    helpers::bpf_redirect,
    programs::TcContext,
};
use podshaper_abi::{HostEnd, INGRESS};

use crate::packet::{TC_ACT_SHOT, TC_ACT_UNSPEC};

/// Marks a packet that returns from the waiting room. A packet that leaves the pod has this in `skb->mark`, which is 0
/// before, since marks do not pass from one namespace into another. A packet that enters the pod has this in
/// `skb->cb[PLACE]`, since its mark is the node's.
pub const IS_BACK: u32 = 0x7064_6261;
/// In `skb->cb[PLACE]`: a packet that returns, and that its socket's hook charges.
pub const IS_BACK_TO_BE_CHARGED: u32 = 0x7064_6262;
/// In `skb->cb[PLACE]`: a SYN that returns.
pub const IS_REQUEST_BACK: u32 = 0x7064_6263;
/// In `skb->mark` in the waiting room, with the number of the interface to return to: the packet enters the pod.
const INTO_POD: u32 = 1 << 31;
/// Words of `skb->cb`: fq overwrites those of the departure time later, and leaves the others alone.
const EDT: usize = 0;
const MARK: usize = 3;
pub const PLACE: usize = 4;

/// Sends a packet into the waiting room, with its departure time and the interface to return to.
#[inline(always)]
pub fn wait(skb: *mut __sk_buff, end: &HostEnd, direction: u32, class: u16, edt_ns: u64) -> i32 {
    let into = if direction == INGRESS { INTO_POD } else { 0 };
    // SAFETY: tc programs may write cb, mark and priority, and read ifindex. Before Linux 5.18 bpf_redirect clears
    // tstamp, but never cb.
    unsafe {
        (*skb).cb[EDT] = edt_ns as u32;
        (*skb).cb[EDT + 1] = (edt_ns >> 32) as u32;
        (*skb).cb[MARK] = (*skb).mark;
        if direction == INGRESS {
            (*skb).cb[PLACE] = IS_BACK;
        }
        (*skb).mark = (*skb).ifindex | into;
        (*skb).priority = match end.waiting_class {
            0 => 0,
            first => first + u32::from(class),
        };
        bpf_redirect(end.waiting_ifindex, 0) as i32
    }
}

/// See [`crate::wait_here`].
#[inline(always)]
pub fn wait_here(ctx: &TcContext) -> i32 {
    // SAFETY: tc programs may read cb and write tstamp.
    unsafe {
        let skb = ctx.skb.skb;
        (*skb).tstamp = u64::from((*skb).cb[EDT]) | u64::from((*skb).cb[EDT + 1]) << 32;
    }
    TC_ACT_UNSPEC
}

/// See [`crate::go_back`].
#[inline(always)]
pub fn go_back(ctx: &TcContext) -> i32 {
    // SAFETY: tc programs may read and write mark, cb, priority and tstamp.
    unsafe {
        let skb = ctx.skb.skb;
        let mark = (*skb).mark;
        if mark == 0 {
            // A packet of the node itself, which has no business here.
            return TC_ACT_SHOT;
        }
        (*skb).priority = 0;
        (*skb).tstamp = 0;
        if mark & INTO_POD == 0 {
            (*skb).mark = IS_BACK;
            return bpf_redirect(mark, BPF_F_INGRESS.into()) as i32;
        }
        (*skb).mark = (*skb).cb[MARK];
        bpf_redirect(mark & !INTO_POD, 0) as i32
    }
}
