//! Requests for connections that nothing follows: a scan, a flood, a balancer that looks whether a port is open.

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

/// Each socket is closed before its request is answered, and the answer reset.
pub fn knock(options: &Knock) -> io::Result<()> {
    const AT_ONCE: Duration = Duration::from_nanos(1);
    let start = Instant::now();
    for number in 0.. {
        let due = Duration::from_secs(number) / options.per_second;
        if due >= options.seconds {
            break;
        }
        thread::sleep(due.saturating_sub(start.elapsed()));
        // That it has no time to succeed is what is asked for.
        let _ = TcpStream::connect_timeout(&options.to, AT_ONCE);
    }
    Ok(())
}
