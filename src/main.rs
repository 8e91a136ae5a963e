//! podshaper: a chained CNI plugin that limits the bandwidth of pods by pacing their senders. A runtime's call goes to [`cni`],
//! a person's to [`cli`].
//!
//! The data flow one way: [`request`] -> [`cgroup`] -> [`shaper`] (loaded, attached, and pinned by [`pins`]) -> reply.
//! Where podshaper delegates, [`delegate`] has the network's plugins called between the request and the cgroup.
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
