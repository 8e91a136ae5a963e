//! The kind of a packet that enters a pod: which socket receives it, and whether a hook will charge it.

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

/// Bytes that may be on the way from the host end to a socket of the pod. The host end lets no more bytes pass until
/// the hook has seen these.
const ON_THE_WAY_BYTES: u64 = 1 << 20;

/// A segment of a connection, and the state of its socket.
pub struct Stretch {
    /// The packet is a datagram and no segment. A field and not a variant of [`Coming`]: the compiler would copy the
    /// fields that such a variant does not have, and the verifier refuses to read memory that was never written.
    pub is_datagram: bool,
    pub segment: Segment,
    /// The socket has received all bytes before the segment.
    pub has_arrived: bool,
    /// Windows slow the sender down. Otherwise only drops do.
    pub has_windows: bool,
}

impl Stretch {
    const DATAGRAM: Self = Self { is_datagram: true, segment: Segment::NONE, has_arrived: false, has_windows: false };
}

/// The kind of a packet that enters the pod.
pub enum Coming<'a> {
    /// A socket of the pod receives the packet, and the socket's hook charges it.
    ToBeCharged,
    /// The packet belongs to a connection that is being opened. A hook charges the packet if the kernel takes it.
    OfRequest,
    /// The packet belongs to a connection whose acknowledgements cannot be held, or is a datagram.
    ToBeHeld(&'a mut Flow, Stretch),
    /// The packet is a SYN, or belongs to a connection that is not open yet.
    ToListener(Client),
    /// No hook charges the packet.
    Other,
}

/// The kind of a packet. A hook knows a socket from the socket's first packet on; that first packet is charged here, as
/// one of a new flow.
#[inline(always)]
pub fn coming<'a>(packet: &SkBuffContext, end: &HostEnd, bytes: u64) -> Coming<'a> {
    let Some(mut peers) = packet::peers(packet, ETHERNET_HEADER_BYTES) else { return Coming::Other };
    // SAFETY: the socket found is released, and not used after that. Its storage stays as long as the program runs
    // (RCU).
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
                // If acknowledgements ride on data, the callback that noted this also sets windows.
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
            // The packet belongs to a connection that is being opened, or that replaces one in TIME-WAIT: the
            // listener's hook sees the packet.
            None if full.is_none() && waits_for_listener(packet, end) => {
                Coming::ToListener(Client::new(peers.sender()))
            }
            None if full.is_none() && is_request => Coming::OfRequest,
            None => Coming::Other,
        }
    }
}

/// Whether a packet to a listener, or before a connection is open, is charged here and waits. Where acknowledgements
/// are held this is the SYN alone; the hook charges the packets that follow.
#[inline(always)]
fn waits_for_listener(packet: &SkBuffContext, end: &HostEnd) -> bool {
    end.holds_streams != 0 || end.paces_requests() && Segment::of(packet, ETHERNET_HEADER_BYTES).is_request
}

/// Whether packets to a connection wait here, instead of at the remote for held acknowledgements.
#[inline(always)]
fn is_held(flow: &Flow, end: &HostEnd) -> bool {
    end.holds_streams != 0 && flow.into_covered.slot == end.slot.into() || rides(flow, end)
}

/// Whether the hook will charge a packet of a flow, as the hook has charged the flow's packets before.
#[inline(always)]
fn covered<'a>(flow: &mut Flow, end: &HostEnd, bytes: u64) -> Coming<'a> {
    if flow.into_covered.passes(end, bytes, ON_THE_WAY_BYTES) { Coming::ToBeCharged } else { Coming::Other }
}

/// Whether packets to a flow are to be held here since its acknowledgements ride on data, or since earlier packets
/// still wait here.
#[inline(always)]
fn rides(flow: &Flow, end: &HostEnd) -> bool {
    flow.slot == end.slot.into() && flow.waiting.is_on(clock::now_ns())
}
