//! Voice: calls of two streams each, 160 bytes of G.711 every 20 ms in RTP packets (RFC 3550, RFC 3551), which is 64
//! kbit/s of audio and 80 kbit/s at layer 3. Each packet carries the time at which it was given to the kernel, so
//! that the other end can tell how late it is: both ends are on one machine with one monotonic clock.
//!
//! The calling end has a socket for each call, as phones have. The answering end has one socket for all calls, as a
//! conference server has.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::times::{Times, micros};
use super::{Receive, context, say_listening, seconds};

const SOUND_EVERY: Duration = Duration::from_millis(20);
const RTP_HEADER_BYTES: usize = 12;
const SOUND_BYTES: usize = 160;
const PACKET_BYTES: usize = RTP_HEADER_BYTES + SOUND_BYTES;
/// A later packet counts as lost.
const LATE: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Call {
    /// Address and port of `traffic voice-answer`
    #[arg(long)]
    to: SocketAddr,
    /// Hang up after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Calls at once
    #[arg(long, default_value_t = 1)]
    calls: u32,
}

/// The packets that one end has sent and received.
#[derive(Serialize)]
pub struct Report {
    sent: u64,
    received: u64,
    /// From the sender's send() to the receiver's recv().
    delay: Times,
    /// Jitter according to RFC 3550, section 6.4.1: the mean over all packets.
    jitter_us: f64,
    /// The maximum on any call.
    most_jitter_us: f64,
}

/// The result of one stream.
#[derive(Default)]
struct Heard {
    delays: Vec<Duration>,
    jitter: f64,
    jitter_sum: f64,
    most_jitter: f64,
}

impl Heard {
    fn packet(&mut self, delay: Duration) {
        if let Some(last) = self.delays.last() {
            self.jitter += (micros(delay.abs_diff(*last)) - self.jitter) / 16.0;
        }
        self.delays.push(delay);
        self.jitter_sum += self.jitter;
        self.most_jitter = self.most_jitter.max(self.jitter);
    }
}

pub fn call(options: &Call) -> io::Result<Report> {
    let starts = (0..options.calls).map(|call| SOUND_EVERY * call / options.calls);
    let calling: Vec<_> = starts.map(|start| thread::spawn(place(options.to, start, options.seconds))).collect();
    let (mut sent, mut streams) = (0, vec![]);
    for call in calling {
        let (said, heard) = joined(call)?;
        sent += said;
        streams.extend(heard);
    }
    Ok(report(sent, streams))
}

/// One call: sends and receives from its beginning to its end.
fn place(to: SocketAddr, start: Duration, length: Duration) -> impl FnOnce() -> io::Result<(u64, Vec<Heard>)> {
    move || {
        thread::sleep(start);
        let any: SocketAddr =
            if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16, 0, 0, 0, 0, 0, 0, 0], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(LATE))?;
        let socket = Arc::new(socket);
        let saying = Arc::clone(&socket);
        let saying = thread::spawn(move || say(&saying, to, length));
        let heard = hear(&socket, length + LATE, |_| ())?;
        Ok((joined(saying)?, heard))
    }
}

/// Answers all calls, as long as they last.
pub fn answer(options: &Receive) -> io::Result<Report> {
    let socket = UdpSocket::bind(options.listen).map_err(context(format_args!("listen on {}", options.listen)))?;
    say_listening(socket.local_addr()?);
    socket.set_read_timeout(Some(options.wait))?;
    socket.peek_from(&mut [0]).map_err(context("wait for a call"))?;
    socket.set_read_timeout(Some(LATE))?;
    let socket = Arc::new(socket);
    let sent = Arc::new(AtomicU64::new(0));
    let length = options.seconds;
    let streams = hear(&socket, length + LATE, |from| {
        let (socket, sent) = (Arc::clone(&socket), Arc::clone(&sent));
        thread::spawn(move || {
            let said = say(&socket, from, length)?;
            sent.fetch_add(said, Ordering::Relaxed);
            io::Result::Ok(())
        });
    })?;
    Ok(report(sent.load(Ordering::Relaxed), streams))
}

/// Sends a packet every 20 ms. Returns how many the socket accepted. If the socket's buffer is full it waits, though
/// a real sender of audio would not.
fn say(socket: &UdpSocket, to: SocketAddr, length: Duration) -> io::Result<u64> {
    let start = Instant::now();
    let mut sent: u64 = 0;
    while start.elapsed() < length {
        socket.send_to(&packet(sent)?, to)?;
        sent += 1;
        thread::sleep((SOUND_EVERY * sent as u32).saturating_sub(start.elapsed()));
    }
    Ok(sent)
}

/// Version 2, payload type 0 (G.711), a number, a time in samples of 8 kHz; then audio, which begins with the time
/// here.
fn packet(number: u64) -> io::Result<[u8; PACKET_BYTES]> {
    let mut packet = [0; PACKET_BYTES];
    packet[0] = 2 << 6;
    packet[2..4].copy_from_slice(&(number as u16).to_be_bytes());
    packet[4..8].copy_from_slice(&(number as u32 * SOUND_BYTES as u32).to_be_bytes());
    packet[RTP_HEADER_BYTES..][..size_of::<u64>()].copy_from_slice(&now_ns()?.to_ne_bytes());
    Ok(packet)
}

/// The streams that arrive within this time, one for each address. Calls `begin` at the first packet of each stream.
fn hear(socket: &UdpSocket, length: Duration, mut begin: impl FnMut(SocketAddr)) -> io::Result<Vec<Heard>> {
    let mut streams: HashMap<SocketAddr, Heard> = HashMap::new();
    let mut packet = [0; PACKET_BYTES];
    let start = Instant::now();
    while start.elapsed() < length {
        let from = match socket.recv_from(&mut packet) {
            Ok((_, from)) => from,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(context("receive")(error)),
        };
        let delay = packet[RTP_HEADER_BYTES..].first_chunk().map_or(Ok(Duration::ZERO), |stamp| since(*stamp))?;
        let stream = streams.entry(from).or_insert_with(|| {
            begin(from);
            Heard::default()
        });
        stream.packet(delay);
    }
    Ok(streams.into_values().collect())
}

fn report(sent: u64, streams: Vec<Heard>) -> Report {
    let delays: Vec<Duration> = streams.iter().flat_map(|stream| stream.delays.iter().copied()).collect();
    let received = delays.len() as u64;
    Report {
        sent,
        received,
        delay: Times::of(delays),
        jitter_us: streams.iter().map(|stream| stream.jitter_sum).sum::<f64>() / received.max(1) as f64,
        most_jitter_us: streams.iter().map(|stream| stream.most_jitter).fold(0.0, f64::max),
    }
}

fn now_ns() -> io::Result<u64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64)
}

fn since(stamp: [u8; 8]) -> io::Result<Duration> {
    Ok(Duration::from_nanos(now_ns()?.saturating_sub(u64::from_ne_bytes(stamp))))
}

fn joined<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of a call panicked")))
}
