//! The tests, one binary. What needs root is `#[ignore]`d with its reason and run by `tests/run`: counted, never passed over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod api;
/// Traffic of real pods.
mod chain;
/// The conflists in conflist-examples/.
mod conflist_examples;
mod harness;
/// `podshaper install`, `uninstall`, and what is in install/.
mod install;
/// State and failure: pins, links and cgroups of the kernel, whatever order and company the calls come in.
mod kernel;
/// Labels and annotations from an API server.
mod labels;
/// podshaper's own: iproute2 lacks what is read and set with it.
#[allow(dead_code, reason = "the tests use a part")]
#[path = "../src/netlink.rs"]
mod netlink;
/// The commands for a person.
mod operator;
/// The protocol: what a runtime writes and reads, as far as it needs no privilege.
mod plain;
/// What real runtimes sent, call by call.
mod replay;
mod sandbox;
/// The harness itself: what it makes, what it measures, and that nothing of it is left.
mod selftest;
