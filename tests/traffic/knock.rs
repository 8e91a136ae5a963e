//! Connection requests that are not followed by anything: a scan, a flood, a load balancer that checks whether a port
//! is open.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::seconds;

#[derive(clap::Args)]
pub struct Knock {
    /// Address and port of a server
    #[arg(long)]
    to: SocketAddr,
    /// Requests in a second
    #[arg(long)]
    per_second: u32,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

/// Closes each socket before its request is answered, so that the kernel resets the answer.
pub fn knock(options: &Knock) -> io::Result<()> {
    const AT_ONCE: Duration = Duration::from_nanos(1);
    let start = Instant::now();
    for number in 0.. {
        let due = Duration::from_secs(number) / options.per_second;
        if due >= options.seconds {
            break;
        }
        thread::sleep(due.saturating_sub(start.elapsed()));
        // Intended: there is no time to succeed.
        let _ = TcpStream::connect_timeout(&options.to, AT_ONCE);
    }
    Ok(())
}
