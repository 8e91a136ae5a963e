//! Commands that podshaper starts, other processes and their descriptors, and how names are looked up.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::process::CommandExt,
    process::Command,
};

use nix::sys::signal::SigSet;

/// Makes a command start with these signals unblocked: it would inherit the signals that are blocked here.
pub fn unblock_before_exec(command: &mut Command, signals: SigSet) {
    // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
    unsafe { command.pre_exec(move || signals.thread_unblock().map_err(io::Error::from)) };
}

/// Makes the kernel kill a command when the thread that starts it ends.
pub fn kill_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ask = move || {
        // SAFETY: both are one system call each, without a pointer. Between fork and exec nothing is allocated.
        let (asked, found) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        match asked {
            0 if u32::try_from(found) == Ok(parent) => Ok(()),
            // The parent has ended already, so that no signal will come.
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: see above.
    unsafe { command.pre_exec(ask) };
}

/// Makes getaddrinfo look into /etc/hosts and ask the servers of /etc/resolv.conf, each for one second, and use no
/// other service.
///
/// glibc (2.34 and later) has these two services built in. For any other service in the node's nsswitch.conf
/// (`resolve`, `mymachines`, ..) it loads the node's library into the process, and that library was made for another
/// glibc than the one in a static binary. The second is for a server that is down: with glibc's five seconds the next
/// server would be asked too late.
#[cfg(target_env = "gnu")]
pub fn look_up_names_without_plugins() {
    unsafe extern "C" {
        /// nss.h
        fn __nss_configure_lookup(database: *const libc::c_char, services: *const libc::c_char) -> libc::c_int;
    }
    // SAFETY: both are C strings, which glibc copies. No other thread of this process looks up names or reads the
    // environment. The call fails only for want of memory, or where these services are unknown; then nsswitch.conf
    // counts.
    unsafe {
        __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
        libc::setenv(c"RES_OPTIONS".as_ptr(), c"timeout:1 attempts:2".as_ptr(), 0);
    }
}

/// Other C libraries have no plugins.
#[cfg(not(target_env = "gnu"))]
pub fn look_up_names_without_plugins() {}

/// A handle of a process. It does not become that of a later process with the same number.
///
/// # Errors
/// The kernel's error; ESRCH where there is no such process.
pub fn open_process(id: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: a process id and no flags: nothing of this process's memory is touched.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) })
}

/// Another process's descriptor, as a descriptor of this process: the same open file or socket (Linux 5.6). This takes
/// the right to trace the process.
///
/// # Errors
/// The kernel's error; EBADF: the process has no such descriptor.
pub fn descriptor_of(process: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only numbers, as in `open_process`.
    opened(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// The descriptor (close-on-exec) that a system call has opened, or the kernel's error.
fn opened(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
