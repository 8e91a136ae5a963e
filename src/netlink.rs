//! One rtnetlink request and its answer, synchronously: podshaper asks for a few things and exits.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

/// A request that changes something: `flags` beside REQUEST and ACK.
///
/// # Errors
/// What the kernel says.
pub fn change(message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
}

/// A request for everything of a kind in the calling thread's network namespace.
///
/// # Errors
/// What the kernel says.
pub fn dump(message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
}

/// A request for one thing. The kernel answers it, and acknowledges it after that.
///
/// # Errors
/// What the kernel says.
pub fn get(message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_ACK).map(|answers| answers.into_iter().next())
}

/// An interface of the calling thread's network namespace.
///
/// # Errors
/// What the kernel says.
pub fn link(ifindex: u32) -> io::Result<Option<LinkMessage>> {
    Ok(get(RouteNetlinkMessage::GetLink(link_message(ifindex)))?.and_then(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    }))
}

/// Changes attributes of such an interface.
///
/// # Errors
/// What the kernel says.
pub fn set_link(ifindex: u32, attributes: Vec<LinkAttribute>) -> io::Result<()> {
    let mut message = link_message(ifindex);
    message.attributes = attributes;
    change(RouteNetlinkMessage::SetLink(message), 0)
}

fn link_message(ifindex: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message
}

fn exchange(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    // The kernel gives it an address with the first message (`netlink_autobind`).
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send(&bytes, 0)?;
    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        if collect(&datagram, &mut answers)? {
            return Ok(answers);
        }
    }
}

/// Reads the messages of a datagram; whether the last of the answer was among them.
fn collect(mut datagram: &[u8], answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram).map_err(io::Error::other)?;
        // Messages are aligned to four bytes, the last one too.
        let length = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::InnerMessage(answer) => answers.push(answer),
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Error(_) => return Ok(true),
            _ => {}
        }
        datagram = datagram.get(length..).filter(|_| length > 0).unwrap_or_default();
    }
    Ok(false)
}
