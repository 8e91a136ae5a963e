//! harness: throw-away nodes and pods, for the tests, the demo and the benchmark.
//!
//! A [`Host`] is a node's network namespace, in which plugins run and which is the other end of a pod's traffic. A
//! [`Pod`] has what kubelet and a runtime make for a pod: network namespace, cgroup, identifiers, and the calls of a
//! CNI chain. Both really exist on this machine, in namespaces of their own, and are removed when dropped, even after
//! a panic. `measure` sends traffic through them.
//!
//! All functions here return [`Result`], so that the demo can clean up after any error; a test unwraps. The harness
//! needs root, and the programs of iproute2 and util-linux.
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

/// Debian's directory of the plugins of the containernetworking project.
pub const PLUGIN_DIR: &str = "/usr/lib/cni";

/// Why a pod could not be made, called or measured. Debug prints the bare text, which may have many lines, since
/// `unwrap()` prints Debug.
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

/// Adds to an error what was being done.
pub trait Context<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{doing}: {error}")))
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

/// After Ctrl-C, SIGTERM or SIGHUP, everything that the harness waits for ends with an error, so that every Drop
/// runs.
///
/// Call this before any thread is started: it blocks the signals, and one thread waits for them. Children are not
/// affected: std starts them with nothing blocked, and on Ctrl-C the terminal signals them itself.
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

/// `prefix`, this process's id and a counter: unique on a machine, and the leftovers of a killed run can be
/// recognised.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("podshaper-{prefix}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Prints a line on stderr. A closed pipe is ignored, so that pods are still removed.
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

/// The plugin of this build, in the place where cargo puts it as seen from an example or a test.
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
