//! Takes pace and window off connections whose limit ends. The options that the programs have set on a socket stay when
//! the programs go, and no program runs for a connection that sends nothing. But root can get a copy of another
//! process's descriptor (`pidfd_getfd`, since Linux 5.6), and can set the socket's options through the copy. The
//! options that the application had set are in the programs' state of the socket, which user space reads by the
//! descriptor.
//!
//! This module finds the sockets that a process of the cgroup has open. Sockets that no process has open (the kernel's
//! own, the subflows of MPTCP, connections before accept()) lose their pace and window when they send: see
//! [`super::lift`].

use std::{
    collections::HashSet,
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use podshaper_abi::SocketState;

use crate::{
    cgroup,
    direction::Direction,
    owner::Owner,
    shaper::Pinned,
    sys::{self, Map, Read},
};

/// SO_MAX_PACING_RATE of a socket without a pace.
const NOT_PACED: u64 = u64::MAX;
/// TCP_WINDOW_CLAMP of a socket whose window is bounded by its buffer alone: the largest window that TCP can announce
/// (RFC 7323, 2.2). The kernel starts a socket with this value, too (`tcp_select_initial_window`).
const NOT_CLAMPED: u32 = 0xffff << 14;

/// The longest time for all sockets of an attachment: other calls wait meanwhile, and a pod may open any number of
/// sockets.
const MAX_TIME: Duration = Duration::from_secs(1);

/// nix has no names for these options.
#[derive(Clone, Copy)]
struct MaxPacingRate;
nix::setsockopt_impl!(MaxPacingRate, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, u64, sockopt::SetStruct<u64>);
#[derive(Clone, Copy)]
struct WindowClamp;
nix::setsockopt_impl!(WindowClamp, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, u32, sockopt::SetStruct<u32>);

/// The connections of one attachment.
pub struct Connections {
    /// The programs' state of each socket.
    states: Map<i32, SocketState>,
    /// The slot of the attachment.
    slot: u32,
    /// The cgroup of the attachment.
    cgroup: PathBuf,
}

/// The connections of the attachment that is pinned in a directory. `None` if the programs' state of the sockets cannot
/// be read, because it has another layout; the reason goes to the log.
pub fn connections(directory: &Path, owner: &Owner) -> Option<Connections> {
    match Pinned::at(directory).set().and_then(|set| set.socket_states()) {
        Ok(states) => Some(Connections { states, slot: owner.slot, cgroup: PathBuf::from(&owner.cgroup) }),
        Err(error) => {
            log::warn!("connections may keep the limit that ends: {error}");
            None
        }
    }
}

impl Connections {
    /// Gives the sockets the application's own options back, for these directions. Errors go to the log.
    pub fn let_go(&self, directions: &[Direction]) {
        let (until, mut seen) = (Instant::now() + MAX_TIME, HashSet::new());
        for process in cgroup::processes(&self.cgroup) {
            match self.let_go_of(process, directions, until, &mut seen) {
                // The process or the descriptor has gone meanwhile.
                Err(cause) if matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EBADF)) => {}
                Err(cause) => log::warn!("connections of process {process} may keep the limit that ended: {cause}"),
                Ok(()) => {}
            }
            if Instant::now() > until {
                let cgroup = self.cgroup.display();
                log::warn!(
                    "connections of {cgroup} may keep the limit that ended: there are more than {MAX_TIME:?} are enough for"
                );
                return;
            }
        }
    }

    fn let_go_of(
        &self,
        process: i32,
        directions: &[Direction],
        until: Instant,
        seen: &mut HashSet<PathBuf>,
    ) -> io::Result<()> {
        let handle = sys::open_process(process)?;
        let mut first_error = Ok(());
        for (number, name) in sockets(process)? {
            if Instant::now() > until {
                break;
            }
            if !seen.insert(name) {
                continue;
            }
            let done = sys::descriptor_of(handle.as_fd(), number).and_then(|socket| self.release(&socket, directions));
            first_error = first_error.and(done);
        }
        first_error
    }

    fn release(&self, socket: &OwnedFd, directions: &[Direction]) -> io::Result<()> {
        let found = self.states.get(&socket.as_raw_fd(), Read::Plain)?;
        let Some(state) = found.filter(|state| state.slot == u64::from(self.slot)) else { return Ok(()) };
        if directions.contains(&Direction::Egress) && state.set_bytes_per_s != 0 {
            let own = state.application_bytes_per_s;
            setsockopt(socket, MaxPacingRate, &(if own == 0 { NOT_PACED } else { own }))?;
        }
        if directions.contains(&Direction::Ingress) && state.window_bytes != 0 {
            let own = state.application_window_bytes;
            let clamp = if own == 0 { NOT_CLAMPED } else { own.try_into().unwrap_or(NOT_CLAMPED) };
            setsockopt(socket, WindowClamp, &clamp)?;
        }
        Ok(())
    }
}

/// The sockets that a process has open: the descriptor's number, and the kernel's name of the socket.
fn sockets(process: i32) -> io::Result<impl Iterator<Item = (RawFd, PathBuf)>> {
    let open = fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    Ok(open.filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_link(entry.path()).ok()?;
        name.to_str()?.starts_with("socket:").then_some((number, name))
    }))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::AsFd, process};

    use super::*;

    #[test]
    fn a_socket_of_a_process_is_found_and_opened_again() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let own = process::id() as i32;
        let (number, _) = sockets(own).unwrap().find(|(number, _)| *number == listener.as_raw_fd()).unwrap();
        // This takes the right to trace: as another user, or in a sandbox that forbids it, the call fails with EPERM.
        let copy = sys::open_process(own).and_then(|process| sys::descriptor_of(process.as_fd(), number)).unwrap();
        let copy = TcpListener::from(copy);
        assert_eq!(copy.local_addr().unwrap(), listener.local_addr().unwrap());
        let file = tempfile::tempfile().unwrap();
        assert!(sockets(own).unwrap().all(|(number, _)| number != file.as_raw_fd()));
    }
}
