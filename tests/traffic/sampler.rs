//! The bytes that a network namespace and the flows in it receive, ten times a second.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::sockets::Protocol;
use super::wire::Received;

/// Arrivals are counted in steps of this time.
pub const BUCKET: Duration = Duration::from_millis(100);

/// Cumulative counts: a bucket is the difference of two neighbours, and a rate is the difference of any two divided
/// by the time between them.
#[derive(Serialize)]
pub struct Timeline {
    /// When each sample was taken, since the first byte.
    pub sample_us: Vec<u64>,
    /// Payload received until then.
    pub payload_bytes: Vec<u64>,
    /// Wire bytes received until then by the whole network namespace, since the start of listening (`wire.rs`).
    pub wire_bytes: Vec<u64>,
    /// Payload per 100 ms.
    pub buckets: Vec<u64>,
    /// Total payload.
    pub bytes: u64,
    /// Packets received, counted as on the wire.
    pub packets: u64,
    /// Payload of each flow, in the order of connecting.
    pub flows: Vec<u64>,
}

/// State that the sampling thread shares with the receiving threads.
pub struct Sampler {
    protocol: Protocol,
    base: Received,
    flows: Mutex<Vec<Arc<AtomicU64>>>,
    first_byte: OnceLock<Instant>,
    sampler: Thread,
}

impl Sampler {
    /// The calling thread samples the arrivals of all added flows. Call this before the first connection: at accept()
    /// ten segments may have arrived already.
    pub fn new(protocol: Protocol) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            protocol,
            base: Received::now(protocol)?,
            flows: Mutex::default(),
            first_byte: OnceLock::new(),
            sampler: thread::current(),
        }))
    }

    /// A counter for another flow.
    pub fn flow(&self) -> Arc<AtomicU64> {
        let counter = Arc::new(AtomicU64::new(0));
        self.flows.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counter));
        counter
    }

    /// Adds received bytes to their flow.
    pub fn count(&self, flow: &AtomicU64, bytes: usize) {
        flow.fetch_add(bytes as u64, Ordering::Relaxed);
        self.begin();
    }

    /// Starts the clock, unless it runs already.
    pub fn begin(&self) {
        if self.first_byte.get().is_none() && self.first_byte.set(Instant::now()).is_ok() {
            self.sampler.unpark();
        }
    }

    fn counts(&self) -> Vec<u64> {
        let flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        flows.iter().map(|flow| flow.load(Ordering::Relaxed)).collect()
    }

    /// The time of the first byte, which must come within `wait`.
    fn start(&self, wait: Duration) -> io::Result<Instant> {
        let listening = Instant::now();
        loop {
            if let Some(start) = self.first_byte.get() {
                return Ok(*start);
            }
            let Some(left) = wait.checked_sub(listening.elapsed()) else {
                return Err(io::Error::other(format!("nothing arrived within {wait:?}")));
            };
            thread::park_timeout(left);
        }
    }

    /// Samples for this time from the first byte on.
    pub fn sample(&self, length: Duration, wait: Duration) -> io::Result<Timeline> {
        let start = self.start(wait)?;
        let mut report = Timeline {
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
            let (at, received) = self.received_since(start)?;
            report.sample_us.push(at.as_micros() as u64);
            report.flows = self.counts();
            let payload = report.flows.iter().sum();
            report.buckets.push(payload - report.bytes);
            report.bytes = payload;
            report.payload_bytes.push(payload);
            report.wire_bytes.push(received.wire_bytes - self.base.wire_bytes);
            report.packets = received.packets - self.base.packets;
        }
        Ok(report)
    }

    /// The received bytes, and their time since `start`. On a busy machine this thread may be stopped while it reads
    /// the counters: then it reads them again, at most twice.
    fn received_since(&self, start: Instant) -> io::Result<(Duration, Received)> {
        const NO_STOP: Duration = Duration::from_millis(2);
        let read = || -> io::Result<_> {
            let before = start.elapsed();
            let received = Received::now(self.protocol)?;
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
}
