//! Messages that the receiving end of a bulk flow sends on the same connection meanwhile: the small messages of a
//! bidirectional protocol. Each message carries the time at which it was given to the kernel, if there is room for
//! it, so that the other end can tell how late it is.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A shorter message has no time in it.
const STAMP_BYTES: usize = size_of::<u64>();

/// Sends messages of `bytes` until the connection ends. After a delay no messages are caught up on, since a
/// protocol's messages are caused by events.
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

/// Takes messages of `bytes` until the connection ends. Returns how late each message was, if the messages carry
/// their time.
pub fn listen(mut stream: &TcpStream, bytes: usize) -> Vec<Duration> {
    let (mut message, mut delays) = (vec![0; bytes], vec![]);
    while stream.read_exact(&mut message).is_ok() {
        if let Some(stamp) = message.first_chunk::<STAMP_BYTES>() {
            delays.push(Duration::from_nanos(now_ns().saturating_sub(u64::from_ne_bytes(*stamp))));
        }
    }
    delays
}

/// Both ends are on one machine and share its clock. Of std's clocks, only this one can be passed to another process.
/// It could be set meanwhile, which does not happen here.
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
