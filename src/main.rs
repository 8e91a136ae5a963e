//! podshaper: placeholder while the modules are written.
#![allow(dead_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod error;
mod pod;
mod units;

fn main() {}
