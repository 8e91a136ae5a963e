//! What a packet is that goes into a pod: whose socket gets it, and whether a hook will charge it.

use core::ptr::NonNull;

use aya_ebpf::{
    helpers::{bpf_sk_fullsock, bpf_tcp_sock},
    programs::SkBuffContext,
};
use podshaper_abi::HostEnd;

use crate::{
    clock,
    flow::Flow,
    maps,
    packet::{self, ETHERNET_HEADER_BYTES, Segment},
    tcp::FIRST_FLIGHT_BYTES,
    waited::Client,
};

/// What may be on the way from the host's end to a socket of the pod. No more passes for it until the hook has seen that.
const ON_THE_WAY_BYTES: u64 = 1 << 20;

/// A segment of a connection, and what its socket knows.
pub struct Stretch {
    /// It is none, but a datagram. Not a variant of [`Coming`] beside this: the compiler would copy the fields that the variant has not, and the
    /// verifier refuses to read what was never written.
    pub is_datagram: bool,
    pub segment: Segment,
    /// The socket has all that came before.
    pub has_arrived: bool,
    /// Windows slow its sender down. Else nothing but drops does.
    pub has_windows: bool,
}

impl Stretch {
    const DATAGRAM: Self = Self { is_datagram: true, segment: Segment::NONE, has_arrived: false, has_windows: false };
}

/// What a packet is that goes into the pod.
pub enum Coming<'a> {
    /// A socket of the pod gets it, whose hook charges its bytes.
    ToBeCharged,
    /// It is of a connection whose acknowledgements cannot be held, or a datagram.
    ToBeHeld(&'a mut Flow, Stretch),
    /// It asks for a connection, or is of one that is not open yet.
    ToListener(Client),
    /// No hook charges it.
    Other,
}

/// A socket is known to the hook by its first packet, which is charged here, as new.
#[inline(always)]
pub fn coming<'a>(packet: &SkBuffContext, end: &HostEnd, bytes: u64) -> Coming<'a> {
    let Some(mut peers) = packet::peers(packet, ETHERNET_HEADER_BYTES) else { return Coming::Other };
    // SAFETY: what is found is released, and not used after that. Its storage stays as long as the program runs (RCU).
    unsafe {
        let Some((socket, is_request)) = peers.socket(packet, end.namespace.into()) else { return Coming::Other };
        let full = NonNull::new(bpf_sk_fullsock(socket.as_ptr()));
        let flow = full.and_then(|socket| maps::flow(socket));
        let listens = full.is_some_and(packet::listens);
        let is_connection = peers.are_of_tcp && full.is_some() && !listens;
        let is_held = is_connection && flow.as_deref().is_some_and(|flow| is_held(flow, end));
        let tcp = full.filter(|_| is_held).and_then(|socket| bpf_tcp_sock(socket.as_ptr()).as_ref());
        let (next_sequence, received_bytes) = tcp.map_or((0, 0), |tcp| (tcp.rcv_nxt, tcp.bytes_received));
        packet::release(socket);
        match flow {
            Some(flow) if is_held => {
                let segment = Segment::of(packet, ETHERNET_HEADER_BYTES);
                if segment.is_acknowledgement() {
                    return covered(flow, end, bytes);
                }
                if end.holds_streams != 0 && segment.is_multipath(packet) {
                    flow.waiting.is_multipath = 1;
                }
                // Acknowledgements that ride on data are known by the callback that sets windows.
                let has_windows =
                    end.holds_streams == 0 || flow.waiting.has_windows != 0 || received_bytes < FIRST_FLIGHT_BYTES;
                Coming::ToBeHeld(
                    flow,
                    Stretch {
                        is_datagram: false,
                        segment,
                        has_arrived: segment.sequence == next_sequence,
                        has_windows,
                    },
                )
            }
            _ if peers.are_of_tcp && listens && waits_for_listener(packet, end) => {
                Coming::ToListener(Client::new(peers.sender()))
            }
            Some(flow)
                if !peers.are_of_tcp && end.waiting_ifindex != 0 && flow.into_covered.slot == end.slot.into() =>
            {
                Coming::ToBeHeld(flow, Stretch::DATAGRAM)
            }
            Some(flow) => covered(flow, end, bytes),
            // Of a connection that is being opened, or in the place of one in TIME-WAIT: its listener's hook sees it.
            None if full.is_none() && waits_for_listener(packet, end) => {
                Coming::ToListener(Client::new(peers.sender()))
            }
            None if full.is_none() && is_request => Coming::ToBeCharged,
            None => Coming::Other,
        }
    }
}

/// Whether what comes to a listener, or before a connection is open, is charged here and waits. Where acknowledgements are held it is the request
/// alone; the hook charges what follows.
#[inline(always)]
fn waits_for_listener(packet: &SkBuffContext, end: &HostEnd) -> bool {
    end.holds_streams != 0 || end.paces_requests() && Segment::of(packet, ETHERNET_HEADER_BYTES).is_request
}

/// Whether what comes to a connection waits here, and not at the remote for its acknowledgements.
#[inline(always)]
fn is_held(flow: &Flow, end: &HostEnd) -> bool {
    end.holds_streams != 0 && flow.into_covered.slot == end.slot.into() || rides(flow, end)
}

/// Whether the hook will charge a packet of a flow, as it has charged those before.
#[inline(always)]
fn covered<'a>(flow: &mut Flow, end: &HostEnd, bytes: u64) -> Coming<'a> {
    if flow.into_covered.passes(end, bytes, ON_THE_WAY_BYTES) { Coming::ToBeCharged } else { Coming::Other }
}

/// Whether a flow's acknowledgements ride on data, so that what comes to it is to be held here, or some of that waits here still.
#[inline(always)]
fn rides(flow: &Flow, end: &HostEnd) -> bool {
    flow.slot == end.slot.into() && flow.waiting.is_on(clock::now_ns())
}
