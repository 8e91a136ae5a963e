//! `podshaper install` and `uninstall`: put this program into the CNI bin directory, its entry into the node's
//! conflist, and the systemd units that keep it there; and take all of them away again.
//!
//! A running node is changed while its runtime is working. So each file is replaced in one step, the program before
//! the list that names it, and an edited list keeps every other byte. A lone configuration (`.conf`), which other
//! programs may watch, stays, too: a list of ours that sorts before it has its plugin as the first one. A program that
//! rewrites a conflist (the network's own pod, at its start) takes podshaper out; the node's systemd, if there is one,
//! then installs again. The network does not rewrite a delegating list of ours ([`delegating`]).

mod conflist;
mod delegating;
mod diff;
mod edit;
mod files;
mod multus;
mod place;
mod report;
mod seen;
#[cfg(test)]
mod tests;
mod uninstall;
mod units;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value};

use super::{output, sync};
use crate::error::{Code, Error, Result};
use crate::request::Request;
use conflist::{BANDWIDTH, CAPABILITIES, Conflist, Entry, PODSHAPER};
use edit::{Edit, What};
pub use files::networks;
pub use multus::is as is_multus;
use place::{Place, Target};
use report::{Report, writer};
use seen::Seen;
pub use uninstall::Uninstall;
pub use units::not_enabled;

/// The option with the keys of an installation.
const CONFIG: &str = "--config";
const REPLACE_BANDWIDTH: &str = "--replace-bandwidth";

/// How often `--and-sync` checks again whether a file came or went meanwhile. If files change more often than that,
/// the timer finds the rest.
const MAX_ROUNDS: usize = 20;

/// Put podshaper on this node: the program, an entry at the end of the conflist the runtime uses (the first by name),
/// and systemd units that keep it there and have `podshaper sync` follow what is asked of pods.
#[derive(Args, Debug)]
pub struct Install {
    #[command(flatten)]
    place: Place,
    /// Keys of podshaper's entry, as JSON: '{"max": {"egress": "1G"}}'; replaces the keys of an entry that is there,
    /// except with --and-sync
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Write a conflist of podshaper's own, which runtimes take first and which has podshaper call the plugins of the
    /// network's as it stands at each call: for nodes without systemd, whose network writes its conflist anew
    #[arg(long, conflicts_with = "conflist")]
    delegate: bool,
    /// Take the bandwidth plugin out of the conflist: podshaper does what it does. With --delegate it is not called.
    /// Later installations do so as well, until uninstall
    #[arg(long)]
    replace_bandwidth: bool,
    /// Write no systemd units
    #[arg(long)]
    no_units: bool,
    /// Whom the units' sync asks for the annotations of running pods: /etc/kubernetes/kubelet.conf, for example; the
    /// one of the last installation, unless another is named
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// This node's name in the cluster, for the units' sync [default: the host's name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Directory in which the runtime's CNI library keeps the results of its calls [default: the one of the last
    /// installation, else /var/lib/cni]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Then do what `podshaper sync` does, and say only what was changed. An entry that is there stays as it is. This
    /// is what the units call
    #[arg(long, conflicts_with = "dry_run")]
    and_sync: bool,
    /// Do it only if something came, went or changed since the last --and-sync looked. This is what the units call
    /// after that one
    #[arg(long, requires = "and_sync")]
    if_changed: bool,
}

impl Install {
    /// Installs, and prints what was done.
    ///
    /// # Errors
    /// Before anything is changed: a file that cannot be a conflist, or keys that podshaper would refuse.
    pub fn run(mut self) -> Result<ExitCode> {
        // The program is opened before the root directory changes: its path may not exist on the node.
        let own = File::open("/proc/self/exe")
            .map_err(|cause| Error::because(Code::Io, "read this program from /proc/self/exe", cause))?;
        self.place.enter()?;
        if !self.and_sync {
            self.keep_options();
            return self.install(&own).and_then(|report| output::print(&report)).map(|()| ExitCode::SUCCESS);
        }
        self.install_and_sync(&own)
    }

    /// Installs and syncs again and again, until no file came or went meanwhile.
    fn install_and_sync(&self, own: &File) -> Result<ExitCode> {
        if self.if_changed && Seen::recall() == Some(self.seen()) {
            return Ok(ExitCode::SUCCESS);
        }
        let mut status = ExitCode::SUCCESS;
        for _ in 0..MAX_ROUNDS {
            let before = self.seen();
            // If the network's file does not exist yet, or is being written, pods still get their limits.
            let installed = self.install(own).and_then(|report| output::print(&report));
            if let Err(error) = &installed {
                output::complain(&error.to_string());
            }
            let synced = self.place.check_bpffs().and_then(|()| self.sync().run())?;
            status = if installed.is_ok() { synced } else { ExitCode::FAILURE };
            if self.seen() == before {
                before.keep();
                break;
            }
        }
        Ok(status)
    }

    /// Takes the options that are not given from the units of the last installation. `uninstall` forgets them with the
    /// units.
    fn keep_options(&mut self) {
        let directory = self.place.unit_dir().to_path_buf();
        let before = |option: &str| units::option_before(&directory, option);
        let path_before = |option: &str| before(option).map(PathBuf::from);
        self.replace_bandwidth |= units::has_option(&directory, REPLACE_BANDWIDTH);
        self.kubeconfig = self.kubeconfig.take().or_else(|| path_before("--kubeconfig"));
        self.node = self.node.take().or_else(|| before("--node"));
        self.cache_dir = self.cache_dir.take().or_else(|| path_before("--cache-dir"));
        // --delegate excludes --conflist.
        self.place.keep_conflist(path_before("--conflist").filter(|_| !self.delegate));
    }

    fn sync(&self) -> sync::Arguments {
        let cache_dir = self.cache_dir().to_path_buf();
        sync::Arguments::of_units(self.kubeconfig.clone(), self.node.clone(), self.place.conf_dir(), cache_dir)
    }

    fn cache_dir(&self) -> &Path {
        self.cache_dir.as_deref().unwrap_or(Path::new(sync::CACHE_DIR))
    }

    fn seen(&self) -> Seen {
        Seen::now(&self.place.conf_dir(), &crate::sandboxes::directories(self.cache_dir()))
    }

    fn watched(&self) -> Vec<PathBuf> {
        std::iter::once(self.place.conf_dir()).chain(crate::sandboxes::directories(self.cache_dir())).collect()
    }

    /// Returns what was done, line by line.
    fn install(&self, own: &File) -> Result<String> {
        let keys = self.config.as_deref().map_or(Ok(Map::new()), keys)?;
        // These checks run at a person's call, and not every few seconds.
        if !self.and_sync {
            request_of(&keys, CONFIG)?
                .check_namespaces()
                .map_err(|error| Error::because(Code::Config, CONFIG, error))?;
        }
        let entry = Entry::new(keys)?;
        let mut report = Report::new(self.place.is_dry_run(), self.and_sync);
        let delegates = self.delegates();
        let edits = match delegates {
            true => vec![self.delegating(&entry, &mut report)?],
            false => self.edits(&entry, &mut report)?,
        };
        install_program(own, &self.place, &mut report)?;
        for edit in &edits {
            edit.perform(&mut report)?;
        }
        if delegates {
            self.place.clear_own_lists(&mut report)?;
        }
        self.place.clear_leftovers(&mut report)?;
        self.install_units(&edits, &mut report)?;
        Ok(report.text)
    }

    fn edits(&self, entry: &Entry, report: &mut Report) -> Result<Vec<Edit>> {
        let mut edits = Vec::new();
        for target in &self.place.targets()? {
            let named =
                |error| Error::because(Code::Config, format!("put podshaper into {}", target.path().display()), error);
            edits.push(self.edit_of(target, entry, report).map_err(named)?);
        }
        Ok(edits)
    }

    fn edit_of(&self, target: &Target, entry: &Entry, report: &mut Report) -> Result<Edit> {
        let path = target.path().to_path_buf();
        let before = files::read(&path)?;
        match target {
            Target::List(_) => {
                let after = self.edit(&before, entry, report)?;
                self.warn_about(&Conflist::parse(&after)?, report);
                Ok(Edit { like: path.clone(), path, before: Some(before), after, what: What::Network })
            }
            Target::Delegate(_) => {
                let after = multus::with_delegate(&before, |list| self.edit(list, entry, report))?;
                if !multus::passes_bandwidth(&before) {
                    report.warn(format!(
                        "Multus passes no pod's limits on by {}, whose \"capabilities\" lack \"bandwidth\": write it there, or have \
                         podshaper ask the API server (\"kubeconfig\")",
                        path.display()
                    ));
                }
                let after = after.unwrap_or_else(|| before.clone());
                Ok(Edit { like: path.clone(), path, before: Some(before), after, what: What::Network })
            }
            Target::Lone(_) => {
                let list = target.edited();
                let there = files::text_if_there(&list)?;
                let made = conflist::from_lone(&before)?;
                // The entry of our present list stays, as an entry in a list of the network's does.
                let with_there = there.as_deref().and_then(|there| Conflist::parse(&made).ok()?.with_entry_of(there));
                let after = self.edit(with_there.as_ref().unwrap_or(&made), entry, report)?;
                self.warn_about(&Conflist::parse(&after)?, report);
                Ok(Edit { path: list, before: there, after, like: path, what: What::OwnList })
            }
        }
    }

    /// Whether an entry that is there gets the keys of `--config`. The units have the keys of the last installation,
    /// and only put in a missing entry: an administrator, or the network itself, may have changed an entry since.
    fn replaces_entry(&self) -> bool {
        self.config.is_some() && !self.and_sync
    }

    fn edit(&self, list: &str, entry: &Entry, report: &mut Report) -> Result<String> {
        let parsed = Conflist::parse(list)?;
        let keep = match parsed.entry() {
            None => false,
            Some(there) => {
                let there: Value = serde_json::from_str(there).unwrap_or_default();
                let lacking = CAPABILITIES.iter().find(|name| there["capabilities"][**name] != Value::Bool(true));
                if let Some(name) = lacking.filter(|_| !self.replaces_entry()) {
                    report
                        .warn(format!("its entry is without the capability {name:?}; --config '{{}}' writes it anew"));
                }
                if self.config.is_none() && !self.and_sync {
                    let keys = parsed.entry_keys().unwrap_or_default();
                    request_of(&keys, "its entry of podshaper (--config writes it anew)")?;
                }
                !self.replaces_entry() || there == entry.value()
            }
        };
        let with = if keep { list.to_owned() } else { parsed.with(entry) };
        if self.replace_bandwidth && parsed.has(BANDWIDTH) {
            return Ok(Conflist::parse(&with)?.without(BANDWIDTH));
        }
        Ok(with)
    }

    fn warn_about(&self, list: &Conflist<'_>, report: &mut Report) {
        let primary = list.primary();
        if list.has(BANDWIDTH) {
            report.warn("the bandwidth plugin is in the list as well, and limits every pod a second time, with a queue; --replace-bandwidth takes it out");
        }
        self.warn_about_program(primary, report);
        if let Some(writer) = writer(primary).filter(|_| !self.has_units()) {
            report.warn(format!("{writer}; podshaper is then to be installed again, or put in there"));
        }
    }

    fn warn_about_program(&self, primary: &str, report: &mut Report) {
        let bin_dir = self.place.bin_dir();
        let plain_name = Path::new(primary).file_name() == Some(OsStr::new(primary));
        if plain_name && !bin_dir.join(primary).exists() {
            let elsewhere = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .into_iter()
                .find(|dir| Path::new(dir).join(primary).exists());
            let remedy = elsewhere.map_or("name the runtime's directory with --bin-dir".to_owned(), |dir| {
                format!("--bin-dir {dir} has it")
            });
            report.warn(format!("the plugin {primary:?} of this list is not in {}: {remedy}", bin_dir.display()));
        }
    }

    fn has_units(&self) -> bool {
        !self.no_units && self.place.has_systemd()
    }

    fn install_units(&self, edits: &[Edit], report: &mut Report) -> Result<()> {
        if self.no_units || self.and_sync {
            return Ok(());
        }
        if !self.place.has_systemd() {
            let lacks = match edits.first().map(|edit| edit.what) {
                Some(What::Delegating) => "follows the annotations of running pods",
                _ => {
                    "installs again when a network writes its conflist anew (--delegate does without) and follows annotations"
                }
            };
            report.say(format!(
                "no systemd runs on this host, so nothing was set up that {lacks}: have kubelet call `podshaper install --and-sync` \
                 (install/without-systemd.yaml), or something else every few seconds"
            ));
            return Ok(());
        }
        let directory = self.place.unit_dir();
        let units = units::all(&self.command(edits), &self.watched());
        let missing = units::missing(directory, &units);
        for (name, text) in &missing {
            let path = directory.join(name);
            let before = files::read_if_there(&path)?.unwrap_or_default();
            report.change(&path, &String::from_utf8_lossy(&before), text);
        }
        if report.dry_run {
            return Ok(());
        }
        units::write(directory, &missing)?;
        if self.place.systemd_reads_units() {
            // Units are enabled even if none is missing: a person may have stopped them.
            units::enable()?;
        }
        match missing.as_slice() {
            [] => report.unchanged(format!("{}: podshaper's units are there", directory.display())),
            some => {
                let names: Vec<&str> = some.iter().map(|(name, _)| *name).collect();
                let then = if self.place.systemd_reads_units() { "enabled" } else { "to be enabled by you" };
                report.say(format!("{}: {}, {then}", directory.display(), names.join(", ")));
            }
        }
        Ok(())
    }

    /// The command of the service: this same installation, with the present keys of the entry, and a sync.
    fn command(&self, edits: &[Edit]) -> Vec<String> {
        let keys = edits.iter().find_map(|edit| Conflist::parse(&edit.after).ok()?.entry_keys());
        let shown = |path: &Path| path.display().to_string();
        let options = [
            ("--conf-dir", Some(shown(&self.place.conf_dir()))),
            ("--bin-dir", Some(shown(&self.place.bin_dir()))),
            ("--cache-dir", Some(shown(self.cache_dir()))),
            ("--conflist", self.place.named().map(shown)),
            (
                "--config",
                keys.or_else(|| self.config.as_deref().and_then(|text| serde_json::from_str(text).ok()))
                    .map(|keys| Value::Object(keys).to_string()),
            ),
            ("--kubeconfig", self.kubeconfig.as_deref().map(shown)),
            ("--node", self.node.clone()),
        ];
        let mut command = vec![shown(&self.place.bin_dir().join(PODSHAPER)), "install".into(), "--and-sync".into()];
        command.extend(self.delegates().then(|| "--delegate".to_owned()));
        command.extend(self.replace_bandwidth.then(|| REPLACE_BANDWIDTH.to_owned()));
        for (option, value) in options {
            command.extend(value.into_iter().flat_map(|value| [option.to_owned(), value]));
        }
        command
    }
}

/// Copies the program from the open file, and not from current_exe(): the open file stays readable after it was
/// replaced on disk.
fn install_program(mut own: &File, place: &Place, report: &mut Report) -> Result<()> {
    let bin_dir = place.bin_dir();
    let target = bin_dir.join(PODSHAPER);
    if files::is_same(own, &target) {
        report.unchanged(format!("{} is this program already", target.display()));
        return Ok(());
    }
    let mut program = Vec::new();
    own.rewind()
        .and_then(|()| own.read_to_end(&mut program))
        .map_err(|cause| Error::because(Code::Io, "read this program", cause))?;
    if files::read_if_there(&target)?.is_some_and(|there| there == program) {
        report.unchanged(format!("{} is this program already", target.display()));
        return Ok(());
    }
    if !bin_dir.is_dir() {
        let text = format!(
            "{} is no directory: name the one where the runtime has its CNI plugins with --bin-dir",
            bin_dir.display()
        );
        return Err(Error::new(Code::Config, text));
    }
    if report.dry_run {
        report.say(format!("{} would be this program ({} bytes)", target.display(), program.len()));
        return Ok(());
    }
    files::replace_program(&target, &program).map_err(|error| {
        Error::because(Code::Io, "put this program where the runtime looks (--bin-dir names another directory)", error)
    })?;
    report.say(format!("{}: installed, {} bytes", target.display(), program.len()));
    Ok(())
}

/// podshaper's keys, read as an ADD will read them: a mistake in them would stop every pod of the node.
fn keys(json: &str) -> Result<Map<String, Value>> {
    let wrong = |cause| Error::because(Code::Config, "--config is not a JSON object", cause);
    let keys: Map<String, Value> = serde_json::from_str(json).map_err(wrong)?;
    request_of(&keys, CONFIG)?;
    Ok(keys)
}

/// Checks the keys as an ADD would. `of` names where the keys were given.
fn request_of(keys: &Map<String, Value>, of: &str) -> Result<Request> {
    let request = Request::of_keys(keys).map_err(|error| Error::because(Code::Config, of, error))?;
    match request.unknown_keys.first() {
        Some(key) => Err(Error::new(Code::Config, format!("{of}: {key}"))),
        None => Ok(request),
    }
}
