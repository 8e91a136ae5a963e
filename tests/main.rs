//! The tests, one binary. What needs root is `#[ignore]`d with its reason and run by `tests/run`: counted, never passed over.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

/// Traffic of real pods.
mod chain;
/// The conflists in conflist-examples/.
mod conflists;
mod harness;
/// The harness itself: what it makes, what it measures, and that nothing of it is left.
mod selftest;
