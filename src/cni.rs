//! The verbs: what a runtime asks is resolved first (which changes nothing), then acted on, then answered.
//!
//! The CNI library's types speak the protocol, but its `Plugin::run` does not run the plugin: it reads stdin without bound and
//! writes the result anew, which loses what it does not know, and a chained plugin owes the next one `prevResult` as it came.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rscni_plugin::{
    types::{Cmd, ErrorResult},
    version::{PluginInfo, SpecVersion},
};

use crate::{
    cgroup::{self, Hierarchies, PodCgroup, Wanted},
    error::{Code, Error, Result},
    ingress::{self, IngressBy, Inside},
    logging, netns, packets,
    pins::{BPFFS, LockedPins, Pins, Place},
    pod::{Owner, PodKey},
    probe,
    request::{Attachment, Env, Limit, Limits, Request, Subject, declared_version, read_stdin},
    shaper::{self, Pinned, Queue, Settings},
};

/// Reads a runtime's call, does it and answers on stdout.
pub fn run(env: &Env) -> ExitCode {
    let mut stdin = Vec::new();
    let answered = answer(env, &mut stdin).and_then(|answer| write_stdout(&answer));
    let Err(error) = answered else { return ExitCode::SUCCESS };
    log::error!("{error}");
    let version = declared_version(&stdin).unwrap_or_default();
    let result = ErrorResult::new(version, &error.to_cni());
    // A runtime that has closed stdout sees the exit status.
    let _ = serde_json::to_vec(&result).map_err(io::Error::from).and_then(|json| io::stdout().write_all(&json));
    ExitCode::FAILURE
}

fn answer(env: &Env, stdin: &mut Vec<u8>) -> Result<Vec<u8>> {
    let Some(cmd) = env.command()? else {
        return Err(Error::new(Code::Environment, "CNI_COMMAND is empty"));
    };
    if cmd == Cmd::Version {
        return version(read_stdin(io::stdin().lock()).ok().as_deref().and_then(declared_version));
    }
    *stdin = read_stdin(io::stdin().lock())?;
    let request = Request::parse(cmd, env, stdin)?;
    logging::start(&request.config);
    let verb = <&str>::from(request.cmd);
    log::debug!("{verb} of network {}, CNI {}: {:?}", request.network, request.version, request.subject);
    for error in &request.forgiven {
        log::warn!("{verb} goes on without: {error}");
    }
    match (cmd, &request.subject) {
        (Cmd::Add, Subject::Attachment(attachment)) => add(&request, attachment),
        (Cmd::Check, Subject::Attachment(attachment)) => check(&request, attachment).map(|()| Vec::new()),
        (Cmd::Del, Subject::Attachment(attachment)) => del(&request, attachment).map(|()| Vec::new()),
        (Cmd::Status, _) => probe::node(Path::new(BPFFS)).map(|()| Vec::new()),
        (Cmd::Gc, _) => gc(&request).map(|()| Vec::new()),
        // Only a DEL is parsed into this: ADD and CHECK refuse such names.
        (_, Subject::NeverAdded(why)) => {
            log::info!("nothing to remove: {why}");
            Ok(Vec::new())
        }
        (_, Subject::Node) | (Cmd::Version, _) => {
            Err(Error::new(Code::Environment, "the call names no container and interface"))
        }
    }
}

/// The specification has it answer in the version it is asked in, supported or not; a person asks in none.
fn version(asked: Option<SpecVersion>) -> Result<Vec<u8>> {
    let text = "write the supported versions";
    let known = PluginInfo::default();
    let info = PluginInfo::new(asked.unwrap_or(known.cni_version()), known.supported_versions().to_vec());
    serde_json::to_vec(&info).map_err(|cause| Error::because(Code::Io, text, cause))
}

/// Everything an ADD needs to know before it changes anything.
struct Plan {
    limits: Limits,
    cgroup: PodCgroup,
    netns: PathBuf,
}

fn add(request: &Request, attachment: &Attachment) -> Result<Vec<u8>> {
    let reply = request.prev_result.as_ref().ok_or_else(|| {
        Error::new(
            Code::Config,
            "there is no prevResult: podshaper is a chained plugin, put it behind the one that makes the interface, \
             in the \"plugins\" list of a .conflist",
        )
    })?;
    let limits = request.limits()?;
    if limits.is_empty() {
        forget_unlimited(attachment)?;
    } else {
        limit(request, attachment, resolve(request, attachment, limits)?)?;
    }
    Ok(reply.get().as_bytes().to_vec())
}

fn resolve(request: &Request, attachment: &Attachment, limits: Limits) -> Result<Plan> {
    let netns = request.netns.clone().ok_or_else(|| Error::new(Code::Environment, "CNI_NETNS is missing"))?;
    let cgroup = find_cgroup(request, attachment, &Hierarchies::of_this_host()?)?;
    Ok(Plan { limits, cgroup, netns })
}

fn find_cgroup(request: &Request, attachment: &Attachment, hierarchies: &Hierarchies) -> Result<PodCgroup> {
    match (request.cgroup_hint(), &attachment.key) {
        (Some(path), _) => cgroup::find(hierarchies, Wanted::Path(&path.to_string_lossy())),
        (None, PodKey::Uid(uid)) => cgroup::find(hierarchies, Wanted::Uid(uid.as_str())),
        (None, PodKey::Container(id)) => Err(Error::new(
            Code::Cgroup,
            format!(
                "find the cgroup of container {id}: the runtime passes neither K8S_POD_UID nor cgroupPath; give the plugin's \
                 configuration a \"cgroupPath\", with {{containerID}} in it if need be"
            ),
        )),
    }
}

fn limit(request: &Request, attachment: &Attachment, plan: Plan) -> Result<()> {
    let Plan { limits, cgroup, netns } = plan;
    let pins = Pins::ensure(Path::new(BPFFS))?;
    let Prepared { ifindex, gso_max_size, inside } =
        netns::in_netns(&netns, || prepare_netns(&attachment.ifname, &netns, &limits, None))?;
    let queue = inside.queue();
    let subnets = &request.config.subnets;
    let ingress_by = limits.ingress.map(|limit| inside.choose(ifindex, &limit, subnets.is_empty()));
    let mut owner = request.owner(attachment, &cgroup.path);
    (owner.fq, owner.htb) = (queue == Queue::Fq, queue == Queue::Htb);
    owner.gso_max_size = gso_max_size;
    owner.ingress_by = ingress_by.map(|mechanism| mechanism.to_string());
    // Not returned yet: the qdiscs are on the interfaces by now, and a failed ADD takes them off again.
    let loaded = shaper::load(&Settings { ifindex, limits, queue, ingress_by }, subnets, &owner);
    let place = place(attachment);
    let locked = match pins.lock() {
        Ok(locked) => locked,
        Err(error) => {
            put_back(pins.find(&place).and_then(before), &owner);
            return loaded.and(Err(error));
        }
    };
    let before = locked.find(&place).and_then(before);
    let attached = loaded.and_then(|loaded| loaded.attach(cgroup.open()?.as_fd()));
    let committed = attached.and_then(|attached| {
        let staged = locked.stage(&place)?;
        attached.pin(staged.directory())?;
        staged.commit()
    });
    if let Err(error) = committed {
        put_back(before, &owner);
        if !locked.has_pod(&place.pod) {
            remove_cgroup_if_made(&cgroup.path);
        }
        return Err(error);
    }
    if let Some((before, _)) = before.filter(|_| ingress_by != Some(IngressBy::Tbf)) {
        ingress::undo_host_side(&before);
    }
    log_limits(&place, &limits, &owner);
    Ok(())
}

/// Whose the attachment pinned there is, and its ingress limit, before another takes its place.
fn before(directory: PathBuf) -> Option<(Owner, Option<Limit>)> {
    let pinned = Pinned::at(&directory);
    let [_, ingress] = pinned.limits().ok()?;
    Some((pinned.owner().ok()?, shaper::limit_of(&ingress)))
}

/// Takes off the interfaces what an ADD that failed, for `failed`, has put there, but not what the attachment `before` it needs.
fn put_back(before: Option<(Owner, Option<Limit>)>, failed: &Owner) {
    match before {
        Some((stays, limit)) => ingress::restore(&stays, limit.as_ref(), failed),
        None => ingress::undo(failed),
    }
}

/// What was found and done in a pod's network namespace.
pub struct Prepared {
    /// The interface.
    pub ifindex: u32,
    /// Its `gso_max_size` without podshaper: see [`packets::keep_small`].
    pub gso_max_size: Option<u32>,
    /// For ingress.
    pub inside: Inside,
}

/// Sets the namespace so that small pacing rates make small packets and acknowledgements can be held. `found` is the interface's
/// `gso_max_size` where podshaper has changed it before.
///
/// # Errors
/// [`Code::Netns`]: there is no such interface.
pub fn prepare_netns(ifname: &str, netns: &Path, limits: &Limits, found: Option<u32>) -> Result<Prepared> {
    let ifindex = netns::interface(ifname, netns)?.index;
    let small = limits.egress.map_or(Ok(None), |limit| packets::keep_small(ifindex, limit.rate, found));
    // Without it the rate holds and the latency does not: not worth a pod.
    let gso_max_size = small.unwrap_or_else(|error| {
        log::warn!("TCP may send large packets in bursts: {error}");
        found
    });
    Ok(Prepared { ifindex, gso_max_size, inside: ingress::prepare(ifindex, limits) })
}

fn log_limits(place: &Place, limits: &Limits, owner: &Owner) {
    let pod = [&owner.pod_namespace, &owner.pod_name].map(|name| name.as_deref().unwrap_or("?")).join("/");
    let Place { pod: key, interface } = place;
    let egress_by = match Queue::of(owner) {
        Queue::Fq => "pacing and fq",
        Queue::Htb => "pacing and htb",
        Queue::None => "pacing and drops",
    };
    let ingress_by = owner.ingress_by.as_deref().unwrap_or_default();
    for (direction, limit, by) in [("egress", &limits.egress, egress_by), ("ingress", &limits.ingress, ingress_by)] {
        let Some(Limit { rate, burst, asked, source }) = limit else { continue };
        let capped = if asked > rate { format!(", capped by max: {asked} were asked for") } else { String::new() };
        let (burst, cgroup) = (burst.as_bytes(), &owner.cgroup);
        log::info!(
            "{pod} ({key}) {interface}: {direction} {rate}bit/s, burst {burst} bytes, by {by}, from {source}{capped}; {cgroup}"
        );
    }
}

/// A pod without limits may have had some in its last sandbox, on the same cgroup.
fn forget_unlimited(attachment: &Attachment) -> Result<()> {
    let place = place(attachment);
    let Some(pins) = Pins::existing(Path::new(BPFFS)).filter(|pins| pins.find(&place).is_some()) else {
        return Ok(());
    };
    let pins = pins.lock()?;
    let before = pins.find(&place).and_then(|directory| Pinned::at(&directory).owner().ok());
    pins.remove(&place)?;
    before.iter().for_each(ingress::undo);
    Ok(())
}

fn check(request: &Request, attachment: &Attachment) -> Result<()> {
    let limits = request.limits()?;
    if limits.is_empty() {
        return Ok(());
    }
    let place = place(attachment);
    let missing = || {
        let text = format!("{} of pod {} has no shaper, but a limit was asked for", place.interface, place.pod);
        Error::new(Code::Mismatch, text)
    };
    let directory = Pins::existing(Path::new(BPFFS)).and_then(|pins| pins.find(&place)).ok_or_else(missing)?;
    let pinned = Pinned::at(&directory);
    let owner = pinned.owner()?;
    if !owner.is(&request.network, &attachment.container_id, &attachment.ifname) {
        let text = format!(
            "{} of pod {} is shaped for container {} of network {}, not for this one",
            place.interface, place.pod, owner.container_id, owner.network
        );
        return Err(Error::new(Code::Mismatch, text));
    }
    let ingress_by = owner.ingress_by.as_deref().and_then(|name| name.parse().ok());
    pinned.check(Path::new(&owner.cgroup), &Settings { ifindex: 0, limits, queue: Queue::of(&owner), ingress_by })?;
    ingress::check(&owner)
}

fn del(request: &Request, attachment: &Attachment) -> Result<()> {
    let Some(pins) = Pins::existing(Path::new(BPFFS)) else { return Ok(()) };
    let pins = pins.lock()?;
    let place = place(attachment);
    pins.settle(&place)?;
    if let Some(directory) = pins.find(&place) {
        let owner = Pinned::at(&directory).owner()?;
        if !owner.is_of(&attachment.container_id, &attachment.ifname) {
            log::info!("{} is another sandbox's by now: {}", directory.display(), owner.container_id);
            return Ok(());
        }
        pins.remove(&place)?;
        ingress::undo(&owner);
        log::info!("removed {}", directory.display());
    }
    remove_cgroup_after(request, attachment, &pins);
    Ok(())
}

/// On a hybrid host the pod's cgroup2 directory is podshaper's, to be removed with its last attachment. It cannot be while the
/// pod's last container is in it; then one of the DELs that follow does it.
fn remove_cgroup_after(request: &Request, attachment: &Attachment, pins: &LockedPins) {
    let Ok(hierarchies) = Hierarchies::of_this_host() else { return };
    if !hierarchies.are_hybrid() || pins.has_pod(attachment.key.as_str()) {
        return;
    }
    if let Ok(cgroup) = find_cgroup(request, attachment, &hierarchies) {
        remove_cgroup_if_made(&cgroup.path);
    }
}

fn remove_cgroup_if_made(path: &Path) {
    let removed = Hierarchies::of_this_host().and_then(|hierarchies| cgroup::remove_if_made(&hierarchies, path));
    if let Err(error) = removed {
        log::warn!("{error}");
    }
}

/// Removes this network's attachments that the runtime does not name any more, as many as can be.
fn gc(request: &Request) -> Result<()> {
    // Without the list nothing is known to be stale.
    let Some(valid) = &request.valid_attachments else { return Ok(()) };
    let Some(pins) = Pins::existing(Path::new(BPFFS)) else { return Ok(()) };
    let pins = pins.lock()?;
    let mut failed: Vec<String> = pins.settle_all().err().iter().map(Error::to_string).collect();
    for (place, directory) in pins.list() {
        let owner = match Pinned::at(&directory).owner() {
            Ok(owner) => owner,
            Err(error) => {
                failed.push(error.to_string());
                continue;
            }
        };
        let named = valid.iter().any(|kept| kept.container_id == owner.container_id && kept.ifname == owner.ifname);
        if owner.network != request.network.as_str() || named {
            continue;
        }
        match pins.remove(&place) {
            Ok(()) => {
                ingress::undo(&owner);
                log::info!("removed {}, which no container uses any more", directory.display());
                if !pins.has_pod(&place.pod) {
                    remove_cgroup_if_made(Path::new(&owner.cgroup));
                }
            }
            Err(error) => failed.push(error.to_string()),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::new(Code::Kernel, failed.join("; "))) }
}

fn place(attachment: &Attachment) -> Place {
    Place { pod: attachment.key.as_str().to_owned(), interface: attachment.ifname.to_string() }
}

fn write_stdout(answer: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(answer)
        .and_then(|()| stdout.flush())
        .map_err(|cause| Error::because(Code::Io, "write the result to stdout", cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_names_every_version_the_plugin_speaks() {
        for (asked, answered) in [(None, "1.1.0"), (Some(SpecVersion::new(0, 4, 0)), "0.4.0")] {
            assert_eq!(
                String::from_utf8(version(asked).unwrap()).unwrap(),
                format!(
                    r#"{{"cniVersion":"{answered}","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}}"#
                )
            );
        }
    }
}
