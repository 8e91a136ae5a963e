//! The network's list, called in the runtime's place: podshaper is then the only plugin of the list that the runtime uses
//! ([`FILE`], which `podshaper install --delegate` writes), and at each call it reads the network's own as it stands ([`list`]).
//!
//! A network that writes its list anew takes podshaper out of it; what delegates to that list stays. Each verb goes the way that SPEC.md
//! ("Section 3: Execution of Network Configurations") has a runtime go, as libcni does: [`plugin`] makes one call, [`result`] speaks the
//! version of the runtime, which may be another one than the list's. Surprising: a DEL has to call the plugins of the ADD, whatever the
//! list says by then, so each ADD leaves its list behind ([`record`]).

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

/// The list of podshaper's own, in the directory of the network's: runtimes take the first by name.
pub const FILE: &str = "00-podshaper.conflist";
/// The name of its network.
pub const NETWORK: &str = "podshaper";
/// `type` of podshaper's entry in any list.
const PODSHAPER: &str = "podshaper";
/// `type` of the plugin whose limits podshaper's would come on top of.
const BANDWIDTH: &str = "bandwidth";

/// The network of an ADD, made.
pub struct Added<'a> {
    request: &'a Request,
    endpoint: &'a Endpoint,
    list: List,
    result: Box<RawValue>,
}

/// Makes the network of a pod. What a plugin that fails has made, and those before it, is removed again.
///
/// # Errors
/// [`Code::Unavailable`] without a list, a plugin's own error, and what is wrong with the directories.
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
    // Before anything is made: podshaper may be killed, and then the DEL that follows knows what to undo.
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
    /// What the last plugin has answered, in the version of the runtime.
    pub fn reply(&self) -> Result<Box<RawValue>> {
        result::in_version(&self.result, self.list.version, self.request.version)
    }

    /// Removes it again: podshaper itself could not do its part.
    pub fn undo(&self) {
        undo(&self.list, self.request, self.endpoint, Some(&self.result));
    }
}

/// A failed ADD is followed by a DEL of the runtime. It does what this one could not, which is why nothing but a log tells of it.
fn undo(list: &List, request: &Request, endpoint: &Endpoint, result: Option<&RawValue>) {
    let undone = del_all(list, request, result).and_then(|()| record::forget(endpoint));
    if let Err(error) = undone {
        log::warn!("undo a failed ADD (the runtime's DEL tries again): {error}");
    }
}

/// Removes the network of a pod: by the list of its ADD or, where none was kept (it was added before podshaper delegated), by the one of now.
///
/// # Errors
/// A plugin's own. The plugins before it are then not called, as in a runtime's DEL, and a second DEL begins anew.
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
            // So ended the ADD, too, if there was one. A DEL that failed would keep a sandbox that never had a network.
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
    // SPEC.md has prevResult in DEL from 0.4.0 on.
    let result = result.filter(|_| list.version >= SpecVersion::new(0, 4, 0));
    del_all(&list, request, result.as_deref())?;
    record::forget(endpoint)
}

fn del_all(list: &List, request: &Request, prev_result: Option<&RawValue>) -> Result<()> {
    let call = Call { verb: Cmd::Del, list, offers: offers(request).unwrap_or_default(), prev_result };
    list.plugins.iter().rev().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Has the plugins of the ADD look whether all is as they made it.
///
/// # Errors
/// The first plugin's own.
pub fn check(delegation: &Delegation, request: &Request, endpoint: &Endpoint) -> Result<()> {
    let kept = record::of(endpoint)?;
    let list = kept.map_or_else(|| list::in_force(&delegation.directory), Ok)?;
    // A runtime with this list would not call them either.
    if list.disables_check || list.version.allows(Cmd::Check).is_err() {
        return Ok(());
    }
    let result = request.prev_result.as_deref();
    let result = result.map(|result| result::in_version(result, request.version, list.version)).transpose()?;
    let call = Call { verb: Cmd::Check, list: &list, offers: offers(request)?, prev_result: result.as_deref() };
    list.plugins.iter().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Whether pods can be added: there is a list, and its plugins say so where its version has them asked.
///
/// # Errors
/// [`Code::Unavailable`] without a list; the first plugin's own.
pub fn status(delegation: &Delegation) -> Result<()> {
    let list = list::in_force(&delegation.directory)?;
    if list.version.allows(Cmd::Status).is_err() {
        return Ok(());
    }
    let call = Call { verb: Cmd::Status, list: &list, offers: BTreeMap::new(), prev_result: None };
    list.plugins.iter().try_for_each(|plugin| call.make(plugin).map(drop))
}

/// Has the plugins remove what belongs to none of the attachments that the runtime names, and forgets their records.
///
/// # Errors
/// Those of all plugins.
pub fn gc(delegation: &Delegation, request: &Request) -> Result<()> {
    // Without the attachments nothing is known to be stale.
    let Some(valid) = &request.valid_attachments else { return Ok(()) };
    // Before it calls GC, a runtime calls DEL for each attachment that it knows to be stale. These it does not know.
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

/// What the runtime has for plugins, by capability.
fn offers(request: &Request) -> Result<BTreeMap<String, &RawValue>> {
    let Some(raw) = &request.runtime_config else { return Ok(BTreeMap::new()) };
    serde_json::from_str(raw.get())
        .map_err(|cause| Error::because(Code::Decode, "decode \"runtimeConfig\" of the network configuration", cause))
}
