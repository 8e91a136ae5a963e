//! The state of each socket.
//!
//! The state is in socket storage: it lives and dies with the socket. All of it is zero when new. Each part belongs to
//! the module that its comment names.

use core::mem::offset_of;

use podshaper_abi::SocketState;

/// How long after a packet that was held at the host end the next packets are assumed to be held as well.
const HELD_FOR_NS: u64 = 1_000_000_000;

/// One socket's state.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Flow {
    /// The turn of packets that the socket sends.
    pub out: Turn,
    /// The turn of packets that the socket receives.
    pub into: Turn,
    /// The class that `pace_tcp` has given the segment that is just being sent, plus 1, for `count_egress`. 0: none.
    pub decided: u64,
    /// The application's own SO_MAX_PACING_RATE in bytes/s. 0: the application has set none.
    pub application_bytes_per_s: u64,
    /// The application's own TCP_WINDOW_CLAMP in bytes. 0: the application has set none.
    pub application_window_bytes: u64,
    /// SO_MAX_PACING_RATE as the programs set it last, in bytes/s. 0: never set by them, or not since the application
    /// set its own.
    pub set_bytes_per_s: u64,
    /// The pace that the socket's last segment was given, in bytes/s. 0: the pace has been raised since.
    pub paced_bytes_per_s: u64,
    /// The slot of the attachment by whose interface the socket's last packet left (u64: no padding). 0: no attachment.
    pub slot: u64,
    /// When a link of the ingress limit would have delivered the bytes that the remote sent before anything could slow
    /// it: no answer to these bytes leaves earlier. 0: there is nothing to wait for.
    pub answer_from_ns: u64,
    /// The namespace in which the socket was looked up, as in `Scope::namespace` ([`crate::namespace`]). 0: it has not
    /// been looked up yet.
    pub asked_namespace: u64,
    /// Not 0: the socket is not in that namespace.
    pub is_foreign: u64,
    /// 1: the flow of a listener, or of a connection that has inherited it and has received no data yet. More than 1:
    /// the bytes on the wire that have come on such a connection are added, up to the most that count in the mean of
    /// connections. 0: another socket.
    pub is_answering: u64,
    /// Sent bytes: charged by the hook, and passed by the host end.
    pub out_covered: Covered,
    /// Received bytes: charged by the hook, and passed by the host end.
    pub into_covered: Covered,
    /// Received packets that wait at the host end.
    pub waiting: Waiting,
    /// The receive window.
    pub window: Window,
}

/// [`crate::turn`]: one direction of a flow: the bytes that it may send at once in spite of the backlog, and when it
/// has waited.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Turn {
    /// When the flow's credit is refilled. 0: the flow has had no credit yet.
    pub filled_ns: u64,
    /// The rest of the credit, in bytes on the wire.
    pub credit_bytes: u64,
    /// From when on the flow is known and no longer new. 0: the flow has had no packet yet.
    pub known_from_ns: u64,
    /// The clock of the flow's small packets.
    pub small_ns: u64,
    /// From when on the flow's next packet has waited. 0: the flow has not been told to wait yet.
    pub due_ns: u64,
    /// When the last of the flow's packets in the queue will have left.
    pub queued_until_ns: u64,
    /// Bytes that the flow has sent since it last waited.
    pub burst_bytes: u64,
}

impl Turn {
    /// Whether the flow is sparse at present.
    #[inline(always)]
    pub fn is_sparse(&self) -> bool {
        self.credit_bytes != 0
    }
}

/// [`crate::other_paths`]: the bytes on the wire that the cgroup's hook has charged for a socket in one direction, and
/// those that have passed the host end for that charge.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Covered {
    /// The attachment that was charged.
    pub slot: u64,
    pub charged_bytes: u64,
    pub passed_bytes: u64,
    /// The bytes that had been charged at the last look ..
    pub older_bytes: u64,
    /// .. and the time of the next look.
    pub next_look_ns: u64,
}

/// [`crate::other_paths`]: the waiting packets of a connection whose acknowledgements cannot be held.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Waiting {
    /// Until when packets to the socket are held at the host end, since acknowledgements ride on data. 0: no
    /// acknowledgement has.
    pub until_ns: u64,
    /// Until when packets that have come wait.
    pub waits_until_ns: u64,
    /// The time of the last packet that was held at the host end.
    pub held_ns: u64,
    /// The sequence numbers of the bytes that wait one behind the other: the number behind the last byte, and in the
    /// upper half the number of the first byte.
    pub sequences: u64,
    /// Not 0: the connection is MPTCP. MPTCP senders stall at a small window, since another window covers all subflows
    /// together.
    pub is_multipath: u64,
    /// Not 0: the programs set the connection's window with each acknowledgement. 0 for a connection that is older than
    /// the limit, and for every connection on Linux 5.10.
    pub has_windows: u64,
}

impl Waiting {
    /// Whether packets that come now are to be held at the host end.
    #[inline(always)]
    pub fn is_on(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns.max(self.waits_until_ns)
    }

    /// Whether packets are held at the host end, so that the pod's acknowledgements need not be held.
    #[inline(always)]
    pub fn is_held(&self, now_ns: u64) -> bool {
        // The host end writes the time on another CPU, so it may be later than this CPU's `now_ns`.
        self.held_ns != 0 && now_ns < self.held_ns + HELD_FOR_NS
    }
}

/// [`crate::window`]: the window the remote sender is given, and when its next acknowledgement may leave.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Window {
    /// The window, in bytes. 0: not set yet.
    pub bytes: u64,
    /// When the window last changed.
    pub changed_ns: u64,
    /// Bytes that the socket had received at that change.
    pub received_bytes: u64,
    /// Whether the ingress clock has had a backlog since the flow began. Until then the window grows faster.
    pub met_backlog: u64,
    /// How long acknowledgements are held back, smoothed as the remote smooths its round trips.
    pub held_ns: u64,
    /// Bytes that the socket had received at the last acknowledgement.
    pub acknowledged_bytes: u64,
    /// Bytes up to which the remote may send, counted from the same start.
    pub right_edge: u64,
    /// The largest window so far, in bytes.
    pub largest_bytes: u64,
    /// Departure time of the pure ACK that is just being sent. 0: the ACK is not held.
    pub hold_until_ns: u64,
    /// Bytes that the socket had received when it last sent data.
    pub ridden_bytes: u64,
}

// User space reads a `Flow` as a `SocketState`.
const _: () = {
    assert!(size_of::<Flow>() == size_of::<SocketState>());
    assert!(offset_of!(Flow, application_bytes_per_s) == offset_of!(SocketState, application_bytes_per_s));
    assert!(offset_of!(Flow, application_window_bytes) == offset_of!(SocketState, application_window_bytes));
    assert!(offset_of!(Flow, set_bytes_per_s) == offset_of!(SocketState, set_bytes_per_s));
    assert!(offset_of!(Flow, slot) == offset_of!(SocketState, slot));
    assert!(offset_of!(Flow, window) + offset_of!(Window, bytes) == offset_of!(SocketState, window_bytes));
};
