//! The stages on this machine's kernel, in User Mode Linux and on Debian's kernels.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

use serde_json::Value;

use crate::lane::{Lane, Tests};
use crate::output::last_line;
use crate::plan::{
    ALONE, ALTERS_THE_KERNEL, ASKED_OF_BOTH_ENDS, ASKED_OF_KERNELS, BOTH_ENDS, KERNEL_TO_ALTER, KERNELS, MANY_PODS,
    MANY_PODS_IN_UML, MAY_BE_LACKING, SAME_EVERYWHERE, TOO_MUCH_FOR_UML, TRAFFIC_HERE, TRAFFIC_IN_UML,
};
use crate::processes::{self, command};
use crate::summary::Outcome;

/// Results of stages for later stages.
pub struct Session {
    pub root: PathBuf,
    /// Whether this is `--all`.
    pub everything: bool,
    debug: OnceLock<Built>,
    optimised: OnceLock<Built>,
}

/// The paths of the programs that run on the lab's kernels.
#[derive(Debug)]
pub struct Built {
    pub tests: String,
    pub podshaper: String,
    pub traffic: String,
}

impl Session {
    pub fn new(root: PathBuf, everything: bool) -> Self {
        Self { root, everything, debug: OnceLock::new(), optimised: OnceLock::new() }
    }

    /// The build for other kernels, the optimised one if there is one. If there is no build, notes that the stage
    /// cannot run.
    pub fn built(&self, lane: &mut Lane, stage: &str) -> Option<&Built> {
        let built = self.optimised.get().or(self.debug.get());
        if built.is_none() {
            lane.note(stage, Outcome::NotRun("the build failed".into()), Instant::now());
        }
        built
    }
}

/// The stdout of a short command that succeeds; otherwise the last line of its stderr.
pub fn printed_by(command: &mut Command) -> Result<String, String> {
    let output = command.stderr(Stdio::piped()).output().map_err(|error| format!("run {command:?}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(last_line(&text(&output.stderr))) }
}

/// Installs the Debian packages whose program or file is missing ("program:package"), and says so.
pub fn need(lane: &mut Lane, needs: &[&str]) -> Result<(), String> {
    let mut install = command("bash");
    install.args(["-c", "source tests/lab/common.bash && need \"$@\"", "tests/run"]).args(needs);
    match lane.run(&mut install) {
        (0, _) => Ok(()),
        (_, said) => Err(last_line(&said)),
    }
}

/// Adds Debian's Prometheus and node_exporter to $PATH if they are missing. In the tests they read podshaper's
/// metrics.
pub fn find_prometheus(lane: &mut Lane) -> Result<(), String> {
    if processes::is_there("promtool") && processes::is_there("prometheus-node-exporter") {
        return Ok(());
    }
    let (code, said) = lane.run(&mut command("tests/lab/prometheus"));
    if code != 0 {
        return Err(last_line(&said));
    }
    processes::add_to_path(Path::new(&last_line(&said)));
    Ok(())
}

/// tests/quic is only for the benchmark and has no tests: the tests need not wait for the build of its runtime.
const WITHOUT_QUIC: &[&str] = &["--workspace", "--exclude", "quic"];

pub fn build_debug(session: &Session, lane: &mut Lane) {
    build(lane, "build", &[&["test", "--no-run"], WITHOUT_QUIC].concat(), &session.debug);
}

/// For whole suites: where each eBPF instruction is interpreted and each system call is a switch of processes, a
/// build without optimisation takes too long.
pub fn build_optimised(session: &Session, lane: &mut Lane) {
    let arguments = ["build", "--release", "--bins", "--example", "traffic", "--test", "tests"];
    build(lane, "build, optimised", &arguments, &session.optimised);
}

fn build(lane: &mut Lane, name: &str, arguments: &[&str], session: &OnceLock<Built>) {
    let start = Instant::now();
    lane.say(&format!("{name} .."));
    let cargo = || {
        let mut cargo = command("cargo");
        cargo.args(arguments).arg("--locked");
        cargo
    };
    let outcome = if lane.run(&mut cargo()).0 != 0 {
        Outcome::Failed("the messages are above".into())
    } else {
        // A second time, to get the paths: the first run shows its messages as they come.
        match printed_by(cargo().args(["--quiet", "--message-format=json"])).and_then(|messages| built(&messages)) {
            Ok(built) => {
                let _ = session.set(built);
                Outcome::Passed("done".into())
            }
            Err(why) => Outcome::Failed(why),
        }
    };
    lane.note(name, outcome, start);
}

/// Builds an example, together with podshaper and the other examples, which it calls. Returns its path. `packages`
/// are further packages whose programs it calls.
pub fn example(name: &str, packages: &[&str]) -> Result<String, String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--bins", "--examples", "--message-format=json-render-diagnostics"]);
    cargo.args([&["podshaper"], packages].concat().iter().flat_map(|package| ["--package", package]));
    // The messages go to the terminal, and cargo gets Ctrl-C from the terminal.
    let output = cargo.stderr(Stdio::inherit()).output().map_err(|error| format!("run cargo: {error}"))?;
    if !output.status.success() {
        return Err("cargo could not build it; the messages are above".into());
    }
    executable(&String::from_utf8_lossy(&output.stdout), "example", name)
}

/// The path of a program, from cargo's messages.
pub fn executable(messages: &str, kind: &str, name: &str) -> Result<String, String> {
    // The unit tests of a program have the program's name and kind.
    let is_it = |message: &Value| {
        let target = &message["target"];
        target["name"] == name
            && target["kind"][0] == kind
            && message["profile"]["test"] == (kind == "test")
            && message["executable"].is_string()
    };
    let mut messages = messages.lines().filter_map(|line| serde_json::from_str(line).ok());
    let found = messages.rfind(is_it).and_then(|message| message["executable"].as_str().map(str::to_owned));
    found.ok_or_else(|| format!("cargo built no {kind} {name}"))
}

fn built(messages: &str) -> Result<Built, String> {
    Ok(Built {
        tests: executable(messages, "test", "tests")?,
        podshaper: executable(messages, "bin", "podshaper")?,
        traffic: executable(messages, "example", "traffic")?,
    })
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// `--skip NAME` for each name.
fn skipping<'a>(names: &[&'a str]) -> Vec<&'a str> {
    names.iter().flat_map(|name| ["--skip", name]).collect()
}

/// Tests that make and inspect real pods, and measure nothing. Without `--all`, tests that take minutes are left out.
pub fn functional_here(session: &Session, lane: &mut Lane) {
    let mut arguments = vec!["--include-ignored", "--skip", ALTERS_THE_KERNEL];
    arguments.extend(skipping(ALONE));
    if !session.everything {
        arguments.extend(skipping(MANY_PODS));
    }
    let command = [&["cargo", "test"], WITHOUT_QUIC, &["--no-fail-fast", "--locked", "--"]].concat();
    lane.tests(&Tests { name: format!("this machine's kernel, {}", release()), command: &command, arguments });
}

pub fn all_traffic_here(_: &Session, lane: &mut Lane) {
    traffic_here(lane, ALONE);
}

pub fn some_traffic_here(_: &Session, lane: &mut Lane) {
    traffic_here(lane, TRAFFIC_HERE);
}

/// Tests whose feature a kernel lacks. `run_there` runs a command on that kernel (`tests/lab/uml --`); if it is
/// empty, the kernel is this machine's.
fn lacking(lane: &mut Lane, run_there: &[&str]) -> Vec<&'static str> {
    const LACKS: &str = "this kernel has not what it takes for ";
    let question = |(tests, script): &(&str, &str)| {
        let script = format!("ip link add v0 type veth peer name v1 && {script}");
        format!("unshare --net sh -ec '{script}' >/dev/null 2>&1 || echo '{LACKS}{tests}'; ")
    };
    let questions: String = MAY_BE_LACKING.iter().map(question).collect();
    let words = [run_there, &["sh", "-c", &questions]].concat();
    let Some((program, arguments)) = words.split_first() else { return vec![] };
    let (_, said) = lane.run(command(program).args(arguments));
    let is_lacking = |tests: &str| said.lines().any(|line| line.trim_end().strip_prefix(LACKS) == Some(tests));
    MAY_BE_LACKING.iter().map(|(tests, _)| *tests).filter(|tests| is_lacking(tests)).collect()
}

/// The end of a stage's name: a test that is left out has not passed, and the summary says so.
fn without(tests: &[&str]) -> String {
    if tests.is_empty() { String::new() } else { format!(", without {}, which it cannot", tests.join(", ")) }
}

fn traffic_here(lane: &mut Lane, names: &[&str]) {
    // The selections of tests have none of these tests.
    let lacking = if names.contains(&"chain::") { lacking(lane, &[]) } else { vec![] };
    let arguments = [&["--include-ignored", "--test-threads=1"], &skipping(&lacking)[..], names].concat();
    let command = ["cargo", "test", "--locked", "--test", "tests", "--"];
    let name = format!("this machine's kernel, traffic{}", without(&lacking));
    lane.tests(&Tests { name, command: &command, arguments });
}

/// Runs tests in User Mode Linux, for at most this time.
fn in_uml(session: &Session, lane: &mut Lane, name: &str, seconds: &str, arguments: &[&str]) {
    let Some(built) = session.built(lane, name) else { return };
    let command = ["tests/lab/uml", "--seconds", seconds, "--", &built.tests];
    let arguments = [&["--include-ignored", "--test-threads=1"], arguments].concat();
    lane.tests(&Tests { name: name.into(), command: &command, arguments });
}

pub fn some_traffic_in_uml(session: &Session, lane: &mut Lane) {
    in_uml(session, lane, "User Mode Linux, traffic", "600", TRAFFIC_IN_UML);
}

pub fn all_in_uml(session: &Session, lane: &mut Lane) {
    let lacking = lacking(lane, &["tests/lab/uml", "--"]);
    let skipped = [SAME_EVERYWHERE, TOO_MUCH_FOR_UML, MANY_PODS, &[ALTERS_THE_KERNEL], &lacking[..]].concat();
    let name = format!("User Mode Linux{}", without(&lacking));
    in_uml(session, lane, &name, "2400", &skipping(&skipped));
}

pub fn many_pods_in_uml(session: &Session, lane: &mut Lane) {
    in_uml(session, lane, &format!("User Mode Linux ({})", MANY_PODS_IN_UML.join(" ")), "1500", MANY_PODS_IN_UML);
}

/// The main tests on the oldest of Debian's kernels.
pub fn on_the_oldest_kernel(session: &Session, lane: &mut Lane) {
    on_debians_kernels(session, lane, |kernel| kernel == KERNELS[0]);
}

/// The main tests on Debian's other kernels.
pub fn on_newer_kernels(session: &Session, lane: &mut Lane) {
    on_debians_kernels(session, lane, |kernel| kernel != KERNELS[0]);
}

fn on_debians_kernels(session: &Session, lane: &mut Lane, is_asked: impl Fn(&str) -> bool) {
    const QEMU: [&str; 4] =
        ["qemu-system-x86_64:qemu-system-x86", "busybox:busybox-static", "cpio:cpio", "modprobe:kmod"];
    let Some(built) = session.built(lane, "Debian's kernels") else { return };
    if let Err(why) = need(lane, &QEMU) {
        return lane.note("Debian's kernels", Outcome::NotRun(why), Instant::now());
    }
    for kernel in KERNELS.iter().filter(|kernel| is_asked(kernel)) {
        let start = Instant::now();
        let (code, said) = lane.run(command("tests/lab/kernels").arg(kernel));
        let found = last_line(&said);
        if code != 0 {
            lane.note(format!("Debian's kernel {kernel}"), Outcome::NotRun(found), start);
            continue;
        }
        let release = found.split(' ').nth(1).unwrap_or(kernel);
        // On an emulated CPU, a build without optimisation takes too long.
        let command = ["tests/lab/vm", kernel, "--seconds", "1200", "--", &built.tests];
        let asked_of_ends = if BOTH_ENDS.contains(kernel) { ASKED_OF_BOTH_ENDS } else { &[] };
        let arguments = [&["--include-ignored", "--test-threads=1"], ASKED_OF_KERNELS, asked_of_ends].concat();
        let name = format!("Debian's kernel {release}");
        lane.tests(&Tests { name, command: &command, arguments });
        if *kernel == KERNEL_TO_ALTER {
            let name = format!("Debian's kernel {release}, altered");
            let arguments = vec!["--include-ignored", "--test-threads=1", ALTERS_THE_KERNEL];
            lane.tests(&Tests { name, command: &command, arguments });
        }
    }
}

/// Debian's compilers for `bpf/build`.
pub fn install_bpf_compilers(_: &Session, lane: &mut Lane) {
    const NAME: &str = "compilers for the eBPF object";
    let start = Instant::now();
    let outcome = match bpf_compilers(lane) {
        Ok(()) => Outcome::Passed("there".into()),
        Err(why) => Outcome::NotRun(why),
    };
    lane.note(NAME, outcome, start);
}

fn bpf_compilers(lane: &mut Lane) -> Result<(), String> {
    const LLVM: &str = "/usr/lib/llvm-22";
    need(
        lane,
        &[
            &format!("{LLVM}/bin/llvm-config:llvm-22-dev"),
            "/usr/bin/rustc:rustc-web",
            "/usr/bin/cargo:cargo-web",
            "/usr/bin/cargo-clippy:rust-web-clippy",
            "/usr/lib/rustlib/bpfel-unknown-none:libstd-rust-web-dev-bpf",
        ],
    )?;
    if processes::is_there("bpf-linker") {
        return Ok(());
    }
    let mut install = command("cargo");
    install.args(["install", "--quiet", "--locked", "bpf-linker", "--version", "0.13.0"]);
    install.args(["--no-default-features", "--features", "llvm-22"]).env("LLVM_PREFIX", LLVM);
    match lane.run(&mut install) {
        (0, _) => Ok(()),
        (_, said) => Err(format!("cargo could not build bpf-linker: {}", last_line(&said))),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_the_programs_are() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"podshaper"},"profile":{"test":false},"executable":"/t/podshaper"}
{"reason":"compiler-artifact","target":{"kind":["bin"],"name":"podshaper"},"profile":{"test":true},"executable":"/t/deps/podshaper-1"}
{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"tests"},"profile":{"test":true},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["test"],"name":"tests"},"profile":{"test":true},"executable":"/t/deps/tests-1"}
{"reason":"compiler-artifact","target":{"kind":["example"],"name":"traffic"},"profile":{"test":false},"executable":"/t/examples/traffic"}
{"reason":"build-finished","success":true}"#;
        let found = built(messages).unwrap();
        assert_eq!((found.tests.as_str(), found.podshaper.as_str()), ("/t/deps/tests-1", "/t/podshaper"));
        assert_eq!(found.traffic, "/t/examples/traffic");
        assert_eq!(built("").unwrap_err(), "cargo built no test tests");
    }
}
