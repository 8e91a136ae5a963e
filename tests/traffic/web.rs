//! A web server and its clients, as far as the network sees them: short connections, each with a request and a
//! response, in a closed loop.
//!
//! A request is one line of [`REQUEST_BYTES`] with all that the server needs to know. The answering side closes
//! first, as a web server does with `Connection: close`: so TIME_WAIT stays at its end, and the clients do not run
//! out of ports.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde::Serialize;

use super::sampler::{BUCKET, Sampler, Timeline};
use super::sockets::Protocol;
use super::times::{Times, micros};
use super::wire::Segments;
use super::{Receive, say, say_listening, seconds};

/// Size of a request, and of the answer to a POST.
const REQUEST_BYTES: usize = 100;
/// Connections that are served at the same time; more connections wait to be accepted.
const SERVED_AT_ONCE: usize = 160;
const BUFFER_BYTES: usize = 1 << 16;
/// A client does not ask again immediately after a failure: on a machine with two CPUs it would take CPU time from
/// the other clients.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);

#[derive(clap::Args)]
pub struct WebGet {
    /// Address and port of `traffic web-serve`
    #[arg(long)]
    to: SocketAddr,
    /// How many ask at once, each one request after the other
    #[arg(long)]
    clients: usize,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// What a response has, or with --post a request
    #[arg(long)]
    bytes: usize,
    /// Send the bytes, instead of asking for them
    #[arg(long)]
    post: bool,
    /// Keep the connection for the next request
    #[arg(long)]
    keep: bool,
}

#[derive(Serialize)]
pub struct WebServeReport {
    #[serde(flatten)]
    received: Timeline,
    /// Segments that this namespace has sent again.
    retransmits: u64,
}

#[derive(Serialize)]
pub struct WebGetReport {
    #[serde(flatten)]
    received: Timeline,
    /// Segments that this namespace has sent again.
    retransmits: u64,
    responses: usize,
    /// Requests without a response, by the error's name.
    failures: BTreeMap<String, u64>,
    /// Requests without a response at the end.
    unfinished: usize,
    /// How long the oldest of them had waited.
    longest_unfinished_us: f64,
    /// From connect() to the last byte; on a connection that is kept, from the request.
    from_connect: Times,
    /// From writing the request to the last byte, as wrk reports it.
    from_request: Times,
}

/// The contents of a request's line.
#[derive(Clone, Copy)]
struct Request {
    post: bool,
    bytes: usize,
    keep: bool,
}

impl Request {
    fn line(self) -> String {
        let Self { post, bytes, keep } = self;
        let text = format!("{} {bytes} {}", if post { "POST" } else { "GET" }, if keep { "keep" } else { "close" });
        format!("{text:<width$}\n", width = REQUEST_BYTES - 1)
    }

    fn parse(line: &[u8]) -> io::Result<Self> {
        let text = String::from_utf8_lossy(line);
        let words: Vec<&str> = text.split_whitespace().collect();
        let request = match words[..] {
            [method @ ("GET" | "POST"), bytes, end @ ("keep" | "close")] => {
                bytes.parse().ok().map(|bytes| Self { post: method == "POST", bytes, keep: end == "keep" })
            }
            _ => None,
        };
        request.ok_or_else(|| io::Error::other(format!("{text:?} is no request of `traffic web-get`")))
    }

    /// The number of bytes after the request's line, and the size of the response.
    fn bodies(self) -> (usize, usize) {
        if self.post { (self.bytes, REQUEST_BYTES) } else { (0, self.bytes) }
    }
}

pub fn serve(options: &Receive) -> io::Result<WebServeReport> {
    let listener = Arc::new(Protocol::TCP.listen(options.listen)?);
    let before = Segments::now()?;
    let sampler = Sampler::new(Protocol::TCP)?;
    // Never joined: accept() blocks for ever, and the process ends after the last sample.
    for _ in 0..SERVED_AT_ONCE {
        let (listener, sampler, counter) = (Arc::clone(&listener), Arc::clone(&sampler), sampler.flow());
        thread::spawn(move || {
            let mut buffer = vec![0; BUFFER_BYTES];
            // The clients report the errors of their connections.
            listener.incoming().flatten().for_each(|stream| drop(answer(stream, &mut buffer, &sampler, &counter)));
        });
    }
    say_listening(listener.local_addr()?);
    let received = sampler.sample(options.seconds, options.wait)?;
    // The clients, whose time began a moment earlier, have ended by then.
    thread::sleep(2 * BUCKET);
    Ok(WebServeReport { received, retransmits: Segments::now()?.retransmitted - before.retransmitted })
}

/// Serves one connection until it ends.
fn answer(mut stream: TcpStream, buffer: &mut [u8], sampler: &Sampler, counter: &AtomicU64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut line = [0; REQUEST_BYTES];
    loop {
        stream.read_exact(&mut line)?;
        sampler.count(counter, line.len());
        let request = Request::parse(&line)?;
        let (body, response) = request.bodies();
        take(&mut stream, body, buffer, |length| sampler.count(counter, length))?;
        give(&mut stream, response, buffer)?;
        if !request.keep {
            return Ok(());
        }
    }
}

/// Reads this number of bytes.
fn take(stream: &mut TcpStream, bytes: usize, buffer: &mut [u8], count: impl Fn(usize)) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let most = left.min(buffer.len());
        match stream.read(&mut buffer[..most])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            length => {
                count(length);
                left -= length;
            }
        }
    }
    Ok(())
}

fn give(stream: &mut TcpStream, bytes: usize, buffer: &[u8]) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let most = left.min(buffer.len());
        left -= stream.write(&buffer[..most])?;
    }
    Ok(())
}

/// The results of one client.
#[derive(Default)]
struct Seen {
    from_connect: Vec<Duration>,
    from_request: Vec<Duration>,
    failures: BTreeMap<String, u64>,
    /// When the unanswered request began.
    waiting: Option<Instant>,
}

pub fn get(options: &WebGet) -> io::Result<WebGetReport> {
    let WebGet { to, clients, seconds, bytes, post, keep } = *options;
    let request = Request { post, bytes, keep };
    let before = Segments::now()?;
    let sampler = Sampler::new(Protocol::TCP)?;
    let seen: Vec<Arc<Mutex<Seen>>> = (0..clients).map(|_| Arc::default()).collect();
    // A slow machine takes seconds to make the threads. Nothing else should be measured before they are ready.
    let made = Arc::new(Barrier::new(clients + 1));
    for seen in &seen {
        let client =
            Client { to, request, seen: Arc::clone(seen), sampler: Arc::clone(&sampler), counter: sampler.flow() };
        let made = Arc::clone(&made);
        // Never joined: a request may wait for a long time, and the process ends when the time is over.
        thread::spawn(move || {
            made.wait();
            client.run();
        });
    }
    say("ready");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    // Before the first connection, which may already have to wait.
    sampler.begin();
    made.wait();
    let received = sampler.sample(seconds, Duration::ZERO)?;
    let mut all = Seen::default();
    let mut waited = vec![];
    for seen in seen {
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        all.from_connect.extend(seen.from_connect);
        all.from_request.extend(seen.from_request);
        waited.extend(seen.waiting.map(|since| since.elapsed()));
        seen.failures.into_iter().for_each(|(name, count)| *all.failures.entry(name).or_default() += count);
    }
    Ok(WebGetReport {
        received,
        retransmits: Segments::now()?.retransmitted - before.retransmitted,
        responses: all.from_connect.len(),
        failures: all.failures,
        unfinished: waited.len(),
        longest_unfinished_us: waited.into_iter().max().map_or(0.0, micros),
        from_connect: Times::of(all.from_connect),
        from_request: Times::of(all.from_request),
    })
}

struct Client {
    to: SocketAddr,
    request: Request,
    seen: Arc<Mutex<Seen>>,
    sampler: Arc<Sampler>,
    counter: Arc<AtomicU64>,
}

impl Client {
    fn run(self) {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut kept = None;
        let see = |change: &dyn Fn(&mut Seen)| change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        loop {
            let began = Instant::now();
            see(&|seen| seen.waiting = Some(began));
            let result = self.ask(kept.take(), &mut buffer);
            let ended = Instant::now();
            match result {
                Ok((stream, asked)) => {
                    see(&|seen| {
                        seen.from_connect.push(ended - began);
                        seen.from_request.push(ended - asked);
                        seen.waiting = None;
                    });
                    kept = stream;
                }
                Err(error) => {
                    see(&|seen| *seen.failures.entry(name(&error)).or_default() += 1);
                    thread::sleep(PAUSE_AFTER_FAILURE);
                }
            }
        }
    }

    /// One request, on a kept connection or on a new one. Returns the connection if it is kept, and the time at which
    /// the request was written.
    fn ask(&self, kept: Option<TcpStream>, buffer: &mut [u8]) -> io::Result<(Option<TcpStream>, Instant)> {
        let mut stream = kept.map_or_else(|| self.connect(), Ok)?;
        let (body, response) = self.request.bodies();
        stream.write_all(self.request.line().as_bytes())?;
        let asked = Instant::now();
        give(&mut stream, body, buffer)?;
        let count = |length| self.sampler.count(&self.counter, length);
        take(&mut stream, response, buffer, count)?;
        if self.request.keep {
            return Ok((Some(stream), asked));
        }
        // The end of the connection is the end of the response.
        match stream.read(buffer)? {
            0 => Ok((None, asked)),
            _ => Err(io::Error::other("more came than was asked for")),
        }
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.to)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// The error's name, such as ECONNRESET.
fn name(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(|number| format!("{:?}", Errno::from_raw(number)));
    errno.unwrap_or_else(|| format!("{:?}", error.kind()))
}
