//! One rtnetlink request and its answer, synchronously: podshaper makes a few requests and exits. A thread uses one
//! socket as long as it stays in a network namespace. `netns` changes both.

use std::{cell::RefCell, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_ECHO, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkMessage},
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

/// A request that changes something, with `flags` beside REQUEST and ACK.
///
/// # Errors
/// The kernel's error.
pub fn change(message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
}

/// A request for everything of a kind in the calling thread's network namespace.
///
/// # Errors
/// The kernel's error.
pub fn dump(message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
}

/// A request for one thing, which the kernel answers with one message.
///
/// # Errors
/// The kernel's error.
pub fn get(message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST).map(|answers| answers.into_iter().next())
}

/// A request for one thing that the kernel answers by a notification to all listeners, and to the caller if it asks for
/// that. The kernel may have nothing to report.
///
/// # Errors
/// The kernel's error.
pub fn get_notified(message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
    exchange(message, NLM_F_REQUEST | NLM_F_ECHO | NLM_F_ACK).map(|answers| answers.into_iter().next())
}

/// An interface of the calling thread's network namespace, by its number. `None`: there is no such interface.
///
/// # Errors
/// The kernel's error.
pub fn link(ifindex: u32) -> io::Result<Option<LinkMessage>> {
    get_link(link_message(ifindex))
}

/// An interface of the calling thread's network namespace, by its name. `None`: there is no such interface.
///
/// # Errors
/// The kernel's error.
pub fn link_by_name(name: &str) -> io::Result<Option<LinkMessage>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    get_link(message)
}

/// Asks for an interface without its counters. These would be more than the rest of the answer, and are of no use here.
fn get_link(mut message: LinkMessage) -> io::Result<Option<LinkMessage>> {
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    match get(RouteNetlinkMessage::GetLink(message)) {
        Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(link)),
        Err(cause) if cause.raw_os_error() != Some(libc::ENODEV) => Err(cause),
        _ => Ok(None),
    }
}

/// Changes attributes of an interface in the calling thread's network namespace.
///
/// # Errors
/// The kernel's error.
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

/// A netlink socket, which belongs to the network namespace in which it was made.
pub struct Connection {
    socket: Socket,
    datagram: Vec<u8>,
}

thread_local! {
    static CONNECTION: RefCell<Option<Connection>> = const { RefCell::new(None) };
}

/// Gives the calling thread another connection, because it goes to another namespace, and returns the old connection. A
/// thread without a connection makes one for its next request.
pub fn replace_connection(connection: Option<Connection>) -> Option<Connection> {
    CONNECTION.replace(connection)
}

fn exchange(message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
    CONNECTION.with_borrow_mut(|open| {
        let mut connection = open.take().map_or_else(Connection::open, Ok)?;
        let answers = connection.exchange(message, flags)?;
        // After an error the rest of an answer may be left in the socket, so the connection is not used again.
        *open = Some(connection);
        Ok(answers)
    })
}

impl Connection {
    /// More than the kernel puts into one datagram (`netlink_dump`).
    const DATAGRAM_BYTES: usize = 1 << 16;

    /// Opens a socket. The kernel gives it an address with the first message (`netlink_autobind`).
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

/// Reads the messages of a datagram. Returns whether the last message of the answer was among them.
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
