//! podshaper called by a person: CNI_COMMAND is not set. Each command has a file below `cli/`; this file runs a command
//! and maps its result to an exit status.
//!
//! Reading commands take no lock and change nothing. All commands print through [`output`]. If the reader of the output
//! has gone away, the command ends quietly.

mod attach;
mod attachments;
mod chart;
mod completions;
mod detach;
mod directories;
mod doctor;
mod gc;
mod install;
mod list;
mod man;
mod metrics;
mod output;
mod run;
mod select;
mod set;
mod show;
mod sync;
mod table;
mod top;
mod upgrade;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::{self, Result};

/// The exit status of a command with wrong arguments.
const EXIT_USAGE: u8 = 2;

const ABOUT: &str = "\
podshaper limits the bandwidth of Kubernetes pods. It is a chained CNI plugin: the container runtime calls it for
each pod, with CNI_COMMAND in the environment and the configuration on stdin. There is nothing to start.
The commands below are for the operator of a node: they show what is limited, and change it.";

const AFTER: &str = "\
To use it on a node, `podshaper install`, which copies the binary to /opt/cni/bin, adds to the end of the \"plugins\"
list of the conflist in /etc/cni/net.d, and has systemd keep it there (`podshaper install --dry-run` shows all):

    { \"type\": \"podshaper\",
      \"capabilities\": { \"bandwidth\": true, \"cgroupPath\": true, \"io.kubernetes.cri.pod-annotations\": true } }

Then annotate a pod before it is created, or a running one, which `podshaper sync` follows:

    kubernetes.io/egress-bandwidth: 10M        bits per second on the wire: k, M, G, Ki, Mi ..
    rate: \"1M\"                                 what the pod sends, in megabytes per second: 1M is 8 Mbit/s

Optional keys beside \"type\":
    egress, ingress            rate of pods that ask for none, such as \"100M\"
    egressBurst, ingressBurst  their bursts, in bits (default: 5 ms of the rate, 10 packets at least)
    max                        {\"egress\": .., \"ingress\": ..}: no pod gets more
    namespaces                 [{\"name\": .. or \"labels\": {..}, \"egress\": .., \"max\": {..}}, ..]: the same for pods
                               of some namespaces; the first entry that fits counts
    rateKey                    the annotation in megabytes per second (default: rate; \"\": none)
    cgroupPath                 the pod's cgroup below the cgroup2 mount, where the runtime passes no pod UID;
                               {containerID} in it is replaced
    kubeconfig                 whom to ask for the pod's annotations and labels (default: nobody)
    onApiError                 fail|ignore: what becomes of a pod when there is no answer (default: fail)
    exemptSubnets              [\"10.0.0.0/8\", ..]: what goes there and comes from there is not limited
    shapedSubnets              the opposite: nothing else is limited; of both lists the longest prefix counts
    otherPaths                 false: limit the pod's own sockets only, and not what tunnels, VMs or other
                               namespaces send through the pod (default: true)
    logFile, logLevel          where to log, and off|error|warn|info|debug|trace (default: stderr, info)

A POD is its name, namespace/name, UID or container id, or the beginning of one; or a cgroup's path.
Exit status: 0 done, 1 failed, 2 called wrongly; of run: the command's own.";

#[derive(Parser)]
#[command(name = "podshaper", version, about = "Limits the bandwidth of Kubernetes pods", long_about = ABOUT)]
#[command(after_long_help = AFTER, after_help = AFTER, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What a person can ask for.
#[derive(Subcommand)]
enum Command {
    /// Show every attachment: limits, what they let pass now, and whether they are in force
    #[command(visible_alias = "ls")]
    List(list::Arguments),
    /// Show all of one pod, with the histogram of its backlog
    Show(show::Arguments),
    /// Watch what the limits let pass; q ends it
    Top(top::Arguments),
    /// Change the limits of a running pod, until it gets a new sandbox
    Set(set::Arguments),
    /// Limit a cgroup: a systemd slice or service, a container
    Attach(attach::Arguments),
    /// Take a limit off
    Detach(detach::Arguments),
    /// Run a command in a cgroup of its own, limited
    Run(run::Arguments),
    /// Bring this node's pods to what is asked of them now
    Sync(sync::Arguments),
    /// Remove attachments whose cgroup is gone, lists of delegated networks of sandboxes that are gone, and what
    /// killed calls left
    Gc(gc::Arguments),
    /// Check whether this node can limit pods and its conflists make it
    Doctor(doctor::Arguments),
    /// Print everything for Prometheus
    Metrics(metrics::Arguments),
    /// Put podshaper on this node
    Install(install::Install),
    /// Take podshaper off this node
    Uninstall(install::Uninstall),
    /// Give running pods this podshaper's eBPF programs; their limits and connections go on
    Upgrade(upgrade::Arguments),
    /// Print the completions of a shell
    Completions(completions::Arguments),
    /// Print the manual page, of podshaper or of a command
    Man(man::Arguments),
}

impl Command {
    fn run(self) -> Result<ExitCode> {
        let done = |()| ExitCode::SUCCESS;
        match self {
            Self::List(arguments) => arguments.run().map(done),
            Self::Show(arguments) => arguments.run().map(done),
            Self::Top(arguments) => arguments.run().map(done),
            Self::Set(arguments) => arguments.run().map(done),
            Self::Attach(arguments) => arguments.run().map(done),
            Self::Detach(arguments) => arguments.run().map(done),
            Self::Run(arguments) => arguments.run(),
            Self::Sync(arguments) => arguments.run(),
            Self::Gc(arguments) => arguments.run().map(done),
            Self::Doctor(arguments) => arguments.run(),
            Self::Metrics(arguments) => arguments.run().map(done),
            Self::Install(arguments) => arguments.run(),
            Self::Uninstall(arguments) => arguments.run().and_then(|report| output::print(&report)).map(done),
            Self::Upgrade(arguments) => arguments.run().map(done),
            Self::Completions(arguments) => arguments.run().map(done),
            Self::Man(arguments) => arguments.run().map(done),
        }
    }
}

/// Parses the arguments and runs the command.
pub fn run() -> ExitCode {
    let ended = match Cli::try_parse() {
        Ok(cli) => {
            log_to_stderr();
            cli.command.run()
        }
        Err(_) if std::env::args_os().len() < 2 => help().map(|()| ExitCode::SUCCESS),
        Err(error) => answer(&error),
    };
    ended.unwrap_or_else(|error| {
        output::complain(&error.to_string());
        ExitCode::FAILURE
    })
}

fn help() -> Result<()> {
    output::print(&Cli::command().render_long_help().to_string())
}

/// Prints an error of clap. Such an error may be an answer: `--help`, `--version`.
fn answer(error: &clap::Error) -> Result<ExitCode> {
    let text = error.render().to_string();
    if error.use_stderr() {
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        let lines: Vec<String> = text.lines().map(error::printable).collect();
        output::complain(&lines.join("\n"));
        return Ok(ExitCode::from(EXIT_USAGE));
    }
    output::print(&text).map(|()| ExitCode::SUCCESS)
}

/// Modules that the commands share with the plugin warn in the log. A command prints these warnings on stderr at once.
fn log_to_stderr() {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn
        }
        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                output::complain(&error::printable(&record.args().to_string()));
            }
        }
        fn flush(&self) {}
    }
    // The only possible error is a second logger, which does not exist.
    let _ = log::set_logger(&Stderr).map(|()| log::set_max_level(log::LevelFilter::Warn));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(command: &clap::Command, path: &str, check: &mut impl FnMut(&clap::Command, &str)) {
        check(command, path);
        command.get_subcommands().for_each(|sub| each(sub, &format!("{path} {}", sub.get_name()), check));
    }

    #[test]
    fn every_command_and_every_argument_has_help() {
        Cli::command().debug_assert();
        each(&Cli::command(), "podshaper", &mut |command, path| {
            assert!(command.get_about().is_some(), "{path} has no help");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path} {} has no help", argument.get_id());
            }
        });
    }

    #[test]
    fn what_is_wrong_with_the_arguments_is_found_before_anything_is_done() {
        for words in [
            "",
            "frobnicate",
            "list -o xml",
            "set web",
            "set --egress 10M",
            "set web --egress 10MB",
            "set web --egress 0",
            "attach --cgroup /a",
            "attach --egress 10M",
            "run --egress 10M",
            "run -- true",
            "top --interval 0",
            "detach",
            "metrics extra",
        ] {
            let words = std::iter::once("podshaper").chain(words.split_whitespace());
            assert!(Cli::try_parse_from(words.clone()).is_err(), "{:?}", words.collect::<Vec<_>>());
        }
    }
}
