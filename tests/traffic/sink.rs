//! Bulk TCP received: any number of flows, received with large reads and counted by one thread that wakes ten times a second.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::wire::Received;
use super::{Receive, connect, context, say_listening, seconds};

/// What arrives is counted in steps of this.
pub const BUCKET: Duration = Duration::from_millis(100);
/// As much as a flow at 14 Gbit/s brings in half a millisecond: few wakeups, and it stays in the second-level cache.
const READ_BYTES: usize = 1 << 20;
/// How long a server may take to send its first byte.
const FIRST_BYTE_WAIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Fetch {
    /// Address and port of `traffic serve`
    #[arg(long)]
    from: SocketAddr,
    /// How many connections at once
    #[arg(long, default_value_t = 1)]
    flows: usize,
    /// Stop this long after the first byte
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
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
    let shared = Arc::new(Shared::new());
    let accepting = Arc::clone(&shared);
    // Never joined: accept() blocks for good, and the process ends when the samples are taken.
    thread::spawn(move || listener.incoming().flatten().for_each(|stream| accepting.add(stream)));
    let report = sample(&shared, base, options.seconds, options.wait)?;
    match options.flows {
        Some(wanted) if report.flows.len() != wanted => {
            Err(io::Error::other(format!("{} flows came instead of {wanted}", report.flows.len())))
        }
        _ => Ok(report),
    }
}

pub fn fetch(options: &Fetch) -> io::Result<SinkReport> {
    let base = Received::now()?;
    let shared = Arc::new(Shared::new());
    for _ in 0..options.flows {
        shared.add(connect(options.from)?);
    }
    sample(&shared, base, options.seconds, FIRST_BYTE_WAIT)
}

impl Shared {
    /// What arrives on the flows added is sampled by the thread that calls this.
    fn new() -> Self {
        Self { flows: Mutex::default(), first_byte: OnceLock::new(), sampler: thread::current() }
    }

    /// Counts what arrives on `stream`, on a thread that nobody joins.
    fn add(self: &Arc<Self>, stream: TcpStream) {
        let counter = Arc::new(AtomicU64::new(0));
        self.flows.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counter));
        let shared = Arc::clone(self);
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

/// What was received, and when since `start`. On a busy machine the reader of the counters may be stopped while it reads: then it reads
/// them again, twice at most.
fn received_since(start: Instant) -> io::Result<(Duration, Received)> {
    const NO_STOP: Duration = Duration::from_millis(2);
    let read = || -> io::Result<_> {
        let before = start.elapsed();
        let received = Received::now()?;
        let took = start.elapsed() - before;
        Ok((took, before + took / 2, received))
    };
    let mut best = read()?;
    for _ in 0..2 {
        if best.0 <= NO_STOP {
            break;
        }
        let again = read()?;
        if again.0 < best.0 {
            best = again;
        }
    }
    Ok((best.1, best.2))
}

fn sample(shared: &Shared, base: Received, length: Duration, wait: Duration) -> io::Result<SinkReport> {
    let listening = Instant::now();
    let start = loop {
        if let Some(start) = shared.first_byte.get() {
            break *start;
        }
        let Some(left) = wait.checked_sub(listening.elapsed()) else {
            return Err(io::Error::other(format!("nothing arrived within {wait:?}")));
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
    while next + BUCKET <= start + length {
        next += BUCKET;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let (at, received) = received_since(start)?;
        report.sample_us.push(at.as_micros() as u64);
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
