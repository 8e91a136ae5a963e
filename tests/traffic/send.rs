//! Bulk TCP sent: by the side that connects (`send`) or by the one that accepts (`serve`).

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

use super::sink::BUCKET;
use super::wire::Segments;
use super::{connect_with, context, say_listening, seconds};

const WRITE_BYTES: usize = 1 << 17;
/// SO_MAX_PACING_RATE of a socket that nothing paces.
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
    /// Fight a limit: tell the kernel so often not to pace the flows, by SO_MAX_PACING_RATE
    #[arg(long, value_name = "MILLISECONDS")]
    unpace_every_ms: Option<u64>,
    /// Every second flow has segments of so much payload (TCP_MAXSEG)
    #[arg(long, value_name = "BYTES")]
    small_segments: Option<u32>,
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
    /// Written to the sockets; some of it may never have left.
    bytes: u64,
    /// Payload of a full segment, as the kernel had it at the end.
    mss: u32,
    /// Segments this namespace sent, retransmissions not included.
    out_segments: u64,
    /// Segments this namespace sent again.
    retransmits: u64,
}

pub fn send(options: &Send) -> io::Result<SendReport> {
    let before = Segments::now()?;
    let flows: Vec<TcpStream> =
        (0..options.flows.count).map(|number| open(options, number)).collect::<io::Result<_>>()?;
    fill_all(&flows, options.flows.seconds, options.unpace_every_ms.map(Duration::from_millis), before)
}

pub fn serve(options: &Serve) -> io::Result<SendReport> {
    let listener = TcpListener::bind(options.listen).map_err(context(format_args!("listen on {}", options.listen)))?;
    options.max_pacing_rate.map_or(Ok(()), |rate| pace(&listener, rate))?;
    let before = Segments::now()?;
    say_listening(listener.local_addr()?);
    let accept = |_| listener.accept().and_then(|(stream, _)| prepare(stream));
    let flows: Vec<TcpStream> = (0..options.flows.count).map(accept).collect::<io::Result<_>>()?;
    fill_all(&flows, options.flows.seconds, None, before)
}

fn open(options: &Send, number: usize) -> io::Result<TcpStream> {
    let segment = options.small_segments.filter(|_| number % 2 == 1);
    let stream = connect_with(options.to, |socket| {
        segment.map_or(Ok(()), |bytes| {
            setsockopt(socket, sockopt::TcpMaxSeg, &bytes).map_err(io::Error::from).map_err(context("set TCP_MAXSEG"))
        })?;
        options.max_pacing_rate.map_or(Ok(()), |rate| pace(socket, rate))
    })?;
    if let Some(name) = &options.cc {
        setsockopt(&stream, sockopt::TcpCongestion, name)
            .map_err(io::Error::from)
            .map_err(context(format_args!("use the congestion control {name:?}")))?;
    }
    prepare(stream)
}

fn pace(socket: &impl AsFd, bytes_per_s: u64) -> io::Result<()> {
    setsockopt(socket, MaxPacingRate, &bytes_per_s).map_err(io::Error::from).map_err(context("set SO_MAX_PACING_RATE"))
}

fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    // Reset on close: megabytes may wait in the socket buffer, and the pod should be silent when this program has ended.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // A flow of 10 Mbit/s can block in write() for seconds.
    stream.set_write_timeout(Some(BUCKET))?;
    Ok(stream)
}

fn fill_all(
    flows: &[TcpStream],
    length: Duration,
    unpace_every: Option<Duration>,
    before: Segments,
) -> io::Result<SendReport> {
    let until = Instant::now() + length;
    let written: io::Result<Vec<u64>> = thread::scope(|scope| {
        let threads: Vec<_> = flows.iter().map(|flow| scope.spawn(move || fill(flow, until))).collect();
        if let Some(pause) = unpace_every {
            while !threads.iter().all(|thread| thread.is_finished()) {
                flows.iter().try_for_each(|flow| pace(flow, NOT_PACED))?;
                thread::sleep(pause);
            }
        }
        threads.into_iter().map(|thread| thread.join().map_err(|_| io::Error::other("a flow panicked"))?).collect()
    });
    let bytes = written?.iter().sum();
    let after = Segments::now()?;
    let mss = match flows.first() {
        Some(flow) => nix::sys::socket::getsockopt(flow, sockopt::TcpMaxSeg)?,
        None => 0,
    };
    Ok(SendReport {
        bytes,
        mss,
        out_segments: after.sent - before.sent,
        retransmits: after.retransmitted - before.retransmitted,
    })
}

fn fill(mut stream: &TcpStream, until: Instant) -> io::Result<u64> {
    let buffer = vec![0; WRITE_BYTES];
    let mut written = 0;
    while Instant::now() < until {
        match stream.write(&buffer) {
            Ok(length) => written += length as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The sink has seen enough.
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => break,
            Err(error) => return Err(context("send")(error)),
        }
    }
    Ok(written)
}
