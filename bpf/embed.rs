//! Build script of the plugin: puts the eBPF object where `src/shaper.rs` includes it from.
//!
//! The committed object is what is embedded, so that stable Rust alone builds podshaper. It is built anew from its
//! sources where `PODSHAPER_BUILD_BPF=1` asks for that, and where the sources are no longer those the committed object
//! was made of and the eBPF toolchain is there. `bpf/build` knows how; `bpf/build --check` is what CI runs.
#![allow(clippy::expect_used, clippy::print_stdout, reason = "a build script talks to cargo by panics and stdout")]

use std::{
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    process::Command,
};

const COMMITTED: &str = "bpf/podshaper.bpf.o";

fn main() {
    for source in ["bpf/src", "bpf/abi", "bpf/Cargo.toml", "bpf/Cargo.lock", "bpf/build", COMMITTED] {
        println!("cargo::rerun-if-changed={source}");
    }
    println!("cargo::rerun-if-env-changed=PODSHAPER_BUILD_BPF");
    leave_out_unwind_tables();

    let output = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("podshaper.bpf.o");
    if env::var_os("PODSHAPER_BUILD_BPF").is_some_and(|asked| asked == "1") {
        assert!(build(&output), "PODSHAPER_BUILD_BPF=1, but bpf/build failed: see its messages above");
    } else if is_stale() {
        println!("cargo::warning=the sources in bpf/ have changed since {COMMITTED} was built: building it anew");
        assert!(build(&output), "cannot build the changed sources in bpf/: see the messages above, or restore them");
    } else {
        fs::copy(COMMITTED, &output).expect("copy the committed eBPF object");
    }
    println!("cargo::rustc-env=PODSHAPER_BPF_IDENTITY={}", identity(&fs::read(&output).expect("read the eBPF object")));
}

/// A number that another object does not have, as text.
fn identity(object: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    object.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// In release builds, which abort on a panic; tests unwind. On the machine it was tried on.
fn leave_out_unwind_tables() {
    const SCRIPT: &str = "bpf/no-unwind.ld";
    println!("cargo::rerun-if-changed={SCRIPT}");
    let is = |name: &str, value: &str| env::var_os(name).is_some_and(|found| found == value);
    if is("PROFILE", "release") && is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_ENV", "gnu") {
        let directory = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        println!("cargo::rustc-link-arg-bin=podshaper=-Wl,-T,{directory}/{SCRIPT},--no-eh-frame-hdr");
    }
}

fn build(output: &Path) -> bool {
    // Its own target directory: the outer cargo holds the lock of the usual one.
    let target = output.with_file_name("bpf-target");
    Command::new("bpf/build")
        .arg(output)
        .env("PODSHAPER_BPF_TARGET_DIR", target)
        .status()
        .is_ok_and(|status| status.success())
}

fn is_stale() -> bool {
    Command::new("bpf/build").arg("--is-stale").status().is_ok_and(|status| status.success())
}
