//! What is remembered of each socket.
//!
//! It is in socket storage: it lives and dies with the socket. All of it is zero when new. Each part is kept by the module that its comment
//! names.

use core::mem::offset_of;

use podshaper_abi::SocketState;

/// How long after a packet that was held at the host's end the next ones are taken to be as well.
const HELD_FOR_NS: u64 = 1_000_000_000;

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

/// [`crate::turn`]: one direction of a flow: what it may send before the backlog, and when it has waited.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Turn {
    /// When its credit is filled up again. 0: it has had none yet.
    pub filled_ns: u64,
    /// What is left of the credit, in bytes on the wire.
    pub credit_bytes: u64,
    /// From when on the flow is known and not new any more. 0: it has sent nothing yet.
    pub known_from_ns: u64,
    /// The clock of its small packets.
    pub small_ns: u64,
    /// From when on its next packet has waited. 0: none has been asked to.
    pub due_ns: u64,
    /// When the last of its packets that wait will have left.
    pub queued_until_ns: u64,
    /// Bytes that it has sent since it last waited.
    pub burst_bytes: u64,
}

impl Turn {
    /// Whether the flow is a sparse one at present.
    #[inline(always)]
    pub fn is_sparse(&self) -> bool {
        self.credit_bytes != 0
    }
}

/// [`crate::other_paths`]: what the cgroup's hook has charged of a socket in one direction, and what has passed the host's end for that, in bytes on the wire.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Covered {
    /// The attachment that was charged.
    pub slot: u64,
    pub charged_bytes: u64,
    pub passed_bytes: u64,
    /// What had been charged when that was looked at last ..
    pub older_bytes: u64,
    /// .. and when it is next.
    pub next_look_ns: u64,
}

/// [`crate::other_paths`]: what waits of a connection whose acknowledgements cannot be held.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Waiting {
    /// Until when what comes is held here, since acknowledgements ride on data. 0: none has.
    pub until_ns: u64,
    /// Until when what came waits.
    pub waits_until_ns: u64,
    /// The time of the last packet that was held here.
    pub held_ns: u64,
    /// The number of the byte behind what came last of what waits.
    pub next_sequence: u64,
    /// Not 0: it is of MPTCP, whose senders stall where a window is small: they have another one for all their connections.
    pub is_multipath: u64,
    /// Not 0: its window is set with each acknowledgement. That of a connection which was there before the limit is not, and none is on Linux 5.10.
    pub has_windows: u64,
}

impl Waiting {
    /// Whether what comes now is to be held at the host's end.
    #[inline(always)]
    pub fn is_on(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns.max(self.waits_until_ns)
    }

    /// Whether what comes is held at the host's end, so that the pod's acknowledgements need not be.
    #[inline(always)]
    pub fn is_held(&self, now_ns: u64) -> bool {
        self.held_ns != 0 && now_ns - self.held_ns < HELD_FOR_NS
    }
}

/// [`crate::window`]: the window the remote sender is given, and when its next acknowledgement may leave.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Window {
    /// The window, in bytes. 0: not set yet.
    pub bytes: u64,
    /// When it was last changed.
    pub changed_ns: u64,
    /// What the socket had received then, in bytes.
    pub received_bytes: u64,
    /// Whether the ingress clock has ever had a backlog in this flow's time. Until then the window grows faster.
    pub met_backlog: u64,
    /// How long acknowledgements are held back, smoothed as the remote smooths its round trips.
    pub held_ns: u64,
    /// What the socket had received at the last acknowledgement, in bytes.
    pub acknowledged_bytes: u64,
    /// How far the remote may send, counted as these.
    pub right_edge: u64,
    /// The largest window that it has had, in bytes.
    pub largest_bytes: u64,
    /// Departure time of the pure ACK that is just being sent. 0: it is not held.
    pub hold_until_ns: u64,
    /// What the socket had received when it last sent data, in bytes.
    pub ridden_bytes: u64,
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
