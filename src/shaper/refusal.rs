//! The error where the kernel refuses something of the shaper.

use std::fs;

use aya::programs::ProgramError;

use crate::error::{Code, Error};

const CAPABILITIES: &str =
    " (podshaper must run with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON: as root, as container runtimes do)";

/// The kernel's error, and a remedy. aya's errors hold their cause and also print it, so only the innermost cause is
/// printed here.
pub fn refused(what: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> Error {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let errno = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    let verifier = error.downcast_ref::<ProgramError>().map(verifier_says).unwrap_or_default();
    let remedy = match errno {
        // Kernels differ in the error for a missing capability. Without CAP_PERFMON it is the verifier that refuses.
        Some(libc::EPERM | libc::EACCES | libc::EINVAL) if lacks_capabilities() => CAPABILITIES,
        // The error may be EACCES here, too, but then the verifier's log has the reason.
        _ if !verifier.is_empty() => {
            " (this kernel's verifier does not accept it: please report this, with the kernel's version)"
        }
        // In a user namespace a process has all capabilities, but only for what belongs to that namespace.
        Some(libc::EPERM | libc::EACCES) => CAPABILITIES,
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => {
            " (it takes Linux 5.10 or later with CONFIG_CGROUP_BPF and CONFIG_BPF_SYSCALL)"
        }
        Some(libc::ENOMEM | libc::ENOSPC) => " (the node is out of memory, or of RLIMIT_MEMLOCK)",
        _ => "",
    };
    Error::because(Code::Kernel, what.into() + remedy, cause.to_string() + &verifier)
}

/// The last lines of the verifier's log, which have the reason.
fn verifier_says(error: &ProgramError) -> String {
    const LINES: usize = 3;
    let ProgramError::LoadError { verifier_log, .. } = error else { return String::new() };
    let log = verifier_log.to_string();
    const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let says_why = |line: &&str| !line.trim().is_empty() && !STATISTICS.iter().any(|start| line.starts_with(start));
    let lines: Vec<_> = log.lines().filter(says_why).collect();
    match lines[lines.len().saturating_sub(LINES)..].join(" | ") {
        end if end.is_empty() => end,
        end => format!("; the verifier says: {end}"),
    }
}

/// Whether this process lacks a needed capability, as far as the kernel tells (`CapEff` in proc_pid_status(5); the bits
/// are those of uapi/linux/capability.h). CAP_SYS_ADMIN stands in for the capabilities that came with Linux 5.8.
fn lacks_capabilities() -> bool {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    const PERFMON_AND_BPF: u64 = 1 << 38 | 1 << 39;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    effective
        .is_some_and(|has| has & NET_ADMIN == 0 || has & SYS_ADMIN == 0 && has & PERFMON_AND_BPF != PERFMON_AND_BPF)
}
