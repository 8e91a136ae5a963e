//! quic: bulk transfers and small requests by QUIC, as browsers and gRPC send them. `tests/harness` calls this
//! program like `traffic`.
//!
//! It is a separate package, since it needs a runtime (tokio) that nothing else in podshaper needs. A unidirectional
//! stream is a transfer, whose bytes are counted; a bidirectional stream is a request, which is answered with the
//! same bytes. `quic serve` prints "listening on ADDRESS" on stderr. The other subcommands print one line of JSON on
//! stdout at the end.
#![allow(clippy::print_stdout, reason = "one line of JSON on stdout is this program's answer")]

#[path = "../../traffic/times.rs"]
mod times;

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use quinn::rustls::RootCertStore;
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig, TransportConfig, VarInt};
use serde::Serialize;

use times::{Times, median_of_time, percentiles};

/// The name in the server's certificate.
const NAME: &str = "pod.test";
/// Size of a request and of its answer.
const MESSAGE_BYTES: usize = 100;
const CHUNK_BYTES: usize = 1 << 16;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// Traffic by QUIC to measure a pod's network with.
#[derive(Parser)]
#[command(name = "quic")]
enum Command {
    /// Take transfers and answer requests
    Serve(Serve),
    /// Send bulk, on one stream of each connection
    Put(Put),
    /// Send requests one after the other on one connection, each on a stream of its own, and time every reply
    Ask(Ask),
}

#[derive(clap::Args)]
struct Serve {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long)]
    listen: SocketAddr,
    /// Write the certificate that clients trust to this file
    #[arg(long)]
    certificate: PathBuf,
    /// Exit after this long
    #[arg(long, value_parser = seconds, default_value = "600")]
    seconds: Duration,
}

#[derive(clap::Args)]
struct To {
    /// Address and port of `quic serve`
    #[arg(long)]
    to: SocketAddr,
    /// The file to which it has written its certificate
    #[arg(long)]
    certificate: PathBuf,
    /// Stop after this long
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

#[derive(clap::Args)]
struct Put {
    #[command(flatten)]
    to: To,
    /// Connections, of a socket each
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Give each datagram to the kernel by itself, and not several to be cut by it (UDP_SEGMENT)
    #[arg(long)]
    one_by_one: bool,
}

#[derive(clap::Args)]
struct Ask {
    #[command(flatten)]
    to: To,
    /// Pause between a reply and the next request
    #[arg(long, default_value_t = 1000)]
    interval_us: u64,
}

/// The sender's view of one connection.
#[derive(Serialize)]
struct PutReport {
    /// The bytes of all datagrams that the socket accepted, including retransmissions.
    sent_bytes: u64,
    sent_packets: u64,
    /// Packets that the sender considers lost, and has sent again.
    lost_packets: u64,
    congestion_events: u64,
    rtt_us: f64,
    congestion_window_bytes: u64,
    datagram_bytes: u16,
}

#[derive(Serialize)]
struct AskReport {
    count: usize,
    p50_of_time_us: f64,
    lost_packets: u64,
    #[serde(flatten)]
    times: Times,
    percentiles_us: Vec<f64>,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(Into::into).and_then(|runtime| match command {
        Command::Serve(options) => runtime.block_on(serve(&options)),
        Command::Put(options) => runtime.block_on(put(&options)).and_then(print),
        Command::Ask(options) => runtime.block_on(ask(&options)).and_then(print),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "quic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print(report: impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(&report)?;
    line.push(b'\n');
    Ok(io::stdout().write_all(&line)?)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

async fn serve(options: &Serve) -> Result<()> {
    let key = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    fs::write(&options.certificate, key.cert.der())?;
    let private = quinn::rustls::pki_types::PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let config = ServerConfig::with_single_cert(vec![key.cert.der().clone()], private.into())?;
    let endpoint = Endpoint::server(config, options.listen)?;
    writeln!(io::stderr(), "listening on {}", endpoint.local_addr()?)?;
    let serving = async {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(async {
                let connection = incoming.await?;
                tokio::spawn(take(connection.clone()));
                answer(connection).await
            });
        }
    };
    let _ = tokio::time::timeout(options.seconds, serving).await;
    Ok(())
}

/// Reads transfers until the connection ends.
async fn take(connection: Connection) -> Result<()> {
    loop {
        let mut stream = connection.accept_uni().await?;
        tokio::spawn(async move { while let Ok(Some(_)) = stream.read_chunk(usize::MAX, true).await {} });
    }
}

/// Answers requests until the connection ends.
async fn answer(connection: Connection) -> Result<()> {
    loop {
        let (mut send, mut receive) = connection.accept_bi().await?;
        tokio::spawn(async move {
            let request = receive.read_to_end(MESSAGE_BYTES).await?;
            send.write_all(&request).await?;
            Result::<()>::Ok(send.finish()?)
        });
    }
}

async fn connect(to: &To, one_by_one: bool) -> Result<Connection> {
    let mut roots = RootCertStore::empty();
    roots.add(read(&to.certificate)?.into())?;
    let mut endpoint = Endpoint::client((Ipv4Addr::UNSPECIFIED, 0).into())?;
    let mut transport = TransportConfig::default();
    transport.enable_segmentation_offload(!one_by_one);
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(Arc::new(transport));
    endpoint.set_default_client_config(config);
    Ok(endpoint.connect(to.to, NAME)?.await?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| format!("read {}: {error}", path.display()).into())
}

async fn put(options: &Put) -> Result<Vec<PutReport>> {
    let mut connections = vec![];
    for _ in 0..options.connections {
        connections.push(connect(&options.to, options.one_by_one).await?);
    }
    let sending: Vec<_> = connections.into_iter().map(|connection| send(connection, options.to.seconds)).collect();
    let sending: Vec<_> = sending.into_iter().map(tokio::spawn).collect();
    let mut reports = vec![];
    for sent in sending {
        reports.push(sent.await??);
    }
    Ok(reports)
}

async fn send(connection: Connection, seconds: Duration) -> Result<PutReport> {
    let mut stream = connection.open_uni().await?;
    let chunk = vec![0; CHUNK_BYTES];
    let sending = async {
        loop {
            if let Err(error) = stream.write_all(&chunk).await {
                return error;
            }
        }
    };
    if let Ok(error) = tokio::time::timeout(seconds, sending).await {
        return Err(error.into());
    }
    let stats = connection.stats();
    let path = stats.path;
    connection.close(VarInt::from_u32(0), b"");
    Ok(PutReport {
        sent_bytes: stats.udp_tx.bytes,
        sent_packets: path.sent_packets,
        lost_packets: path.lost_packets,
        congestion_events: path.congestion_events,
        rtt_us: times::micros(path.rtt),
        congestion_window_bytes: path.cwnd,
        datagram_bytes: path.current_mtu,
    })
}

async fn ask(options: &Ask) -> Result<AskReport> {
    let connection = connect(&options.to, false).await?;
    let (message, mut times) = ([0; MESSAGE_BYTES], vec![]);
    let start = Instant::now();
    while start.elapsed() < options.to.seconds {
        let asked = Instant::now();
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(&message).await?;
        send.finish()?;
        receive.read_to_end(MESSAGE_BYTES).await?;
        times.push(asked.elapsed());
        tokio::time::sleep(Duration::from_micros(options.interval_us)).await;
    }
    let lost_packets = connection.stats().path.lost_packets;
    Ok(AskReport {
        count: times.len(),
        p50_of_time_us: median_of_time(&times),
        lost_packets,
        percentiles_us: percentiles(&times),
        times: Times::of(times),
    })
}
