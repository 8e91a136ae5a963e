//! `podshaper install` and `uninstall`: this program into the CNI bin directory, its entry into the node's conflist, and back.
//!
//! A running node is changed under its runtime, so each file is replaced in one step, the program before the list that names it,
//! and an edited list keeps all that is not podshaper's as it was. Nothing runs afterwards: who writes the conflist anew (the
//! network's own pod, at its start) takes podshaper out, and `install` has to be run again.

mod conflist;
mod diff;
mod files;
#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::Args;
use rscni_plugin::types::Cmd;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::probe;
use crate::request::{self, Env, Request};
pub use files::networks;

use conflist::{BANDWIDTH, CAPABILITIES, Conflist, Entry, PODSHAPER};

/// Where the node's runtime looks.
#[derive(Args, Debug)]
struct Place {
    /// Directory of the runtime's network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Directory of the CNI plugins (Debian's containerd: /usr/lib/cni)
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Conflist to change, by name in --conf-dir or by path
    #[arg(long, value_name = "FILE")]
    conflist: Option<PathBuf>,
    /// Show what would be changed, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Put podshaper on this node: the program, and an entry at the end of the conflist the runtime uses (the first by name).
#[derive(Args, Debug)]
pub struct Install {
    #[command(flatten)]
    place: Place,
    /// Keys of podshaper's entry, as JSON: '{"max": {"egress": "1G"}}'; replaces the keys of an entry that is there
    #[arg(long, value_name = "JSON")]
    config: Option<String>,
    /// Take the bandwidth plugin out of the conflist: podshaper does what it does
    #[arg(long)]
    replace_bandwidth: bool,
}

/// Take podshaper out of the conflists of this node. Running pods keep their limits until they end.
#[derive(Args, Debug)]
pub struct Uninstall {
    #[command(flatten)]
    place: Place,
    /// Remove the program, too. CRI-O, and podman, call it for each pod that was made with it: only when those are gone
    #[arg(long)]
    remove_binary: bool,
}

impl Install {
    /// Installs; returns what was done, line by line.
    ///
    /// # Errors
    /// Before anything is changed: a conflist that cannot be one, keys podshaper would refuse.
    pub fn run(self) -> Result<String> {
        let entry = Entry::new(self.config.as_deref().map_or(Ok(Map::new()), keys)?)?;
        let mut report = Report::new(&self.place);
        let path = self.place.pick()?;
        let before = files::read(&path)?;
        let named = |error| Error::because(Code::Config, format!("put podshaper into {}", path.display()), error);
        let target = if files::is_list(&path) { path.clone() } else { path.with_extension("conflist") };
        let list = if target == path { before.clone() } else { conflist::from_lone(&before).map_err(named)? };
        if target != path && target.exists() {
            let text = format!("{} is there, too, and not used: remove one of them", target.display());
            return Err(named(Error::new(Code::Config, text)));
        }
        let after = self.edit(&list, &entry, &mut report).map_err(named)?;

        report.warn_about(&Conflist::parse(&after).map_err(named)?, &self.place.bin_dir);
        install_program(&self.place, &mut report)?;
        report.change(&target, if target == path { &before } else { "" }, &after);
        if target == path && after == before {
            report.say(format!("{} has podshaper already", path.display()));
        } else if !self.place.dry_run {
            put_in_place(&path, &target, &before, &after)?;
            report.say(format!(
                "{}: podshaper is in it; as it was: {}",
                target.display(),
                files::backup(&path).display()
            ));
        }
        Ok(report.text)
    }

    fn edit(&self, list: &str, entry: &Entry, report: &mut Report<'_>) -> Result<String> {
        let parsed = Conflist::parse(list)?;
        let keep = match parsed.entry() {
            None => false,
            Some(there) => {
                let there: Value = serde_json::from_str(there).unwrap_or_default();
                let lacking = CAPABILITIES.iter().find(|name| there["capabilities"][**name] != Value::Bool(true));
                if let (Some(name), None) = (lacking, &self.config) {
                    report
                        .warn(format!("its entry is without the capability {name:?}; --config '{{}}' writes it anew"));
                }
                self.config.is_none() || there == entry.value()
            }
        };
        let with = if keep { list.to_owned() } else { parsed.with(entry) };
        if self.replace_bandwidth && parsed.has(BANDWIDTH) {
            return Ok(Conflist::parse(&with)?.without(BANDWIDTH));
        }
        Ok(with)
    }
}

/// The backup first, then the list. Of a lone configuration the backup is the file itself, under another name, and it goes last:
/// until then the runtime reads it, since it sorts before the list.
fn put_in_place(path: &Path, target: &Path, before: &str, after: &str) -> Result<()> {
    if target != path {
        files::replace(target, after.as_bytes(), path)?;
        return files::rename(path, &files::backup(path));
    }
    // A list with podshaper in it is not what uninstall is to bring back.
    if Conflist::parse(before).is_ok_and(|list| !list.has(PODSHAPER)) {
        files::replace(&files::backup(path), before.as_bytes(), path)?;
    }
    files::replace(path, after.as_bytes(), path)
}

fn install_program(place: &Place, report: &mut Report<'_>) -> Result<()> {
    // Not current_exe(): this one is readable after the file was replaced, too.
    let own = Path::new("/proc/self/exe");
    let program =
        std::fs::read(own).map_err(|cause| Error::because(Code::Io, "read this program from /proc/self/exe", cause))?;
    let target = place.bin_dir.join(PODSHAPER);
    if files::read_if_there(&target)?.is_some_and(|there| there == program) {
        report.say(format!("{} is this program already", target.display()));
        return Ok(());
    }
    if !place.bin_dir.is_dir() {
        let text = format!(
            "{} is no directory: name the one where the runtime has its CNI plugins with --bin-dir",
            place.bin_dir.display()
        );
        return Err(Error::new(Code::Config, text));
    }
    if place.dry_run {
        report.say(format!("{} would be this program ({} bytes)", target.display(), program.len()));
        return Ok(());
    }
    files::replace_program(&target, &program)?;
    report.say(format!("{}: installed, {} bytes", target.display(), program.len()));
    Ok(())
}

/// podshaper's keys, taken as an ADD will take them: a mistake in them would stop every pod of the node.
fn keys(json: &str) -> Result<Map<String, Value>> {
    let wrong = |cause| Error::because(Code::Config, "--config is not a JSON object", cause);
    let keys: Map<String, Value> = serde_json::from_str(json).map_err(wrong)?;
    if let Some(key) = request::unknown(keys.keys()).first() {
        return Err(Error::new(Code::Config, format!("--config: {}", request::says_unknown(key))));
    }
    let mut stdin = keys.clone();
    stdin.extend(
        [("cniVersion", "1.1.0"), ("name", "install"), ("type", PODSHAPER)]
            .map(|(key, value)| (key.to_owned(), value.into())),
    );
    let named = |name: &str| Some(name.into());
    let env = Env { container_id: named("install"), netns: named("/"), ifname: named("eth0"), ..Env::default() };
    let taken = Request::parse(Cmd::Add, &env, Value::Object(stdin).to_string().as_bytes())
        .and_then(|request| request.limits());
    taken.map_err(|error| Error::because(Code::Config, "--config", error))?;
    Ok(keys)
}

impl Uninstall {
    /// Uninstalls; returns what was done, line by line.
    ///
    /// # Errors
    /// A file could not be read or written.
    pub fn run(self) -> Result<String> {
        let mut report = Report::new(&self.place);
        let lists = match &self.place.conflist {
            Some(_) => vec![self.place.pick()?],
            None => networks(&self.place.conf_dir)?,
        };
        let mut found = false;
        for path in lists.iter().filter(|path| files::is_list(path)) {
            let text = files::read(path)?;
            let parsed = Conflist::parse(&text);
            match parsed {
                Ok(list) if list.has(PODSHAPER) => {
                    found = true;
                    self.take_out(path, &text, &list, &mut report)?;
                }
                Ok(_) => {}
                Err(error) => report.warn(format!("left alone: {}: {error}", path.display())),
            }
        }
        if !found {
            report.say(format!("podshaper is in no conflist of {}", self.place.conf_dir.display()));
        }
        self.remove_program(&mut report)?;
        if !self.place.dry_run {
            probe::forget(Path::new(probe::MEMORY));
        }
        Ok(report.text)
    }

    fn take_out(&self, path: &Path, text: &str, list: &Conflist<'_>, report: &mut Report<'_>) -> Result<()> {
        let without = list.without(PODSHAPER);
        if without == text {
            let text = format!(
                "{}: podshaper is its only plugin: remove the file if the node is to have no network",
                path.display()
            );
            return Err(Error::new(Code::Config, text));
        }
        let original = Original::of(path)?;
        let restores = original.as_ref().is_some_and(|original| original.became(&without));
        let after = original.as_ref().filter(|_| restores).map_or(&without, |original| &original.text);
        report.change(path, text, after);
        if self.place.dry_run {
            return Ok(());
        }
        match original {
            Some(original) if restores && original.lone => {
                files::rename(&original.backup, &original.path)?;
                files::remove(path)?;
                report.say(format!("{} is as it was before install", original.path.display()));
            }
            Some(original) if restores => {
                files::replace(path, original.text.as_bytes(), path)?;
                files::remove(&original.backup)?;
                report.say(format!("{} is as it was before install", path.display()));
            }
            original => {
                files::replace(path, without.as_bytes(), path)?;
                report.say(format!("{}: podshaper's entry is out", path.display()));
                if let Some(Original { backup, .. }) = original {
                    let changed = "it was changed after install, so no more was undone; as it was before";
                    report.warn(format!("{}: {changed}: {}", path.display(), backup.display()));
                }
            }
        }
        Ok(())
    }

    fn remove_program(&self, report: &mut Report<'_>) -> Result<()> {
        let program = self.place.bin_dir.join(PODSHAPER);
        if !program.exists() {
            return Ok(());
        }
        if !self.remove_binary {
            report.say(format!("{} is left for the pods that were made with it (--remove-binary)", program.display()));
            return Ok(());
        }
        report.say(format!("{}: removed", program.display()));
        if self.place.dry_run { Ok(()) } else { files::remove(&program) }
    }
}

/// What install kept of a conflist, or of the lone configuration it made the conflist of.
struct Original {
    backup: PathBuf,
    path: PathBuf,
    lone: bool,
    text: String,
}

impl Original {
    fn of(list: &Path) -> Result<Option<Self>> {
        for extension in ["conflist", "conf", "json"] {
            let path = list.with_extension(extension);
            let backup = files::backup(&path);
            if let Some(bytes) = files::read_if_there(&backup)? {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                return Ok(Some(Self { backup, lone: !files::is_list(&path), path, text }));
            }
        }
        Ok(None)
    }

    /// Whether `without`, a list that podshaper was taken out of, is what install had put podshaper into.
    fn became(&self, without: &str) -> bool {
        let list = if self.lone { conflist::from_lone(&self.text) } else { Ok(self.text.clone()) };
        list.is_ok_and(|list| {
            let replaced = Conflist::parse(&list).map(|parsed| parsed.without(BANDWIDTH));
            list == without || replaced.is_ok_and(|replaced| replaced == without)
        })
    }
}

impl Place {
    fn pick(&self) -> Result<PathBuf> {
        if let Some(named) = &self.conflist {
            let path = if named.components().count() > 1 { named.clone() } else { self.conf_dir.join(named) };
            // An edit replaces the file; a link to it stays one.
            return path
                .canonicalize()
                .map_err(|cause| Error::because(Code::Io, format!("find {}", path.display()), cause));
        }
        let first = networks(&self.conf_dir)?.into_iter().next();
        let path = first.ok_or_else(|| {
            let text = format!(
                "{} has no network yet (*.conflist, *.conf, *.json): install the cluster's network first",
                self.conf_dir.display()
            );
            Error::new(Code::Config, text)
        })?;
        path.canonicalize().map_err(|cause| Error::because(Code::Io, format!("find {}", path.display()), cause))
    }
}

/// What a person is told.
struct Report<'a> {
    dry_run: bool,
    place: &'a Place,
    text: String,
}

impl<'a> Report<'a> {
    fn new(place: &'a Place) -> Self {
        Self { dry_run: place.dry_run, place, text: String::new() }
    }

    fn say(&mut self, line: impl AsRef<str>) {
        self.text.push_str(line.as_ref());
        self.text.push('\n');
    }

    fn warn(&mut self, line: impl AsRef<str>) {
        self.say(format!("warning: {}", line.as_ref()));
    }

    fn change(&mut self, path: &Path, before: &str, after: &str) {
        if self.dry_run {
            self.text.push_str(&diff::unified(&path.display().to_string(), before, after));
        }
    }

    fn warn_about(&mut self, list: &Conflist<'_>, bin_dir: &Path) {
        let primary = list.primary();
        if list.has(BANDWIDTH) {
            self.warn("the bandwidth plugin is in the list as well, and limits every pod a second time, with a queue; --replace-bandwidth takes it out");
        }
        let plain_name = Path::new(primary).file_name() == Some(OsStr::new(primary));
        if plain_name && !bin_dir.join(primary).exists() {
            let elsewhere = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .into_iter()
                .find(|dir| Path::new(dir).join(primary).exists());
            let remedy = elsewhere.map_or("name the runtime's directory with --bin-dir".to_owned(), |dir| {
                format!("--bin-dir {dir} has it")
            });
            self.warn(format!(
                "the plugin {primary:?} of this list is not in {}: {remedy}",
                self.place.bin_dir.display()
            ));
        }
        if let Some(writer) = writer(primary) {
            self.warn(format!("{writer}; podshaper is then to be installed again, or put in there"));
        }
    }
}

/// Who writes the conflist of this plugin anew, and from what.
fn writer(primary: &str) -> Option<&'static str> {
    match primary {
        "flannel" => Some("flannel's pod writes this file anew when it starts, from the ConfigMap kube-flannel-cfg"),
        "calico" => Some("calico's pod writes this file anew when it starts, from the ConfigMap calico-config"),
        "cilium-cni" => Some(
            "cilium's agent writes this file anew, at once unless cni.exclusive=false, from cni.configMap (cni.customConf=true) if set",
        ),
        "weave-net" => Some("weave's pod may write this file anew when it is upgraded"),
        "multus" | "multus-shim" => Some("multus may write this file anew when it starts"),
        _ => None,
    }
}
