//! Child processes that do not outlive their owner.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Context, Failure, Result, check_stop};

const POLL: Duration = Duration::from_millis(10);

/// Runs a program to its end. Returns its stdout, or an error with its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context(format_args!("run {command:?}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format_args!("run {command:?}: {}: {}", output.status, stderr.trim())))
}

/// A child whose stdout and stderr are collected; killed and reaped on drop.
pub struct Running {
    what: String,
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut running = Self::spawn(command, Stdio::null())?;
        running.stderr = running.child.stderr.take().map(collect);
        Ok(running)
    }

    /// Starts one of the servers of `traffic` and waits until it listens.
    pub fn start_server(command: &mut Command) -> Result<(Self, SocketAddr)> {
        let (running, line) = Self::start_until_it_says(command)?;
        let address = line.strip_prefix("listening on ").and_then(|address| address.parse().ok());
        let address = address.ok_or_else(|| Failure::new(format_args!("start {}: {line}", running.what)))?;
        Ok((running, address))
    }

    /// Starts a program and waits for its first line on stderr.
    pub fn start_until_it_says(command: &mut Command) -> Result<(Self, String)> {
        Self::spawn(command, Stdio::null())?.until_it_says()
    }

    /// Starts one of the clients of `traffic` and waits until it is ready. The client then waits for
    /// [`Running::go_on`].
    pub fn start_ready(command: &mut Command) -> Result<Self> {
        let (running, line) = Self::spawn(command, Stdio::piped())?.until_it_says()?;
        if line == "ready" { Ok(running) } else { Err(Failure::new(format_args!("start {}: {line}", running.what))) }
    }

    /// Closes the child's stdin, for which the child waits.
    pub fn go_on(&mut self) {
        self.child.stdin = None;
    }

    fn until_it_says(self) -> Result<(Self, String)> {
        let mut running = self;
        let stderr = running.child.stderr.take().ok_or_else(|| Failure::new("a child without stderr"))?;
        let mut stderr = BufReader::new(stderr);
        let mut line = String::new();
        stderr.read_line(&mut line).context(format_args!("read from {}", running.what))?;
        running.stderr = Some(collect(stderr));
        Ok((running, line.trim().to_owned()))
    }

    fn spawn(command: &mut Command, stdin: Stdio) -> Result<Self> {
        let what = format!("{command:?}");
        let child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.context(format_args!("start {what}"))?;
        let stdout = child.stdout.take().map(collect);
        Ok(Self { what, child, stdout, stderr: None })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The JSON that the child prints; errors as in [`Running::text`].
    pub fn json(self, limit: Duration) -> Result<Value> {
        let what = self.what.clone();
        let stdout = self.text(limit)?;
        serde_json::from_str(&stdout).context(format_args!("read the answer of {what}: {stdout:?}"))
    }

    /// The text that the child prints. An error if the child fails, takes longer than `limit`, or a signal asks this
    /// process to stop.
    pub fn text(mut self, limit: Duration) -> Result<String> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().context(format_args!("wait for {}", self.what))? {
                break status;
            }
            check_stop()?;
            if start.elapsed() > limit {
                return Err(Failure::new(format_args!("wait for {}: still running after {limit:?}", self.what)));
            }
            thread::sleep(POLL);
        };
        check_stop()?;
        let (stdout, stderr) = (text(self.stdout.take()), text(self.stderr.take()));
        if !status.success() {
            return Err(failed(&self.what, status, &stderr));
        }
        Ok(stdout)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(what: &str, status: ExitStatus, stderr: &str) -> Failure {
    Failure::new(format_args!("run {what}: {status}: {}", stderr.trim()))
}

/// Reads on a thread, so that a child never waits for a full pipe.
pub fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

pub fn text(reader: Option<JoinHandle<String>>) -> String {
    reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
}
