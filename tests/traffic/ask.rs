//! Small requests and replies: what a person at the other end of a busy pod feels.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{connect, context, say_listening, seconds};

/// Bytes of a request and of a reply.
const MESSAGE_BYTES: usize = 100;

#[derive(clap::Args)]
pub struct Echo {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    /// Exit after this long, so that nothing is left behind by a caller that was killed
    #[arg(long, value_parser = seconds, default_value = "600")]
    seconds: Duration,
}

#[derive(clap::Args)]
pub struct Ask {
    /// Address and port of `traffic echo`
    #[arg(long)]
    to: SocketAddr,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Pause between a reply and the next request. Without one the requests themselves fill a link of 10 Mbit/s
    #[arg(long, default_value_t = 1000)]
    interval_us: u64,
}

#[derive(Serialize)]
pub struct AskReport {
    count: usize,
    p50_us: f64,
    /// Half of all the time that was spent waiting passed in waits of at least this.
    p50_of_time_us: f64,
    p99_us: f64,
    max_us: f64,
}

pub fn echo(options: &Echo) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen).map_err(context(format_args!("listen on {}", options.listen)))?;
    say_listening(listener.local_addr()?);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    thread::sleep(options.seconds);
    Ok(())
}

/// Ends when the asking side does.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

pub fn ask(options: &Ask) -> io::Result<AskReport> {
    let mut stream = connect(options.to)?;
    stream.set_nodelay(true)?;
    let pause = Duration::from_micros(options.interval_us);
    let mut message = [0; MESSAGE_BYTES];
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < options.seconds {
        let sent = Instant::now();
        stream.write_all(&message).map_err(context("send a request"))?;
        stream.read_exact(&mut message).map_err(context("wait for a reply"))?;
        times.push(sent.elapsed());
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    times.sort_unstable();
    Ok(AskReport {
        count: times.len(),
        p50_us: percentile(&times, 0.50),
        p50_of_time_us: median_of_time(&times),
        p99_us: percentile(&times, 0.99),
        max_us: percentile(&times, 1.0),
    })
}

/// The smallest time that `share` of all times do not exceed (nearest rank); 0 if there are none.
fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(0.0, |time| time.as_nanos() as f64 / 1000.0)
}

/// The time below which waits add up to half of what all of them take together; 0 if there are none.
fn median_of_time(sorted: &[Duration]) -> f64 {
    let half = sorted.iter().sum::<Duration>() / 2;
    let mut waited = Duration::ZERO;
    let median = sorted.iter().find(|time| {
        waited += **time;
        waited >= half
    });
    median.map_or(0.0, |time| time.as_nanos() as f64 / 1000.0)
}
