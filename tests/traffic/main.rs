//! traffic: the traffic that the tests, the demo and the benchmark send through a pod, and its measurement.
//!
//! Every subcommand prints one line of JSON on stdout at the end. Rates are always measured where the bytes arrive
//! (`sink`, `udp-sink`), since in its first second a sender only fills its own socket buffer. Servers print
//! "listening on ADDRESS" on stderr as soon as clients may connect, so a caller can pass port 0.
#![allow(clippy::print_stdout, reason = "one line of JSON on stdout is this program's answer")]

mod ask;
mod chatter;
mod frames;
mod knock;
mod sampler;
mod send;
mod sink;
mod sockets;
mod sources;
mod times;
mod udp;
mod voice;
mod watch;
mod web;
mod wire;
mod xdp;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde::Serialize;

/// Traffic to measure a pod's network with.
#[derive(Parser)]
#[command(name = "traffic")]
enum Command {
    /// Receive TCP flows and count what arrives in every 100 ms from the first byte on
    Sink(sink::Sink),
    /// Send bulk TCP flows
    Send(send::Send),
    /// Accept TCP flows and send on them
    Serve(send::Serve),
    /// Connect to `traffic serve` and count what arrives as `traffic sink` does
    Fetch(sink::Fetch),
    /// Receive UDP and count what arrives in every 100 ms from the first packet on; at an address of multicast, join it
    UdpSink(Receive),
    /// Send UDP at a steady rate and count what the socket refused
    UdpSend(udp::Send),
    /// Send UDP in frames of an AF_PACKET socket
    Frames(frames::Frames),
    /// Answer every 100-byte request with 100 bytes
    Echo(ask::Echo),
    /// Send requests one after the other and time every reply
    Ask(ask::Ask),
    /// Answer calls, which `traffic voice-call` makes
    VoiceAnswer(Receive),
    /// Speak and hear: a stream of 64 kbit/s each way for each call
    VoiceCall(voice::Call),
    /// Answer short requests, each with as much as it asks for
    WebServe(Receive),
    /// Ask in a closed loop, on connections that are short or kept, and time every response
    WebGet(web::WebGet),
    /// Ask for connections and take none of them
    Knock(knock::Knock),
    /// Say what this network namespace has received so far
    Received,
    /// Count what an interface receives in every 100 ms from the first large packet on
    Watch(watch::Watch),
    /// Set an option of 8 KiB on a socket and see what the kernel got
    Sources(sources::Sources),
}

/// Options of a server that counts arrivals.
#[derive(clap::Args)]
struct Receive {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    /// Stop this long after the first byte
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
    /// Give up when nothing has arrived after this long
    #[arg(long, value_parser = seconds, default_value = "10")]
    wait: Duration,
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Sink(options) => sink::sink(&options).and_then(print),
        Command::Send(options) => send::send(&options).and_then(print),
        Command::Serve(options) => send::serve(&options).and_then(print),
        Command::Fetch(options) => sink::fetch(&options).and_then(print),
        Command::UdpSink(options) => udp::sink(&options).and_then(print),
        Command::UdpSend(options) => udp::send(&options).and_then(print),
        Command::Frames(options) => frames::send(&options).and_then(print),
        Command::Echo(options) => ask::echo(&options),
        Command::Ask(options) => ask::ask(&options).and_then(print),
        Command::VoiceAnswer(options) => voice::answer(&options).and_then(print),
        Command::VoiceCall(options) => voice::call(&options).and_then(print),
        Command::WebServe(options) => web::serve(&options).and_then(print),
        Command::WebGet(options) => web::get(&options).and_then(print),
        Command::Knock(options) => knock::knock(&options),
        Command::Received => wire::Received::now(sockets::Protocol::TCP).and_then(print),
        Command::Watch(options) => watch::watch(&options).and_then(print),
        Command::Sources(options) => sources::sources(&options).and_then(print),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "traffic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(report: impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(&report)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

/// A number of seconds on the command line, fractions allowed.
fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

fn say_listening(address: SocketAddr) {
    say(format_args!("listening on {address}"));
}

/// Prints a line on stderr for the waiting caller.
fn say(what: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{what}");
}

/// Adds what was being done to a system error.
fn context(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}
