//! What is remembered of each socket.
//!
//! It is in socket storage: it lives and dies with the socket. All of it is zero when new.

use core::mem::offset_of;

use podshaper_abi::{HostEnd, SocketState};

use crate::{
    clock,
    other_paths::{Covered, Waiting},
    turn::Turn,
    window::Window,
};

/// One socket's state.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Flow {
    /// What it sends.
    pub out: Turn,
    /// What it receives.
    pub into: Turn,
    /// What `pace_tcp` has decided of the segment that is just being sent, for `count_egress`. 0: nothing.
    pub decided: u64,
    /// The application's own SO_MAX_PACING_RATE in bytes/s. 0: it set none.
    pub application_bytes_per_s: u64,
    /// The application's own TCP_WINDOW_CLAMP in bytes. 0: it set none.
    pub application_window_bytes: u64,
    /// SO_MAX_PACING_RATE as it was set here last, in bytes/s. 0: not since it was new, or since the application set its own.
    pub set_bytes_per_s: u64,
    /// The pace that its last segment was given, in bytes/s. 0: it has been raised since.
    pub paced_bytes_per_s: u64,
    /// The attachment by whose interface the socket's last packet left, as the maps know it (u64: no padding). 0: none of ours.
    pub slot: u64,
    /// When a link of the ingress limit would have delivered what the remote sent before anything could slow it: no answer to that leaves
    /// earlier. 0: there is nothing to wait for.
    pub answer_from_ns: u64,
    /// The namespace of the attachment for which it was asked whether the socket is in that ([`crate::namespace`]). 0: not yet.
    pub asked_namespace: u64,
    /// Not 0: it is not.
    pub is_foreign: u64,
    /// 1: a listener's, which a connection that a remote has opened inherits. What comes on that is added, in bytes on the wire, as far as it counts in
    /// the mean of what connections bring. 0: of another socket.
    pub is_answering: u64,
    /// What it has sent: charged, and passed the host's end.
    pub out_covered: Covered,
    /// The same of what it receives.
    pub into_covered: Covered,
    /// What it receives and waits at the host's end.
    pub waiting: Waiting,
    /// The receive window.
    pub window: Window,
}

impl Flow {
    /// Whether its acknowledgements ride on data, so that what comes to it is to be held at this host's end, or some of that waits there still.
    #[inline(always)]
    pub fn rides(&self, end: &HostEnd) -> bool {
        self.slot == end.slot.into() && self.waiting.is_on(clock::now_ns())
    }
}

// User space reads it as the other one.
const _: () = {
    assert!(size_of::<Flow>() == size_of::<SocketState>());
    assert!(offset_of!(Flow, application_bytes_per_s) == offset_of!(SocketState, application_bytes_per_s));
    assert!(offset_of!(Flow, application_window_bytes) == offset_of!(SocketState, application_window_bytes));
    assert!(offset_of!(Flow, set_bytes_per_s) == offset_of!(SocketState, set_bytes_per_s));
    assert!(offset_of!(Flow, slot) == offset_of!(SocketState, slot));
    assert!(offset_of!(Flow, window) + offset_of!(Window, bytes) == offset_of!(SocketState, window_bytes));
};
