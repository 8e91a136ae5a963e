//! Receives bulk TCP: any number of flows, received with large reads and counted by one thread that wakes ten times a
//! second.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::sampler::{Sampler, Timeline};
use super::sockets::Protocol;
use super::{Receive, chatter, say_listening, seconds};

/// As many bytes as a flow at 14 Gbit/s receives in half a millisecond: few wakeups, and the buffer stays in the
/// second-level cache.
const READ_BYTES: usize = 1 << 20;
/// The most time that a server may take to send its first byte.
const FIRST_BYTE_WAIT: Duration = Duration::from_secs(10);

/// TCP_WINDOW_CLAMP.
#[derive(Clone, Copy, Debug)]
struct WindowClamp;
nix::setsockopt_impl!(WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, u32, sockopt::SetStruct<u32>);
nix::getsockopt_impl!(WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, u32, sockopt::GetStruct<u32>);

#[derive(clap::Args)]
pub struct Sink {
    #[command(flatten)]
    receive: Receive,
    /// Fail unless so many flows came
    #[arg(long)]
    flows: Option<usize>,
    /// TCP_WINDOW_CLAMP of each flow; fail unless it is the same at the end
    #[arg(long, value_name = "BYTES")]
    window_clamp: Option<u32>,
    /// SO_RCVBUF of each flow, which the kernel doubles
    #[arg(long, value_name = "BYTES")]
    buffer: Option<usize>,
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
    let clamped = Arc::new(Mutex::new(Vec::new()));
    let (window_clamp, streams) = (options.window_clamp, Arc::clone(&clamped));
    let buffer = options.buffer;
    let chatter = options.chatter_bytes.zip(options.chatter_us.map(Duration::from_micros));
    // Never joined: accept() blocks for ever, and the process ends after the last sample.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // An error shows up when the stream is read.
            let _ = protocol.greet(&stream);
            if let (Some((bytes, every)), Ok(stream)) = (chatter, stream.try_clone()) {
                thread::spawn(move || chatter::say(stream, bytes, every));
            }
            if let Some(bytes) = buffer {
                // A refusal shows up in the result.
                let _ = setsockopt(&stream, sockopt::RcvBuf, &bytes);
            }
            if let (Some(bytes), Ok(stream)) = (window_clamp, stream.try_clone()) {
                // With an explicit buffer size, the kernel's autotuning leaves the clamp unchanged. An error shows up
                // at the end.
                let _ = setsockopt(&stream, sockopt::RcvBuf, &(16 * bytes as usize));
                let _ = setsockopt(&stream, WindowClamp, &bytes);
                streams.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
            }
            add(&accepting, stream);
        }
    });
    let report = sampler.sample(seconds, wait)?;
    for stream in clamped.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let bytes = getsockopt(stream, WindowClamp)?;
        if window_clamp.is_some_and(|own| bytes > own) {
            return Err(io::Error::other(format!("the window clamp of a flow is {bytes} bytes at the end")));
        }
    }
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

/// Counts the bytes that arrive on `stream`, on a thread that is never joined.
fn add(sampler: &Arc<Sampler>, stream: TcpStream) {
    let (counter, sampler) = (sampler.flow(), Arc::clone(sampler));
    thread::spawn(move || receive(stream, &counter, &sampler));
}

/// Ends with the flow, whether it is closed or reset: received bytes are counted in both cases.
fn receive(mut stream: TcpStream, counter: &AtomicU64, sampler: &Sampler) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        sampler.count(counter, length);
    }
}
