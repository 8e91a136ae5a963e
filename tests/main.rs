//! The tests, as one binary. Tests that need root are `#[ignore]`d with the reason and run by `tests/run`, so they
//! are counted and never skipped silently.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod api;
/// Traffic of real pods.
mod chain;
/// The conflists in conflist-examples/.
mod conflist_examples;
mod harness;
/// `podshaper install`, `uninstall`, and what is in install/.
mod install;
/// State and failures: pins, links and cgroups in the kernel, in any order and concurrency of calls.
mod kernel;
/// Labels and annotations from an API server.
mod labels;
/// podshaper's own module, since iproute2 lacks what these tests read and set.
#[allow(dead_code, reason = "the tests use a part")]
#[path = "../src/netlink.rs"]
mod netlink;
/// The commands for a person.
mod operator;
/// The protocol: input and output of a runtime, as far as this needs no privilege.
mod plain;
/// Recorded calls of real runtimes, one by one.
mod replay;
mod sandbox;
/// The harness itself: what it makes, what it measures, and that it leaves nothing behind.
mod selftest;
