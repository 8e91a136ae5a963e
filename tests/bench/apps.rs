//! Real servers in the pod and their usual clients on its node: nginx with wrk and h2load, redis with its benchmark.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::harness::limiter::{Limiter, Limits};
use super::harness::measure::{self, Way};
use super::harness::pod::Pod;
use super::harness::process::Running;
use super::harness::{Context, Failure, Result, table};
use super::{Options, Table, Title};

/// Of a response of nginx.
const BYTES: usize = 10_000;
const HTTP_PORT: u16 = 8080;
const HTTP2_PORT: u16 = 8082;
const REDIS_PORT: u16 = 6379;
/// Beyond what a client was told to take.
const GRACE: Duration = Duration::from_secs(60);

/// What one client program found.
struct Found {
    /// What was done, where one client does several things.
    what: String,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
    failed: String,
}

type Client = fn(&Pod, IpAddr, &Options, u64) -> Result<Vec<Found>>;

pub fn apps(options: &Options, table: &mut Table) -> Result<Title> {
    let clients: [(&str, Client); 4] = [
        ("nginx, connections kept", |pod, at, options, _| nginx(pod, at, |http, _| wrk(pod, http, options, true))),
        ("nginx, connections closed", |pod, at, options, _| nginx(pod, at, |http, _| wrk(pod, http, options, false))),
        ("nginx, HTTP/2", |pod, at, options, _| nginx(pod, at, |_, http2| h2load(pod, http2, options))),
        ("redis beside a bulk flow", |pod, at, _, limit| redis(pod, at, limit)),
    ];
    let limiters = [&[Limiter::Bare][..], &options.limiters].concat();
    for limit in options.rates.iter().copied() {
        for (name, client) in clients {
            for limiter in limiters.iter().copied() {
                let limits = Limits { egress: Some(limit), ingress: None };
                let mut rows = vec![];
                table.row(options, &[table::limit(limit), name.to_owned()], limiter, limits, |pod| {
                    let address = pod.addresses().into_iter().find(IpAddr::is_ipv4);
                    let address = address.ok_or_else(|| Failure::new("a pod without an address"))?;
                    rows = client(pod, address, options, limit)?.into_iter().map(cells).collect();
                    Ok(rows.first().cloned().unwrap_or_default())
                })?;
                // A client that does several things has a row for each.
                let labels = [table::limit(limit), name.to_owned(), limiter.title().to_owned()];
                table.rows.extend(rows.into_iter().skip(1).map(|cells| [&labels[..], &cells].concat()));
            }
        }
    }
    Ok((
        format!("Servers in the pod{}, what they send limited", options.path()),
        &["limit", "server", "limiter", "", "a second", "p50", "p99", "longest", "failed"],
    ))
}

fn cells(found: Found) -> Vec<String> {
    let Found { what, per_second, p50_us, p99_us, longest_us, failed } = found;
    let times = [p50_us, p99_us, longest_us].map(table::millis).to_vec();
    [vec![what, format!("{per_second:.0}")], times, vec![failed]].concat()
}

/// nginx in the pod, for as long as `work` takes with its two addresses: HTTP/1.1 and HTTP/2.
fn nginx<T>(pod: &Pod, at: IpAddr, work: impl FnOnce(SocketAddr, SocketAddr) -> Result<T>) -> Result<T> {
    let directory = directory()?;
    let path = directory.path();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", path.display()))
        .concat();
    let configuration = format!(
        "daemon off;\nmaster_process off;\npid {0}/pid;\nerror_log {0}/error.log;\nevents {{ worker_connections 4096; }}\n\
         http {{\n{temporary}access_log off;\nkeepalive_requests 100000000;\nsendfile on;\ntcp_nopush on;\n\
         server {{ listen {at}:{HTTP_PORT} backlog=4096; listen {at}:{HTTP2_PORT} http2; root {0}; }}\n}}\n",
        path.display(),
    );
    write(&path.join("conf"), configuration.as_bytes())?;
    write(&path.join("object"), &vec![b'x'; BYTES])?;
    let mut command = pod.command("nginx")?;
    command.arg("-p").arg(path).arg("-c").arg(path.join("conf")).args(["-e", "stderr"]);
    let _server = Running::start(&mut command)?;
    let (http, http2) = (SocketAddr::new(at, HTTP_PORT), SocketAddr::new(at, HTTP2_PORT));
    wait_for(pod, http)?;
    work(http, http2)
}

fn wrk(pod: &Pod, server: SocketAddr, options: &Options, keep: bool) -> Result<Vec<Found>> {
    options
        .clients
        .iter()
        .map(|clients| {
            let mut command = pod.host.command("wrk");
            command.args(["--threads", "1", "--latency", "--timeout", "30", "--connections", &clients.to_string()]);
            command.args(["--duration", &whole_seconds(options)]);
            if !keep {
                command.args(["--header", "Connection: close"]);
            }
            let text = client(command.arg(format!("http://{server}/object")), options)?;
            let line = |start: &str| text.lines().map(str::trim).find_map(|line| line.strip_prefix(start));
            let time = |start: &str, column: usize| {
                line(start).and_then(|line| line.split_whitespace().nth(column)).and_then(micros)
            };
            let unread = || Failure::new(format_args!("read what wrk says: {text}"));
            Ok(Found {
                what: format!("{clients} clients"),
                per_second: line("Requests/sec:").and_then(|rate| rate.trim().parse().ok()).ok_or_else(unread)?,
                p50_us: time("50%", 0).ok_or_else(unread)?,
                p99_us: time("99%", 0).ok_or_else(unread)?,
                // Average, deviation, maximum.
                longest_us: time("Latency ", 2).ok_or_else(unread)?,
                failed: line("Socket errors:").map_or_else(|| "0".to_owned(), |errors| errors.trim().to_owned()),
            })
        })
        .collect()
}

/// Its summary has no percentiles: they are taken from its log of every request.
fn h2load(pod: &Pod, server: SocketAddr, options: &Options) -> Result<Vec<Found>> {
    const CLIENTS: &str = "4";
    const STREAMS: &str = "10";
    let directory = directory()?;
    let log = directory.path().join("log");
    let mut command = pod.host.command("h2load");
    command.args(["-c", CLIENTS, "-m", STREAMS, "-D", &whole_seconds(options)]);
    command.arg(format!("--log-file={}", log.display())).arg(format!("http://{server}/object"));
    let text = client(&mut command, options)?;
    let log = fs::read_to_string(&log).context(format_args!("read {}, the log of: {text}", log.display()))?;
    // When it began, status, microseconds.
    let fields = log.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let (done, failed): (Vec<_>, Vec<_>) = fields.partition(|fields| fields.get(1) == Some(&"200"));
    let mut times: Vec<f64> = done.iter().filter_map(|fields| fields.get(2)?.parse().ok()).collect();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).or(times.last()).copied().unwrap_or(0.0);
    Ok(vec![Found {
        what: format!("{CLIENTS} clients of {STREAMS} streams"),
        per_second: times.len() as f64 / options.seconds.round(),
        p50_us: at(0.50),
        p99_us: at(0.99),
        longest_us: at(1.0),
        failed: failed.len().to_string(),
    }])
}

/// So many requests as the slowest limiter answers in some seconds: its benchmark counts no time.
fn redis(pod: &Pod, at: IpAddr, limit: u64) -> Result<Vec<Found>> {
    const CLIENTS: &str = "8";
    const BITS_FOR_EACH: u64 = 20_000;
    let directory = directory()?;
    let mut server = pod.command("redis-server")?;
    server.args(["--bind", &at.to_string(), "--port", &REDIS_PORT.to_string(), "--protected-mode", "no"]);
    server.args(["--save", "", "--appendonly", "no"]).arg("--dir").arg(directory.path());
    let _server = Running::start(&mut server)?;
    wait_for(pod, SocketAddr::new(at, REDIS_PORT))?;
    let _bulk = measure::load(pod, Way::Out, 1)?;
    thread::sleep(Duration::from_secs(1));
    let requests = (limit / BITS_FOR_EACH).clamp(100, 50_000);
    let mut command = pod.host.command("redis-benchmark");
    command.args(["-h", &at.to_string(), "-p", &REDIS_PORT.to_string(), "-t", "set,get", "-c", CLIENTS, "-d", "100"]);
    command.args(["-n", &requests.to_string(), "--csv"]);
    let text = Running::start(&mut command)?.text(2 * GRACE)?;
    // "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(|field| field.trim_matches('"')).collect();
        let number = |column: usize| fields.get(column)?.parse::<f64>().ok();
        Some(Found {
            what: format!("{}, {CLIENTS} clients", fields.first()?),
            per_second: number(1)?,
            p50_us: number(4)? * 1e3,
            p99_us: number(6)? * 1e3,
            longest_us: number(7)? * 1e3,
            failed: "0".to_owned(),
        })
    };
    let found: Vec<Found> = text.lines().skip(1).filter_map(row).collect();
    if found.is_empty() { Err(Failure::new(format_args!("read what redis-benchmark says: {text}"))) } else { Ok(found) }
}

fn client(command: &mut Command, options: &Options) -> Result<String> {
    Running::start(command)?.text(Duration::from_secs_f64(options.seconds) + GRACE)
}

fn whole_seconds(options: &Options) -> String {
    format!("{:.0}", options.seconds)
}

/// "1.20ms" and the like.
fn micros(text: &str) -> Option<f64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match text.strip_prefix(digits)? {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 60e6,
        _ => return None,
    };
    Some(digits.parse::<f64>().ok()? * factor)
}

fn wait_for(pod: &Pod, server: SocketAddr) -> Result<()> {
    const LONGEST: Duration = Duration::from_secs(5);
    pod.host.netns.inside(|| {
        let start = Instant::now();
        loop {
            match TcpStream::connect(server) {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > LONGEST => {
                    return Err(Failure::new(format_args!("connect to the server at {server}: {error}")));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    })?
}

fn directory() -> Result<TempDir> {
    tempfile::Builder::new().prefix("podshaper-bench-").tempdir().context("make a directory")
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).context(format_args!("write {}", path.display()))
}
