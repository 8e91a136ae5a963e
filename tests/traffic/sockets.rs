//! TCP and MPTCP sockets, which differ only in the protocol passed to socket(2).
#![expect(unsafe_code, reason = "nix has no name for MPTCP, so socket(2) is called as it is")]

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, Backlog, SockaddrStorage, setsockopt, sockopt};

use super::{context, wire};

/// Connections that may wait to be accepted in a storm of connections: the kernel's own bound, net.core.somaxconn, is
/// 4096.
const BACKLOG: i32 = 4096;

#[derive(clap::Args, Clone, Copy)]
pub struct Protocol {
    /// MPTCP, which the other end has to speak as well
    #[arg(long)]
    mptcp: bool,
}

impl Protocol {
    pub const TCP: Self = Self { mptcp: false };

    pub fn is_mptcp(self) -> bool {
        self.mptcp
    }

    /// The size of a data segment's TCP options, which the kernel adds to every segment that it cuts from a larger
    /// packet.
    pub fn option_bytes(self) -> io::Result<u64> {
        const TIMESTAMPS: u64 = 12;
        /// A data sequence signal of 26 bytes with its padding: 64-bit acknowledgement and mapping, no checksum (RFC
        /// 8684, section 3.3).
        const DATA_SEQUENCE_SIGNAL: u64 = 28;
        let timestamps = if wire::timestamps()? { TIMESTAMPS } else { 0 };
        Ok(timestamps + if self.mptcp { DATA_SEQUENCE_SIGNAL } else { 0 })
    }

    /// The first message of the accepting end on an MPTCP connection, as in most protocols at least one end sends
    /// data first: only an end that has received data sends the long acknowledgements (`use_64bit_ack`), which leave
    /// no room among a segment's options.
    pub fn greet(self, mut stream: &TcpStream) -> io::Result<()> {
        if self.mptcp { stream.write_all(&[0]) } else { Ok(()) }
    }

    /// Reads the other end's greeting.
    pub fn be_greeted(self, mut stream: &TcpStream) -> io::Result<()> {
        if self.mptcp { stream.read_exact(&mut [0]) } else { Ok(()) }
    }

    /// Returns an error where the kernel would silently make another kind of socket.
    fn check(self) -> io::Result<()> {
        const ENABLED: &str = "/proc/sys/net/mptcp/enabled";
        if !self.mptcp || fs::read_to_string(ENABLED).is_ok_and(|text| text.trim() == "1") {
            return Ok(());
        }
        Err(io::Error::other(format!("this kernel has no MPTCP, or it is turned off: {ENABLED} is not 1")))
    }

    fn socket(self, of: SocketAddr) -> io::Result<OwnedFd> {
        let family = if of.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let protocol = if self.mptcp { libc::IPPROTO_MPTCP } else { libc::IPPROTO_TCP };
        // SAFETY: the call has no pointers.
        let fd = Errno::result(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, protocol) })?;
        // SAFETY: the call above has just made the descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub fn listen(self, address: SocketAddr) -> io::Result<TcpListener> {
        self.check()?;
        let listen = || -> io::Result<TcpListener> {
            let socket = self.socket(address)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
            socket::listen(&socket, Backlog::new(BACKLOG)?)?;
            Ok(socket.into())
        };
        listen().map_err(context(format_args!("listen on {address}")))
    }

    /// Connects, and waits up to two seconds for the other side to start.
    pub fn connect(self, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_with(to, |_| Ok(()))
    }

    /// Connects with a socket that is prepared first.
    pub fn connect_with(self, to: SocketAddr, prepare: impl Fn(&OwnedFd) -> io::Result<()>) -> io::Result<TcpStream> {
        self.check()?;
        let start = Instant::now();
        loop {
            let socket = self.socket(to)?;
            prepare(&socket)?;
            match socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
                Ok(()) => return Ok(socket.into()),
                Err(Errno::ECONNREFUSED) if start.elapsed() < Duration::from_secs(2) => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(context(format_args!("connect to {to}"))(error.into())),
            }
        }
    }
}

/// Sets the mark of a socket's packets, which needs CAP_NET_ADMIN.
pub fn mark(socket: &impl AsFd, number: u32) -> io::Result<()> {
    setsockopt(socket, sockopt::Mark, &number).map_err(io::Error::from).map_err(context("set SO_MARK"))
}
