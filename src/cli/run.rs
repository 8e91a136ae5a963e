//! `podshaper run -- COMMAND`: runs a command in a cgroup of its own, with a limit. Cgroup and limit are removed when
//! the command ends.
//!
//! The cgroup is a child of podshaper's own, so that the accounting of the parent still includes the command. podshaper
//! moves itself into the new cgroup, starts the command there and moves back. So the command is limited from its first
//! packet, without any code between fork and exec.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, ExitStatus},
    thread,
    time::Duration,
};

use clap::Args;
use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};

use super::attach::{LimitArguments, Target};
use crate::{
    cgroup::{self, Hierarchies},
    error::{Code, Error, Result},
    sys,
};

/// The prefix of the cgroup's name. The process id of the podshaper that made it follows.
const PREFIX: &str = "podshaper-run-";
/// The base of the exit status with which a shell reports a command that a signal ended: 128 plus the signal.
const EXIT_SIGNALLED: i32 = 128;
/// The exit status with which a shell reports that a command was not found.
const EXIT_NOT_FOUND: u8 = 127;
/// The signals that end a command by default.
const ENDING: [Signal; 4] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP];

#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    asked: LimitArguments,
    /// The command and its arguments, after --
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Arguments {
    /// Returns the command's exit status.
    pub fn run(self) -> Result<ExitCode> {
        // Signals are blocked before anything is made. From here on a signal ends the command, and podshaper removes
        // what it has made after that.
        let signals = Signals::block()?;
        let cgroup = RunCgroup::make()?;
        let target = Target::find(&cgroup.path, None, None)?;
        let limited = target.attach(&self.asked.limits()).map(|()| Limited { target: &target });
        let limited = limited?;
        if let Some(signal) = Signals::early()? {
            return Ok(exit_code(EXIT_SIGNALLED + signal));
        }
        let child = cgroup.start(&self.command, &signals);
        let status = match child {
            Ok(child) => wait(child, &signals)?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                log::error!(
                    "run {}: {cause}",
                    self.command.first().map(|name| name.to_string_lossy()).unwrap_or_default()
                );
                return Ok(ExitCode::from(EXIT_NOT_FOUND));
            }
            Err(cause) => return Err(Error::because(Code::Io, "start the command in its cgroup", cause)),
        };
        drop(limited);
        Ok(exit_code(status.code().unwrap_or_else(|| EXIT_SIGNALLED + status.signal().unwrap_or_default())))
    }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// The attachment, removed when dropped.
struct Limited<'a> {
    target: &'a Target,
}

impl Drop for Limited<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.target.detach() {
            log::error!("{error}");
        }
    }
}

/// The command's cgroup. When it is dropped, the remaining processes are killed and the directory is removed.
struct RunCgroup {
    path: PathBuf,
    home: PathBuf,
}

impl RunCgroup {
    fn make() -> Result<Self> {
        let home = own_cgroup()?;
        let path = home.join(format!("{PREFIX}{}", std::process::id()));
        // An earlier podshaper with the same process id may have been killed and have left its cgroup.
        remove_cgroup_of_the_dead(&path);
        fs::create_dir(&path)
            .map_err(|cause| Error::because(Code::Cgroup, format!("make the cgroup {}", path.display()), cause))?;
        Ok(Self { path, home })
    }

    fn start(&self, command: &[OsString], signals: &Signals) -> io::Result<Child> {
        let [program, arguments @ ..] = command else { return Err(io::ErrorKind::InvalidInput.into()) };
        move_self(&self.path)?;
        let child = signals.spawn(Command::new(program).args(arguments));
        move_self(&self.home)?;
        child
    }
}

impl Drop for RunCgroup {
    fn drop(&mut self) {
        if let Err(cause) = empty_and_remove(&self.path) {
            log::error!("remove the cgroup {}: {cause}", self.path.display());
        }
    }
}

/// The directory of podshaper's own cgroup; the root of the mount, if podshaper's cgroup is above the visible mount.
fn own_cgroup() -> Result<PathBuf> {
    const FILE: &str = "/proc/self/cgroup";
    let failed = |cause| Error::because(Code::Cgroup, format!("find podshaper's own cgroup in {FILE}"), cause);
    let text = fs::read_to_string(FILE).map_err(failed)?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let mount = Hierarchies::of_this_host()?.unified;
    let own = mount.join(path);
    Ok(if own.join("cgroup.procs").exists() { own } else { mount })
}

/// Moves this process. "0" means the process that writes.
fn move_self(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
}

/// Kills the processes that the command has left running, and removes the cgroup. Nothing would limit these processes
/// later.
fn empty_and_remove(path: &Path) -> io::Result<()> {
    const ATTEMPTS: u32 = 100;
    let mut result = Ok(());
    for _ in 0..ATTEMPTS {
        result = fs::remove_dir(path);
        match &result {
            Err(cause) if cause.raw_os_error() == Some(libc::EBUSY) => {
                kill_all(path)?;
                thread::sleep(Duration::from_millis(10));
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            _ => return result,
        }
    }
    result
}

fn kill_all(path: &Path) -> io::Result<()> {
    // cgroup.kill exists since Linux 5.14. Before that the processes are killed one by one, until none is left.
    if fs::write(path.join("cgroup.kill"), "1").is_ok() {
        return Ok(());
    }
    for id in cgroup::processes(path) {
        match kill(Pid::from_raw(id), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Whether a cgroup is that of a `podshaper run` that was killed, and whose command has ended, too.
pub fn is_of_the_dead(cgroup: &Path) -> bool {
    let name = cgroup.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let maker = name.strip_prefix(PREFIX).and_then(|id| id.parse::<u32>().ok());
    let is_dead = |id: u32| id == std::process::id() || !Path::new(&format!("/proc/{id}")).exists();
    let is_empty = || fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|text| text.contains("populated 0"));
    maker.is_some_and(is_dead) && is_empty()
}

/// Removes the cgroup of a killed `podshaper run`; leaves any other cgroup alone.
pub fn remove_cgroup_of_the_dead(cgroup: &Path) {
    if is_of_the_dead(cgroup)
        && let Err(cause) = fs::remove_dir(cgroup)
    {
        log::warn!("remove the cgroup {}: {cause}", cgroup.display());
    }
}

/// The signals that would end podshaper before it has cleaned up, and the signal that reports the end of the command.
/// They are blocked, so that none is lost, and read from a file descriptor. The command starts with no signal blocked.
struct Signals {
    set: SigSet,
    file: SignalFd,
}

impl Signals {
    fn block() -> Result<Self> {
        let failed = |errno: Errno| Error::because(Code::Io, "block signals", errno);
        let set: SigSet = ENDING.into_iter().chain([Signal::SIGCHLD]).collect();
        set.thread_block().map_err(failed)?;
        let file = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).map_err(failed)?;
        Ok(Self { set, file })
    }

    /// A signal that has arrived before the command was started.
    fn early() -> Result<Option<i32>> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let come = SignalFd::with_flags(&ENDING.into_iter().collect(), flags).and_then(|file| file.read_signal());
        let come = come.map_err(|errno| Error::because(Code::Io, "look for signals", errno))?;
        Ok(come.map(|signal| signal.ssi_signo as i32))
    }

    fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        sys::unblock_before_exec(command, self.set);
        command.spawn()
    }
}

/// Waits for the command, and passes on the signals that other processes send. A signal of the terminal (Ctrl-C) has
/// already been sent to the command as well.
fn wait(mut child: Child, signals: &Signals) -> Result<ExitStatus> {
    let failed = |cause: io::Error| Error::because(Code::Io, "wait for the command", cause);
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status);
        }
        let Some(signal) = signals.file.read_signal().map_err(|errno| failed(errno.into()))? else { continue };
        let number = Signal::try_from(signal.ssi_signo as i32).ok().filter(|number| *number != Signal::SIGCHLD);
        if let Some(number) = number.filter(|_| signal.ssi_code <= libc::SI_USER) {
            // The command has ended already: SIGCHLD comes next.
            let _ = kill(Pid::from_raw(child.id() as i32), number);
        }
    }
}
