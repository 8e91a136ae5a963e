//! One rtnetlink request and its answer, synchronously: podshaper asks for a few things and exits. A thread asks by one socket as long as
//! it stays in a network namespace, and `netns` changes both.

use std::{cell::RefCell, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
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

/// A request for one thing, which the kernel answers with one message.
///
/// # Errors
/// What the kernel says.
pub fn get(message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST).map(|answers| answers.into_iter().next())
}

/// A request for one thing, of which the kernel notifies whoever listens, and the caller if it asks for that. It may have nothing to say.
///
/// # Errors
/// What the kernel says.
pub fn get_notified(message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_ECHO | NLM_F_ACK).map(|answers| answers.into_iter().next())
}

/// An interface of the calling thread's network namespace; `None` where there is none of this number.
///
/// # Errors
/// What the kernel says.
pub fn link(ifindex: u32) -> io::Result<Option<LinkMessage>> {
    get_link(link_message(ifindex))
}

/// The same by its name.
///
/// # Errors
/// What the kernel says.
pub fn link_by_name(name: &str) -> io::Result<Option<LinkMessage>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    get_link(message)
}

/// Its counters, which are more than all the rest of the answer, are of no use here.
fn get_link(mut message: LinkMessage) -> io::Result<Option<LinkMessage>> {
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    match get(RouteNetlinkMessage::GetLink(message)) {
        Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(link)),
        Err(cause) if cause.raw_os_error() != Some(libc::ENODEV) => Err(cause),
        _ => Ok(None),
    }
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

/// A socket, which belongs to the network namespace that it was made in.
pub struct Connection {
    socket: Socket,
    datagram: Vec<u8>,
}

thread_local! {
    static CONNECTION: RefCell<Option<Connection>> = const { RefCell::new(None) };
}

/// Gives the calling thread another connection and returns its own, since it goes to another namespace. Without one it makes one when it
/// asks for something.
pub fn replace_connection(connection: Option<Connection>) -> Option<Connection> {
    CONNECTION.replace(connection)
}

fn exchange(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    CONNECTION.with_borrow_mut(|open| {
        let mut connection = open.take().map_or_else(Connection::open, Ok)?;
        let answers = connection.exchange(message, flags)?;
        // After an error something may be left to be read.
        *open = Some(connection);
        Ok(answers)
    })
}

impl Connection {
    /// More than the kernel puts into one datagram (`netlink_dump`).
    const DATAGRAM_BYTES: usize = 1 << 16;

    /// The kernel gives it an address with the first message (`netlink_autobind`).
    fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::new(NETLINK_ROUTE)?, datagram: Vec::with_capacity(Self::DATAGRAM_BYTES) })
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let is_one = flags & (NLM_F_ACK | NLM_F_DUMP) == 0;
        let mut answers = Vec::new();
        loop {
            self.datagram.clear();
            let length = self.socket.recv(&mut self.datagram, libc::MSG_TRUNC)?;
            if length > self.datagram.len() {
                return Err(io::Error::other(format!("the kernel's answer of {length} bytes is cut")));
            }
            if collect(&self.datagram, &mut answers)? || (is_one && !answers.is_empty()) {
                return Ok(answers);
            }
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
