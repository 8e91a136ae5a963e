//! The interface between podshaper and its eBPF programs: the structures in the maps and the arithmetic of the pod
//! clock.
//!
//! Both sides compile these very lines. So `cargo test` checks on the host, against 128-bit integers, the arithmetic
//! that runs in the kernel with 64-bit integers. All fields are `u64` or `u32` without padding: the bytes of a map's
//! value are the bytes of the structure. A change of a structure's layout needs a new [`LAYOUT`], which is part of
//! every pin's path.
#![cfg_attr(not(test), no_std)]

pub mod requests;

/// Version of the structures below and of the set of maps and programs that are pinned.
pub const LAYOUT: u32 = 7;

/// Index of the egress direction in an attachment's limits and meters: packets that the pod sends.
pub const EGRESS: u32 = 0;
/// Index of the ingress direction in an attachment's limits and meters: packets that the pod receives.
pub const INGRESS: u32 = 1;
/// Number of directions.
pub const DIRECTIONS: usize = 2;

/// Maximum number of attachments that share one set of programs and maps. The table of a hash map of this size takes
/// 128 KiB, even when the map is empty.
pub const MAX_ATTACHMENTS: usize = 1 << 13;
/// Maximum number of interfaces of one cgroup that share one set of programs.
pub const MAX_SCOPES: usize = 4;

/// Interfaces are numbered from 2 in a network namespace that has `lo`, which is always 1 (net/core/dev.c,
/// `dev_new_index`; drivers/net/loopback.c, `BUG_ON(dev->ifindex != LOOPBACK_IFINDEX)`).
pub const LOOPBACK_IFINDEX: u32 = 1;

/// Number of buckets of the backlog histogram.
pub const BACKLOG_BUCKETS: usize = 32;
/// The first bucket of the histogram counts backlogs below 2^10 ns (a microsecond); each further bucket reaches twice
/// as far.
pub const BACKLOG_FIRST_BUCKET_LOG2_NS: u32 = 10;

/// Maximum number of subnets in a configuration, of both kinds together.
pub const MAX_SUBNETS: usize = 1 << 14;
/// Maximum number of subnets in all lists of a node.
pub const MAX_LISTED_SUBNETS: usize = 1 << 18;
/// Value in the `SUBNETS` map: traffic of this subnet is limited and counted.
pub const SUBNET_SHAPED: u32 = 0;
/// Value in the `SUBNETS` map: traffic of this subnet is neither limited nor counted.
pub const SUBNET_EXEMPT: u32 = 1;

/// An address in the `SUBNETS` map: IPv6. An IPv4 address is `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
pub type SubnetAddress = [u8; 16];

/// An IPv4 address as an IPv6 address. A prefix of the IPv4 address becomes longer by 96 bits.
#[inline(always)]
pub fn ipv4_mapped([a, b, c, d]: [u8; 4]) -> SubnetAddress {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The key of a lookup in the `SUBNETS` map: the number of a list, and an address in that list. The prefixes in the map
/// are prefixes of these bytes, so each prefix is longer than its subnet's by the bits of the number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListedAddress {
    /// The list: the bytes of [`Scope::list`].
    pub list: [u8; 8],
    /// The address.
    pub address: SubnetAddress,
}

/// The traffic of a cgroup that an attachment limits, and where the limits are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The interface, in the pod's network namespace. 0: every interface but loopback.
    pub ifindex: u32,
    /// The attachment's slot, the key of the maps `LIMITS` and `METERS`. 0: this entry is free.
    pub slot: u32,
    /// Number of the list of subnets. Every address is in some subnet of the list. 0: there is no list, and every
    /// address is shaped.
    pub list: u64,
    /// The network namespace of the interface, as the number (nsid) that the namespace has for itself. Another
    /// namespace of the node has the same number for itself with a chance of 1 in 131072. 0: the namespace has no such
    /// number, and only the interface's number is known.
    pub namespace: u64,
}

/// The value of a cgroup's storage: the attachments on that cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(pub [Scope; MAX_SCOPES]);

/// Facts for the programs at the host end of a pod's veth, keyed by the number of that interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostEnd {
    /// The attachment, as in [`Scope::slot`].
    pub slot: u32,
    /// The pod's network namespace, as the number (nsid) that the node's namespace has for it.
    pub namespace: u32,
    /// The interface that leads into the waiting room. 0: there is no waiting room, and packets that would wait pass or
    /// are dropped.
    pub waiting_ifindex: u32,
    /// The first of the pod's htb classes in the waiting room, in the form of `skb->priority`. [`ROOM_OUT`] and the
    /// other offsets are added to it. 0: the waiting room has fq.
    pub waiting_class: u32,
    /// As in [`Scope::list`].
    pub list: u64,
    /// Not 0: the interface has other attachments as well, and a packet that was charged to any of them passes.
    pub is_shared: u32,
    /// Not 0: all TCP that enters the pod waits its turn at the host end, since the pod's acknowledgements cannot be
    /// held.
    pub holds_streams: u32,
}

impl HostEnd {
    /// The qdisc of the waiting room: [`QUEUE_FQ`] or [`QUEUE_HTB`].
    #[inline(always)]
    pub fn queue(&self) -> u64 {
        if self.waiting_class == 0 { QUEUE_FQ } else { QUEUE_HTB }
    }

    /// Whether SYNs can wait for a departure time of their own.
    #[inline(always)]
    pub fn paces_requests(&self) -> bool {
        self.waiting_ifindex != 0 && self.queue() == QUEUE_FQ
    }
}

/// Nanoseconds in a second times bits in a byte: the factor that turns bytes and bits/s into nanoseconds.
const BIT_NANOS_PER_BYTE_SECOND: u64 = 8_000_000_000;

/// Bytes of sparse flows count this many times on a clock of their own. So all sparse flows together get at most a
/// quarter of the rate before the backlog, however many there are.
pub const SPARSE_COST: u64 = 4;
/// Bytes of new flows count this many times on another clock: an eighth of the rate. So the many connections that a
/// pod's clients open take nothing from the share of sparse flows that are already known.
pub const FRESH_COST: u64 = 8;
/// Bytes of the small packets of one sparse flow beyond its credit count this many times, on a clock of that flow: a
/// sixteenth of the rate.
pub const SMALL_COST: u64 = 16;

/// Class of a packet whose sender has waited for its turn. The packet leaves at once, whatever the backlog.
pub const WAITED: u64 = 0;
/// Class of a packet of a sparse flow. The packet leaves at once, whatever the backlog, and counts on the clock of
/// sparse flows.
pub const SPARSE: u64 = 1;
/// Class of a packet of a new flow. The packet leaves at once, whatever the backlog, and counts on the clock of new
/// flows.
pub const FRESH: u64 = 2;
/// Class of a TCP packet whose sender has not waited. The packet waits for the backlog before it, up to the horizon.
pub const STREAM: u64 = 3;
/// Class of a packet that is not TCP and whose sender has not waited. Nothing tells the sender when it sends too much,
/// so the bound is nearer.
pub const DATAGRAM: u64 = 4;

/// Class of a packet whose sender has waited, but which waits as well, since the backlog is long. The packet is never
/// dropped.
pub const ORDERED: u64 = 5;

/// Class of a packet that no socket of the cgroup has sent or will receive. The packet waits at the host end, and its
/// bound is the nearest.
pub const OTHER: u64 = 6;
/// Class of a packet as of [`OTHER`] while no such packet waits. The packet leaves at once, and counts on the clock of
/// new flows.
pub const OTHER_FRESH: u64 = 7;

/// Class of a packet that is not TCP, is on its way to a socket of the cgroup and waits at the host end. Also of a TCP
/// packet on its way to a listener whose SYNs have waited at the host end. The bound is that of [`OTHER`].
pub const HELD_DATAGRAM: u64 = 8;

/// No packet waits longer than this, however low the limit; fq's horizon is the same.
pub const MAX_HORIZON_NS: u64 = 60_000_000_000;

/// Queue for packets whose sender has not waited: none. The packets pass or are dropped.
pub const QUEUE_NONE: u64 = 0;
/// Queue for packets whose sender has not waited: fq, by departure time.
pub const QUEUE_FQ: u64 = 1;
/// Queue for packets whose sender has not waited: the class [`HTB_QUEUE`] of htb.
pub const QUEUE_HTB: u64 = 2;
/// Handle of the qdiscs that podshaper makes ("7064:"). podshaper recognises its qdiscs by this handle.
pub const QDISC_MAJOR: u16 = 0x7064;
/// The htb class for packets whose sender has not waited; `skb->priority` names the class. Its low bits are those of
/// best effort, for queues that the packet meets later (include/uapi/linux/pkt_sched.h, `TC_PRIO_MAX`).
pub const HTB_QUEUE: u16 = 0x10;

/// Offset of the htb class, among a pod's classes in the waiting room, for packets that leave the pod.
pub const ROOM_OUT: u16 = 0;
/// Offset of the class for packets that enter the pod: it has the limit, and is the parent of the next two.
pub const ROOM_INTO: u16 = 1;
/// Offset of the class for packets that enter the pod at once while others wait: the class takes their part of the
/// limit from those that wait.
pub const ROOM_INTO_AT_ONCE: u16 = 2;
/// Offset of the class for packets that enter the pod and wait.
pub const ROOM_INTO_QUEUE: u16 = 3;
/// Number of classes of a pod. The number of the first class is a multiple of this.
pub const ROOM_CLASSES: u16 = 4;

/// How long one packet of each bulk flow may take at the limit, all flows together; for a single flow, how long its one
/// packet may take. TCP's smallest packet size counts where it is larger.
pub const MAX_PACKET_NS: u64 = 20_000_000;

/// Largest packet for which the arithmetic is exact. A GSO packet is at most 512 KiB (`GSO_MAX_SIZE`, 8 * 65535 with
/// BIG TCP), and the headers of its segments do not double that.
pub const MAX_PACKET_BYTES: u64 = 1 << 20;

/// The limit of one direction. User space writes it at ADD and whenever the limit of a live pod changes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// The rate, in bits per second at layer 3. 0: this direction has no limit.
    pub rate_bits_per_s: u64,
    /// How far an idle clock may lag behind the time: the burst, expressed as time at the rate.
    pub burst_ns: u64,
    /// Part of the burst that TCP's bulk flows, which can wait, leave to packets that cannot wait.
    pub reserve_ns: u64,
    /// Backlog beyond which a packet that is not TCP, and whose sender has not waited, is dropped.
    pub datagram_bound_ns: u64,
    /// Backlog beyond which such a packet is marked with CE, if it is ECN-capable.
    pub datagram_mark_ns: u64,
    /// Backlog beyond which ECN-capable TCP is marked with CE. All ones: never.
    pub stream_mark_ns: u64,
    /// Backlog beyond which TCP whose sender has not waited is dropped.
    pub horizon_ns: u64,
    /// Backlog beyond which a packet is dropped that takes another path than the cgroup's sockets, or that is a
    /// datagram waiting at the host end.
    pub others_bound_ns: u64,
    /// Segments in a packet that a bulk flow builds at its lowest pace.
    pub min_tso_segs: u64,
    /// Queue for packets whose sender has not waited: [`QUEUE_NONE`], [`QUEUE_FQ`] or [`QUEUE_HTB`]. For ingress: the
    /// queue at the host end, for packets that wait there.
    pub queue: u64,
    /// Rate of the virtual link in bits per second. It equals the limit, except with htb: there it is the limit as htb
    /// counts it.
    pub link_bits_per_s: u64,
    /// Bytes that each packet has on that link beyond those of layer 3. 0, except with htb, which counts Ethernet
    /// headers. If the clock did not count them, packets that leave at once could use up htb's tokens, and htb's queue
    /// would be longer than the clock's backlog.
    pub link_header_bytes: u64,
}

/// The kernel's `struct bpf_spin_lock`. The verifier finds the lock in a map's value by this name in the BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(non_camel_case_types, reason = "the name by which the verifier knows it")]
pub struct bpf_spin_lock {
    val: u32,
}

/// An attachment's limits, by direction.
pub type Limits = [Limit; DIRECTIONS];

/// An attachment's clocks and counters, by direction. Only the holder of the lock may access the fields. Exceptions are
/// the lock itself and the means (`usual_bytes`, `window_bytes_per_s`): programs read and write each of the means as a
/// whole, without the lock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Meters {
    lock: bpf_spin_lock,
    reserved: u32,
    /// The clocks and counters, by direction.
    pub of: [Meter; DIRECTIONS],
}

/// One direction's clock and counters.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// Bytes that a flow sends between two waits, as a mean over the bytes in the backlog. 0: there is no mean yet.
    pub usual_bytes: u64,
    /// Mean bytes per second that the windows of growing flows let through. Ingress only. 0: no window has grown yet.
    pub window_bytes_per_s: u64,
    /// The virtual link.
    pub clock: Clock,
    /// Time of a slower clock for sparse flows: see [`SPARSE_COST`].
    pub sparse_ns: u64,
    /// Time of a slower clock for new flows: see [`FRESH_COST`].
    pub fresh_ns: u64,
    /// The counters.
    pub counters: Counters,
}

/// The pod clock: the time at which a link of the limit's rate would have sent all packets so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// That time, in nanoseconds of `CLOCK_MONOTONIC`.
    pub next_ns: u64,
    /// The fraction of a nanosecond missing from `next_ns`, in units of 1 ns / rate: the remainder of the divisions so
    /// far.
    pub next_rem: u64,
}

/// The counters of one direction since ADD.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes at layer 3 that passed, each GSO segment with its own headers.
    pub bytes: u64,
    /// Packets that passed; each GSO segment counts as one.
    pub packets: u64,
    /// Packets dropped: beyond the horizon, or not paced and beyond the bound.
    pub drops: u64,
    /// Packets that passed with a congestion mark (CE) set here.
    pub marks: u64,
    /// Largest virtual backlog a packet found, in nanoseconds.
    pub max_backlog_ns: u64,
    /// Packets by the backlog that they found: see [`backlog_bucket`].
    pub backlog: [u64; BACKLOG_BUCKETS],
}

/// Packets since ADD that took another path than the cgroup's sockets, in one direction; [`Counters`] does not include
/// them. Also the state that the programs at the host end keep for the whole pod. Times are nanoseconds of
/// `CLOCK_MONOTONIC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Until when packets of other paths wait.
    pub waits_until_ns: u64,
    /// Until when packets to the cgroup's sockets wait in the waiting room.
    pub streams_wait_until_ns: u64,
    /// When the next SYN may enter.
    pub next_request_ns: u64,
    /// When the next SYN of the node itself may overtake the others.
    pub next_node_request_ns: u64,
    /// Egress: when the next SYN-ACK may leave within the share of SYN-ACKs. Ingress: when a link of the limit would
    /// have carried all packets so far of connections that were being opened.
    pub next_answer_ns: u64,
    /// Until when SYN-ACKs are assumed to be charged at the host end.
    pub answers_here_until_ns: u64,
    /// Mean bytes on the wire that a connection brings after its SYN. 0: there was no SYN yet.
    pub mean_first_bytes: u64,
    /// Bytes at layer 3 of packets of other paths that passed.
    pub bytes: u64,
    /// Packets of other paths that passed.
    pub packets: u64,
    /// Packets of other paths that were dropped.
    pub drops: u64,
}

/// [`Others`] of both directions. A type of its own, and not an array, since the programs add to the fields in place.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OtherPaths {
    /// By direction.
    pub of: [Others; DIRECTIONS],
}

/// Number of places that note how long SYNs have waited. A power of two.
pub const REQUEST_PLACES: u32 = 1 << 11;

/// How long a SYN has waited.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// The client that sent the SYN, as a hash of its address and port and of the pod's slot.
    pub client: u32,
    /// The wait, in microseconds.
    pub us: u32,
}

/// The programs' state of a socket, as far as user space reads it: the values that the programs have set on the socket,
/// and those that the application had set itself. Only the programs use the other fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketState {
    turns: [u64; 15],
    /// The application's own SO_MAX_PACING_RATE in bytes/s. 0: the application has set none.
    pub application_bytes_per_s: u64,
    /// The application's own TCP_WINDOW_CLAMP in bytes. 0: the application has set none.
    pub application_window_bytes: u64,
    /// SO_MAX_PACING_RATE as the programs set it last, in bytes/s. 0: the application's value is in force.
    pub set_bytes_per_s: u64,
    paced_bytes_per_s: u64,
    /// The attachment by whose interface the socket sends, as in [`Scope::slot`]. 0: none.
    pub slot: u64,
    others: [u64; 20],
    /// TCP_WINDOW_CLAMP as the programs set it last, in bytes. 0: the programs have not set it.
    pub window_bytes: u64,
    window: [u64; 9],
}

// The sizes are part of LAYOUT: a padding byte or a new field must not slip in unseen.
const _: () = assert!(size_of::<Limit>() == 96);
const _: () = assert!(size_of::<Clock>() == 16);
const _: () = assert!(size_of::<Counters>() == 40 + 8 * BACKLOG_BUCKETS);
const _: () = assert!(size_of::<Meter>() == 16 + size_of::<Clock>() + 16 + size_of::<Counters>());
const _: () = assert!(size_of::<Meters>() == 8 + 2 * size_of::<Meter>());
const _: () = assert!(size_of::<Scope>() == 24);
const _: () = assert!(size_of::<HostEnd>() == 32);
const _: () = assert!(size_of::<OtherPaths>() == 160);
const _: () = assert!(size_of::<SocketState>() == 400);

impl Meters {
    /// Meters whose lock is free.
    pub const fn new(of: [Meter; DIRECTIONS]) -> Self {
        Self { lock: bpf_spin_lock { val: 0 }, reserved: 0, of }
    }
}

/// Time to send some bytes at a rate: whole nanoseconds and the remainder, in units of 1 ns / rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransmitTime {
    /// Whole nanoseconds.
    pub ns: u64,
    /// Remainder, less than the rate in bits/s.
    pub rem: u64,
}

/// How long a link of `rate_bits_per_s` (not 0) takes to send `bytes`, exactly.
#[inline(always)]
pub fn transmit_time(bytes: u64, rate_bits_per_s: u64) -> TransmitTime {
    // 2^20 bytes * 8e9 < 2^53: no overflow, and one division gives both the nanoseconds and the remainder.
    let bytes = if bytes > MAX_PACKET_BYTES { MAX_PACKET_BYTES } else { bytes };
    let bit_nanos = bytes * BIT_NANOS_PER_BYTE_SECOND;
    let ns = bit_nanos / rate_bits_per_s;
    TransmitTime { ns, rem: bit_nanos - ns * rate_bits_per_s }
}

impl Limit {
    /// How long the virtual link takes to send a packet of so many segments, with `bytes` in all at layer 3.
    #[inline(always)]
    pub fn transmit_time(&self, bytes: u64, segments: u64) -> TransmitTime {
        transmit_time(bytes + segments * self.link_header_bytes, self.link_bits_per_s)
    }
}

impl Clock {
    /// The clock's time, where an idle clock is at most `burst_ns` late. The lag lets the pod catch up after a pacing
    /// timer that fired late: without the lag every late timer is lost rate.
    #[inline(always)]
    pub fn caught_up_ns(next_ns: u64, now_ns: u64, burst_ns: u64) -> u64 {
        next_ns.max(now_ns.max(burst_ns) - burst_ns)
    }

    /// Virtual backlog: the time that a link whose clock shows `next_ns` still needs, at `now_ns`, to send all packets
    /// so far.
    #[inline(always)]
    pub fn backlog_ns(next_ns: u64, now_ns: u64) -> u64 {
        // Not saturating_sub, which compiles to two branches and doubles the verifier's work.
        next_ns.max(now_ns) - now_ns
    }

    /// Moves the clock by a packet. `time` must be computed with the limit's present rate.
    #[inline(always)]
    pub fn advance(&mut self, now_ns: u64, limit: &Limit, time: TransmitTime) {
        let caught_up_ns = Self::caught_up_ns(self.next_ns, now_ns, limit.burst_ns);
        // A clock that has caught up starts on a whole nanosecond.
        let rem = if caught_up_ns == self.next_ns { self.next_rem } else { 0 };
        let rem = rem + time.rem;
        let carry = rem >= limit.link_bits_per_s;
        self.next_ns = caught_up_ns + time.ns + carry as u64;
        let rem = if carry { rem - limit.link_bits_per_s } else { rem };
        // After a change to a lower rate the remainder of the higher rate may exceed the lower rate. The remainder is
        // below 1 ns, and is dropped.
        self.next_rem = if rem < limit.link_bits_per_s { rem } else { 0 };
    }
}

/// Moves the time of a clock that bounds a privilege and sets no rate: `time_ns` of the link count `cost` times. The
/// clock may lag by the burst.
#[inline(always)]
pub fn advance_privilege(next_ns: u64, now_ns: u64, burst_ns: u64, time_ns: u64, cost: u64) -> u64 {
    Clock::caught_up_ns(next_ns, now_ns, burst_ns) + time_ns * cost
}

/// The mean of the bytes that a flow sends between two waits, over the bytes in a backlog of `backlog_ns`, updated by
/// one packet. The packet is `own_ns` of the backlog (at most all of it), and its flow has sent `burst` bytes,
/// including the packet, since the flow last waited. `before`: the mean without the packet; 0 where there is none. The
/// result is never 0.
///
/// A flow that is alone finds only its own packet in the backlog. One of N equal flows finds itself to be an Nth of the
/// backlog. So the backlog divided by this mean is the number of flows with packets in the backlog.
#[inline(always)]
pub fn usual_bytes(before: u64, burst: u64, own_ns: u64, backlog_ns: u64) -> u64 {
    let others_ns = if before == 0 { 0 } else { backlog_ns - own_ns };
    let burst = burst.min(MAX_PACKET_BYTES);
    (before * others_ns + burst * own_ns).checked_div(others_ns + own_ns).unwrap_or(burst).max(1)
}

/// How long a flow waits that has sent `bytes`, which are `own_ns` of the backlog: until these bytes have drained, plus
/// a part of the backlog before them, in proportion of `bytes` to the usual bytes of a flow. So all flows that wait for
/// a backlog send the same number of bytes.
///
/// `usual_bytes` is the mean before the packet: a large packet that counted in the mean would look usual. 0: there is
/// no mean yet.
#[inline(always)]
pub fn fair_wait_ns(backlog_ns: u64, own_ns: u64, bytes: u64, usual_bytes: u64) -> u64 {
    let before_ns = backlog_ns - own_ns;
    own_ns + (before_ns * bytes).checked_div(usual_bytes).unwrap_or(before_ns)
}

/// How much earlier than told a flow may send again without being early. TCP's pacing takes off the delay of the packet
/// before, up to half of the wait (`tcp_update_skb_after_send`). There is also a gap between the moment from which TCP
/// reckons and the moment at which a program runs.
#[inline(always)]
pub fn wait_slack_ns(wait_ns: u64, late_ns: u64) -> u64 {
    late_ns.min(wait_ns / 2) + wait_ns / 8 + SLACK_NS
}

/// The smallest slack: the time that passes between TCP's look at the clock and the program's.
const SLACK_NS: u64 = 50_000;

/// Histogram bucket of a backlog: 0 below 2^10 ns, then one bucket for each doubling; the last bucket is open-ended.
#[inline(always)]
pub fn backlog_bucket(backlog_ns: u64) -> usize {
    let log2 = u64::BITS - (backlog_ns >> BACKLOG_FIRST_BUCKET_LOG2_NS).leading_zeros();
    // A mask and not `min`: the verifier accepts a masked index as inside the array.
    let bucket = if log2 as usize >= BACKLOG_BUCKETS { BACKLOG_BUCKETS - 1 } else { log2 as usize };
    bucket & (BACKLOG_BUCKETS - 1)
}

/// Upper end of a histogram bucket, in nanoseconds; `None` for the last bucket, which is open-ended.
pub fn backlog_bucket_end_ns(bucket: usize) -> Option<u64> {
    (bucket < BACKLOG_BUCKETS - 1).then(|| 1 << (BACKLOG_FIRST_BUCKET_LOG2_NS as usize + bucket))
}

/// The trait implementations by which user space reads and writes these structures through aya's maps.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya::Pod is a promise about a type's bytes")]
mod user {
    // SAFETY: repr(C), integers only, no padding (the sizes are asserted above): any bytes are a valid value.
    unsafe impl aya::Pod for super::Limit {}
    // SAFETY: as for Limit.
    unsafe impl aya::Pod for super::Meters {}
    // SAFETY: as for Limit.
    unsafe impl aya::Pod for super::Scopes {}
    // SAFETY: as for Limit.
    unsafe impl aya::Pod for super::HostEnd {}
    // SAFETY: as for Limit.
    unsafe impl aya::Pod for super::OtherPaths {}
    // SAFETY: as for Limit.
    unsafe impl aya::Pod for super::SocketState {}
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const RATES_BITS_PER_S: [u64; 9] = [
        1_000,
        9_600,
        1_000_000,
        10_000_001,
        999_999_937,
        34_359_738_368,
        100_000_000_000,
        1 << 47,
        1_000_000_000_000_000,
    ];

    fn limit(rate_bits_per_s: u64) -> Limit {
        Limit { rate_bits_per_s, link_bits_per_s: rate_bits_per_s, ..Limit::default() }
    }

    #[test]
    fn the_clock_equals_128_bit_arithmetic_to_the_nanosecond_after_a_million_packets() {
        for rate in RATES_BITS_PER_S {
            let mut clock = Clock { next_ns: 1_000, next_rem: 0 };
            let mut bits: u128 = 0;
            for i in 0..1_000_000u64 {
                let bytes = 40 + (i * 7919) % 65_536;
                clock.advance(0, &limit(rate), transmit_time(bytes, rate));
                bits += u128::from(bytes) * 8;
            }
            let exact_ns = 1_000 + bits * 1_000_000_000 / u128::from(rate);
            assert_eq!(u128::from(clock.next_ns), exact_ns, "at {rate} bit/s");
        }
    }

    #[test]
    fn minimum_packets_at_100_gbit_are_exact() {
        // 64 bytes are 5.12 ns: whole nanoseconds would run 2.4 % fast.
        let mut clock = Clock::default();
        for _ in 0..1_000_000 {
            clock.advance(0, &limit(100_000_000_000), transmit_time(64, 100_000_000_000));
        }
        assert_eq!(clock.next_ns, 5_120_000);
    }

    #[test]
    fn an_idle_clock_lags_by_the_burst_and_no_more() {
        let limit = Limit { burst_ns: 5_000, ..limit(8_000_000_000) };
        let mut clock = Clock { next_ns: 10, next_rem: 3 };
        clock.advance(1_000_000, &limit, transmit_time(100, limit.rate_bits_per_s));
        assert_eq!(clock, Clock { next_ns: 995_000 + 100, next_rem: 0 });
        assert_eq!(Clock::backlog_ns(clock.next_ns, 1_000_000), 0);
    }

    #[test]
    fn a_busy_clock_is_not_moved_by_the_time() {
        let limit = limit(8_000_000_000);
        let mut clock = Clock { next_ns: 2_000, next_rem: 0 };
        clock.advance(1_500, &limit, transmit_time(100, limit.rate_bits_per_s));
        assert_eq!(Clock::backlog_ns(clock.next_ns, 1_500), 600);
    }

    #[test]
    fn a_lower_rate_finds_no_remainder_it_cannot_hold() {
        let mut clock = Clock { next_ns: 2_000, next_rem: 999_999_999 };
        clock.advance(0, &limit(1_000), TransmitTime { ns: 0, rem: 0 });
        assert!(clock.next_rem < 1_000);
    }

    #[test]
    fn sparse_flows_have_the_quarter_that_is_meant_and_not_an_eighth() {
        // A second of packets; each leaves as soon as the clock allows it.
        let (time_ns, mut next_ns, mut sent_ns) = (transmit_time(125, 8_000_000).ns, 0, 0);
        for now_ns in (0..1_000_000_000).step_by(1_000) {
            if next_ns <= now_ns {
                next_ns = advance_privilege(next_ns, now_ns, 0, time_ns, SPARSE_COST);
                sent_ns += time_ns;
            }
        }
        assert!((249_000_000..=251_000_000).contains(&sent_ns), "{sent_ns} ns of a second");
    }

    #[test]
    fn a_flow_that_waited_as_tcp_makes_it_wait_is_not_early() {
        // TCP shortens the wait by the delay of the packet before, but at most by half.
        for (wait_ns, late_ns, least_ns) in
            [(8_000_000, 0, 8_000_000), (8_000_000, 1_000_000, 7_000_000), (8_000_000, u64::MAX, 4_000_000)]
        {
            assert!(wait_ns - wait_slack_ns(wait_ns, late_ns).min(wait_ns) <= least_ns);
        }
    }

    #[test]
    fn ipv4_is_mapped_as_the_library_does() {
        let ipv4 = std::net::Ipv4Addr::new(10, 1, 2, 3);
        assert_eq!(ipv4_mapped(ipv4.octets()), ipv4.to_ipv6_mapped().octets());
    }

    #[test]
    fn burst_longer_than_uptime_does_not_wrap() {
        assert_eq!(Clock::caught_up_ns(0, 10, u64::MAX), 0);
    }

    #[test]
    fn oversized_packets_do_not_overflow() {
        assert_eq!(transmit_time(u64::MAX, 1_000), transmit_time(MAX_PACKET_BYTES, 1_000));
    }

    #[test]
    fn a_flow_that_is_alone_waits_for_itself_and_no_longer() {
        assert_eq!(fair_wait_ns(2_400_000, 2_400_000, 2_896, 64_000), 2_400_000);
        assert_eq!(usual_bytes(64_000, 2_896, 2_400_000, 2_400_000), 2_896);
        // The very first flow waits for the whole backlog.
        assert_eq!(fair_wait_ns(9_000_000, 2_400_000, 2_896, 0), 9_000_000);
        assert_eq!(usual_bytes(0, 2_896, 2_400_000, 9_000_000), 2_896);
    }

    #[test]
    fn flows_have_the_same_rate_whatever_packets_they_build() {
        // Nanoseconds per byte of 10 Mbit/s; three flows that send 1, 2 and 12 segments at a time.
        const NS_PER_BYTE: u64 = 800;
        let packets = [1_448, 2_896, 17_376];
        let (mut next_ns, mut usual, mut due, mut sent) = (0, 0, [0; 3], [0; 3]);
        while due.iter().all(|due_ns| *due_ns < 60_000_000_000) {
            let flow = (0..3).min_by_key(|flow| due[*flow]).unwrap();
            let now_ns: u64 = due[flow];
            let own_ns = packets[flow] * NS_PER_BYTE;
            next_ns = now_ns.max(next_ns) + own_ns;
            due[flow] = now_ns + fair_wait_ns(next_ns - now_ns, own_ns, packets[flow], usual);
            usual = usual_bytes(usual, packets[flow], own_ns, next_ns - now_ns);
            sent[flow] += packets[flow];
        }
        let all: u64 = sent.iter().sum();
        assert!(sent.iter().all(|bytes| (31..=35).contains(&(bytes * 100 / all))), "{sent:?}");
        let share_of_link = all * NS_PER_BYTE * 100 / 60_000_000_000;
        assert!((99..=100).contains(&share_of_link), "{share_of_link} % of the link");
    }

    #[test]
    fn the_largest_packets_at_the_lowest_rate_do_not_overflow() {
        let own_ns = transmit_time(MAX_PACKET_BYTES, 1_000).ns;
        let backlog_ns = own_ns + 2_000_000_000;
        let usual = usual_bytes(1, MAX_PACKET_BYTES, own_ns, backlog_ns);
        assert!(usual <= MAX_PACKET_BYTES);
        assert!(fair_wait_ns(backlog_ns, own_ns, MAX_PACKET_BYTES, usual) >= own_ns);
        assert_eq!(fair_wait_ns(backlog_ns, 1, MAX_PACKET_BYTES, MAX_PACKET_BYTES), backlog_ns);
    }

    #[test]
    fn buckets_double_and_every_backlog_has_one() {
        for (backlog_ns, bucket) in
            [(0, 0), (1_023, 0), (1_024, 1), (2_047, 1), (2_048, 2), (1 << 20, 11), (1 << 40, 31), (u64::MAX, 31)]
        {
            assert_eq!(backlog_bucket(backlog_ns), bucket, "{backlog_ns} ns");
        }
        for bucket in 0..BACKLOG_BUCKETS - 1 {
            let end_ns = backlog_bucket_end_ns(bucket).unwrap();
            assert_eq!(backlog_bucket(end_ns - 1), bucket);
            assert_eq!(backlog_bucket(end_ns), bucket + 1);
        }
        assert_eq!(backlog_bucket_end_ns(BACKLOG_BUCKETS - 1), None);
    }
}
