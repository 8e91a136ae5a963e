//! podshaper: placeholder while the modules are written.
#![allow(dead_code, unused_imports)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod cgroup;
mod error;
mod netns;
mod pod;
mod request;
mod units;

fn main() {}
