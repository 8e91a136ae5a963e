//! Child processes. Each child has a process group of its own, so that Ctrl-C ends it together with all processes
//! that it has started.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The most time that a group may take to end after SIGTERM: a kernel of tests/lab checks once a second, and hundreds
/// of pods are removed one by one.
const PATIENCE: Duration = Duration::from_secs(60);

/// The running groups, and whether a signal has asked to stop.
struct Running {
    groups: BTreeSet<u32>,
    stopped: bool,
}

static RUNNING: Mutex<Running> = Mutex::new(Running { groups: BTreeSet::new(), stopped: false });

/// Directories that are searched after the directories of $PATH.
static MORE_PATH: Mutex<Vec<OsString>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a directory in which programs are found from now on.
pub fn add_to_path(directory: &Path) {
    locked(&MORE_PATH).push(directory.into());
}

/// A command that is also searched in the directories of [`add_to_path`], and that has no stdin.
pub fn command(program: &str) -> Command {
    let mut path = env::var_os("PATH").unwrap_or_default();
    for directory in locked(&MORE_PATH).iter() {
        path.push(":");
        path.push(directory);
    }
    let mut command = Command::new("env");
    // `env` searches the program in the new $PATH; std would search the old one.
    command.arg(program).env("PATH", path).stdin(Stdio::null()).process_group(0);
    command
}

/// Whether a program can be found.
pub fn is_there(program: &str) -> bool {
    let mut look = command("sh");
    look.args(["-c", "command -v \"$0\" >/dev/null", program]);
    run(&mut look, |_| ()).is_ok_and(|status| status.success())
}

/// Runs a command to its end. `print` gets the output on stdout and stderr as it arrives.
pub fn run(command: &mut Command, mut print: impl FnMut(&[u8])) -> io::Result<ExitStatus> {
    let (mut output, theirs) = io::pipe()?;
    command.stdout(theirs.try_clone()?).stderr(theirs);
    let mut running = locked(&RUNNING);
    stay_if_stopped(&running);
    let mut child = command.spawn()?;
    let group = child.id();
    running.groups.insert(group);
    drop(running);
    // The command object keeps the writing ends of the pipe open, and the reading end would never end.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let mut buffer = vec![0; 64 << 10];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => print(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let status = child.wait()?;
    let mut running = locked(&RUNNING);
    stay_if_stopped(&running);
    running.groups.remove(&group);
    Ok(status)
}

/// The exit status as a shell gives it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// After a signal nothing is started, reported or summed up any more; the thread of [`stop_on_signals`] ends the
/// process.
fn stay_if_stopped(running: &MutexGuard<'_, Running>) {
    if running.stopped {
        loop {
            thread::park();
        }
    }
}

/// On Ctrl-C, SIGTERM and SIGHUP, ends all processes that were started, and then this process.
pub fn stop_on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!("tests/run: stopped by a signal: ending what was started ..");
            stop();
            end(signal);
        }
    });
    Ok(())
}

#[expect(clippy::exit, reason = "no other thread of this process ends once a signal has come")]
fn end(signal: i32) -> ! {
    std::process::exit(128 + signal)
}

fn stop() {
    let groups: Vec<Pid> = {
        let mut running = locked(&RUNNING);
        running.stopped = true;
        running.groups.iter().filter_map(|group| i32::try_from(*group).ok()).map(Pid::from_raw).collect()
    };
    for group in &groups {
        let _ = killpg(*group, Signal::SIGTERM);
    }
    let start = Instant::now();
    // A group exists until its last process has ended and its first one has been waited for.
    while start.elapsed() < PATIENCE && groups.iter().any(|group| killpg(*group, None).is_ok()) {
        thread::sleep(Duration::from_millis(100));
    }
    for group in &groups {
        let _ = killpg(*group, Signal::SIGKILL);
    }
}
