//! The network's list: the file that a runtime would use if podshaper's own list did not exist. It is read as libcni
//! reads it (libcni/conf.go: `NetworkConfFromFile`, `ConfFiles`).
//!
//! A network may be writing its file at this moment, in place (`cp` of flannel's init container) or by renaming another
//! file. If the list cannot be read, podshaper tries again for a second, where libcni gives up: libcni reads a file
//! after it has changed, podshaper when a pod is waiting.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use rscni_plugin::version::{PluginInfo, SpecVersion};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{BANDWIDTH, FILE, PODSHAPER};
use crate::error::{Code, Error, Result, quoted};
use crate::pod::NetworkName;
use crate::request::{DELEGATE, Delegation};

/// The file name extensions that libcni, and so every runtime, looks for.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];
/// How long a network may take to write its list.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);
const READ_AGAIN_AFTER: Duration = Duration::from_millis(10);
/// Multus' plugins. They have the first other network of the same directory make the interface. This network may be
/// podshaper's own list, which must not call Multus again.
pub const MULTUS: [&str; 2] = ["multus", "multus-shim"];

/// A network's list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct List {
    /// The file of the list.
    pub file: PathBuf,
    #[serde(serialize_with = "as_text")]
    pub(super) name: NetworkName,
    /// The highest of the list's versions that podshaper supports.
    #[serde(rename = "cniVersion")]
    pub(super) version: SpecVersion,
    #[serde(rename = "disableCheck")]
    pub(super) disables_check: bool,
    #[serde(rename = "disableGC")]
    pub(super) disables_gc: bool,
    /// The plugins without podshaper, which is already running.
    pub plugins: Vec<Plugin>,
}

/// One of the list's plugins, as it stands in the list.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Plugin {
    #[serde(skip)]
    pub(super) kind: String,
    /// The capabilities that the plugin declares: the runtime's offers that it is given.
    #[serde(skip)]
    pub capabilities: BTreeSet<String>,
    pub(super) text: Box<RawValue>,
}

/// The keys of a list, or of one plugin alone.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Keys {
    #[serde(default)]
    name: String,
    #[serde(default)]
    cni_version: Option<String>,
    #[serde(default)]
    cni_versions: Vec<String>,
    #[serde(default)]
    disable_check: Value,
    #[serde(default, rename = "disableGC")]
    disable_gc: Value,
    #[serde(default)]
    load_only_inlined_plugins: Value,
    #[serde(default)]
    plugins: Vec<Box<RawValue>>,
}

/// The keys of a plugin that a runtime reads.
#[derive(Deserialize)]
struct PluginKeys {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    capabilities: Option<std::collections::BTreeMap<String, bool>>,
    #[serde(rename = "delegate", default)]
    delegation: Value,
}

/// The content of a file in the directory.
enum Found {
    Network(List),
    /// Multus' own configuration, or a list that delegates.
    PassedOver,
}

/// Every network configuration of a directory, in the order in which runtimes try them.
///
/// # Errors
/// The kernel's error.
pub fn configurations(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_network = path.extension().is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known));
        if is_network && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a file is a list of plugins, and not one plugin alone. Runtimes tell the two apart by the name.
pub fn is_list(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "conflist")
}

/// The delegation in a list; `None` if the list is not a delegating list of podshaper's.
pub fn delegation(text: &str) -> Option<Delegation> {
    let Keys { plugins, .. } = serde_json::from_str(text).ok()?;
    let keys = plugins.iter().filter_map(|raw| serde_json::from_str::<PluginKeys>(raw.get()).ok());
    let ours = keys.filter(|keys| keys.kind == PODSHAPER).find(|keys| !keys.delegation.is_null())?;
    serde_json::from_value(ours.delegation).ok()
}

/// The network's list. Waits for a moment if the list cannot be read yet.
///
/// # Errors
/// [`Code::Unavailable`] if there is no list, or if it cannot be read.
pub fn in_force(directory: &Path) -> Result<List> {
    let start = Instant::now();
    loop {
        match find(directory) {
            Err(_) if start.elapsed() < WRITTEN_WITHIN => thread::sleep(READ_AGAIN_AFTER),
            found => return found.inspect(|list| log::debug!("the network's list is {}", list.file.display())),
        }
    }
}

/// The network's list at this moment: the first file of the directory, by name, that is neither podshaper's nor Multus'
/// own.
///
/// # Errors
/// [`Code::Unavailable`] if there is no list, or if the first one cannot be read. The next file is not tried: it is
/// another network, in which pods must not be placed.
pub fn find(directory: &Path) -> Result<List> {
    let files = configurations(directory).map_err(|cause| {
        let text = format!("list {}, where the network's list is to be (key {DELEGATE:?})", directory.display());
        Error::because(Code::Unavailable, text, cause)
    })?;
    for file in files.into_iter().filter(|file| file.file_name().is_none_or(|name| name != FILE)) {
        let text = || format!("read {}, the network's list that podshaper delegates to", file.display());
        match read(&file).map_err(|cause| Error::because(Code::Unavailable, text(), cause))? {
            Found::Network(list) => return Ok(list),
            Found::PassedOver => {}
        }
    }
    let text = format!(
        "{} has no network's list beside podshaper's own, which delegates to it (*.conflist, *.conf, *.json): the cluster's network is \
         not installed, or has not written it yet",
        directory.display()
    );
    Err(Error::new(Code::Unavailable, text))
}

fn read(file: &Path) -> Result<Found> {
    let text = fs::read_to_string(file).map_err(|cause| Error::because(Code::Io, "open it", cause))?;
    let mut keys = parse(&text)?;
    if !is_list(file) {
        keys.plugins = vec![raw(&text)?];
    } else if !is_true(&keys.load_only_inlined_plugins) {
        keys.plugins.extend(beside(file, &keys.name)?);
    }
    List::of(file.to_path_buf(), keys)
}

/// The plugins of a list that are files of their own: `NAME/*.conf` beside the list, for libcni 1.3 and later.
fn beside(file: &Path, name: &str) -> Result<Vec<Box<RawValue>>> {
    // The name must be a plain file name, or the path would lead to another directory.
    if name.parse::<NetworkName>().is_err() {
        return Ok(Vec::new());
    }
    let found = match configurations(&file.with_file_name(name)) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => {
            found.map_err(|cause| Error::because(Code::Io, format!("list the directory {name:?} beside it"), cause))?
        }
    };
    let plugin = |path: &PathBuf| {
        let text = || format!("read {}, a plugin of it", path.display());
        let read = fs::read_to_string(path).map_err(|cause| Error::because(Code::Io, text(), cause))?;
        raw(&read)
    };
    found.iter().filter(|path| path.extension().is_some_and(|extension| extension == "conf")).map(plugin).collect()
}

fn parse(text: &str) -> Result<Keys> {
    // serde accepts an array for a struct, too.
    let object = raw(text)?;
    if !object.get().starts_with('{') {
        return Err(Error::new(Code::Decode, "it is not a JSON object"));
    }
    serde_json::from_str(text).map_err(no_configuration)
}

fn raw(text: &str) -> Result<Box<RawValue>> {
    serde_json::from_str(text).map_err(no_configuration)
}

fn no_configuration(cause: serde_json::Error) -> Error {
    Error::because(Code::Decode, "it is not the JSON of a CNI configuration", cause)
}

/// libcni also accepts the string "true".
fn is_true(value: &Value) -> bool {
    value == true || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("true"))
}

impl List {
    fn of(file: PathBuf, keys: Keys) -> Result<Found> {
        let Keys { name, cni_version, cni_versions, disable_check, disable_gc, plugins, .. } = keys;
        let mut chain = Vec::new();
        for text in plugins {
            let keys: PluginKeys = serde_json::from_str(text.get()).map_err(no_configuration)?;
            if MULTUS.contains(&keys.kind.as_str()) || keys.kind == PODSHAPER && !keys.delegation.is_null() {
                return Ok(Found::PassedOver);
            }
            if keys.kind.is_empty() {
                return Err(Error::new(Code::Decode, "one of its plugins has no \"type\""));
            }
            let capabilities = keys.capabilities.into_iter().flatten().filter(|(_, has)| *has).map(|(name, _)| name);
            chain.push(Plugin { kind: keys.kind, capabilities: capabilities.collect(), text });
        }
        let (disables_check, disables_gc) = (is_true(&disable_check), is_true(&disable_gc));
        let version = highest(cni_version.iter().chain(&cni_versions), cni_version.as_deref())?;
        let mut list = Self { file, name: name.parse()?, version, disables_check, disables_gc, plugins: chain };
        list.leave_out(PODSHAPER);
        if list.plugins.is_empty() { Err(list.lacks_plugins()) } else { Ok(Found::Network(list)) }
    }

    /// The list that a record holds.
    pub(super) fn of_record(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Place {
            file: PathBuf,
        }
        let Place { file } = serde_json::from_str(text).map_err(no_configuration)?;
        match Self::of(file, parse(text)?)? {
            Found::Network(list) => Ok(list),
            Found::PassedOver => Err(Error::new(Code::Decode, "it is of no network")),
        }
    }

    /// Removes the plugins of this type from the list.
    pub(super) fn leave_out(&mut self, kind: &str) {
        self.plugins.retain(|plugin| plugin.kind != kind);
    }

    pub(super) fn lacks_plugins(&self) -> Error {
        let text = format!("{} has no plugin that makes an interface in its \"plugins\"", self.file.display());
        Error::new(Code::Unavailable, text)
    }

    /// The plugin that makes the interface.
    pub fn primary(&self) -> &str {
        self.plugins.first().map_or("", |plugin| &plugin.kind)
    }

    /// The name of the network.
    pub fn network(&self) -> &str {
        self.name.as_str()
    }

    /// Whether the bandwidth plugin is in it.
    pub fn has_bandwidth(&self) -> bool {
        self.plugins.iter().any(|plugin| plugin.kind == BANDWIDTH)
    }
}

/// Chooses the version as libcni 1.2 and later do: the highest supported one. `declared` appears in the error if none
/// is supported.
fn highest<'a>(all: impl Iterator<Item = &'a String>, declared: Option<&str>) -> Result<SpecVersion> {
    let known = PluginInfo::default();
    let parsed = all.filter_map(|text| text.parse::<SpecVersion>().ok());
    let highest = parsed.filter(|version| known.supported_versions().contains(version)).max();
    highest.ok_or_else(|| {
        let shown = declared.map_or("missing".to_owned(), quoted);
        let text = format!(
            "its \"cniVersion\" is {shown}, and podshaper speaks 0.3.0 to 1.1.0: raise it if every plugin of the list allows"
        );
        Error::new(Code::IncompatibleVersion, text)
    })
}

fn as_text<S: serde::Serializer>(name: &NetworkName, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(directory.path().join(name), text).unwrap());
        directory
    }

    fn chain(name: &str, plugins: &str) -> String {
        format!(r#"{{"cniVersion": "0.3.1", "name": {name:?}, "plugins": [{plugins}]}}"#)
    }

    /// The name of the network that is delegated to, and its plugins.
    fn found(files: &[(&str, &str)]) -> Result<(String, Vec<String>), String> {
        let directory = directory(files);
        let list = find(directory.path());
        let shown = list.map(|list| {
            let kinds = list.plugins.iter().map(|plugin| plugin.kind.clone()).collect();
            (list.network().to_owned(), kinds)
        });
        shown.map_err(|error| {
            assert_eq!(error.code(), Code::Unavailable);
            error.to_string().replace(&format!("{}/", directory.path().display()), "")
        })
    }

    #[test]
    fn the_list_is_the_one_that_a_runtime_would_take_without_ours() {
        let ours = chain("podshaper", r#"{"type": "podshaper", "delegate": {"directory": "/a"}}"#);
        let (first, second) = (chain("a", r#"{"type": "bridge"}"#), chain("b", r#"{"type": "ptp"}"#));
        let lone = r#"{"cniVersion": "1.0.0", "name": "lone", "type": "ovn", "ipam": {}}"#;
        let multus = r#"{"cniVersion": "0.3.1", "name": "m", "type": "multus"}"#;
        let both = chain("a", r#"{"type": "bridge"}, {"type": "podshaper", "max": {}}, {"type": "portmap"}"#);
        let is =
            |name: &str, kinds: &[&str]| Ok((name.to_owned(), kinds.iter().map(|kind| (*kind).to_owned()).collect()));
        for (files, expected) in [
            (vec![(FILE, &*ours), ("10-a.conflist", &first), ("20-b.conflist", &second)], is("a", &["bridge"])),
            (vec![(FILE, &ours), ("20-b.conflist", &second), ("10.json", lone)], is("lone", &["ovn"])),
            (vec![(FILE, &ours), ("10-ovn.conf", lone), ("9.txt", &first)], is("lone", &["ovn"])),
            // A list of ours is recognized under any name; and Multus would call it back.
            (vec![(FILE, "{"), ("01-copy.conflist", &ours), ("20-b.conflist", &second)], is("b", &["ptp"])),
            (vec![("00-multus.conf", multus), (FILE, &ours), ("20-b.conflist", &second)], is("b", &["ptp"])),
            // Podshaper is running already, so it is left out.
            (vec![(FILE, &ours), ("10-a.conflist", &both)], is("a", &["bridge", "portmap"])),
        ] {
            assert_eq!(found(&files), expected, "{files:?}");
        }
    }

    #[test]
    fn where_there_is_no_list_that_can_be_read_no_other_is_taken() {
        let second = chain("b", r#"{"type": "ptp"}"#);
        let no_version = second.replace("0.3.1", "0.2.0");
        let only_podshaper = chain("a", r#"{"type": "podshaper"}"#);
        for (first, expected) in [
            ("", "it is not the JSON of a CNI configuration: EOF"),
            (&second[..40], "it is not the JSON of a CNI configuration: EOF"),
            ("[]", "it is not a JSON object"),
            (r#"{"cniVersion": "1.0.0", "name": "a"}"#, "10-a.conflist has no plugin that makes an interface"),
            (&only_podshaper, "10-a.conflist has no plugin that makes an interface"),
            (&no_version, "its \"cniVersion\" is \"0.2.0\", and podshaper speaks"),
            (&chain("../b", r#"{"type": "ptp"}"#), "\"../b\" is not a network name"),
            (&chain("b", r#"{"kind": "ptp"}"#), "one of its plugins has no \"type\""),
        ] {
            let error = found(&[("10-a.conflist", first), ("20-b.conflist", &second)]).unwrap_err();
            assert!(error.starts_with("read 10-a.conflist, the network's list") && error.contains(expected), "{error}");
        }
        let error = found(&[(FILE, &second)]).unwrap_err();
        assert!(error.contains(" has no network's list beside podshaper's own"), "{error}");
        assert_eq!(find(Path::new("/nowhere")).unwrap_err().code(), Code::Unavailable);
    }

    #[test]
    fn a_list_that_is_being_written_is_waited_for() {
        let text = chain("a", r#"{"type": "bridge"}"#);
        let directory = directory(&[("10-a.conflist", &text[..30])]);
        let list = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(5 * READ_AGAIN_AFTER);
                fs::write(directory.path().join("10-a.conflist"), &text).unwrap();
            });
            in_force(directory.path())
        });
        assert_eq!(list.unwrap().network(), "a");
        let start = Instant::now();
        fs::remove_file(directory.path().join("10-a.conflist")).unwrap();
        assert!(in_force(directory.path()).is_err() && start.elapsed() >= WRITTEN_WITHIN);
    }

    #[test]
    fn a_list_says_what_libcni_reads_in_it() {
        let text = r#"{"cniVersion": "0.4.0", "cniVersions": ["1.0.0", "9.0.0", "0.3.1"], "name": "a", "disableCheck": "True",
            "plugins": [{"type": "x", "capabilities": {"portMappings": true, "mac": false}}, {"type": "y", "capabilities": null}]}"#;
        let directory = directory(&[("10-a.conflist", text)]);
        let beside = directory.path().join("a");
        fs::create_dir(&beside).unwrap();
        fs::write(beside.join("20.conf"), r#"{"type": "late"}"#).unwrap();
        fs::write(beside.join("10.conf"), r#"{"type": "early"}"#).unwrap();
        fs::write(beside.join("10.json"), "no plugin of it").unwrap();
        let list = find(directory.path()).unwrap();
        let kinds = |list: &List| list.plugins.iter().map(|plugin| plugin.kind.clone()).collect::<Vec<_>>();
        assert_eq!(kinds(&list), ["x", "y", "early", "late"]);
        assert_eq!((list.version, list.disables_check, list.disables_gc), (SpecVersion::new(1, 0, 0), true, false));
        assert_eq!(list.plugins[0].capabilities, BTreeSet::from(["portMappings".to_owned()]));
        assert!(list.plugins[1].capabilities.is_empty());
        // A record holds the same list, whatever is in the directory later.
        let record = List::of_record(&serde_json::to_string(&list).unwrap()).unwrap();
        assert_eq!((&record.file, kinds(&record), record.version), (&list.file, kinds(&list), list.version));
        assert_eq!((record.disables_check, &record.plugins[0].capabilities), (true, &list.plugins[0].capabilities));
        let inlined = text.replacen('{', r#"{"loadOnlyInlinedPlugins": true, "#, 1);
        fs::write(directory.path().join("10-a.conflist"), inlined).unwrap();
        assert_eq!(kinds(&find(directory.path()).unwrap()), ["x", "y"]);
    }
}
