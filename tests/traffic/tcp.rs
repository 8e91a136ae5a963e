//! Bulk TCP: any number of flows, received with large reads and counted by one thread that wakes ten times a second.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

use super::wire::{Received, Segments};
use super::{Receive, connect, context, say_listening, seconds};

/// What arrives is counted in steps of this.
pub const BUCKET: Duration = Duration::from_millis(100);
/// As much as a flow at 14 Gbit/s brings in half a millisecond: few wakeups, and it stays in the second-level cache.
const READ_BYTES: usize = 1 << 20;
const WRITE_BYTES: usize = 1 << 17;

/// nix has no name for this option yet.
#[derive(Clone, Copy)]
struct MaxPacingRate;
nix::setsockopt_impl!(MaxPacingRate, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, u64, sockopt::SetStruct<u64>);

#[derive(clap::Args)]
pub struct Send {
    /// Address and port of the sink
    #[arg(long)]
    to: SocketAddr,
    /// How many connections at once
    #[arg(long, default_value_t = 1)]
    flows: usize,
    /// Stop sending after this long, or when the sink closes
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Congestion control of the flows [default: the namespace's]
    #[arg(long)]
    cc: Option<OsString>,
    /// SO_MAX_PACING_RATE of each flow, in bytes per second
    #[arg(long, value_name = "BYTES")]
    max_pacing_rate: Option<u64>,
}

/// Cumulative counts: a bucket is the difference of two neighbours, a rate that of any two over the time between them.
#[derive(Serialize)]
pub struct SinkReport {
    /// When each sample was taken, counted from the first byte.
    pub sample_us: Vec<u64>,
    /// Payload received by then.
    pub payload_bytes: Vec<u64>,
    /// Wire bytes received by then, since listening, by the whole network namespace (`wire.rs`).
    pub wire_bytes: Vec<u64>,
    /// Payload per 100 ms.
    pub buckets: Vec<u64>,
    /// Payload in all.
    pub bytes: u64,
    /// Packets received, as they would be on the wire.
    pub packets: u64,
    /// Payload of each flow, in the order of connecting.
    pub flows: Vec<u64>,
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

/// What the accepting thread, the flows and the sampling thread share.
struct Shared {
    flows: Mutex<Vec<Arc<AtomicU64>>>,
    first_byte: OnceLock<Instant>,
    sampler: Thread,
}

pub fn sink(options: &Receive) -> io::Result<SinkReport> {
    let listener = TcpListener::bind(options.listen).map_err(context(format_args!("listen on {}", options.listen)))?;
    // Before the first connection: at accept() the first ten segments may have arrived already.
    let base = Received::now()?;
    say_listening(listener.local_addr()?);
    let shared = Arc::new(Shared { flows: Mutex::default(), first_byte: OnceLock::new(), sampler: thread::current() });
    let accepting = Arc::clone(&shared);
    // Never joined: accept() blocks for good, and the process ends when the samples are taken.
    thread::spawn(move || accept(&listener, &accepting));
    let report = sample(options, &shared, base)?;
    match options.flows {
        Some(wanted) if report.flows.len() != wanted => {
            Err(io::Error::other(format!("{} flows came instead of {wanted}", report.flows.len())))
        }
        _ => Ok(report),
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for stream in listener.incoming().flatten() {
        let counter = Arc::new(AtomicU64::new(0));
        shared.flows.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counter));
        let shared = Arc::clone(shared);
        thread::spawn(move || receive(stream, &counter, &shared));
    }
}

/// Ends with the flow, be it closed or reset: what has arrived is counted either way.
fn receive(mut stream: TcpStream, counter: &AtomicU64, shared: &Shared) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        counter.fetch_add(length as u64, Ordering::Relaxed);
        if shared.first_byte.get().is_none() && shared.first_byte.set(Instant::now()).is_ok() {
            shared.sampler.unpark();
        }
    }
}

fn sample(options: &Receive, shared: &Shared, base: Received) -> io::Result<SinkReport> {
    let listening = Instant::now();
    let start = loop {
        if let Some(start) = shared.first_byte.get() {
            break *start;
        }
        let Some(left) = options.wait.checked_sub(listening.elapsed()) else {
            return Err(io::Error::other(format!("nothing arrived within {:?}", options.wait)));
        };
        thread::park_timeout(left);
    };
    let counts = || -> Vec<u64> {
        let flows = shared.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.iter().map(|flow| flow.load(Ordering::Relaxed)).collect()
    };
    let mut report = SinkReport {
        sample_us: vec![0],
        payload_bytes: vec![0],
        wire_bytes: vec![0],
        buckets: vec![],
        bytes: 0,
        packets: 0,
        flows: vec![],
    };
    let mut next = start;
    while next + BUCKET <= start + options.seconds {
        next += BUCKET;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let received = Received::now()?;
        report.sample_us.push(start.elapsed().as_micros() as u64);
        report.flows = counts();
        let payload = report.flows.iter().sum();
        report.buckets.push(payload - report.bytes);
        report.bytes = payload;
        report.payload_bytes.push(payload);
        report.wire_bytes.push(received.wire_bytes - base.wire_bytes);
        report.packets = received.packets - base.packets;
    }
    Ok(report)
}

pub fn send(options: &Send) -> io::Result<SendReport> {
    let before = Segments::now()?;
    let flows: Vec<TcpStream> = (0..options.flows).map(|_| open(options)).collect::<io::Result<_>>()?;
    let until = Instant::now() + options.seconds;
    let written: io::Result<Vec<u64>> = thread::scope(|scope| {
        let threads: Vec<_> = flows.iter().map(|flow| scope.spawn(move || fill(flow, until))).collect();
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

fn open(options: &Send) -> io::Result<TcpStream> {
    let stream = connect(options.to)?;
    if let Some(name) = &options.cc {
        setsockopt(&stream, sockopt::TcpCongestion, name)
            .map_err(io::Error::from)
            .map_err(context(format_args!("use the congestion control {name:?}")))?;
    }
    if let Some(rate) = &options.max_pacing_rate {
        setsockopt(&stream, MaxPacingRate, rate).map_err(io::Error::from).map_err(context("set SO_MAX_PACING_RATE"))?;
    }
    // Reset on close: megabytes may wait in the socket buffer, and the pod should be silent when this program has ended.
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    // A flow of 10 Mbit/s can block in write() for seconds.
    stream.set_write_timeout(Some(BUCKET))?;
    Ok(stream)
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
