//! What the receiving end of a bulk flow says on the same connection meanwhile: the small messages of a protocol that goes both ways.
//! Each message carries the time at which it was given to the kernel, if there is room for it, and the other end sees how late it is.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A message shorter than this has no time in it.
const STAMP_BYTES: usize = size_of::<u64>();

/// Says messages of `bytes` until the connection ends. What is late is not made good: a protocol's messages come of what happens.
pub fn say(mut stream: TcpStream, bytes: usize, every: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = vec![0; bytes];
    let mut due = Instant::now();
    loop {
        if let Some(stamp) = message.first_chunk_mut() {
            *stamp = now_ns().to_ne_bytes();
        }
        stream.write_all(&message)?;
        due = (due + every).max(Instant::now());
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Takes messages of `bytes` until the connection ends; how late each was, where they say when they were sent.
pub fn listen(mut stream: &TcpStream, bytes: usize) -> Vec<Duration> {
    let (mut message, mut delays) = (vec![0; bytes], vec![]);
    while stream.read_exact(&mut message).is_ok() {
        if let Some(stamp) = message.first_chunk::<STAMP_BYTES>() {
            delays.push(Duration::from_nanos(now_ns().saturating_sub(u64::from_ne_bytes(*stamp))));
        }
    }
    delays
}

/// Both ends are on one machine, which has one clock. That one of std's which can be told to another process may be set meanwhile, which
/// nobody does here.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
