//! Real servers in a pod and their usual clients on its node: nginx with wrk, nghttpd with h2load, redis with its
//! benchmark.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use tempfile::TempDir;

use super::measure::{self, Way};
use super::pod::Pod;
use super::process::Running;
use super::seen::{self, Look, Seen};
use super::{Context, Failure, Result};

const HTTP_PORT: u16 = 8080;
const HTTP2_PORT: u16 = 8082;
const REDIS_PORT: u16 = 6379;
/// Additional time beyond the time that a client was told to run.
const GRACE: Duration = Duration::from_secs(60);

/// Clients of nginx.
#[derive(Clone, Copy, Debug)]
pub struct Http {
    /// Out: the clients GET. In: the clients POST.
    pub way: Way,
    pub clients: usize,
    /// Size of a response, or of a posted body.
    pub bytes: usize,
    /// Each client keeps its connection.
    pub keep: bool,
    pub seconds: f64,
    /// As in [`Look`].
    pub ask: Option<Duration>,
}

/// Clients of nghttpd.
#[derive(Clone, Copy, Debug)]
pub struct Http2 {
    /// As in [`Http`].
    pub way: Way,
    pub clients: usize,
    /// Requests that each client has open at the same time.
    pub streams: usize,
    pub bytes: usize,
    pub seconds: f64,
    pub ask: Option<Duration>,
}

/// Clients of redis.
#[derive(Clone, Copy, Debug)]
pub struct Redis {
    /// The direction of most bytes: of the values that are got or set, or of the bulk flows.
    pub way: Way,
    pub clients: usize,
    /// Size of a value.
    pub bytes: usize,
    /// Requests that each client has open at the same time.
    pub pipeline: usize,
    /// TCP bulk flows beside the clients. With bulk flows, both SET and GET are measured; without, only the command
    /// whose values go in this direction.
    pub bulk_flows: usize,
    /// About how long each of SET and GET takes. The wire is watched for the same time.
    pub seconds: f64,
    pub ask: Option<Duration>,
}

/// The results of a client program.
#[derive(Clone, Debug, Serialize)]
pub struct Served {
    /// The kind of request, where one client does several kinds.
    pub what: String,
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub longest_us: f64,
    pub failed: u64,
}

/// The results of a server in a pod.
#[derive(Clone, Debug, Serialize)]
pub struct App {
    pub served: Vec<Served>,
    pub seen: Seen,
}

/// Runs nginx, and wrk on the node.
pub fn http(pod: &Pod, options: &Http) -> Result<App> {
    let address = SocketAddr::new(address(pod)?, HTTP_PORT);
    let directory = directory()?;
    let _server = nginx(pod, address, directory.path(), options.bytes)?;
    let look = Look { ways: vec![options.way], seconds: options.seconds, ask: options.ask };
    let (served, seen) = seen::while_doing(pod, &look, || wrk(pod, address, directory.path(), options))?;
    Ok(App { served: vec![served], seen })
}

/// Starts nginx. It reads a posted body completely before it answers, as a proxy does; here it is a proxy for itself.
fn nginx(pod: &Pod, address: SocketAddr, directory: &Path, bytes: usize) -> Result<Running> {
    let at = directory.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {at}/{kind};\n"))
        .concat();
    let configuration = format!(
        "daemon off;\nmaster_process off;\nuser root;\npid {at}/pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n{temporary}access_log off;\nkeepalive_requests 100000000;\nsendfile on;\ntcp_nopush on;\n\
         client_max_body_size 0;\nclient_body_buffer_size 1m;\n\
         server {{\nlisten {address} backlog=4096;\nroot {at};\n\
         location /taken {{ proxy_pass http://unix:{at}/taken.sock:; proxy_pass_request_body off; proxy_set_header Content-Length \"\"; }}\n}}\n\
         server {{ listen unix:{at}/taken.sock backlog=4096; return 204; }}\n}}\n"
    );
    write(&directory.join("conf"), configuration.as_bytes())?;
    write(&directory.join("object"), &vec![b'x'; bytes])?;
    let mut command = pod.command("nginx")?;
    command.arg("-p").arg(directory).arg("-c").arg(directory.join("conf")).args(["-e", "stderr"]);
    start(pod, &mut command, address)
}

fn wrk(pod: &Pod, server: SocketAddr, directory: &Path, options: &Http) -> Result<Served> {
    let Http { way, clients, bytes, keep, seconds, .. } = *options;
    let mut command = pod.host.command("wrk");
    command.args(["--threads", "1", "--latency", "--timeout", "30", "--connections", &clients.to_string()]);
    command.args(["--duration", &format!("{seconds:.0}")]);
    if !keep {
        command.args(["--header", "Connection: close"]);
    }
    if way == Way::In {
        let script = directory.join("post.lua");
        let post = format!("wrk.method = \"POST\"\nwrk.path = \"/taken\"\nwrk.body = string.rep(\"x\", {bytes})\n");
        write(&script, post.as_bytes())?;
        command.arg("--script").arg(script);
    }
    let text = said_by(command.arg(format!("http://{server}/object")), seconds)?;
    let line = |start: &str| text.lines().map(str::trim).find_map(|line| line.strip_prefix(start));
    let time = |start: &str, column: usize| line(start)?.split_whitespace().nth(column).and_then(micros);
    let unread = || Failure::new(format_args!("read what wrk says: {text}"));
    // "Socket errors: connect 0, read 0, write 0, timeout 0", and "Non-2xx or 3xx responses: 0".
    let words = ["Socket errors:", "Non-2xx or 3xx responses:"].into_iter().filter_map(line);
    let failed = words.flat_map(|line| line.split([' ', ','])).filter_map(|word| word.parse::<u64>().ok()).sum();
    Ok(Served {
        what: format!("{clients} clients"),
        per_second: line("Requests/sec:").and_then(|rate| rate.trim().parse().ok()).ok_or_else(unread)?,
        p50_us: time("50%", 0).ok_or_else(unread)?,
        p99_us: time("99%", 0).ok_or_else(unread)?,
        // Average, deviation, maximum.
        longest_us: time("Latency ", 2).ok_or_else(unread)?,
        failed,
    })
}

/// Runs nghttpd, and h2load on the node. The summary of h2load has no percentiles, so they are taken from its log of
/// all requests.
pub fn http2(pod: &Pod, options: &Http2) -> Result<App> {
    let Http2 { way, clients, streams, bytes, seconds, ask } = *options;
    let address = SocketAddr::new(address(pod)?, HTTP2_PORT);
    let directory = directory()?;
    let object = directory.path().join("object");
    write(&object, &vec![b'x'; bytes])?;
    write(&directory.path().join("taken"), b"")?;
    let mut server = pod.command("nghttpd")?;
    server.args(["--no-tls", "--address", &address.ip().to_string(), "--htdocs"]).arg(directory.path());
    let _server = start(pod, server.arg(address.port().to_string()), address)?;

    let log = directory.path().join("log");
    let mut command = pod.host.command("h2load");
    command.args(["-c", &clients.to_string(), "-m", &streams.to_string(), "-D", &format!("{seconds:.0}")]);
    command.arg(format!("--log-file={}", log.display()));
    let path = if way == Way::In { "taken" } else { "object" };
    if way == Way::In {
        command.arg("--data").arg(&object);
    }
    command.arg(format!("http://{address}/{path}"));
    let look = Look { ways: vec![way], seconds, ask };
    let (text, seen) = seen::while_doing(pod, &look, || said_by(&mut command, seconds))?;

    let log = fs::read_to_string(&log).context(format_args!("read {}, the log of: {text}", log.display()))?;
    // Start time, status, microseconds.
    let fields = log.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let (done, failed): (Vec<_>, Vec<_>) = fields.partition(|fields| fields.get(1) == Some(&"200"));
    let mut times: Vec<f64> = done.iter().filter_map(|fields| fields.get(2)?.parse().ok()).collect();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).or(times.last()).copied().unwrap_or(0.0);
    let served = Served {
        what: format!("{clients} clients of {streams} streams"),
        per_second: times.len() as f64 / seconds.round(),
        p50_us: at(0.50),
        p99_us: at(0.99),
        longest_us: at(1.0),
        failed: failed.len() as u64,
    };
    Ok(App { served: vec![served], seen })
}

/// Runs redis, and its benchmark on the node.
pub fn redis(pod: &Pod, options: &Redis) -> Result<App> {
    let Redis { way, bulk_flows, seconds, ask, .. } = *options;
    let address = SocketAddr::new(address(pod)?, REDIS_PORT);
    let directory = directory()?;
    let mut server = pod.command("redis-server")?;
    server.args(["--bind", &address.ip().to_string(), "--port", &REDIS_PORT.to_string(), "--protected-mode", "no"]);
    server.args(["--save", "", "--appendonly", "no"]).arg("--dir").arg(directory.path());
    let _server = start(pod, &mut server, address)?;
    let tests = match way {
        _ if bulk_flows > 0 => "set,get",
        Way::In => "set",
        // Values must exist before they can be got.
        Way::Out | Way::Within => {
            redis_benchmark(pod, address, options, "set", 1)?;
            "get"
        }
    };
    let _bulk = (bulk_flows > 0).then(|| measure::load(pod, way, bulk_flows)).transpose()?;
    thread::sleep(Duration::from_secs(1));
    let requests = enough(seconds, |requests| redis_benchmark(pod, address, options, tests, requests).map(drop))?;
    let look = Look { ways: vec![way], seconds, ask };
    let (served, seen) = seen::while_doing(pod, &look, || redis_benchmark(pod, address, options, tests, requests))?;
    Ok(App { served, seen })
}

/// The number of requests that take about this long: redis-benchmark has no option for a time.
fn enough(seconds: f64, ask: impl Fn(u64) -> Result<()>) -> Result<u64> {
    /// A trial may be shorter than the wanted time by this factor.
    const TRIAL: f64 = 10.0;
    let mut requests: u64 = 100;
    loop {
        let start = Instant::now();
        ask(requests)?;
        let took = start.elapsed().as_secs_f64();
        if took >= seconds / TRIAL {
            return Ok((requests as f64 * (seconds / took).max(1.0)) as u64);
        }
        requests *= TRIAL as u64;
    }
}

fn redis_benchmark(pod: &Pod, server: SocketAddr, options: &Redis, tests: &str, requests: u64) -> Result<Vec<Served>> {
    let Redis { clients, bytes, pipeline, .. } = *options;
    let mut command = pod.host.command("redis-benchmark");
    command.args(["-h", &server.ip().to_string(), "-p", &server.port().to_string(), "-t", tests, "--csv"]);
    command.args(["-c", &clients.to_string(), "-d", &bytes.to_string(), "-P", &pipeline.to_string()]);
    command.args(["-n", &requests.to_string()]);
    let text = Running::start(&mut command)?.text(2 * GRACE)?;
    // Columns: "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms",
    // "max_latency_ms"
    let row = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(|field| field.trim_matches('"')).collect();
        let number = |column: usize| fields.get(column)?.parse::<f64>().ok();
        Some(Served {
            what: format!("{}, {clients} clients", fields.first()?),
            per_second: number(1)?,
            p50_us: number(4)? * 1e3,
            p99_us: number(6)? * 1e3,
            longest_us: number(7)? * 1e3,
            failed: 0,
        })
    };
    let found: Vec<Served> = text.lines().skip(1).filter_map(row).collect();
    if found.is_empty() { Err(Failure::new(format_args!("read what redis-benchmark says: {text}"))) } else { Ok(found) }
}

fn address(pod: &Pod) -> Result<IpAddr> {
    let address = pod.addresses().into_iter().find(IpAddr::is_ipv4);
    address.ok_or_else(|| Failure::new("a pod without an address"))
}

fn said_by(command: &mut Command, seconds: f64) -> Result<String> {
    Running::start(command)?.text(Duration::from_secs_f64(seconds) + GRACE)
}

/// Reads times such as "1.20ms".
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

/// Starts a server and waits until it accepts connections.
fn start(pod: &Pod, command: &mut Command, address: SocketAddr) -> Result<Running> {
    const LONGEST: Duration = Duration::from_secs(5);
    let server = Running::start(command)?;
    pod.host.netns.inside(|| {
        let start = Instant::now();
        loop {
            match TcpStream::connect(address) {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > LONGEST => {
                    return Err(Failure::new(format_args!("connect to the server at {address}: {error}")));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    })??;
    Ok(server)
}

/// A directory for the files of a server.
pub(super) fn directory() -> Result<TempDir> {
    tempfile::Builder::new().prefix("podshaper-bench-").tempdir().context("make a directory")
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).context(format_args!("write {}", path.display()))
}
