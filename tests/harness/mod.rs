//! harness: throw-away nodes and pods, for the tests, the demo and the benchmark.
//!
//! A [`Host`] is a node's network namespace, where plugins run and where a pod's traffic goes to; a [`Pod`] is what a kubelet
//! and a runtime make of one: network namespace, cgroup, identifiers, and the calls of a CNI chain. Both exist for real, on
//! this machine, in namespaces of their own, and are undone when dropped, after a panic too. `measure` sends traffic through.
//!
//! Everything here returns [`Result`], so that the demo can clean up after any error; a test unwraps. It needs root, and the
//! programs of iproute2 and util-linux.
#![allow(dead_code, reason = "the tests, the demo, the benchmark and the report each use a part")]

pub mod apps;
pub mod beside;
pub mod cgroup;
pub mod cni;
pub mod cpu;
pub mod host;
pub mod idle;
pub mod limiter;
pub mod measure;
pub mod meter;
pub mod netns;
pub mod paths;
pub mod peers;
pub mod pod;
pub mod process;
pub mod programs;
pub mod quic;
pub mod remote;
pub mod seen;
pub mod table;
mod timeline;
pub mod web;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::signal::{SigSet, Signal};

/// Where Debian has the plugins of the containernetworking project.
pub const PLUGIN_DIR: &str = "/usr/lib/cni";

/// Why a pod could not be made, called or measured. Debug prints the bare text, which may have many lines: `unwrap()` shows it.
pub struct Failure(String);

/// `Result` with this module's [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub fn new(text: impl fmt::Display) -> Self {
        Self(text.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when something failed.
pub trait Context<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{doing}: {error}")))
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C, SIGTERM and SIGHUP end whatever the harness waits for with an error, so that every Drop runs.
///
/// Call it before any thread is started: the signals are blocked and one thread waits for them. Children are not affected,
/// std starts them with nothing blocked; on Ctrl-C the terminal tells them itself.
pub fn stop_on_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context("block SIGINT")?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed)
        }
    });
    Ok(())
}

/// Whether a signal has asked to stop.
pub fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// An error once a signal has asked to stop.
pub fn check_stop() -> Result<()> {
    if stopped() { Err(Failure::new("stopped by a signal")) } else { Ok(()) }
}

/// `prefix`, this process and a counter: no two names of one machine are the same, and a killed run's are recognised.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("podshaper-{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A line on stderr that nobody has to read: a closed pipe is no reason to leave a pod behind.
pub fn note(line: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The `traffic` example of this build: beside the demo, above a test's directory, and below the report's.
pub fn traffic_program() -> Result<PathBuf> {
    beside(
        &["traffic", "../examples/traffic", "examples/traffic"],
        "the traffic tool; build it with `cargo build --example traffic`",
    )
}

/// The `quic` program of this build, which is a package of its own.
pub fn quic_program() -> Result<PathBuf> {
    beside(&["../quic", "quic"], "the quic tool; build it with `cargo build --package quic`")
}

/// The plugin of this build, where cargo puts it seen from an example or a test.
pub fn podshaper_program() -> Result<PathBuf> {
    beside(&["../podshaper", "podshaper"], "podshaper; build it with `cargo build`, or name it with --podshaper PATH")
}

fn beside(candidates: &[&str], what: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let directory = own.parent().unwrap_or(Path::new("/"));
    let found = candidates.iter().map(|candidate| directory.join(candidate)).find(|path| path.is_file());
    let path = found.ok_or_else(|| Failure(format!("find {what}: it is not beside {}", own.display())))?;
    path.canonicalize().context(format_args!("resolve {}", path.display()))
}
