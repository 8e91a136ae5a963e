//! Named network namespaces, and threads inside them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns};

use super::{Context, Failure, Result, note, process};

/// A network namespace under /run/netns with its loopback up; removed on drop, together with its interfaces.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    pub fn new(name: &str) -> Result<Self> {
        process::run(Command::new("ip").args(["netns", "add", name]))?;
        let netns = Self { name: name.to_owned(), path: Path::new("/run/netns").join(name) };
        // /proc/sys/net belongs to the namespace of the process that opens a path in it. With duplicate address
        // detection an IPv6 address cannot be used in its first second, and the bridge plugin waits for that. A
        // kernel may have no IPv6.
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

    /// Runs `work` on a thread of its own in this namespace. Processes that it starts are in the namespace as well.
    ///
    /// Unlike `ip netns exec` this keeps the mounts, so bpffs stays visible, and adds no time to a measured call.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(&self.path).context(format_args!("open {}", self.path.display()))?;
        let enter = || setns(&file, CloneFlags::CLONE_NEWNET).context(format_args!("enter {}", self.path.display()));
        let result = thread::scope(|scope| scope.spawn(|| enter().map(|()| work())).join());
        result.unwrap_or_else(|_| Err(Failure::new(format_args!("a thread in {} panicked", self.name))))
    }

    /// A command that runs in this namespace and in no pod's cgroup.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path.display())).arg("--").arg(program);
        command
    }

    /// Sets cubic, which is Linux's default for pods. A namespace has its default from the machine, where it may be
    /// another one. Where cubic is not the machine's default, the kernel may forbid it in all namespaces but the
    /// machine's own (`tcp_set_default_congestion_control`). Then the machine allows
    /// cubic for a moment.
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
        // The calling thread may be in a sandbox's namespace. The process began in the machine's.
        let machine = format!("--net=/proc/{}/ns/net", std::process::id());
        let mut command = Command::new("nsenter");
        process::run(command.args([&machine, "--", "sh", "-c", ALLOW_AND_SET]).arg(&self.path)).map(drop)
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
