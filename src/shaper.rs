//! The shaper of one attachment: the settings that its programs get, and which programs there are.
//!
//! `set` has the programs and their maps, which a node loads once. `attached` puts an attachment into the maps and its
//! programs on a cgroup. `pinned` reads, changes and checks an attachment that is there. `pins` knows where the pins
//! lie. `bpf/` has the programs.

mod attached;
mod object;
mod owner;
mod pinned;
mod refusal;
mod set;
mod upgrade;

use std::os::fd::BorrowedFd;

use podshaper_abi::{Limit as AbiLimit, Limits as AbiLimits, MAX_HORIZON_NS, QUEUE_FQ, QUEUE_HTB, QUEUE_NONE};

use crate::{
    interface::{
        IngressBy, Queue,
        host_end::{GO_BACK, INTO_POD, OUT_OF_POD, WAIT_HERE},
        min_tso_segs,
    },
    owner::Owner,
    qdisc,
    request::{Limit, Limits, Source},
    sys::{self, CgroupHook},
    units::{Burst, Rate},
};

pub use attached::{Attached, Before, can_share, forget_others, leave};
pub use owner::pin as pin_owner;
pub use pinned::Pinned;
pub use set::{Set, try_programs};
pub use upgrade::NewPrograms;

/// A program of the object, by its name, and its hook. The pin of its link has the same name.
type Hooked = (&'static str, CgroupHook);
/// The programs for cgroups, the largest first.
const PROGRAMS: [Hooked; 5] = [COUNT_EGRESS, COUNT_INGRESS, PACE_TCP, HOLD_ACKS, NOTE_SETSOCKOPT];

/// The hooks at which the cgroup `above` has programs that podshaper's programs displace on the pod's cgroup, and so
/// for everything below. Such programs were attached with the flag that allows this (`BPF_F_ALLOW_OVERRIDE`).
#[must_use]
pub fn displaced(above: BorrowedFd<'_>) -> Vec<CgroupHook> {
    let mut hooks = PROGRAMS.map(|(_, hook)| hook).to_vec();
    hooks.dedup();
    hooks.retain(|hook| sys::has_displaceable(above, *hook).unwrap_or(false));
    hooks
}

const COUNT_EGRESS: Hooked = ("count_egress", CgroupHook::InetEgress);
const COUNT_INGRESS: Hooked = ("count_ingress", CgroupHook::InetIngress);
const PACE_TCP: Hooked = ("pace_tcp", CgroupHook::SockOps);
const HOLD_ACKS: Hooked = ("hold_acks", CgroupHook::SockOps);
const NOTE_SETSOCKOPT: Hooked = ("note_setsockopt", CgroupHook::Setsockopt);

/// The programs at the host end of a pod's interface, and in the waiting room.
const OTHER_PATHS: [&str; 4] = [INTO_POD, OUT_OF_POD, WAIT_HERE, GO_BACK];

/// All programs by name, the largest first.
fn program_names() -> impl Iterator<Item = &'static str> {
    PROGRAMS.into_iter().map(|(name, _)| name).chain(OTHER_PATHS)
}

/// Backlog beyond which packets that are not TCP are dropped if there is no queue for them to wait in. It is short,
/// because all of it is latency for all other packets. It is a tick of a 100 Hz kernel, so that a sender that is
/// scheduled late loses no packet.
const DATAGRAM_BOUND_NS: u64 = 10_000_000;
/// Backlog beyond which packets that are not TCP are marked, if they are ECN-capable.
const DATAGRAM_MARK_NS: u64 = DATAGRAM_BOUND_NS / 2;
/// The least such backlog in full packets. A few QUIC connections have at least two or three packets each on the way;
/// with fewer they would wait for acknowledgements.
const DATAGRAM_MARK_PACKETS: u64 = 16;
/// Backlog beyond which packets that are not TCP are dropped where they wait in a queue. Their senders block before
/// that, when their socket buffers are full.
const QUEUED_DATAGRAM_BOUND_NS: u64 = 500_000_000;
/// The least such backlog in full packets: a socket buffer holds so many (net.core.wmem_default, 208 KiB, counts the
/// memory that the packets take).
const QUEUED_DATAGRAMS: u64 = 100;
/// Backlog beyond which packets of other paths are dropped. It is the queue of TCP in a tunnel, and other packets wait
/// for it.
const OTHERS_BOUND_NS: u64 = 100_000_000;
/// The least such backlog in full packets.
const OTHER_PACKETS: u64 = 30;
/// Backlog beyond which TCP is marked where its acknowledgements are held: twice the backlog for which windows aim.
const HELD_MARK_NS: u64 = 10_000_000;
/// Backlog beyond which TCP is dropped where only drops hold it. With a longer backlog TCP falls less far below the
/// limit.
const DROPS_BOUND_NS: u64 = 100_000_000;
/// Backlog beyond which TCP is dropped if its sender has not waited: against packets that come without end. It is the
/// horizon of Cilium's bandwidth manager (2 s).
const HORIZON_NS: u64 = 2_000_000_000;
/// The least horizon in full packets, up to [`MAX_HORIZON_NS`]: ten packets of each of 300 flows, which TCP sends
/// before it gets any feedback.
const HORIZON_PACKETS: u64 = 3_000;
const FULL_PACKET_BITS: u64 = 1500 * 8;

/// The settings of one attachment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// The limits.
    pub limits: Limits,
    /// Where packets wait whose senders have not waited.
    pub queue: Queue,
    /// What holds the ingress limit; `None`: there is no ingress limit.
    pub ingress_by: Option<IngressBy>,
}

/// The queue as the programs read it.
fn queue_as_abi(queue: Queue) -> u64 {
    match queue {
        Queue::None => QUEUE_NONE,
        Queue::Fq => QUEUE_FQ,
        Queue::Htb => QUEUE_HTB,
    }
}

fn datagram_bound_ns(queue: Queue, rate: Rate) -> u64 {
    match queue {
        Queue::None => DATAGRAM_BOUND_NS,
        // Well below the horizon at every rate, because other packets wait in the same queue.
        Queue::Fq | Queue::Htb => {
            full_packets_ns(QUEUED_DATAGRAMS, rate).clamp(QUEUED_DATAGRAM_BOUND_NS, horizon_ns(rate) / 4)
        }
    }
}

impl Settings {
    /// The settings of an attachment that is there.
    pub fn of(owner: &Owner, limits: Limits) -> Self {
        let record = &owner.interface;
        Self { limits, queue: Queue::of(record), ingress_by: record.ingress_by }
    }

    /// The programs that an attachment needs on its cgroup.
    fn programs(&self) -> Vec<Hooked> {
        let mut programs = Vec::new();
        if self.limits.egress.is_some() {
            programs.extend([COUNT_EGRESS, PACE_TCP, NOTE_SETSOCKOPT]);
        }
        if self.ingress_by.is_some() {
            programs.push(COUNT_INGRESS);
        }
        if matches!(self.ingress_by, Some(IngressBy::HeldAcks | IngressBy::HeldData)) {
            // count_egress also gives the acknowledgements their departure time, and tells to which attachment a
            // connection belongs.
            if self.limits.egress.is_none() {
                programs.extend([COUNT_EGRESS, NOTE_SETSOCKOPT]);
            }
            programs.push(HOLD_ACKS);
        }
        programs
    }

    /// The names of the programs, which the pins of their links have as well.
    pub fn program_names(&self) -> impl Iterator<Item = &'static str> {
        self.programs().into_iter().map(|(name, _)| name)
    }

    /// The limits as the programs read them.
    fn abi_limits(&self) -> AbiLimits {
        let link = |rate| match self.queue {
            Queue::Htb => (qdisc::with_ethernet(rate), qdisc::ETHERNET_HEADER_BYTES),
            Queue::None | Queue::Fq => (rate.as_bits_per_s(), 0),
        };
        let egress = self.limits.egress.as_ref().map(|limit| AbiLimit {
            queue: queue_as_abi(self.queue),
            link_bits_per_s: link(limit.rate).0,
            link_header_bytes: link(limit.rate).1,
            datagram_bound_ns: datagram_bound_ns(self.queue, limit.rate),
            ..abi_limit(limit, u64::MAX, horizon_ns(limit.rate))
        });
        let ingress = self.limits.ingress.as_ref().zip(self.ingress_by).map(|(limit, by)| match by {
            IngressBy::HeldAcks => abi_limit(limit, HELD_MARK_NS, horizon_ns(limit.rate)),
            IngressBy::HeldData => AbiLimit {
                queue: QUEUE_HTB,
                link_bits_per_s: qdisc::with_ethernet(limit.rate),
                link_header_bytes: qdisc::ETHERNET_HEADER_BYTES,
                ..abi_limit(limit, HELD_MARK_NS, horizon_ns(limit.rate))
            },
            // tbf has held the packets already: the programs only count them.
            IngressBy::Tbf => AbiLimit {
                datagram_bound_ns: u64::MAX,
                datagram_mark_ns: u64::MAX,
                others_bound_ns: u64::MAX,
                ..abi_limit(limit, u64::MAX, u64::MAX)
            },
            IngressBy::Drops => abi_limit(limit, DATAGRAM_BOUND_NS, DROPS_BOUND_NS),
        });
        [egress.unwrap_or_default(), ingress.unwrap_or_default()]
    }
}

fn abi_limit(limit: &Limit, stream_mark_ns: u64, horizon_ns: u64) -> AbiLimit {
    AbiLimit {
        rate_bits_per_s: limit.rate.as_bits_per_s(),
        burst_ns: limit.burst.as_ns_at(limit.rate),
        reserve_ns: limit.burst.kept().as_ns_at(limit.rate),
        datagram_bound_ns: DATAGRAM_BOUND_NS,
        datagram_mark_ns: full_packets_ns(DATAGRAM_MARK_PACKETS, limit.rate).max(DATAGRAM_MARK_NS),
        stream_mark_ns,
        horizon_ns,
        others_bound_ns: full_packets_ns(OTHER_PACKETS, limit.rate).max(OTHERS_BOUND_NS),
        min_tso_segs: min_tso_segs(limit.rate),
        queue: QUEUE_NONE,
        link_bits_per_s: limit.rate.as_bits_per_s(),
        link_header_bytes: 0,
    }
}

/// How long a link of this rate takes for so many full packets, in nanoseconds.
fn full_packets_ns(packets: u64, rate: Rate) -> u64 {
    (packets * FULL_PACKET_BITS * 1_000_000_000).checked_div(rate.as_bits_per_s()).unwrap_or(u64::MAX)
}

fn horizon_ns(rate: Rate) -> u64 {
    full_packets_ns(HORIZON_PACKETS, rate).clamp(HORIZON_NS, MAX_HORIZON_NS)
}

/// The limits that the maps have.
pub fn limits_of(both: &AbiLimits) -> Limits {
    let [egress, ingress] = both.each_ref().map(limit_of);
    Limits { egress, ingress }
}

/// The limit that the maps have, as if an operator had asked for it: the maps do not say who asked. `None`: there is no
/// limit.
pub fn limit_of(limit: &AbiLimit) -> Option<Limit> {
    let rate = Rate::bits_per_s(limit.rate_bits_per_s).ok()?;
    Some(Limit { burst: Burst::of_ns_at(limit.burst_ns, rate), ..Limit::of(rate, Source::Operator) })
}
