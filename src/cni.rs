//! The CNI verbs. Each call is resolved first (which changes nothing), then carried out, then answered.
//!
//! The protocol types come from the CNI library, but the plugin is not run by its `Plugin::run`. That function reads
//! stdin without a bound and reserializes the result, which loses fields unknown to the library. A chained plugin has
//! to pass `prevResult` on unchanged.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rscni_plugin::{
    types::{Cmd, ErrorResult},
    version::{PluginInfo, SpecVersion},
};

use crate::{
    attachment::{self, Directory, End, Interfaces, Plan, remove_cgroup_if_ours},
    cgroup::{self, Hierarchies, PodCgroup, Wanted},
    delegate,
    direction::Direction,
    error::{self, Code, Error, Result},
    interface::Queue,
    logging,
    owner::Owner,
    pins::{BPFFS, LockedPins, Pins, Place},
    pod::PodKey,
    probe,
    request::{Endpoint, Env, Limit, Limits, Request, Subject, declared_version, read_stdin},
    shaper::{self, Pinned, Settings},
};

/// Reads a runtime's call, carries it out and answers on stdout.
pub fn run(env: &Env) -> ExitCode {
    let mut stdin = Vec::new();
    let answered = answer(env, &mut stdin).and_then(|answer| write_stdout(&answer));
    let Err(error) = answered else { return ExitCode::SUCCESS };
    log::error!("{error}");
    let version = declared_version(&stdin).unwrap_or_default();
    let result = ErrorResult::new(version, &error.to_cni());
    // A runtime that has closed stdout still sees the exit status.
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
    let read = read_stdin(io::stdin().lock()).and_then(|bytes| {
        *stdin = bytes;
        Request::parse(cmd, env, stdin)
    });
    let request = match read {
        // The variables name the attachment to remove. If this DEL failed, the runtime would not call the DEL of the
        // plugins before podshaper, and IPAM would not free the address.
        Err(error) if cmd == Cmd::Del && matches!(error.code(), Code::Decode | Code::Io) => {
            Request::of_variables(cmd, env, error)?
        }
        read => read?,
    };
    logging::start(&request.config);
    let verb = <&str>::from(request.cmd);
    log::debug!("{verb} of network {}, CNI {}: {:?}", request.network, request.version, request.subject);
    for error in &request.forgiven {
        log::warn!("{verb} goes on without: {error}");
    }
    match (cmd, &request.subject) {
        (Cmd::Add, Subject::Endpoint(endpoint)) => add(&request, endpoint),
        (Cmd::Check, Subject::Endpoint(endpoint)) => check(&request, endpoint).map(|()| Vec::new()),
        (Cmd::Del, Subject::Endpoint(endpoint)) => del(&request, endpoint).map(|()| Vec::new()),
        (Cmd::Status, _) => status(&request).map(|()| Vec::new()),
        (Cmd::Gc, _) => gc(&request).map(|()| Vec::new()),
        // Only a DEL is parsed into this variant: ADD and CHECK refuse such names.
        (_, Subject::NeverAdded(why)) => {
            log::info!("nothing to remove: {why}");
            Ok(Vec::new())
        }
        (_, Subject::Node) | (Cmd::Version, _) => {
            Err(Error::new(Code::Environment, "the call names no container and interface"))
        }
    }
}

/// The specification requires an answer in the version of the question, supported or not. A call by hand names no
/// version.
fn version(asked: Option<SpecVersion>) -> Result<Vec<u8>> {
    let text = "write the supported versions";
    let known = PluginInfo::default();
    let info = PluginInfo::new(asked.unwrap_or(known.cni_version()), known.supported_versions().to_vec());
    serde_json::to_vec(&info).map_err(|cause| Error::because(Code::Io, text, cause))
}

/// Whether every pod could be added. A pod that asks for no limit needs nothing but a configuration that can be read.
fn status(request: &Request) -> Result<()> {
    // The limits of a pod that asks for none. A malformed value in them would fail every ADD.
    let limits = request.limits()?;
    request.check_kubeconfig()?;
    // Without the pod network, nothing else on the node needs to be tested.
    request.config.delegate.as_ref().map_or(Ok(()), delegate::status)?;
    probe::status(Path::new(BPFFS), Path::new(probe::MEMORY), !limits.is_empty())
}

/// What an ADD has to find out before it changes anything.
struct Resolved {
    cgroup: PodCgroup,
    netns: PathBuf,
}

fn add(request: &Request, endpoint: &Endpoint) -> Result<Vec<u8>> {
    for key in &request.unknown_keys {
        log::warn!("the configuration of network {}: {key}; it is ignored", request.network);
    }
    let Some(delegation) = &request.config.delegate else { return add_to_chain(request, endpoint) };
    // The limits are read before the network's plugins are called, so that nothing has to be undone if the pod's
    // annotations are malformed.
    let limits = request.limits()?;
    let network = delegate::add(delegation, request, endpoint)?;
    let limited = network.reply().and_then(|reply| enforce(request, endpoint, limits).map(|()| reply));
    let reply = limited.inspect_err(|_| network.undo())?;
    Ok(reply.get().as_bytes().to_vec())
}

/// An ADD as one plugin of a list, after the plugin that makes the interface.
fn add_to_chain(request: &Request, endpoint: &Endpoint) -> Result<Vec<u8>> {
    let reply = request.prev_result.as_ref().ok_or_else(|| {
        Error::new(
            Code::Config,
            "there is no prevResult: podshaper is a chained plugin, put it behind the one that makes the interface, \
             in the \"plugins\" list of a .conflist",
        )
    })?;
    enforce(request, endpoint, request.limits()?)?;
    Ok(reply.get().as_bytes().to_vec())
}

fn enforce(request: &Request, endpoint: &Endpoint, limits: Limits) -> Result<()> {
    if limits.is_empty() {
        forget_unlimited(endpoint)
    } else {
        limit(request, endpoint, limits, |owner| owner.asked_for(&limits))
    }
}

fn resolve(request: &Request, endpoint: &Endpoint) -> Result<Resolved> {
    let netns = request.netns.clone().ok_or_else(|| Error::new(Code::Environment, "CNI_NETNS is missing"))?;
    let cgroup = find_cgroup(request, endpoint, &Hierarchies::of_this_host()?)?;
    Ok(Resolved { cgroup, netns })
}

fn find_cgroup(request: &Request, endpoint: &Endpoint, hierarchies: &Hierarchies) -> Result<PodCgroup> {
    match (request.cgroup_hint(), &endpoint.key) {
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

/// Limits an interface of a pod, as an ADD does. `record` completes the owner's record of the attachment.
///
/// # Errors
/// What could not be found or made. No part of the attachment is left then.
pub fn limit(
    request: &Request,
    endpoint: &Endpoint,
    limits: Limits,
    record: impl FnOnce(Owner) -> Owner,
) -> Result<()> {
    let Resolved { cgroup, netns } = resolve(request, endpoint)?;
    let owner = record(Owner::of(request, endpoint, &cgroup.path));
    let plan = Plan {
        place: place(endpoint),
        cgroup: Directory::Pod(&cgroup),
        interfaces: Interfaces::One { netns: &netns, name: &endpoint.ifname },
        limits,
        subnets: &request.config.subnets,
        other_paths: request.config.other_paths,
        owner,
    };
    let owner = attachment::attach(&plan)?;
    log_limits(&plan.place, &limits, &owner);
    Ok(())
}

fn log_limits(place: &Place, limits: &Limits, owner: &Owner) {
    let pod = [&owner.pod_namespace, &owner.pod_name].map(|name| name.as_deref().unwrap_or("?")).join("/");
    let Place { pod: key, interface } = place;
    for direction in Direction::BOTH {
        let Some(Limit { rate, burst, asked, max: _, source }) = limits.of(direction) else { continue };
        let by = match (direction, Queue::of(&owner.interface)) {
            (Direction::Egress, Queue::Fq) => "pacing and fq".to_owned(),
            (Direction::Egress, Queue::Htb) => "pacing and htb".to_owned(),
            (Direction::Egress, Queue::None) => "pacing and drops".to_owned(),
            (Direction::Ingress, _) => owner.interface.ingress_by.map(|by| by.to_string()).unwrap_or_default(),
        };
        let capped = if asked > rate { format!(", capped by max: {asked} were asked for") } else { String::new() };
        let (burst, cgroup) = (burst.as_bytes(), &owner.cgroup);
        log::info!(
            "{pod} ({key}) {interface}: {direction} {rate}bit/s, burst {burst} bytes, by {by}, from {source}{capped}; {cgroup}"
        );
    }
}

/// Removes a limit that the pod's last sandbox, on the same cgroup, may have left. For a pod without limits.
fn forget_unlimited(endpoint: &Endpoint) -> Result<()> {
    let place = place(endpoint);
    let is_limited = Pins::existing(Path::new(BPFFS)).is_some_and(|pins| pins.find(&place).is_some());
    if is_limited { attachment::remove(&place, |_, _| true).map(drop) } else { Ok(()) }
}

fn check(request: &Request, endpoint: &Endpoint) -> Result<()> {
    request.config.delegate.as_ref().map_or(Ok(()), |delegation| delegate::check(delegation, request, endpoint))?;
    let limits = request.limits()?;
    if limits.is_empty() {
        return Ok(());
    }
    let place = place(endpoint);
    let missing = || {
        let text = format!("{} of pod {} has no shaper, but a limit was asked for", place.interface, place.pod);
        Error::new(Code::Mismatch, text)
    };
    let directory = Pins::existing(Path::new(BPFFS)).and_then(|pins| pins.find(&place)).ok_or_else(missing)?;
    let pinned = Pinned::at(&directory);
    let owner = pinned.owner()?;
    if !owner.is(&request.network, &endpoint.container_id, &endpoint.ifname) {
        let text = format!(
            "{} of pod {} is shaped for container {} of network {}, not for this one",
            place.interface, place.pod, owner.container_id, owner.network
        );
        return Err(Error::new(Code::Mismatch, text));
    }
    let set = pinned.set()?;
    // The runtime repeats what it asked for at the ADD. Since then an operator or `podshaper sync` may have set other
    // limits, which need other programs.
    let limits = if owner.has_other_limits() { shaper::limits_of(&pinned.limits(&owner, &set)?) } else { limits };
    pinned.check(Path::new(&owner.cgroup), &Settings::of(&owner, limits))?;
    attachment::Node::default().check(&owner, &limits, &set)
}

/// Removes the limit first, since it sits on the interface that the network's plugins have made; then calls their DEL.
/// Their DEL is called even if the limit cannot be removed, so that IPAM frees the address.
fn del(request: &Request, endpoint: &Endpoint) -> Result<()> {
    let lifted = lift(request, endpoint);
    if let Err(error) = &lifted {
        log::error!("{error}");
    }
    delegate::del(request, endpoint)?;
    lifted
}

fn lift(request: &Request, endpoint: &Endpoint) -> Result<()> {
    let Some(pins) = attachment::lock()? else { return Ok(()) };
    // An unreadable record must not keep the pod in Terminating for ever.
    let is_its =
        |owner: Option<&Owner>| owner.is_none_or(|owner| owner.is_of(&endpoint.container_id, &endpoint.ifname));
    if let End::Another(owner) = attachment::remove_locked(&pins, &place(endpoint), |_, owner| is_its(owner))? {
        log::info!("{} of pod {} is another sandbox's by now: {}", endpoint.ifname, endpoint.key, owner.container_id);
        return Ok(());
    }
    remove_cgroup_after(request, endpoint, &pins);
    Ok(())
}

/// On a hybrid host podshaper has to remove the pod's cgroup2 directory, even if the limit was taken off earlier. The
/// directory cannot be removed while the pod's last container is in it; then a later DEL removes it.
fn remove_cgroup_after(request: &Request, endpoint: &Endpoint, pins: &LockedPins) {
    let Ok(hierarchies) = Hierarchies::of_this_host() else { return };
    if !hierarchies.are_hybrid() || pins.has_pod(endpoint.key.as_str()) {
        return;
    }
    if let Ok(cgroup) = find_cgroup(request, endpoint, &hierarchies) {
        remove_cgroup_if_ours(&cgroup.path);
    }
}

/// Removes this network's attachments that the runtime no longer names. An error in one does not stop the others.
fn gc(request: &Request) -> Result<()> {
    let delegated = request.config.delegate.as_ref().map_or(Ok(()), |delegation| delegate::gc(delegation, request));
    error::all([collect(request), delegated])
}

fn collect(request: &Request) -> Result<()> {
    // Without the list no attachment is known to be stale.
    let Some(valid) = &request.valid_attachments else { return Ok(()) };
    let Some(pins) = attachment::lock()? else { return Ok(()) };
    let is_stale = |owner: &Owner| {
        let is_it = |ifname: &str| owner.interface.ifname == ifname;
        let is_named = valid.iter().any(|kept| kept.container_id == owner.container_id && is_it(&kept.ifname));
        owner.network == request.network.as_str() && !is_named
    };
    let remove = |place: Place, directory: PathBuf| -> Result<()> {
        let owner = Pinned::at(&directory).owner()?;
        let is_meant = |_: &Path, owner: Option<&Owner>| owner.is_some_and(is_stale);
        if is_stale(&owner) && matches!(attachment::remove_locked(&pins, &place, is_meant)?, End::Removed) {
            log::info!("no container uses {} any more", directory.display());
            if !pins.has_pod(&place.pod) {
                remove_cgroup_if_ours(Path::new(&owner.cgroup));
            }
        }
        Ok(())
    };
    let settled = attachment::settle_all(&pins);
    let removed = pins.list().into_iter().map(|(place, directory)| remove(place, directory));
    error::all(std::iter::once(settled).chain(removed))
}

/// Where the attachment of an interface is pinned.
pub fn place(endpoint: &Endpoint) -> Place {
    Place { pod: endpoint.key.as_str().to_owned(), interface: endpoint.ifname.to_string() }
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
