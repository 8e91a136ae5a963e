//! Small requests and replies: the delays that a person notices at the other end of a busy pod.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::sockets::Protocol;
use super::times::{Times, median_of_time, percentiles};
use super::{context, say_listening, seconds};

/// Size of a request and of a reply.
const MESSAGE_BYTES: usize = 100;

#[derive(clap::Args)]
pub struct Echo {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    /// Exit after this long, so that nothing is left behind by a caller that was killed
    #[arg(long, value_parser = seconds, default_value = "600")]
    seconds: Duration,
    /// Answer datagrams
    #[arg(long)]
    datagrams: bool,
    #[command(flatten)]
    protocol: Protocol,
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
    /// Ask this long before the first reply is counted: what is measured may begin after the connection
    #[arg(long, value_parser = seconds, default_value = "0")]
    uncounted: Duration,
    /// Each request a datagram, of a socket of its own, as a name is looked up
    #[arg(long)]
    datagrams: bool,
    /// Each request on a connection of its own, which is counted with it
    #[arg(long, conflicts_with = "datagrams")]
    anew: bool,
    #[command(flatten)]
    protocol: Protocol,
}

#[derive(Serialize)]
pub struct AskReport {
    count: usize,
    /// Datagrams that were not answered in time. The time of such a request includes the second try, or the wait
    /// until it gives up.
    lost: u64,
    /// Half of all the waiting time was spent in waits of at least this length.
    p50_of_time_us: f64,
    #[serde(flatten)]
    times: Times,
    percentiles_us: Vec<f64>,
}

pub fn echo(options: &Echo) -> io::Result<()> {
    if options.datagrams {
        let socket = UdpSocket::bind(options.listen).map_err(context("listen"))?;
        say_listening(socket.local_addr()?);
        thread::spawn(move || answer_datagrams(&socket));
        thread::sleep(options.seconds);
        return Ok(());
    }
    let listener = options.protocol.listen(options.listen)?;
    say_listening(listener.local_addr()?);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream));
        }
    });
    thread::sleep(options.seconds);
    Ok(())
}

/// Ends when the asking side ends.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE_BYTES];
    loop {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
}

fn answer_datagrams(socket: &UdpSocket) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    loop {
        let (bytes, from) = socket.recv_from(&mut message)?;
        socket.send_to(&message[..bytes], from)?;
    }
}

fn ask_by(stream: &mut TcpStream, message: &mut [u8]) -> io::Result<()> {
    stream.write_all(message).map_err(context("send a request"))?;
    stream.read_exact(message).map_err(context("wait for a reply"))
}

/// Asks as a resolver does (`timeout:5 attempts:2` is its default). Returns the number of datagrams without an answer
/// in time.
fn look_up(to: SocketAddr, message: &mut [u8]) -> io::Result<u64> {
    const TIMEOUT: Duration = Duration::from_secs(5);
    const ATTEMPTS: u64 = 2;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    for lost in 0..ATTEMPTS {
        socket.send(message).map_err(context("send a request"))?;
        match socket.recv(message) {
            Ok(_) => return Ok(lost),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(context("wait for a reply")(error)),
        }
    }
    Ok(ATTEMPTS)
}

pub fn ask(options: &Ask) -> io::Result<AskReport> {
    let connect = || {
        let stream = options.protocol.connect(options.to)?;
        stream.set_nodelay(true)?;
        io::Result::Ok(stream)
    };
    let mut stream = if options.datagrams || options.anew { None } else { Some(connect()?) };
    let pause = Duration::from_micros(options.interval_us);
    let mut message = [0; MESSAGE_BYTES];
    let (mut times, mut lost) = (Vec::new(), 0);
    let start = Instant::now();
    while start.elapsed() < options.seconds {
        let sent = Instant::now();
        match &mut stream {
            Some(stream) => ask_by(stream, &mut message)?,
            None if options.anew => ask_by(&mut connect()?, &mut message)?,
            None => lost += look_up(options.to, &mut message)?,
        }
        if sent - start >= options.uncounted {
            times.push(sent.elapsed());
        }
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    Ok(AskReport {
        count: times.len(),
        lost,
        p50_of_time_us: median_of_time(&times),
        percentiles_us: percentiles(&times),
        times: Times::of(times),
    })
}
