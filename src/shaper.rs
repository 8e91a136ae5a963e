//! The shaper of one attachment: loads the eBPF object with this pod's numbers, attaches it to the pod's cgroup, pins it.
//! `pinned` reads and checks one that is there. Where the pins lie is `pins`' affair; what the programs do is in `bpf/`.

mod pinned;
mod refusal;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixDatagram,
    panic::resume_unwind,
    path::Path,
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData},
    programs::{Program, ProgramError},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use podshaper_abi::{Limit as AbiLimit, OWNER_SIZE, QUEUE_FQ, QUEUE_HTB, QUEUE_NONE};

use crate::{
    direction::Direction,
    error::{Code, Error, Result},
    interface::{IngressBy, Record, bulk_segments},
    pins::{LIMITS, METERS, OWNER},
    pod::Owner,
    qdisc,
    request::{Limit, Limits, Source, Subnets},
    sys::{self, CgroupHook, TrieKey},
    units::{Burst, Rate},
};

pub use pinned::Pinned;
use refusal::refused;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podshaper.bpf.o"));

/// The map of subnets. It is not pinned: the programs hold it.
const SUBNETS: &str = "SUBNETS";

/// The map of what the programs know of each socket. Not pinned either.
const FLOWS: &str = "FLOWS";

/// A program of the object, by the name that is also that of its link's pin, and where it is attached.
type Hooked = (&'static str, CgroupHook);
const COUNT_EGRESS: Hooked = ("count_egress", CgroupHook::InetEgress);
const COUNT_INGRESS: Hooked = ("count_ingress", CgroupHook::InetIngress);
const PACE_TCP: Hooked = ("pace_tcp", CgroupHook::SockOps);
const HOLD_ACKS: Hooked = ("hold_acks", CgroupHook::SockOps);
const NOTE_SETSOCKOPT: Hooked = ("note_setsockopt", CgroupHook::Setsockopt);

/// Backlog beyond which packets that are not TCP are dropped where there is no queue for them to wait in. Short, because all of it is
/// latency that they add to everything else; longer than a tick of a 100 Hz kernel, so that a sender that is scheduled late loses nothing.
const DATAGRAM_BOUND_NS: u64 = 10_000_000;
/// Backlog beyond which such packets are marked, where they can be.
const DATAGRAM_MARK_NS: u64 = DATAGRAM_BOUND_NS / 2;
/// The same where they wait in a queue: their senders block before that, at what a socket's buffer holds ..
const QUEUED_DATAGRAM_BOUND_NS: u64 = 500_000_000;
/// .. which is so many full packets (net.core.wmem_default, 208 KiB, counts what they take in memory).
const QUEUED_DATAGRAMS: u64 = 100;
/// Backlog beyond which TCP is marked where its acknowledgements are held: twice what its windows aim for.
const HELD_MARK_NS: u64 = 10_000_000;
/// Backlog beyond which TCP is dropped where nothing but drops holds it; a longer one lets it fall less far below the limit.
const DROPS_BOUND_NS: u64 = 100_000_000;
/// Backlog beyond which TCP is dropped whose sender has not waited: what comes without end. The horizon of Cilium's bandwidth manager (2 s) ..
const HORIZON_NS: u64 = 2_000_000_000;
/// .. or so many full packets, if that is longer: ten of each of 300 flows, which TCP sends before it hears of anything ..
const HORIZON_PACKETS: u64 = 3_000;
/// .. but no more than this, which is also fq's.
pub const LONGEST_HORIZON_NS: u64 = 60_000_000_000;
const FULL_PACKET_BITS: u64 = 1500 * 8;

/// An object that is loaded, not yet attached.
pub struct Loaded {
    object: Ebpf,
    programs: Vec<Hooked>,
}

/// Programs that are attached. Dropped without [`Attached::pin`], they are detached.
pub struct Attached {
    object: Ebpf,
    links: Vec<(&'static str, OwnedFd)>,
}

/// What one attachment is to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// The pod's interface, in its network namespace. 0: every interface but loopback.
    pub ifindex: u32,
    /// The limits.
    pub limits: Limits,
    /// Where packets wait whose senders have not.
    pub queue: Queue,
    /// What holds the ingress limit; `None` without one.
    pub ingress_by: Option<IngressBy>,
}

/// Where packets wait whose senders have not waited: see `turn` in the programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Queue {
    /// Nowhere: they pass, or are dropped.
    #[default]
    None,
    /// In fq, for their departure time.
    Fq,
    /// In a class of htb.
    Htb,
}

impl Queue {
    /// What is on the interface of a recorded attachment.
    pub fn of(record: &Record) -> Self {
        match record {
            Record { fq: true, .. } => Self::Fq,
            Record { htb: true, .. } => Self::Htb,
            _ => Self::None,
        }
    }

    /// As the programs read it.
    fn as_abi(self) -> u64 {
        match self {
            Self::None => QUEUE_NONE,
            Self::Fq => QUEUE_FQ,
            Self::Htb => QUEUE_HTB,
        }
    }

    fn datagram_bound_ns(self, rate: Rate) -> u64 {
        match self {
            Self::None => DATAGRAM_BOUND_NS,
            // Well below the horizon, at any rate: others wait there.
            Self::Fq | Self::Htb => {
                full_packets_ns(QUEUED_DATAGRAMS, rate).clamp(QUEUED_DATAGRAM_BOUND_NS, horizon_ns(rate) / 4)
            }
        }
    }
}

impl Settings {
    /// Those of an attachment that is there, but for its interface's index, which only its programs know.
    pub fn of(owner: &Owner, limits: Limits) -> Self {
        let record = &owner.interface;
        Self { ifindex: 0, limits, queue: Queue::of(record), ingress_by: record.ingress_by }
    }

    /// The largest first.
    fn programs(&self) -> Vec<Hooked> {
        let mut programs = Vec::new();
        if self.limits.egress.is_some() {
            programs.extend([COUNT_EGRESS, PACE_TCP, NOTE_SETSOCKOPT]);
        }
        if self.ingress_by.is_some() {
            programs.push(COUNT_INGRESS);
        }
        if self.ingress_by == Some(IngressBy::HeldAcks) {
            // It is also what gives the acknowledgements their departure time.
            if self.limits.egress.is_none() {
                programs.insert(0, COUNT_EGRESS);
                programs.push(NOTE_SETSOCKOPT);
            }
            programs.push(HOLD_ACKS);
        }
        programs
    }

    /// The programs by name, which are also the pins of their links.
    pub fn program_names(&self) -> impl Iterator<Item = &'static str> {
        self.programs().into_iter().map(|(name, _)| name)
    }

    /// The limits as the programs read them, by direction.
    fn abi_limits(&self) -> [(Direction, AbiLimit); 2] {
        let link = |rate| match self.queue {
            Queue::Htb => (qdisc::with_ethernet(rate), qdisc::ETHERNET_HEADER_BYTES),
            Queue::None | Queue::Fq => (rate.as_bits_per_s(), 0),
        };
        let egress = self.limits.egress.as_ref().map(|limit| AbiLimit {
            queue: self.queue.as_abi(),
            link_bits_per_s: link(limit.rate).0,
            link_header_bytes: link(limit.rate).1,
            datagram_bound_ns: self.queue.datagram_bound_ns(limit.rate),
            ..abi_limit(limit, u64::MAX, horizon_ns(limit.rate))
        });
        let ingress = self.limits.ingress.as_ref().zip(self.ingress_by).map(|(limit, by)| match by {
            IngressBy::HeldAcks => abi_limit(limit, HELD_MARK_NS, horizon_ns(limit.rate)),
            // tbf has held it already: this only counts.
            IngressBy::Tbf => AbiLimit {
                datagram_bound_ns: u64::MAX,
                datagram_mark_ns: u64::MAX,
                ..abi_limit(limit, u64::MAX, u64::MAX)
            },
            IngressBy::Drops => abi_limit(limit, DATAGRAM_BOUND_NS, DROPS_BOUND_NS),
        });
        [(Direction::Egress, egress.unwrap_or_default()), (Direction::Ingress, ingress.unwrap_or_default())]
    }
}

/// Loads maps and programs. Nothing is attached yet.
///
/// # Errors
/// [`Code::Kernel`]: the kernel refuses a map or program, and why.
pub fn load(settings: &Settings, subnets: &Subnets) -> Result<Loaded> {
    let mut object = without_kernel_btf(EbpfLoader::new)
        .override_global("IFINDEX", &settings.ifindex, true)
        .override_global("SUBNETS_MODE", &subnets.mode(), true)
        // A map of no entries is refused.
        .map_max_entries(SUBNETS, subnets.len().max(1) as u32)
        .load(OBJECT)
        .map_err(|cause| refused("load podshaper's eBPF maps", &cause))?;
    let programs = settings.programs();
    load_programs(&mut object, &programs)?;

    list_subnets(&mut object, subnets)?;
    try_flows(&object)?;
    Ok(Loaded { object, programs })
}

impl Loaded {
    /// Writes the limits, and whose they are.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says; [`Code::Config`] if the owner's names are too long.
    pub fn write(&mut self, settings: &Settings, owner: &Owner) -> Result<()> {
        let mut limits_map = array_mut::<AbiLimit>(&mut self.object, LIMITS)?;
        for (direction, limit) in settings.abi_limits() {
            limits_map.set(direction.index(), limit, 0).map_err(|cause| refused("write the limits", &cause))?;
        }
        let mut owner_map = array_mut::<[u8; OWNER_SIZE]>(&mut self.object, OWNER)?;
        owner_map.set(0, owner_bytes(owner)?, 0).map_err(|cause| refused("write the owner", &cause))
    }

    /// Attaches every program to the cgroup, beside whatever is attached there already.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says. Nothing stays attached then.
    pub fn attach(self, cgroup: BorrowedFd<'_>) -> Result<Attached> {
        let attach = |(name, hook): Hooked| {
            let failed = |cause: &(dyn std::error::Error + 'static)| {
                refused(format!("attach the eBPF program {name} to the pod's cgroup"), cause)
            };
            let program = self.object.program(name).ok_or_else(|| not_in_object(name))?.fd().map_err(|e| failed(&e))?;
            let link =
                sys::link_to_cgroup(program.as_fd(), cgroup, hook).map_err(|cause| match cause.raw_os_error() {
                    // The programs are loaded, so it is not for want of a capability.
                    Some(libc::EPERM) => {
                        occupied(name, "another one is attached there or above, and tolerates none beside it", cause)
                    }
                    Some(libc::E2BIG) => occupied(name, "64 are attached there already", cause),
                    _ => failed(&cause),
                })?;
            Ok((name, link))
        };
        let links = self.programs.iter().copied().map(attach).collect::<Result<_>>()?;
        Ok(Attached { object: self.object, links })
    }
}

impl Attached {
    /// Pins maps and links in a directory, OWNER first: whoever finds a part of an attachment finds whose it is.
    ///
    /// # Errors
    /// [`Code::Kernel`] with what the kernel says. The caller removes the directory then.
    pub fn pin(self, directory: &Path) -> Result<()> {
        let pinned = |name: &str| format!("pin {}", directory.join(name).display());
        for name in [OWNER, LIMITS, METERS] {
            let map = map_data(self.object.map(name), name)?;
            map.pin(directory.join(name)).map_err(|cause| refused(pinned(name), &cause))?;
        }
        for (name, link) in self.links {
            sys::pin(link.as_fd(), &directory.join(name)).map_err(|cause| refused(pinned(name), &cause))?;
        }
        Ok(())
    }
}

/// `EbpfLoader::new` parses all of /sys/kernel/btf/vmlinux, 20 MB and 30 ms, for relocations that this object does not have,
/// and there is no other constructor. With no descriptor to be had it cannot open the file, and goes on without.
fn without_kernel_btf<T>(new: impl FnOnce() -> T) -> T {
    let limit = getrlimit(Resource::RLIMIT_NOFILE);
    if let Ok((_, hard)) = limit {
        // Failing costs time, not correctness.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, 0, hard);
    }
    let made = new();
    if let Ok((soft, hard)) = limit {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
    }
    made
}

fn abi_limit(limit: &Limit, stream_mark_ns: u64, horizon_ns: u64) -> AbiLimit {
    AbiLimit {
        rate_bits_per_s: limit.rate.as_bits_per_s(),
        burst_ns: limit.burst.as_ns_at(limit.rate),
        kept_ns: limit.burst.kept().as_ns_at(limit.rate),
        datagram_bound_ns: DATAGRAM_BOUND_NS,
        datagram_mark_ns: DATAGRAM_MARK_NS,
        stream_mark_ns,
        horizon_ns,
        bulk_segments: bulk_segments(limit.rate),
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
    full_packets_ns(HORIZON_PACKETS, rate).clamp(HORIZON_NS, LONGEST_HORIZON_NS)
}

/// The limit that was written so, as if by an operator: who asked for it is not written. `None` where there is none.
pub fn limit_of(limit: &AbiLimit) -> Option<Limit> {
    let rate = Rate::bits_per_s(limit.rate_bits_per_s).ok()?;
    Some(Limit { burst: Burst::of_ns_at(limit.burst_ns, rate), ..Limit::of(rate, Source::Operator) })
}

fn owner_bytes(owner: &Owner) -> Result<[u8; OWNER_SIZE]> {
    let text = "record whose attachment this is";
    let json = serde_json::to_vec(owner).map_err(|cause| Error::because(Code::Config, text, cause))?;
    let mut bytes = [0; OWNER_SIZE];
    match bytes.get_mut(..json.len()) {
        Some(room) => room.copy_from_slice(&json),
        None => {
            let text = format!("{text}: its names take {} bytes, more than the {OWNER_SIZE} there are", json.len());
            return Err(Error::new(Code::Config, text));
        }
    }
    Ok(bytes)
}

/// Loads the programs side by side: the verifier is most of the time an ADD takes, and pods wait for it.
fn load_programs(object: &mut Ebpf, wanted: &[Hooked]) -> Result<()> {
    if let Some((name, _)) = wanted.iter().find(|(name, _)| object.program(name).is_none()) {
        return Err(not_in_object(name));
    }
    let place = |name: &str| wanted.iter().position(|(wanted, _)| *wanted == name);
    let mut programs: Vec<_> =
        object.programs_mut().filter_map(|(name, program)| Some((place(name)?, name, program))).collect();
    programs.sort_by_key(|(place, ..)| *place);
    thread::scope(|scope| {
        let mut programs = programs.into_iter();
        // The first is the largest: it does not wait for a thread to be made.
        let largest = programs.next();
        let loading: Vec<_> =
            programs.map(|(_, name, program)| scope.spawn(move || load_program(name, program))).collect();
        largest.map_or(Ok(()), |(_, name, program)| load_program(name, program))?;
        loading.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn load_program(name: &str, program: &mut Program) -> Result<()> {
    let loaded = match program {
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    loaded.map_err(|cause| refused(format!("load the eBPF program {name}"), &cause))
}

fn list_subnets(object: &mut Ebpf, subnets: &Subnets) -> Result<()> {
    let map = match object.map(SUBNETS) {
        Some(Map::LpmTrie(map)) => map.fd().as_fd(),
        _ => return Err(not_in_object(SUBNETS)),
    };
    let (keys, values): (Vec<_>, Vec<_>) =
        subnets.entries().map(|(bits, address, kind)| (TrieKey { bits, address }, kind)).unzip();
    sys::insert_all(map, &keys, &values).map_err(|cause| refused("write the subnets", &cause))
}

/// Keeps with a socket what the programs keep with each. A kernel that cannot takes them all the same, and then nothing is ever paced:
/// its allocator may want a CPU that exchanges 16 bytes at once (`kmalloc_nolock` in Linux 7.3), or net.core.optmem_max has no room.
fn try_flows(object: &Ebpf) -> Result<()> {
    let Some(Map::SkStorage(map)) = object.map(FLOWS) else { return Err(not_in_object(FLOWS)) };
    let kept = UnixDatagram::unbound().and_then(|socket| {
        let bytes = map.info().map_err(std::io::Error::other)?.value_size();
        sys::keep_with_socket(map.fd().as_fd(), socket.as_fd(), bytes as usize)
    });
    kept.map_err(|cause| {
        let text = "keep a flow's state with its socket, without which nothing is paced (net.core.optmem_max may be too small, \
                    or this kernel has no lock-free allocator for this CPU)";
        Error::because(Code::Kernel, text, cause)
    })
}

fn array_mut<'a, V: aya::Pod>(object: &'a mut Ebpf, name: &str) -> Result<Array<&'a mut MapData, V>> {
    let map = object.map_mut(name).ok_or_else(|| not_in_object(name))?;
    Array::try_from(map).map_err(|cause| refused(format!("open the eBPF map {name}"), &cause))
}

fn map_data<'a>(map: Option<&'a Map>, name: &str) -> Result<&'a MapData> {
    match map {
        Some(Map::Array(data)) => Ok(data),
        _ => Err(not_in_object(name)),
    }
}

fn not_in_object(name: &str) -> Error {
    Error::new(Code::Kernel, format!("this podshaper was built wrong: its eBPF object has no {name}"))
}

/// Why a program does not fit beside those that are attached.
fn occupied(name: &str, why: &str, cause: std::io::Error) -> Error {
    let text = format!("attach the eBPF program {name} to the pod's cgroup: {why} (bpftool cgroup tree shows them)");
    Error::because(Code::Kernel, text, cause)
}
