//! podshaper: a chained CNI plugin that limits the bandwidth of pods by pacing their senders. [`cni`] handles the call
//! of a runtime, [`cli`] the command of a person.
//!
//! Data flow in one direction: [`request`] -> [`cgroup`] -> [`shaper`] (loaded, attached, and pinned by [`pins`]) ->
//! reply. If podshaper delegates, [`delegate`] calls the network's plugins between the request and the cgroup.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod attachment;
mod cgroup;
mod cli;
mod cni;
mod delegate;
mod direction;
mod error;
mod interface;
mod kube;
mod logging;
mod netlink;
mod netns;
mod owner;
mod pins;
mod pod;
mod probe;
mod qdisc;
mod request;
mod sandboxes;
mod shaper;
mod sys;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    let env = request::Env::from_process();
    if env.command.is_some() { cni::run(&env) } else { cli::run() }
}
