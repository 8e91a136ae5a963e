//! The program behind `tests/run`: builds, runs the tests on this machine's kernel and on others, and prints a
//! summary of all stages.
//!
//! [`plan`] says what is run, in which order, and what may be tried again. [`stages`], [`lints`], [`nodes`] and
//! [`report`] are the stages; [`lane`] runs them, [`output`] parses their output, [`summary`] judges it. [`mounts`]
//! separates the tests from other runs, and [`processes`] ends all processes on Ctrl-C. The kernels and nodes
//! themselves are shell scripts: tests/lab, tests/node.
#![allow(clippy::print_stdout, reason = "a command of a person")]

mod lane;
mod lints;
mod mounts;
mod nodes;
mod output;
mod plan;
mod processes;
mod report;
mod stages;
mod summary;

use std::env;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Instant;

use lane::Lane;
use plan::{Step, Verb};
use stages::Session;

const USAGE: &str = "\
tests/run                 in about 10 minutes: lints, all but the longest tests, as root and with real pods, on this machine's kernel;
                          of the tests of traffic a choice, here and in User Mode Linux, which has fq
tests/run --all           everything, as in CI, in about 75 minutes: all tests here and in User Mode Linux, the main ones on Debian's
                          kernels from 5.10 on (tests/lab), kubelets, podman, two nodes, a cluster (tests/node)
tests/run uml             all tests that depend on the kernel, in User Mode Linux
tests/run node            real kubelets with each containerd, two nodes, podman, in User Mode Linux
tests/run cluster         a whole cluster of one node, on this machine's kernel
tests/run plain [ARGS]    the tests that need nothing
tests/run lint            what the sources must fulfil: rustfmt, clippy, shellcheck, cargo-deny, the oldest Rust, the eBPF object
tests/run demo [ARGS]     the README's table (--help shows its arguments)
tests/run bench [ARGS]    the long one
tests/run report [--quick] [--out DIR]   podshaper beside what people would use instead, here and in User Mode Linux: tables and plots,
                          in target/report if not in DIR; 40 minutes, --quick 3
tests/run pictures        draws the README's pictures of list, show and top anew, of a real run

What is missing of Debian's packages is installed, and said. The summary has each stage's time. Only tests that measure rates or times
are tried again, twice at most, and the summary says so.";

/// "program or file:Debian package", of everything that is needed to make pods.
const NEEDS: &[&str] = &[
    "ip:iproute2",
    "tc:iproute2",
    "nsenter:util-linux",
    "sysctl:procps",
    "bpftool:bpftool",
    "ping:iputils-ping",
    "iptables:iptables",
    "socat:socat",
    "wg:wireguard-tools",
    "script:bsdutils",
    "/usr/lib/cni/bridge:containernetworking-plugins",
];

/// The servers and clients of `bench --parts apps`.
const NEEDS_OF_APPS: &[&str] = &[
    "nginx:nginx-light",
    "wrk:wrk",
    "redis-server:redis-server",
    "redis-benchmark:redis-tools",
    "h2load:nghttp2-client",
    "nghttpd:nghttp2-server",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (verb, rest) = arguments.split_first().map_or(("", &[][..]), |(verb, rest)| (verb.as_str(), rest));
    // All paths are relative to podshaper's directory.
    if let Err(error) = env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")) {
        eprintln!("tests/run: enter podshaper's directory: {error}");
        return ExitCode::FAILURE;
    }
    let outcome = match verb {
        "" => run(Verb::Short),
        "--all" => run(Verb::All),
        "uml" => run(Verb::Uml),
        "node" => run(Verb::Node),
        "cluster" => run(Verb::Cluster),
        "lint" => run(Verb::Lint),
        "plain" => become_command(Command::new("cargo").args(["test", "--workspace"]).args(rest)),
        "report" => report::report(rest),
        "demo" | "bench" | "pictures" => example(verb, rest),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(if matches!(verb, "help" | "--help" | "-h") { 0 } else { 2 });
        }
    };
    outcome.unwrap_or_else(|why| {
        eprintln!("tests/run: {why}");
        ExitCode::FAILURE
    })
}

/// Pods need root, mounts of their own and a few packages.
fn prepare(lane: &mut Lane) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        let how = "please run it as root (sudo env PATH=\"$PATH\" tests/run ..)";
        return Err(format!("this makes network namespaces and loads eBPF programs: {how}"));
    }
    mounts::have_own()?;
    stages::need(lane, NEEDS)
}

fn run(verb: Verb) -> Result<ExitCode, String> {
    let start = Instant::now();
    let root = env::current_dir().map_err(|error| format!("find podshaper's directory: {error}"))?;
    processes::stop_on_signals().map_err(|error| format!("wait for signals: {error}"))?;
    let steps = plan::steps(verb);
    let mut lane = Lane::default();
    lane.say(&format!("this will run\n{}", plan::described(&steps)));
    if verb != Verb::Lint {
        prepare(&mut lane)?;
        stages::find_prometheus(&mut lane)?;
    }
    // The directory in which `cargo install` puts programs.
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    if let Some(home) = home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo"))) {
        processes::add_to_path(&home.join("bin"));
    }

    let session = Session::new(root, verb == Verb::All);
    for step in &steps {
        match step {
            Step::One(stage) => (stage.run)(&session, &mut lane),
            Step::Beside(here, there) => beside(&session, &mut lane, here, there),
        }
    }
    // Stages that were requested by name must have run.
    Ok(sum_up(&lane, !matches!(verb, Verb::Short | Verb::Lint), start))
}

/// Prints the summary.
fn sum_up(lane: &Lane, everything: bool, start: Instant) -> ExitCode {
    let passed = summary::has_passed(&lane.lines, everything);
    let lines: Vec<String> = lane.lines.iter().map(|line| format!("tests/run: {line}\n")).collect();
    let outcome = if passed { "passed" } else { "FAILED" };
    println!("\ntests/run: the summary:\n{}tests/run: {outcome}, in {} s", lines.concat(), start.elapsed().as_secs());
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs both lists of stages at the same time. The second list has the terminal; the output of the first list
/// follows.
fn beside(session: &Session, lane: &mut Lane, here: &[plan::Stage], there: &[plan::Stage]) {
    let all = |stages: &[plan::Stage], lane: &mut Lane| stages.iter().for_each(|stage| (stage.run)(session, lane));
    let mut kept = Lane::beside();
    thread::scope(|scope| {
        scope.spawn(|| all(here, &mut kept));
        all(there, lane);
        lane.say("waiting for what runs beside this ..");
    });
    lane.append(kept);
}

/// Builds an example and replaces this process by it.
fn example(verb: &str, arguments: &[String]) -> Result<ExitCode, String> {
    processes::stop_on_signals().map_err(|error| format!("wait for signals: {error}"))?;
    let mut lane = Lane::default();
    prepare(&mut lane)?;
    if verb == "pictures" {
        stages::need(&mut lane, &["tmux:tmux"])?;
    }
    let asks_for = |part| arguments.iter().any(|argument| argument.split([',', '=']).any(|asked| asked == part));
    if asks_for("apps") {
        stages::need(&mut lane, NEEDS_OF_APPS)?;
    }
    // Most of the build time of tests/quic is that of a runtime, which is needed only for QUIC.
    let packages: &[&str] = if asks_for("quic") { &["quic"] } else { &[] };
    let program = stages::example(verb, packages)?;
    become_command(Command::new(program).args(arguments))
}

fn become_command(command: &mut Command) -> Result<ExitCode, String> {
    let error = command.exec();
    Err(format!("run {command:?}: {error}"))
}
