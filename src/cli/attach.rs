//! `podshaper attach`: a limit for any cgroup v2, pod or not.
//!
//! The processes in such a cgroup most often share the node's network namespace. Podshaper then adds no qdisc to the
//! node's interfaces: received packets are limited by drops alone, and the command says so. With `--netns` the
//! interface is the cgroup's own, like a pod's.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use clap::Args;
use nix::{
    net::if_::if_nametoindex,
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

use super::{
    attachments::{self, Attachment},
    output,
};
use crate::{
    attachment::{self, Directory, EVERY_INTERFACE, Interfaces, Plan},
    cgroup::{Hierarchies, network_namespace_of, network_namespaces},
    direction::Direction,
    error::{Code, Error, Result},
    interface::Record,
    owner::Owner,
    pins::{self, Place},
    request::{Limit, Limits, Source, Subnets},
    units::{Burst, Rate},
};

#[derive(Args)]
pub struct Arguments {
    /// The cgroup's directory, or its path below the cgroup2 mount
    #[arg(long, value_name = "PATH")]
    cgroup: PathBuf,
    /// Limit only what passes this interface [default: every one but loopback]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// The network namespace of what runs in the cgroup, if it has one of its own; the interface in it may get a qdisc
    #[arg(long, value_name = "PATH", requires = "interface")]
    netns: Option<PathBuf>,
    #[command(flatten)]
    asked: LimitArguments,
}

/// Limits, as they are asked for on the command line.
#[derive(Args)]
pub struct LimitArguments {
    #[command(flatten)]
    rates: RateArguments,
    /// What may be sent at once, in bits [default: 5 ms of the rate, at least 10 packets of 1500 bytes]
    #[arg(long, value_name = "BITS")]
    burst: Option<Burst>,
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct RateArguments {
    /// Limit of what is sent, in bits per second: 10M, 1.5G, 512Ki
    #[arg(long, value_name = "RATE")]
    egress: Option<Rate>,
    /// Limit of what is received
    #[arg(long, value_name = "RATE")]
    ingress: Option<Rate>,
}

impl LimitArguments {
    pub fn limits(&self) -> Limits {
        let limit = |rate: Rate| {
            let limit = Limit::of(rate, Source::Operator);
            Limit { burst: self.burst.unwrap_or(limit.burst), ..limit }
        };
        Limits { egress: self.rates.egress.map(limit), ingress: self.rates.ingress.map(limit) }
    }
}

impl Arguments {
    pub fn run(self) -> Result<()> {
        let Self { cgroup, interface, netns, asked } = self;
        let limits = asked.limits();
        let target = Target::find(&cgroup, interface.as_deref(), netns.as_deref())?;
        target.attach(&limits)?;
        if limits.egress.is_some() {
            output::complain("connections that exist already are counted but not paced; new ones are");
        }
        let lines = Direction::BOTH.into_iter().filter_map(|direction| {
            let Limit { rate, burst, .. } = limits.of(direction)?;
            let Target { path, interface, .. } = &target;
            Some(format!("{} {interface}: {direction} {rate}bit/s, burst {burst}bit\n", path.display()))
        });
        output::print(&lines.collect::<String>())
    }
}

/// A cgroup to limit.
pub struct Target {
    /// The directory of the cgroup.
    path: PathBuf,
    directory: File,
    place: Place,
    interface: String,
    ifindex: u32,
    netns: Option<PathBuf>,
}

impl Target {
    /// Finds everything that an attachment needs; changes nothing.
    ///
    /// # Errors
    /// No such cgroup or interface, or another limit on the same traffic.
    pub fn find(cgroup: &Path, interface: Option<&str>, netns: Option<&Path>) -> Result<Self> {
        let path = cgroup_directory(cgroup)?;
        let failed = |cause| Error::because(Code::Cgroup, format!("open the cgroup {}", path.display()), cause);
        let directory = File::open(&path).map_err(failed)?;
        let id = directory.metadata().map_err(failed)?.ino();
        let interface = interface.unwrap_or(EVERY_INTERFACE).to_owned();
        let place = Place { pod: pins::key_of_cgroup(id), interface: interface.clone() };
        let ifindex = match (netns, interface.as_str()) {
            (_, EVERY_INTERFACE) => 0,
            // The index is found when the namespace is entered.
            (Some(_), _) => 0,
            (None, name) => index_on_this_node(&path, name)?,
        };
        let netns = netns.map(Path::to_path_buf);
        let target = Self { path, directory, place, interface, ifindex, netns };
        match attachments::read()?.iter().find(|other| target.is_limited_by(other)) {
            Some(other) => Err(target.overlaps(other)),
            None => Ok(target),
        }
    }

    /// Whether another attachment limits the same traffic. Cgroup programs run for all cgroups below their own.
    fn is_limited_by(&self, other: &Attachment) -> bool {
        let theirs = Path::new(&other.owner.cgroup);
        if other.place == self.place || other.owner.cgroup.is_empty() || other.links.are_dead() {
            return false;
        }
        let interfaces = [self.interface.as_str(), other.place.interface.as_str()];
        let share_interfaces = interfaces[0] == interfaces[1] || interfaces.contains(&EVERY_INTERFACE);
        match (self.path.starts_with(theirs), theirs.starts_with(&self.path)) {
            (true, true) => share_interfaces,
            (above, below) => above || below,
        }
    }

    fn overlaps(&self, other: &Attachment) -> Error {
        let (path, theirs) = (self.path.display(), &other.owner.cgroup);
        let text = format!(
            "limit the cgroup {path}: {theirs} is limited already ({} {}), and two limits would set each socket's pace in turn; \
             change that one (podshaper set) or take it off (podshaper detach)",
            other.name(),
            other.place.interface
        );
        Error::new(Code::Cgroup, text)
    }

    /// Makes the attachment.
    ///
    /// # Errors
    /// The kernel's error. No part of the new attachment is left then, and an earlier attachment is unchanged.
    pub fn attach(&self, limits: &Limits) -> Result<()> {
        if self.netns.is_none() && limits.ingress.is_some() {
            log::warn!(
                "what is received is limited by drops: podshaper puts no qdisc on the node's own interfaces; TCP may get much less \
                 than the limit (an own network namespace, given with --netns and --interface, has more)"
            );
        }
        let interfaces = match &self.netns {
            Some(netns) => Interfaces::One { netns, name: &self.interface },
            None => Interfaces::OfNode { index: self.ifindex },
        };
        let owner = Owner {
            interface: Record { ifname: self.interface.clone(), ..Record::default() },
            cgroup: self.path.to_string_lossy().into_owned(),
            ..Owner::default()
        };
        let (place, cgroup) = (self.place.clone(), Directory::Other(&self.directory));
        // Only sockets are limited: behind the node's interfaces there is no pod.
        let other_paths = false;
        let plan =
            Plan { place, cgroup, interfaces, limits: *limits, subnets: &Subnets::default(), other_paths, owner };
        attachment::attach(&plan).map(drop)
    }

    /// Removes the attachment.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn detach(&self) -> Result<()> {
        let path = self.path.to_string_lossy();
        let is_ours = |_: &Path, owner: Option<&Owner>| owner.is_none_or(|owner| owner.cgroup == path);
        attachment::remove(&self.place, is_ours).map(drop)
    }
}

/// The index of an interface on this node. Fails if the processes of the cgroup, and of those below it, are all in
/// other network namespaces, where the index would mean another interface.
fn index_on_this_node(cgroup: &Path, name: &str) -> Result<u32> {
    let namespaces = network_namespaces(cgroup);
    let is_here = network_namespace_of("self").is_some_and(|own| namespaces.contains_key(&own));
    if let Some(process) = namespaces.values().next().filter(|_| !is_here) {
        let text = format!(
            "limit the interface {name:?}: process {process} of {} is in a network namespace of its own; name it with \
             --netns /proc/{process}/ns/net, or leave --interface out",
            cgroup.display()
        );
        return Err(Error::new(Code::Netns, text));
    }
    if_nametoindex(name).map_err(|cause| {
        let text = format!("find the interface {name:?} of this node (with --netns, of another namespace)");
        Error::because(Code::Netns, text, cause)
    })
}

/// The directory of a cgroup, given as a directory or as a path below the mount.
fn cgroup_directory(given: &Path) -> Result<PathBuf> {
    let mount = Hierarchies::of_this_host()?.unified;
    let below = if given.starts_with(&mount) {
        given.to_path_buf()
    } else {
        mount.join(given.strip_prefix("/").unwrap_or(given))
    };
    let failed = |cause| Error::because(Code::Cgroup, format!("find the cgroup {}", below.display()), cause);
    let path = fs::canonicalize(&below).map_err(failed)?;
    if statfs(&path).map_err(|errno| failed(errno.into()))?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(Error::new(Code::Cgroup, format!("limit {}: it is not on cgroup v2", path.display())));
    }
    if path == mount {
        let text = format!("limit {}: it is the whole node, with all its pods; name a cgroup below it", path.display());
        return Err(Error::new(Code::Cgroup, text));
    }
    Ok(path)
}
