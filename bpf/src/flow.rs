//! What is remembered of each socket, and when a flow is *sparse*: so little of the pod's traffic that it is not made to wait.
//!
//! A request, a reply or a DNS query then leaves at once beside any number of bulk flows; that is where the latency of an idle
//! pod comes from. The allowance is also about a flow's fair share, since a bulk flow waits for the whole backlog to drain
//! between two segments: nobody gains by being sparse many times.

use crate::clock;

/// The shortest time for one credit, where the backlog is shorter than any timer.
const SPARSE_GAP_NS: u64 = 1_000_000;

/// One socket's state, in socket storage. All zero when new.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Flow {
    /// What it sends.
    pub out: Credit,
    /// What it receives.
    pub into: Credit,
    /// The application's own SO_MAX_PACING_RATE in bytes/s. 0: it set none.
    pub application_bytes_per_s: u64,
    /// SO_MAX_PACING_RATE as it was set here last, in bytes/s. 0: not since it was new, or since the application set its own.
    pub set_bytes_per_s: u64,
    /// The pace that its last segment was given, in bytes/s. 0: it has been raised since.
    pub paced_bytes_per_s: u64,
    /// Whether the socket's last packet left by the attachment's interface (u64 and not bool: no padding).
    pub is_ours: u64,
    /// The receive window (see `window`).
    pub window: Window,
}

/// How much a flow may still send or receive as a sparse one.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Credit {
    /// When it is filled up again.
    filled_ns: u64,
    /// What is left of it, in bytes on the wire.
    bytes: u64,
    /// When it is the flow's turn, if it is not sparse and nothing paces it. 0: it has not been asked for.
    turn_ns: u64,
}

/// TCP in: the window the remote sender is given, and when its next acknowledgement may leave.
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
    pub edge_bytes: u64,
    /// The largest window that it has had, in bytes.
    pub largest_bytes: u64,
    /// Departure time of the pure ACK that is just being sent. 0: it is not held.
    pub hold_until_ns: u64,
}

impl Credit {
    /// Whether `wire_bytes` more may go before the backlog of `backlog_ns` (these bytes included) has drained. Takes them from
    /// the credit, `full_bytes` a time, if so. If not, there is none until twice the time this backlog takes to drain: a bulk
    /// flow, which waits for just the backlog, never has any, even if its timer is late. Packets of less than `bulk_bytes` do not
    /// put that off.
    #[inline(always)]
    pub fn is_sparse(&mut self, backlog_ns: u64, wire_bytes: u64, full_bytes: u64, bulk_bytes: u64) -> bool {
        let now_ns = clock::now_ns();
        let again_ns = now_ns + 2 * backlog_ns + SPARSE_GAP_NS;
        if now_ns > self.filled_ns {
            self.filled_ns = again_ns;
            self.bytes = full_bytes;
        }
        let sparse = wire_bytes <= self.bytes;
        if sparse {
            self.bytes -= wire_bytes;
        } else {
            if wire_bytes >= bulk_bytes {
                self.filled_ns = again_ns;
            }
            self.bytes = 0;
        }
        sparse
    }

    /// Whether the flow has waited for as long as the backlog was at its last turn. This is what a bulk TCP flow does between two
    /// segments: so one that nobody can make wait, a QUIC download beside many of TCP, has a share and not nothing. The first turn comes
    /// after a wait too: nobody gains by a new socket for each packet.
    #[inline(always)]
    pub fn takes_turn(&mut self, backlog_ns: u64, segments: u64) -> bool {
        let now_ns = clock::now_ns();
        let wait_ns = backlog_ns * segments;
        if self.turn_ns == 0 {
            self.turn_ns = now_ns + wait_ns;
        }
        let is_due = now_ns >= self.turn_ns;
        if is_due {
            // What its packets come too late for one turn is not lost for the next.
            self.turn_ns = (self.turn_ns + wait_ns).max(now_ns);
        }
        is_due
    }

    /// Whether the flow is a sparse one at present.
    #[inline(always)]
    pub fn is_left(&self) -> bool {
        self.bytes != 0
    }
}
