//! Whether the kernel runs a cgroup's programs for the sockets of its processes.
//!
//! Linux 5.7 to 5.14, unless fixed later, does not where `net_prio` or `net_cls` of cgroup v1 is in use: each new
//! socket then counts as the root cgroup's. The check tries it: with a program that refuses every packet, on a cgroup
//! that it makes, and a packet over loopback.

use std::{
    fs,
    io::{self, ErrorKind},
    net::UdpSocket,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process,
};

use crate::{
    cgroup::Hierarchies,
    error::{Code, Error, Result},
    sys::{self, CgroupHook},
};

/// Moves this process for a moment into a cgroup of its own, and sends a packet. If this cannot be tried, it is no
/// error.
///
/// # Errors
/// [`Code::Kernel`]: the program did not see the packet. The errors of [`Hierarchies::of_this_host`].
pub fn check(_: &Path) -> Result<String> {
    let unified = Hierarchies::of_this_host()?.unified;
    match is_refused(&unified) {
        Ok(true) => return Ok("counted by their cgroups".to_owned()),
        Ok(false) => {}
        Err(cause) => return Ok(format!("not tried whether they are counted by their cgroups: {cause}")),
    }
    let text = "a program on a cgroup does not see what the cgroup's sockets send: this kernel (5.7 to 5.14) forgets their cgroup where net_prio \
                or net_cls of cgroup v1 is in use. Limits are held at the host's end of a pod's veth alone, by a queue. Take net_prio and \
                net_cls out of use (cgroup_no_v1=net_prio,net_cls), or use another kernel";
    Err(Error::new(Code::Kernel, text))
}

fn is_refused(unified: &Path) -> io::Result<bool> {
    let away = Away::go(unified)?;
    let directory = OwnedFd::from(fs::File::open(&away.there)?);
    let program = sys::refusing_program()?;
    let _link = sys::link_to_cgroup(program.as_fd(), directory.as_fd(), CgroupHook::InetEgress)?;
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    match socket.send_to(&[0], socket.local_addr()?) {
        Ok(_) => Ok(false),
        Err(cause) if cause.kind() == ErrorKind::PermissionDenied => Ok(true),
        Err(cause) => Err(cause),
    }
}

/// This process in a cgroup that was made for it. Dropping this moves the process back and removes the cgroup.
struct Away {
    there: PathBuf,
    home: PathBuf,
}

impl Away {
    fn go(unified: &Path) -> io::Result<Self> {
        const OWN: &str = "/proc/self/cgroup";
        let text = fs::read_to_string(OWN)?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let home = unified.join(own.ok_or_else(|| io::Error::other(format!("{OWN} names no cgroup v2")))?);
        let there = unified.join(format!("podshaper-probe-{}", process::id()));
        fs::create_dir(&there)?;
        let away = Self { there, home };
        enter(&away.there)?;
        Ok(away)
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        let back = enter(&self.home).and_then(|()| fs::remove_dir(&self.there));
        if let Err(cause) = back {
            log::warn!("the cgroup {} is left: {cause}", self.there.display());
        }
    }
}

/// Moves the calling process (0) into a cgroup.
fn enter(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
}
