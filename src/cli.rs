//! podshaper called by a person: CNI_COMMAND is not set.
#![expect(clippy::print_stdout, reason = "a person reads it")]

mod install;

use std::process::ExitCode;

use clap::Parser;

use crate::error::Result;

/// The commands that take arguments.
#[derive(Parser)]
#[command(name = "podshaper")]
enum Command {
    /// Put podshaper on this node
    Install(install::Install),
    /// Take podshaper off this node
    Uninstall(install::Uninstall),
}

const HELP: &str = "\
podshaper limits the bandwidth of Kubernetes pods. It is a chained CNI plugin: the container runtime calls it for
each pod, with CNI_COMMAND in the environment and the configuration on stdin. There is nothing to start.

To use it on a node, `podshaper install`, which copies the binary to /opt/cni/bin and adds to the end of the
\"plugins\" list of the conflist in /etc/cni/net.d (`podshaper install --dry-run` shows it):

    { \"type\": \"podshaper\",
      \"capabilities\": { \"bandwidth\": true, \"cgroupPath\": true, \"io.kubernetes.cri.pod-annotations\": true } }

Then annotate a pod before it is created:

    kubernetes.io/egress-bandwidth: 10M        bits per second on the wire: k, M, G, Ki, Mi ..
    rate: \"1M\"                                 the same in megabytes per second

Optional keys beside \"type\":
    egress, ingress            rate of pods that ask for none, such as \"100M\"
    egressBurst, ingressBurst  their bursts, in bits (default: 5 ms of the rate, 10 packets at least)
    max                        {\"egress\": .., \"ingress\": ..}: no pod gets more
    rateKey                    the annotation in megabytes per second (default: rate; \"\": none)
    cgroupPath                 the pod's cgroup below the cgroup2 mount, where the runtime passes no pod UID;
                               {containerID} in it is replaced
    logFile, logLevel          where to log, and off|error|warn|info|debug|trace (default: stderr, info)

Commands:
    install      put podshaper on this node: --help shows how
    uninstall    take it off again
Options:
    --help       this text
    --version    the version of podshaper
Exit status: 0 done, 1 failed, 2 called wrongly.
";

/// Answers `--help` and `--version`.
pub fn run() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.iter().map(|argument| argument.to_str()).collect::<Vec<_>>()[..] {
        [] | [Some("--help" | "-h" | "help")] => print!("{HELP}"),
        [Some("--version" | "-V")] => println!("podshaper {}", env!("CARGO_PKG_VERSION")),
        [Some("install" | "uninstall"), ..] => return command(),
        _ => {
            eprintln!(
                "podshaper: it takes install, uninstall, --help or --version; a container runtime calls it with CNI_COMMAND set"
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn command() -> ExitCode {
    let done: Result<String> = match Command::parse() {
        Command::Install(install) => install.run(),
        Command::Uninstall(uninstall) => uninstall.run(),
    };
    match done {
        Ok(report) => print!("{report}"),
        Err(error) => {
            eprintln!("podshaper: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
