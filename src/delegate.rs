//! Calls the network's list in the place of the runtime. Podshaper is then the only plugin of the list that the runtime
//! uses ([`FILE`], which `podshaper install --delegate` writes). At each call podshaper reads the network's own list
//! anew ([`list`]).
//!
//! A network that rewrites its list takes podshaper out of it; the delegating list is a separate file and stays. Each
//! verb follows SPEC.md ("Section 3: Execution of Network Configurations"), as libcni does for a runtime. [`plugin`]
//! makes one call. [`result`] converts to the version of the runtime, which may differ from that of the list.
//! Surprising: a DEL has to call the plugins of the ADD, whatever the list says at the time of the DEL. So each ADD
//! leaves its list behind ([`record`]).

pub mod list;
mod plugin;
pub mod record;
mod result;

use std::collections::BTreeMap;

use rscni_plugin::types::Cmd;
use rscni_plugin::version::SpecVersion;
use serde_json::value::RawValue;

use crate::error::{self, Code, Error, Result};
use crate::request::{DELEGATE, Delegation, Endpoint, Request};
use list::List;
use plugin::Call;

/// The file of podshaper's own list, in the directory of the network's list. Runtimes use the first file by name.
pub const FILE: &str = "00-podshaper.conflist";
/// The name of the network in podshaper's list.
pub const NETWORK: &str = "podshaper";
/// `type` of podshaper's entry in any list.
const PODSHAPER: &str = "podshaper";
/// `type` of the bandwidth plugin. With both plugins a pod would be limited twice.
const BANDWIDTH: &str = "bandwidth";

/// The network that an ADD has made.
pub struct Added<'a> {
    request: &'a Request,
    endpoint: &'a Endpoint,
    list: List,
    result: Box<RawValue>,
}

/// Makes the network of a pod. If a plugin fails, everything that this plugin and those before it have made is removed
/// again.
///
/// # Errors
/// [`Code::Unavailable`] without a list; a plugin's own error; the errors of the directories.
pub fn add<'a>(delegation: &Delegation, request: &'a Request, endpoint: &'a Endpoint) -> Result<Added<'a>> {
    if request.prev_result.is_some() {
        let text = format!(
            "configuration key {DELEGATE:?}: there is a prevResult, so podshaper is not the only plugin of its list: take out the key, \
             or the other plugins (podshaper install --delegate writes a list of its own)"
        );
        return Err(Error::new(Code::Config, text));
    }
    let mut list = list::in_force(&delegation.directory)?;
    if delegation.replace_bandwidth {
        list.leave_out(BANDWIDTH);
    }
    // The record is written before anything is made: if podshaper is killed, the following DEL knows what to undo.
    record::keep(endpoint, request.netns.as_deref(), &list)?;
    let mut result: Option<Box<RawValue>> = None;
    for number in 0..list.plugins.len() {
        let call = Call { verb: Cmd::Add, list: &list, offers: offers(request)?, prev_result: result.as_deref() };
        match call.add(&list.plugins[number]) {
            Ok(made) => result = Some(made),
            Err(error) => {
                list.plugins.truncate(number + 1);
                undo(&list, request, endpoint, result.as_deref());
                return Err(error);
            }
        }
    }
    let result = result.ok_or_else(|| list.lacks_plugins())?;
    Ok(Added { request, endpoint, list, result })
}

impl Added<'_> {
    /// The result of the last plugin, in the version of the runtime.
    pub fn reply(&self) -> Result<Box<RawValue>> {
        result::in_version(&self.result, self.list.version, self.request.version)
    }

    /// Removes the network again, because podshaper itself could not limit the pod.
    pub fn undo(&self) {
        undo(&self.list, self.request, self.endpoint, Some(&self.result));
    }
}

/// Undoes a failed ADD. Errors are only logged, since the runtime calls DEL after a failed ADD, and that DEL tries
/// again.
fn undo(list: &List, request: &Request, endpoint: &Endpoint, result: Option<&RawValue>) {
    let undone = del_all(list, request, result).and_then(|()| record::forget(endpoint));
    if let Err(error) = undone {
        log::warn!("undo a failed ADD (the runtime's DEL tries again): {error}");
    }
}

/// Removes the network of a pod. The plugins are those of the list at ADD. If no record exists (the pod was added
/// before podshaper delegated), they are those of the present list.
///
/// # Errors
/// A plugin's own error. The plugins before it in the list are then not called, as in a runtime's DEL; a second DEL
/// starts from the beginning.
pub fn del(request: &Request, endpoint: &Endpoint) -> Result<()> {
    let kept = record::of(endpoint).unwrap_or_else(|error| {
        log::warn!("DEL does without the network's list at ADD: {error}");
        None
    });
    let list = match (kept, &request.config.delegate) {
        (Some(list), _) => list,
        (None, None) => return Ok(()),
        (None, Some(delegation)) => match list::in_force(&delegation.directory) {
            Ok(list) => list,
            // Without a list the ADD failed, too, if there was one. A DEL that failed would keep a sandbox that never
            // had a network.
            Err(error) => {
                log::warn!("nothing of the network is removed: {error}");
                return Ok(());
            }
        },
    };
    let result = request.prev_result.as_deref().filter(|result| result.get() != "null");
    let result = result.map(|result| result::in_version(result, request.version, list.version)).transpose();
    let result = result.unwrap_or_else(|error| {
        log::warn!("DEL goes on without prevResult: {error}");
        None
    });
    // SPEC.md passes prevResult to DEL from 0.4.0 on.
    let result = result.filter(|_| list.version >= SpecVersion::new(0, 4, 0));
    del_all(&list, request, result.as_deref())?;
    record::forget(endpoint)
}

fn del_all(list: &List, request: &Request, prev_result: Option<&RawValue>) -> Result<()> {
    let call = Call { verb: Cmd::Del, list, offers: offers(request).unwrap_or_default(), prev_result };
    list.plugins.iter().rev().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Calls CHECK of the plugins that the ADD called.
///
/// # Errors
/// The error of the first plugin that fails.
pub fn check(delegation: &Delegation, request: &Request, endpoint: &Endpoint) -> Result<()> {
    let kept = record::of(endpoint)?;
    let list = kept.map_or_else(|| list::in_force(&delegation.directory), Ok)?;
    // A runtime that used this list itself would not call CHECK either.
    if list.disables_check || list.version.allows(Cmd::Check).is_err() {
        return Ok(());
    }
    let result = request.prev_result.as_deref();
    let result = result.map(|result| result::in_version(result, request.version, list.version)).transpose()?;
    let call = Call { verb: Cmd::Check, list: &list, offers: offers(request)?, prev_result: result.as_deref() };
    list.plugins.iter().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Whether pods can be added: there is a list, and its plugins' STATUS succeeds, if the version of the list has STATUS.
///
/// # Errors
/// [`Code::Unavailable`] without a list; the error of the first plugin that fails.
pub fn status(delegation: &Delegation) -> Result<()> {
    let list = list::in_force(&delegation.directory)?;
    if list.version.allows(Cmd::Status).is_err() {
        return Ok(());
    }
    let call = Call { verb: Cmd::Status, list: &list, offers: BTreeMap::new(), prev_result: None };
    list.plugins.iter().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Calls the plugins' GC with the attachments that the runtime names, and forgets the records of all others.
///
/// # Errors
/// The errors of all plugins.
pub fn gc(delegation: &Delegation, request: &Request) -> Result<()> {
    // Without the list of attachments none is known to be stale.
    let Some(valid) = &request.valid_attachments else { return Ok(()) };
    // Before a runtime calls GC, it calls DEL for each attachment that it knows to be stale. The records left over are
    // of attachments that the runtime does not know.
    let forgotten = record::forget_all_but(valid);
    let collected = list::in_force(&delegation.directory).and_then(|list| {
        if list.disables_gc || list.version.allows(Cmd::Gc).is_err() {
            return Ok(());
        }
        let call = Call { verb: Cmd::Gc, list: &list, offers: BTreeMap::new(), prev_result: None };
        error::all(list.plugins.iter().map(|plugin| call.collect(plugin, valid)))
    });
    error::all([forgotten, collected])
}

/// What the runtime offers to plugins, by capability.
fn offers(request: &Request) -> Result<BTreeMap<String, &RawValue>> {
    let Some(raw) = &request.runtime_config else { return Ok(BTreeMap::new()) };
    serde_json::from_str(raw.get())
        .map_err(|cause| Error::because(Code::Decode, "decode \"runtimeConfig\" of the network configuration", cause))
}
