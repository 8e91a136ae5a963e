//! Whether a socket is in the network namespace of an attachment. The numbers of interfaces start anew in each namespace, so an interface of a
//! namespace that was made in the pod may have the number of the pod's, and so may one of another pod, in whose namespace a process of this
//! pod's cgroup works. What such a socket sends is charged where it passes an end of a veth on the host, if it does.
//!
//! `bpf_get_netns_cookie` is not for programs of this type before Linux 6.15. But a socket can be looked up in the namespace of a number: user
//! space gives the pod's namespace a number for itself. Another namespace has the same number for itself once in 131072, and none has it for
//! another one. Where that number finds the socket, the socket is in the pod's namespace. Where it does not, and the packet's own namespace has
//! the socket, it is not.

use aya_ebpf::programs::SkBuffContext;
use podshaper_abi::Scope;

use crate::{flow::Flow, packet, packet::Peers};

/// The namespace of the packet's interface (`BPF_F_CURRENT_NETNS`).
const OF_PACKET: u64 = u64::MAX;

/// Whether the socket of a flow is in another namespace than the attachment's interface. Asked once for each socket; one that has no ports, or
/// whose addresses are rewritten in the pod, is not known, and taken to be in it.
#[inline(always)]
pub fn is_foreign(ctx: &SkBuffContext, flow: &mut Flow, scope: &Scope, is_sent: bool) -> bool {
    if scope.namespace == 0 {
        return false;
    }
    if flow.asked_namespace != scope.namespace {
        flow.is_foreign = 0;
        if let Some(mut peers) = packet::peers(ctx, 0) {
            if is_sent {
                peers.turn();
            }
            flow.is_foreign = (!has(ctx, &mut peers, scope.namespace) && has(ctx, &mut peers, OF_PACKET)).into();
        }
        flow.asked_namespace = scope.namespace;
    }
    flow.is_foreign != 0
}

#[inline(always)]
fn has(ctx: &SkBuffContext, peers: &mut Peers, namespace: u64) -> bool {
    // SAFETY: what is found is released, and not used after that.
    unsafe {
        let found = peers.socket(ctx, namespace);
        if let Some((socket, _)) = found {
            packet::release(socket);
        }
        found.is_some()
    }
}
