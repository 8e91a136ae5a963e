//! pictures: draws the README's pictures of a real run. Makes pods with the real CNI plugins, lets them send, and
//! draws the output of `list`, `show` and `top` meanwhile into tests/pictures/*.svg. `top` runs in tmux, which knows
//! the contents of its screen.

#[path = "../harness/mod.rs"]
mod harness;
mod svg;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use harness::host::Host;
use harness::limiter::{Limiter, Limits, Programs};
use harness::measure::{self, Bulk, Udp, Way};
use harness::pod::Pod;
use harness::process::run;
use harness::{Context, Result, check_stop, note, podshaper_program, stop_on_signals, stopped, unique};

const MBIT: u64 = 1_000_000;
/// The time until the sparklines of `top` are full, at two readings a second.
const SECONDS: f64 = 34.0;
const COLUMNS: usize = 168;
const ROWS: usize = 12;

fn main() -> ExitCode {
    match stop_on_signals().and_then(|()| draw()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if stopped() => ExitCode::from(130),
        Err(error) => {
            note(format_args!("pictures: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn draw() -> Result<()> {
    let programs = Programs::find(None, &[Limiter::Podshaper])?;
    let host = Host::new()?;
    let pod = |name: &str, egress: Option<u64>, ingress: Option<u64>| -> Result<Pod<'_>> {
        let mut pod = Pod::new(&host, name)?;
        pod.name = name.to_owned();
        Limiter::Podshaper.add(&mut pod, Limits { egress, ingress }, &programs)?;
        Ok(pod)
    };
    let web = pod("web-7d4b9", Some(100 * MBIT), None)?;
    let crawler = pod("crawler-5", None, Some(20 * MBIT))?;
    let backup = pod("backup-0", Some(20 * MBIT), None)?;
    let telemetry = pod("telemetry-x2k", Some(2 * MBIT), None)?;
    let mail = pod("mail-1", Some(10 * MBIT), Some(10 * MBIT))?;
    thread::scope(|scope| {
        scope.spawn(|| keep(|seconds| bulk(&web, Way::Out, 4, seconds, None)));
        scope.spawn(|| keep(|seconds| bulk(&crawler, Way::In, 2, seconds, None)));
        // Half of its limit, with pauses.
        scope.spawn(|| waves(|| bulk(&backup, Way::Out, 1, 3.0, Some(10 * MBIT / 8))));
        scope.spawn(|| keep(|seconds| udp(&telemetry, seconds)));
        scope.spawn(|| waves(|| bulk(&mail, Way::Out, 2, 2.0, None)));
        pictures(&web)
    })
}

fn pictures(web: &Pod) -> Result<()> {
    let program = podshaper_program()?;
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures");
    let screen = Screen::start(&program)?;
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < SECONDS - 3.0 {
        check_stop()?;
        thread::sleep(Duration::from_millis(100));
    }
    save(&directory, "top", "podshaper top", &screen.capture()?)?;
    drop(screen);
    let mut list = Command::new(&program);
    // Left out: pods other than the pictures', and columns that are the same in all lines.
    let text = run(list.arg("list"))?;
    let lines = text.lines().filter(|line| line.starts_with("POD") || line.starts_with("default/"));
    let lines: Vec<&str> = lines.map(|line| line.rsplit_once("  /").map_or(line, |(before, _)| before)).collect();
    save(&directory, "list", "podshaper list", &lines.join("\n").replace("  CGROUP", ""))?;
    let text = run(Command::new(&program).args(["show", &web.uid]))?;
    save(&directory, "show", &format!("podshaper show {}", web.name), &text)
}

fn save(directory: &Path, name: &str, title: &str, text: &str) -> Result<()> {
    let path: PathBuf = directory.join(format!("{name}.svg"));
    std::fs::write(&path, svg::terminal(title, text)).context(format_args!("write {}", path.display()))?;
    note(format_args!("drew {}", path.display()));
    Ok(())
}

/// `podshaper top` on a screen of tmux; ends when dropped.
struct Screen {
    socket: String,
}

impl Screen {
    fn start(program: &Path) -> Result<Self> {
        let screen = Self { socket: unique("pictures") };
        let line = format!("{} top --interval 0.5", program.display());
        let (columns, rows) = (COLUMNS.to_string(), ROWS.to_string());
        run(screen.tmux(&["new-session", "-d", "-x", &columns, "-y", &rows, &line]).env("LC_ALL", "C.UTF-8"))?;
        Ok(screen)
    }

    /// The screen with its escape sequences.
    fn capture(&self) -> Result<String> {
        run(&mut self.tmux(&["capture-pane", "-p", "-e"]))
    }

    fn tmux(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command.args(["-u", "-f", "/dev/null", "-L", &self.socket]).args(arguments);
        command
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = run(&mut self.tmux(&["kill-server"]));
    }
}

/// Repeats short sending until the pictures are taken, so that the thread notices the end soon.
fn keep(send: impl Fn(f64) -> Result<()>) {
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < SECONDS && !stopped() {
        if let Err(error) = send(SECONDS) {
            note(format_args!("pictures: {error}"));
            return;
        }
    }
}

fn waves(send: impl Fn() -> Result<()>) {
    keep(|_| {
        send()?;
        thread::sleep(Duration::from_millis(1700));
        Ok(())
    });
}

fn bulk(pod: &Pod, way: Way, flows: usize, seconds: f64, max_pacing_rate: Option<u64>) -> Result<()> {
    measure::bulk(pod, &Bulk { way, flows, seconds, max_pacing_rate, ..Bulk::default() }).map(drop)
}

fn udp(pod: &Pod, seconds: f64) -> Result<()> {
    measure::udp(pod, &Udp { rate: 3 * MBIT, seconds, ..Udp::default() }).map(drop)
}
