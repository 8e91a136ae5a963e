//! Bulk TCP received: any number of flows, received with large reads and counted by one thread that wakes ten times a second.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use super::sampler::{Sampler, Timeline};
use super::sockets::Protocol;
use super::{Receive, chatter, say_listening, seconds};

/// As much as a flow at 14 Gbit/s brings in half a millisecond: few wakeups, and it stays in the second-level cache.
const READ_BYTES: usize = 1 << 20;
/// How long a server may take to send its first byte.
const FIRST_BYTE_WAIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Sink {
    #[command(flatten)]
    receive: Receive,
    /// Fail unless so many flows came
    #[arg(long)]
    flows: Option<usize>,
    #[command(flatten)]
    protocol: Protocol,
    /// Say a message of so many bytes on each flow, again and again; 8 bytes have room for the time, which `send` wants
    #[arg(long, value_name = "BYTES", requires = "chatter_us")]
    chatter_bytes: Option<usize>,
    /// Pause between two such messages
    #[arg(long, value_name = "MICROSECONDS", requires = "chatter_bytes")]
    chatter_us: Option<u64>,
}

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

pub fn sink(options: &Sink) -> io::Result<Timeline> {
    let Receive { listen, seconds, wait } = options.receive;
    let listener = options.protocol.listen(listen)?;
    let sampler = Sampler::new(options.protocol)?;
    say_listening(listener.local_addr()?);
    let (accepting, protocol) = (Arc::clone(&sampler), options.protocol);
    let chatter = options.chatter_bytes.zip(options.chatter_us.map(Duration::from_micros));
    // Never joined: accept() blocks for good, and the process ends when the samples are taken.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // An error shows when it is read from.
            let _ = protocol.greet(&stream);
            if let (Some((bytes, every)), Ok(stream)) = (chatter, stream.try_clone()) {
                thread::spawn(move || chatter::say(stream, bytes, every));
            }
            add(&accepting, stream);
        }
    });
    let report = sampler.sample(seconds, wait)?;
    match options.flows {
        Some(wanted) if report.flows.len() != wanted => {
            Err(io::Error::other(format!("{} flows came instead of {wanted}", report.flows.len())))
        }
        _ => Ok(report),
    }
}

pub fn fetch(options: &Fetch) -> io::Result<Timeline> {
    let sampler = Sampler::new(Protocol::TCP)?;
    for _ in 0..options.flows {
        add(&sampler, Protocol::TCP.connect(options.from)?);
    }
    sampler.sample(options.seconds, FIRST_BYTE_WAIT)
}

/// Counts what arrives on `stream`, on a thread that nobody joins.
fn add(sampler: &Arc<Sampler>, stream: TcpStream) {
    let (counter, sampler) = (sampler.flow(), Arc::clone(sampler));
    thread::spawn(move || receive(stream, &counter, &sampler));
}

/// Ends with the flow, be it closed or reset: what has arrived is counted either way.
fn receive(mut stream: TcpStream, counter: &AtomicU64, sampler: &Sampler) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        sampler.count(counter, length);
    }
}
