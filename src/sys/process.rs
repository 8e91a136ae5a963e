//! Commands that are started, other processes and their descriptors, and how names are looked up.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::process::CommandExt,
    process::Command,
};

use nix::sys::signal::SigSet;

/// Has a command start without these signals blocked: it would inherit what is blocked here.
pub fn unblock_before_exec(command: &mut Command, signals: SigSet) {
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(move || signals.thread_unblock().map_err(io::Error::from)) };
}

/// Has a command killed when the thread that starts it ends.
pub fn kill_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ask = move || {
        // SAFETY: both are one system call each, which takes no pointer. Between fork and exec nothing is allocated.
        let (asked, found) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        match asked {
            0 if u32::try_from(found) == Ok(parent) => Ok(()),
            // It has ended already, so that no signal will come.
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: see above.
    unsafe { command.pre_exec(ask) };
}

/// Has getaddrinfo look into /etc/hosts and ask the servers of /etc/resolv.conf, each for one second, and nobody else.
///
/// glibc (2.34 and later) has these two ways in itself. For any other that the node's nsswitch.conf names (`resolve`, `mymachines`,
/// ..) it loads the node's library into the process, and a static binary has another glibc than that library was made for. The second
/// is for a server that is down: with glibc's 5 the next one would be asked too late.
#[cfg(target_env = "gnu")]
pub fn look_up_names_without_plugins() {
    unsafe extern "C" {
        /// nss.h
        fn __nss_configure_lookup(database: *const libc::c_char, services: *const libc::c_char) -> libc::c_int;
    }
    // SAFETY: both are C strings, which glibc copies; no other thread of this process looks up names or reads the environment.
    // It fails only for want of memory, or where these services are unknown, and then nsswitch.conf counts.
    unsafe {
        __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
        libc::setenv(c"RES_OPTIONS".as_ptr(), c"timeout:1 attempts:2".as_ptr(), 0);
    }
}

/// Other libcs have no plugins.
#[cfg(not(target_env = "gnu"))]
pub fn look_up_names_without_plugins() {}

/// A handle of a process, which is not another's when that one has its number.
///
/// # Errors
/// What the kernel says; ESRCH where there is no such process.
pub fn open_process(id: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: a process id and no flags: nothing of this process's memory is touched.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) })
}

/// A descriptor of another process, as one of this process: the same open file or socket (Linux 5.6). Takes the right to trace it.
///
/// # Errors
/// What the kernel says; EBADF where it has no such descriptor.
pub fn descriptor_of(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers alone, as in `open_process`.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// What a call that opens a descriptor (close-on-exec) has returned.
fn opened(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
