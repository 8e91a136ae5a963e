//! Sends bulk TCP, from the connecting side (`send`) or from the accepting side (`serve`).

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use serde::Serialize;

use super::sampler::BUCKET;
use super::sockets::{Protocol, mark};
use super::times::Times;
use super::wire::{self, Segments};
use super::{chatter, context, say_listening, seconds};

const WRITE_BYTES: usize = 1 << 17;
/// What flows send: the number of MPTCP's option in TCP's header. podshaper must not take data for options.
const LIKE_AN_OPTION: u8 = 30;
/// SO_MAX_PACING_RATE of a socket that is not paced.
const NOT_PACED: u64 = u64::MAX;

/// nix has no name for this option yet.
#[derive(Clone, Copy)]
struct MaxPacingRate;
nix::setsockopt_impl!(MaxPacingRate, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, u64, sockopt::SetStruct<u64>);

#[derive(clap::Args)]
pub struct Send {
    /// Address and port of the sink
    #[arg(long)]
    to: SocketAddr,
    #[command(flatten)]
    flows: Flows,
    /// Congestion control of the flows [default: the namespace's]
    #[arg(long)]
    cc: Option<OsString>,
    /// SO_MAX_PACING_RATE of each flow, in bytes per second, set before it connects
    #[arg(long, value_name = "BYTES")]
    max_pacing_rate: Option<u64>,
    /// SO_MARK of each flow, set before it connects
    #[arg(long, value_name = "NUMBER")]
    mark: Option<u32>,
    /// Fight a limit: tell the kernel so often not to pace the flows, by SO_MAX_PACING_RATE
    #[arg(long, value_name = "MILLISECONDS")]
    unpace_every_ms: Option<u64>,
    /// Every second flow has segments of so much payload (TCP_MAXSEG)
    #[arg(long, value_name = "BYTES")]
    small_segments: Option<u32>,
    /// Every so many bytes are a segment of their own (MSG_EOR)
    #[arg(long, value_name = "BYTES")]
    message_bytes: Option<usize>,
    /// Take the messages of so many bytes that `sink` says meanwhile
    #[arg(long, value_name = "BYTES")]
    chatter_bytes: Option<usize>,
    /// From when on nothing is written to the flows
    #[arg(long, value_parser = seconds, requires = "silent_for")]
    silent_after: Option<Duration>,
    /// For how long
    #[arg(long, value_parser = seconds, requires = "silent_after")]
    silent_for: Option<Duration>,
    #[command(flatten)]
    protocol: Protocol,
}

#[derive(clap::Args)]
pub struct Serve {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    #[command(flatten)]
    flows: Flows,
    /// SO_MAX_PACING_RATE of the listening socket, in bytes per second, which those it accepts inherit
    #[arg(long, value_name = "BYTES")]
    max_pacing_rate: Option<u64>,
}

#[derive(clap::Args)]
struct Flows {
    /// How many connections at once
    #[arg(long = "flows", default_value_t = 1)]
    count: usize,
    /// Stop sending after this long, or when the receiver closes
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

#[derive(Serialize)]
pub struct SendReport {
    /// Bytes written to the sockets; some of them may never have left.
    bytes: u64,
    /// Payload of a full segment, according to the kernel at the end.
    mss: u32,
    /// Segments that this namespace has sent, without retransmissions.
    out_segments: u64,
    /// Segments that this namespace has sent again.
    retransmits: u64,
    /// How late the messages of `sink` were.
    chatter: Option<Times>,
}

pub fn send(options: &Send) -> io::Result<SendReport> {
    let before = Segments::now()?;
    let is_mptcp = options.protocol.is_mptcp();
    let connections_before = if is_mptcp { wire::mptcp_connections()? } else { 0 };
    let flows: Vec<TcpStream> =
        (0..options.flows.count).map(|number| open(options, number)).collect::<io::Result<_>>()?;
    if is_mptcp && wire::mptcp_connections()? - connections_before < flows.len() as u64 {
        return Err(io::Error::other("the other end answered with TCP: it needs --mptcp as well"));
    }
    let fill = Fill {
        flows: &flows,
        until: Instant::now() + options.flows.seconds,
        unpace_every: options.unpace_every_ms.map(Duration::from_millis),
        message_bytes: options.message_bytes,
        chatter_bytes: options.chatter_bytes,
        silence: options.silent_after.zip(options.silent_for).map(|(after, length)| {
            let from = Instant::now() + after;
            from..from + length
        }),
    };
    fill.run(before)
}

pub fn serve(options: &Serve) -> io::Result<SendReport> {
    let listener = Protocol::TCP.listen(options.listen)?;
    options.max_pacing_rate.map_or(Ok(()), |rate| pace(&listener, rate))?;
    let before = Segments::now()?;
    say_listening(listener.local_addr()?);
    let accept = |_| listener.accept().and_then(|(stream, _)| prepare(stream));
    let flows: Vec<TcpStream> = (0..options.flows.count).map(accept).collect::<io::Result<_>>()?;
    let until = Instant::now() + options.flows.seconds;
    Fill { flows: &flows, until, unpace_every: None, message_bytes: None, chatter_bytes: None, silence: None }
        .run(before)
}

fn open(options: &Send, number: usize) -> io::Result<TcpStream> {
    let segment = options.small_segments.filter(|_| number % 2 == 1);
    let stream = options.protocol.connect_with(options.to, |socket| {
        segment.map_or(Ok(()), |bytes| {
            setsockopt(socket, sockopt::TcpMaxSeg, &bytes).map_err(io::Error::from).map_err(context("set TCP_MAXSEG"))
        })?;
        options.mark.map_or(Ok(()), |number| mark(socket, number))?;
        options.max_pacing_rate.map_or(Ok(()), |rate| pace(socket, rate))
    })?;
    if let Some(name) = &options.cc {
        setsockopt(&stream, sockopt::TcpCongestion, name)
            .map_err(io::Error::from)
            .map_err(context(format_args!("use the congestion control {name:?}")))?;
    }
    if options.message_bytes.is_some() {
        // A small segment does not wait for the acknowledgement of the segment before.
        stream.set_nodelay(true)?;
    }
    options.protocol.be_greeted(&stream)?;
    prepare(stream)
}

fn pace(socket: &impl AsFd, bytes_per_s: u64) -> io::Result<()> {
    setsockopt(socket, MaxPacingRate, &bytes_per_s).map_err(io::Error::from).map_err(context("set SO_MAX_PACING_RATE"))
}

fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    // Reset on close: megabytes may wait in the socket buffer, and the pod must send nothing after the end of this
    // program.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // A flow of 10 Mbit/s can block in write() for seconds.
    stream.set_write_timeout(Some(BUCKET))?;
    Ok(stream)
}

/// The sent data, and the actions meanwhile.
struct Fill<'a> {
    flows: &'a [TcpStream],
    until: Instant,
    unpace_every: Option<Duration>,
    message_bytes: Option<usize>,
    chatter_bytes: Option<usize>,
    /// The time in which nothing is sent.
    silence: Option<Range<Instant>>,
}

impl Fill<'_> {
    fn run(&self, before: Segments) -> io::Result<SendReport> {
        let joined = || io::Error::other("a flow panicked");
        let (bytes, delays) = thread::scope(|scope| {
            let listening: Vec<_> = self
                .chatter_bytes
                .into_iter()
                .flat_map(|bytes| self.flows.iter().map(move |flow| scope.spawn(move || chatter::listen(flow, bytes))))
                .collect();
            let sending: Vec<_> = self.flows.iter().map(|flow| scope.spawn(|| self.fill(flow))).collect();
            if let Some(pause) = self.unpace_every {
                while !sending.iter().all(|thread| thread.is_finished()) {
                    self.flows.iter().try_for_each(|flow| pace(flow, NOT_PACED))?;
                    thread::sleep(pause);
                }
            }
            let sent = sending.into_iter().map(|thread| thread.join().map_err(|_| joined())?);
            let sent: io::Result<u64> = sent.sum();
            // The listening threads would otherwise wait for the sink to end.
            let _ = self.flows.iter().try_for_each(|flow| flow.shutdown(Shutdown::Both));
            let delays: io::Result<Vec<Vec<Duration>>> =
                listening.into_iter().map(|thread| thread.join().map_err(|_| joined())).collect();
            Ok::<_, io::Error>((sent?, delays?.concat()))
        })?;
        let after = Segments::now()?;
        Ok(SendReport {
            bytes,
            mss: self.mss(),
            out_segments: after.sent - before.sent,
            retransmits: after.retransmitted - before.retransmitted,
            chatter: (!delays.is_empty()).then(|| Times::of(delays)),
        })
    }

    /// 0 for MPTCP, whose sockets do not report it.
    fn mss(&self) -> u32 {
        let first = self.flows.first();
        first.and_then(|flow| nix::sys::socket::getsockopt(flow, sockopt::TcpMaxSeg).ok()).unwrap_or(0)
    }

    fn fill(&self, mut stream: &TcpStream) -> io::Result<u64> {
        let buffer = vec![LIKE_AN_OPTION; self.message_bytes.unwrap_or(WRITE_BYTES)];
        let mut written = 0;
        let mut write = || match self.message_bytes {
            Some(_) => Ok(nix::sys::socket::send(stream.as_raw_fd(), &buffer, MsgFlags::MSG_EOR)?),
            None => stream.write(&buffer),
        };
        while Instant::now() < self.until {
            if let Some(silence) = self.silence.as_ref().filter(|silence| silence.contains(&Instant::now())) {
                thread::sleep(silence.end.saturating_duration_since(Instant::now()));
            }
            match write() {
                Ok(length) => written += length as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The sink has received enough.
                Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                    break;
                }
                Err(error) => return Err(context("send")(error)),
            }
        }
        Ok(written)
    }
}
