//! All attachments, as read from the pins: limits, counters and links of each, and the traffic between two readings.
//!
//! A reading takes no lock of podshaper's: an attachment that is made or removed meanwhile may appear or not. Each
//! attachment takes about ten system calls, so 500 are read in milliseconds.

mod held;
mod json;
mod links;

use std::{
    fs,
    iter::Peekable,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    slice::Iter,
    sync::OnceLock,
    thread,
    time::{Duration, Instant, SystemTime},
};

use podshaper_abi::{Counters, Limit as AbiLimit, Others};

use crate::{
    cgroup::Hierarchies,
    direction::Direction,
    error::{Code, Error, Result},
    interface::{Queue, Record},
    owner::Owner,
    pins::{self, BPFFS, Pins, Place},
    request::{Limit, Limits, Source},
    shaper::{self, Pinned, Set, Settings},
    units::{Burst, Rate},
};
pub use held::look_whether_held;
pub use links::Links;

/// One attachment at the time of a reading.
pub struct Attachment {
    /// The place of the pins: pod and interface.
    pub place: Place,
    /// The directory of the pins.
    pub directory: PathBuf,
    /// The owner's record; empty if it cannot be read.
    pub owner: Owner,
    /// When the attachment was made.
    made_at: Option<SystemTime>,
    /// Whether the programs are attached.
    pub links: Links,
    /// The limit of packets from the pod; `None` if there is none.
    pub egress: Option<Measured>,
    /// The limit of packets to the pod; `None` if there is none.
    pub ingress: Option<Measured>,
    /// Why the attachment is not in force as it was made, if this was checked ([`look_whether_held`]).
    pub not_held: Option<String>,
    /// Which part could not be read, and why.
    pub problem: Option<String>,
    read_at: Instant,
}

/// The limit of one direction, and the traffic that it let pass.
pub struct Measured {
    /// The limit's rate.
    pub rate: Rate,
    /// Its burst.
    pub burst: Burst,
    /// The mechanism that enforces the limit.
    pub by: String,
    /// The counters of the cgroup's sockets since ADD.
    pub counters: Counters,
    /// The traffic that did not pass the cgroup's sockets.
    pub others: OtherPaths,
    /// The traffic between the last two readings.
    pub passing: Option<Passing>,
}

/// What happens to packets that do not pass the cgroup's sockets.
pub enum OtherPaths {
    /// They are limited and counted.
    Held(Others),
    /// They were limited, and are no longer: another program has removed the filters or the queue.
    Lost(Others),
    /// tbf limits them, and does not count them apart from the other packets.
    ByTbf,
    /// They are not limited, though they pass the same interface.
    Free,
    /// The question does not arise: the limit is for sockets, on any interface.
    OfNone,
}

/// The traffic of an interval.
pub struct Passing {
    /// Bits per second.
    pub bits_per_s: f64,
    /// The number of packets by the backlog that they met.
    pub backlog: [u64; podshaper_abi::BACKLOG_BUCKETS],
}

/// All attachments of this node.
///
/// # Errors
/// [`Code::Kernel`] if the process may not read bpffs, which belongs to root.
pub fn read() -> Result<Vec<Attachment>> {
    read_after(&[])
}

/// Reads all attachments at less cost: owner and links are taken from an earlier reading if the attachment has not been
/// replaced.
///
/// # Errors
/// Those of [`read`].
pub fn read_after(before: &[Attachment]) -> Result<Vec<Attachment>> {
    read_pins(before).map(|(found, _)| found)
}

/// All attachments, and the number of unfinished directories. Killed calls have left these directories, or running
/// calls need them at this moment.
///
/// # Errors
/// Those of [`read`].
pub fn read_all() -> Result<(Vec<Attachment>, usize)> {
    read_pins(&[])
}

fn read_pins(before: &[Attachment]) -> Result<(Vec<Attachment>, usize)> {
    let bpffs = Path::new(BPFFS);
    let Some(pins) = Pins::existing(bpffs) else {
        // Without permission the directory looks empty.
        return match fs::read_dir(bpffs) {
            Err(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => {
                Err(Error::because(Code::Kernel, format!("look into {} (it takes root)", bpffs.display()), cause))
            }
            _ => Ok((Vec::new(), 0)),
        };
    };
    pins.check_readable()?;
    // Both readings are in the order of the directory names.
    let mut earlier = before.iter().peekable();
    let mut sets = Sets::default();
    let (listed, unfinished) = pins.list_all();
    let found = listed.into_iter().map(|(place, directory)| {
        let earlier = earlier_of(&mut earlier, &directory).and_then(|earlier| earlier.read_again(&mut sets));
        earlier.unwrap_or_else(|| Attachment::read_by(place, directory, &mut sets))
    });
    // An attachment that was removed during the reading is left out.
    let is_there = |attachment: &Attachment| attachment.problem.is_none() || attachment.directory.exists();
    Ok((found.filter(is_there).collect(), unfinished))
}

/// All attachments after `sample`, with the traffic of this interval. If `sample` is zero, returns at once and without
/// traffic.
///
/// # Errors
/// Those of [`read`].
pub fn read_for(sample: Duration) -> Result<Vec<Attachment>> {
    let before = read()?;
    if sample.is_zero() || before.is_empty() {
        return Ok(before);
    }
    thread::sleep(sample);
    let mut after = read()?;
    compare(&before, &mut after);
    Ok(after)
}

/// Enters the traffic between two readings into the later one.
pub fn compare(before: &[Attachment], after: &mut [Attachment]) {
    let mut earlier = before.iter().peekable();
    for attachment in after {
        if let Some(earlier) = earlier_of(&mut earlier, &attachment.directory) {
            attachment.compare(earlier);
        }
    }
}

/// Advances to the attachment in a directory.
fn earlier_of<'a>(earlier: &mut Peekable<Iter<'a, Attachment>>, directory: &Path) -> Option<&'a Attachment> {
    while earlier.next_if(|earlier| earlier.directory.as_path() < directory).is_some() {}
    earlier.peek().copied().filter(|earlier| earlier.directory == directory)
}

impl Attachment {
    /// Reads the attachment that is pinned in a directory.
    pub fn read(place: Place, directory: PathBuf) -> Self {
        Self::read_by(place, directory, &mut Sets::default())
    }

    fn read_by(place: Place, directory: PathBuf, sets: &mut Sets) -> Self {
        let pinned = Pinned::at(&directory);
        let (owner, mut problem) = match pinned.owner() {
            Ok(owner) => (owner, None),
            Err(error) => (Owner::default(), Some(error.to_string())),
        };
        let mut names = None;
        let (mut egress, mut ingress) = (None, None);
        if !pins::is_current(&directory) {
            problem.get_or_insert_with(|| {
                format!("pinned in layout {}: its numbers are not read", pins::layout_of(&directory))
            });
        } else if problem.is_none() {
            match sets.of(&directory).and_then(|set| read_directions(&pinned, &owner, set)) {
                Ok(directions) => {
                    let settings = Settings::of(&owner, limits_of(directions.each_ref()));
                    names = Some(settings.program_names().map(str::to_owned).collect());
                    [egress, ingress] = directions;
                }
                Err(error) => problem = Some(error.to_string()),
            }
        }
        let names = names.unwrap_or_else(|| pins::links(&directory));
        let links = Links::read(&pinned, &names, Path::new(&owner.cgroup));
        let made_at = pins::made_at(&directory);
        let read_at = Instant::now();
        Self { place, directory, owner, made_at, links, egress, ingress, not_held: None, problem, read_at }
    }

    /// Reads limits and counters again, if the attachment has not been replaced.
    fn read_again(&self, sets: &mut Sets) -> Option<Self> {
        let Self { place, directory, owner, made_at, links, egress: _, ingress: _, not_held: _, problem, read_at: _ } =
            self;
        if problem.is_some() || made_at.is_none() || *made_at != pins::made_at(directory) {
            return None;
        }
        let [egress, ingress] = read_directions(&Pinned::at(directory), owner, sets.of(directory).ok()?).ok()?;
        let (place, directory, owner, links) = (place.clone(), directory.clone(), owner.clone(), links.clone());
        let read_at = Instant::now();
        let (made_at, not_held, problem) = (*made_at, None, None);
        Some(Self { place, directory, owner, made_at, links, egress, ingress, not_held, problem, read_at })
    }

    /// The time since the attachment was made.
    pub fn age(&self) -> Option<Duration> {
        self.made_at.and_then(|made| made.elapsed().ok())
    }

    /// The name for a person: namespace/name; for a cgroup that is not a pod's, its path; otherwise the key of the pod.
    pub fn name(&self) -> String {
        match &self.owner {
            Owner { pod_name: Some(name), pod_namespace, .. } => {
                format!("{}/{name}", pod_namespace.as_deref().unwrap_or("?"))
            }
            Owner { network, cgroup, .. } if network.is_empty() && !cgroup.is_empty() => below_mount(cgroup),
            _ => self.place.pod.clone(),
        }
    }

    /// The limited directions, egress first.
    pub fn directions(&self) -> impl Iterator<Item = (Direction, &Measured)> {
        let both = [(Direction::Egress, &self.egress), (Direction::Ingress, &self.ingress)];
        both.into_iter().filter_map(|(direction, measured)| Some((direction, measured.as_ref()?)))
    }

    /// Whether a reading under the lock, or a later reading, is of this same attachment. Another one may have replaced
    /// it.
    pub fn is_still(&self, directory: &Path, owner: Option<&Owner>) -> bool {
        let has_same_owner = owner
            .is_none_or(|owner| owner.container_id == self.owner.container_id && owner.cgroup == self.owner.cgroup);
        self.directory == directory && has_same_owner && self.made_at == pins::made_at(directory)
    }

    /// Whether the recorded path names another network namespace than at ADD, or none. A missing path in /proc does not
    /// count: it ends with its process, and the namespace may live on.
    pub fn has_lost_namespace(&self) -> bool {
        let Record { netns, netns_inode, .. } = &self.owner.interface;
        let (Some(path), Some(inode)) = (netns, netns_inode) else { return false };
        match fs::metadata(path) {
            Ok(found) => found.ino() != *inode,
            Err(_) => !path.starts_with("/proc/"),
        }
    }

    /// Whether all programs are attached.
    pub fn is_whole(&self) -> bool {
        !self.links.are_dead() && self.links.faults().is_empty()
    }

    /// The limits, as an ADD would have them.
    pub fn limits(&self) -> Limits {
        limits_of([&self.egress, &self.ingress])
    }

    fn compare(&mut self, earlier: &Self) {
        let elapsed = self.read_at.duration_since(earlier.read_at);
        for (now, before) in [(&mut self.egress, &earlier.egress), (&mut self.ingress, &earlier.ingress)] {
            if let (Some(now), Some(before)) = (now, before) {
                now.passing = passing(before, now, elapsed);
            }
        }
    }
}

impl Measured {
    /// All bytes that passed since ADD.
    fn bytes(&self) -> u64 {
        self.counters.bytes + self.others.counted().map_or(0, |others| others.bytes)
    }

    /// The limit, as if the operator had asked for it.
    pub fn limit(&self) -> Limit {
        Limit { burst: self.burst, ..Limit::of(self.rate, Source::Operator) }
    }

    /// The part of the limit that is in use.
    pub fn used(&self) -> Option<f64> {
        self.passing.as_ref().map(|passing| passing.bits_per_s / self.rate.as_bits_per_s() as f64)
    }
}

/// The maps of the attachments. Each set is opened once, since the attachments of a node share their maps.
#[derive(Default)]
struct Sets(Vec<(PathBuf, Set)>);

impl Sets {
    /// The maps of the attachment that is pinned in a directory.
    fn of(&mut self, directory: &Path) -> Result<&Set> {
        let maps = pins::maps_of(directory);
        let known = self.0.iter().position(|(path, _)| *path == maps);
        let index = known.unwrap_or(self.0.len());
        if known.is_none() {
            let set = Set::pinned(&maps)?;
            self.0.push((maps, set));
        }
        Ok(&self.0[index].1)
    }
}

fn read_directions(pinned: &Pinned<'_>, owner: &Owner, set: &Set) -> Result<[Option<Measured>; 2]> {
    let egress_by = match Queue::of(&owner.interface) {
        Queue::Fq => "pacing+fq",
        Queue::Htb => "pacing+htb",
        Queue::None => "pacing",
    };
    let ingress_by = owner.interface.ingress_by.map_or("?".to_owned(), |by| by.to_string());
    let [egress, ingress] = pinned.limits(owner, set)?;
    let [sent, received] = pinned.meters(owner, set)?;
    let Record { netns, held_at, .. } = &owner.interface;
    let [others_out, others_in] = pinned.others(owner, set)?.map(|others| match held_at {
        Some(_) => OtherPaths::Held(others),
        None if netns.is_some() => OtherPaths::Free,
        None => OtherPaths::OfNone,
    });
    let others_in = if owner.interface.has_tbf() { OtherPaths::ByTbf } else { others_in };
    let direction = |limit: &AbiLimit, by: &str, counters, others| {
        let Limit { rate, burst, .. } = shaper::limit_of(limit)?;
        Some(Measured { rate, burst, by: by.to_owned(), counters, others, passing: None })
    };
    Ok([
        direction(&egress, egress_by, sent.counters, others_out),
        direction(&ingress, &ingress_by, received.counters, others_in),
    ])
}

fn limits_of([egress, ingress]: [&Option<Measured>; 2]) -> Limits {
    let limit = |measured: &Option<Measured>| measured.as_ref().map(Measured::limit);
    Limits { egress: limit(egress), ingress: limit(ingress) }
}

/// `None` if the counters have decreased: counters only grow, so they belong to another attachment.
fn passing(before: &Measured, now: &Measured, elapsed: Duration) -> Option<Passing> {
    let bytes = now.bytes().checked_sub(before.bytes())?;
    let mut backlog = now.counters.backlog;
    for (bucket, before) in backlog.iter_mut().zip(before.counters.backlog) {
        *bucket = bucket.checked_sub(before)?;
    }
    Some(Passing { bits_per_s: bytes as f64 * 8.0 / elapsed.as_secs_f64(), backlog })
}

/// The cgroup mounts, read once for all attachments; `None` if they cannot be read.
pub fn hierarchies() -> Option<&'static Hierarchies> {
    static HIERARCHIES: OnceLock<Option<Hierarchies>> = OnceLock::new();
    HIERARCHIES.get_or_init(|| Hierarchies::of_this_host().ok()).as_ref()
}

/// A cgroup's path relative to the mount, for a person.
pub fn below_mount(cgroup: &str) -> String {
    let below = hierarchies().and_then(|found| Path::new(cgroup).strip_prefix(&found.unified).ok());
    below.map_or_else(|| cgroup.to_owned(), |below| format!("/{}", below.display()))
}

impl OtherPaths {
    /// Whether these packets are limited; `None` if the limit is not tied to an interface.
    pub fn are_held(&self) -> Option<bool> {
        match self {
            Self::Held(_) | Self::ByTbf => Some(true),
            Self::Free | Self::Lost(_) => Some(false),
            Self::OfNone => None,
        }
    }

    /// The counters of these packets, if they are known.
    pub fn counted(&self) -> Option<&Others> {
        match self {
            Self::Held(others) | Self::Lost(others) => Some(others),
            Self::ByTbf | Self::Free | Self::OfNone => None,
        }
    }
}
