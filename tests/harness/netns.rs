//! Named network namespaces, and threads inside them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns};

use super::{Context, Failure, Result, note, process};

/// A network namespace under /run/netns with its loopback up; removed on drop, and its interfaces with it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    pub fn new(name: &str) -> Result<Self> {
        process::run(Command::new("ip").args(["netns", "add", name]))?;
        let netns = Self { name: name.to_owned(), path: Path::new("/run/netns").join(name) };
        // /proc/sys/net is that of the namespace of whoever looks it up. Without this an IPv6 address is of no use for its first second, and the
        // bridge plugin waits for that. A kernel may have no IPv6.
        netns.inside(|| fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0"))?.unwrap_or_default();
        netns.set_cubic()?;
        netns.run("ip", &["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread of its own in this namespace; a process it starts is in the namespace as well.
    ///
    /// Unlike `ip netns exec` this leaves the mounts alone, so bpffs stays in sight, and costs a measured call nothing.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(&self.path).context(format_args!("open {}", self.path.display()))?;
        let enter = || setns(&file, CloneFlags::CLONE_NEWNET).context(format_args!("enter {}", self.path.display()));
        let result = thread::scope(|scope| scope.spawn(|| enter().map(|()| work())).join());
        result.unwrap_or_else(|_| Err(Failure::new(format_args!("a thread in {} panicked", self.name))))
    }

    /// A command that runs in this namespace, and in no cgroup of a pod.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Gives it cubic, which pods have by Linux's default. The machine's own default may be another one, and each namespace has it from the machine.
    /// Where cubic is not that default, the kernel may keep it from all namespaces but the machine's own (`tcp_set_default_congestion_control`).
    /// The machine, in whose namespace this runs, then allows cubic for a moment.
    fn set_cubic(&self) -> Result<()> {
        const ALLOW_AND_SET: &str = r#"list=/proc/sys/net/ipv4/tcp_allowed_congestion_control
            exec 9<$list && flock 9
            before=$(cat $list) && echo "$before cubic" >$list
            nsenter --net="$0" sh -c 'echo cubic >/proc/sys/net/ipv4/tcp_congestion_control'
            code=$?
            echo "$before" >$list
            exit "$code""#;
        if self.inside(|| fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic"))?.is_ok() {
            return Ok(());
        }
        process::run(Command::new("sh").args(["-c", ALLOW_AND_SET]).arg(&self.path)).map(drop)
    }

    /// Runs a program in this namespace and returns its stdout.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.inside(|| process::run(Command::new(program).args(arguments)))?
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = process::run(Command::new("ip").args(["netns", "del", &self.name])) {
            note(error);
        }
    }
}
