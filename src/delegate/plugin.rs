//! One call of one plugin of the network's list: its configuration, derived according to SPEC.md ("Deriving execution
//! configuration from plugin configuration"), its environment, and its answer.
//!
//! The environment is podshaper's own, and so the runtime's, except for the verb. There is no timeout: a call may last
//! as long as the runtime lets podshaper's own call last.

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rscni_plugin::error::Error as CniError;
use rscni_plugin::types::{CNI_COMMAND, CNI_PATH, Cmd, GcAttachment};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::list::{List, Plugin};
use crate::error::{Code, Error, Result, quoted};
use crate::sys;

/// How often, and at which interval, a program is tried again that is being written at this moment. libcni retries five
/// times in a second.
const BUSY_TRIES: u32 = 50;
const BUSY: Duration = Duration::from_millis(100);

/// The part of a call that is the same for all plugins of a list.
pub(super) struct Call<'a> {
    pub(super) verb: Cmd,
    pub(super) list: &'a List,
    /// What the runtime offers, by capability.
    pub(super) offers: BTreeMap<String, &'a RawValue>,
    pub(super) prev_result: Option<&'a RawValue>,
}

/// The error JSON of a plugin that fails. The CNI library's own type would replace the plugin's text where it knows the
/// code.
#[derive(Deserialize)]
struct Failure {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// The keys of a configuration, with their values unparsed.
type Keys = BTreeMap<String, Box<RawValue>>;

impl Call<'_> {
    /// Calls ADD. The result is kept byte for byte.
    pub(super) fn add(&self, plugin: &Plugin) -> Result<Box<RawValue>> {
        let answer = self.make(plugin)?;
        let text = || format!("{}: its result ({} bytes)", self.what(plugin), answer.len());
        serde_json::from_slice(&answer).map_err(|cause| Error::because(Code::Decode, text(), cause))
    }

    /// Calls GC.
    pub(super) fn collect(&self, plugin: &Plugin, valid: &[GcAttachment]) -> Result<()> {
        let mut keys = self.keys(plugin)?;
        // libcni passes the list under both names: an earlier draft of the specification had the second.
        for name in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            self.insert(&mut keys, plugin, name, &valid)?;
        }
        self.run(plugin, &keys).map(drop)
    }

    /// Makes a call and returns the plugin's output.
    ///
    /// # Errors
    /// The plugin's own error, or the reason why it could not be called.
    pub(super) fn make(&self, plugin: &Plugin) -> Result<Vec<u8>> {
        self.run(plugin, &self.keys(plugin)?)
    }

    /// The configuration for one execution.
    fn keys(&self, plugin: &Plugin) -> Result<Keys> {
        let mut keys: Keys = serde_json::from_str(plugin.text.get())
            .map_err(|cause| Error::because(Code::Decode, self.what(plugin), cause))?;
        self.insert(&mut keys, plugin, "name", &self.list.network())?;
        self.insert(&mut keys, plugin, "cniVersion", &self.list.version)?;
        // The runtime offers everything that podshaper's list declares. A plugin gets only what it declares itself.
        let declared = |(name, _): &(&String, &&RawValue)| plugin.capabilities.contains(*name);
        let offers: BTreeMap<_, _> = self.offers.iter().filter(declared).collect();
        if !offers.is_empty() {
            self.insert(&mut keys, plugin, "runtimeConfig", &offers)?;
        }
        if let Some(result) = self.prev_result {
            keys.insert("prevResult".to_owned(), result.to_owned());
        }
        Ok(keys)
    }

    fn insert(&self, keys: &mut Keys, plugin: &Plugin, name: &str, value: &impl Serialize) -> Result<()> {
        let failed = |cause| Error::because(Code::Decode, format!("{}: give it {name:?}", self.what(plugin)), cause);
        keys.insert(name.to_owned(), to_raw_value(value).map_err(failed)?);
        Ok(())
    }

    fn run(&self, plugin: &Plugin, keys: &Keys) -> Result<Vec<u8>> {
        let failed = |cause: io::Error| Error::because(Code::Io, self.what(plugin), cause);
        let stdin = serde_json::to_vec(keys).map_err(|cause| failed(cause.into()))?;
        let program = self.program(plugin)?;
        let mut child = start(&program, self.verb).map_err(failed)?;
        let pipe = child.stdin.take();
        let ended = thread::scope(|scope| {
            // A plugin may answer before it has read all of its input.
            scope.spawn(|| pipe.map(|mut pipe| pipe.write_all(&stdin)));
            child.wait_with_output()
        });
        let ended = ended.map_err(failed)?;
        if ended.status.success() { Ok(ended.stdout) } else { Err(self.error(plugin, ended.status, &ended.stdout)) }
    }

    /// The program that the runtime would find (SPEC.md, "Execution protocol"): in the directories of `CNI_PATH`, in
    /// their order.
    fn program(&self, plugin: &Plugin) -> Result<PathBuf> {
        let path = env::var_os(CNI_PATH).unwrap_or_default();
        let is_name = !plugin.kind.contains('/');
        let found = env::split_paths(&path).map(|directory| directory.join(&plugin.kind)).find(|path| path.is_file());
        found.filter(|_| is_name).ok_or_else(|| {
            let text = format!(
                "{}: there is no such program in {:?} ({CNI_PATH}): the network's own pod, or you, put it there",
                self.what(plugin),
                path
            );
            Error::new(Code::Config, text)
        })
    }

    fn error(&self, plugin: &Plugin, status: ExitStatus, answer: &[u8]) -> Error {
        match serde_json::from_slice(answer) {
            Ok(Failure { code, msg, details }) => {
                Error::of_plugin(self.what(plugin), CniError::Custom(code, msg, details))
            }
            Err(_) if answer.trim_ascii().is_empty() => {
                Error::new(Code::Io, format!("{}: it failed and did not say why: {status}", self.what(plugin)))
            }
            Err(_) => {
                let said = quoted(&String::from_utf8_lossy(answer));
                Error::new(Code::Decode, format!("{}: it failed: {status}, and said {said}", self.what(plugin)))
            }
        }
    }

    fn what(&self, plugin: &Plugin) -> String {
        let verb = <&str>::from(self.verb);
        format!("{verb} by the plugin {} of {}", quoted(&plugin.kind), self.list.file.display())
    }
}

/// Starts a program. A runtime that gives up kills podshaper alone and calls DEL. A plugin's ADD that went on after
/// that would make an interface that no DEL removes.
fn start(program: &PathBuf, verb: Cmd) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.env(CNI_COMMAND, <&str>::from(verb)).stdin(Stdio::piped()).stdout(Stdio::piped());
    sys::kill_with_parent(&mut command);
    for _ in 1..BUSY_TRIES {
        match command.spawn() {
            // The network's pod is replacing the program at this moment.
            Err(cause) if cause.kind() == io::ErrorKind::ExecutableFileBusy => thread::sleep(BUSY),
            started => return started,
        }
    }
    command.spawn()
}
