//! Whether a socket is in the network namespace of an attachment. Interface numbers start anew in each namespace. So an
//! interface of a namespace that was made in the pod may have the number of the pod's interface, and so may an
//! interface of another pod in whose namespace a process of this pod's cgroup works. Packets of a socket in such a
//! namespace are charged at the host end of a veth, if they pass one.
//!
//! Before Linux 6.15 programs of this type may not call `bpf_get_netns_cookie`. But they can look a socket up in a
//! namespace by number (nsid). So user space gives the pod's namespace a number for itself. Another namespace has the
//! same number for itself with a chance of 1 in 131072, and no namespace has this number for another namespace. If the
//! lookup by that number finds the socket, the socket is in the pod's namespace. If that lookup fails and a lookup in
//! the packet's own namespace finds the socket, the socket is in another namespace.

use aya_ebpf::programs::SkBuffContext;
use podshaper_abi::Scope;

use crate::{flow::Flow, packet, packet::Peers};

/// The number of the namespace of the packet's interface (`BPF_F_CURRENT_NETNS`).
const OF_PACKET: u64 = u64::MAX;

/// Whether the socket of a flow is in another namespace than the attachment's interface. Looked up once for each
/// socket. A socket without ports, or whose addresses are rewritten in the pod, cannot be found, and is assumed to be
/// in the attachment's namespace.
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
    // SAFETY: the socket found is released, and not used after that.
    unsafe {
        let found = peers.socket(ctx, namespace);
        if let Some((socket, _)) = found {
            packet::release(socket);
        }
        found.is_some()
    }
}
