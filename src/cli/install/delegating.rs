//! `podshaper install --delegate`: writes podshaper's own conflist, which delegates to the network's.
//!
//! The file stays valid when the network rewrites its list: of the network it holds only the directory of that list,
//! and the capabilities that its plugins have declared. Each later `install` keeps delegating, until `uninstall`.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::conflist::{self, Conflist, Entry};
use super::{Edit, Install, Report, What, files, multus, networks};
use crate::delegate::list::{self, List};
use crate::delegate::{FILE, NETWORK};
use crate::error::{Code, Error, Result};
use crate::request::{DELEGATE, Delegation};

/// Capabilities that runtimes support (the specification's CONVENTIONS.md, and the additions of containerd and CRI-O).
/// A runtime offers them to podshaper's list only; podshaper passes on to each of the network's plugins those that the
/// plugin declares.
const WELL_KNOWN: [&str; 11] = [
    "aliases",
    "bandwidth",
    "cgroupPath",
    "deviceID",
    "dns",
    "infinibandGUID",
    "io.kubernetes.cri.pod-annotations",
    "ipRanges",
    "ips",
    "mac",
    "portMappings",
];
/// The versions for every runtime: libcni before 1.2 reads the first key only; later versions take the highest one of
/// the second key that they support. STATUS and GC came with 1.1.0.
const VERSIONS: (&str, [&str; 3]) = ("0.4.0", ["0.4.0", "1.0.0", "1.1.0"]);
/// `type` of Cilium's plugin.
const CILIUM: &str = "cilium-cni";

impl Install {
    fn delegating_path(&self) -> PathBuf {
        self.place.conf_dir().join(FILE)
    }

    /// The text of the present delegating list, if there is one.
    fn delegating_text(&self) -> Option<String> {
        files::read(&self.delegating_path()).ok().filter(|text| list::delegation(text).is_some())
    }

    /// Whether to delegate: the option is given, or an earlier installation delegates and no conflist is named.
    pub(super) fn delegates(&self) -> bool {
        self.delegate || self.place.named().is_none() && self.delegating_text().is_some()
    }

    /// The delegating list to write.
    ///
    /// # Errors
    /// The list would not be the first of its directory; or there is no network's list to delegate to, and a runtime
    /// would call the node ready without a network.
    pub(super) fn delegating(&self, entry: &Entry, report: &mut Report) -> Result<Edit> {
        self.check_that_it_is_first()?;
        let path = self.delegating_path();
        let before = files::text_if_there(&path)?;
        let there = before.clone().filter(|text| list::delegation(text).is_some());
        // The path must be absolute: a runtime calls podshaper in another working directory.
        let directory = std::path::absolute(self.place.conf_dir())
            .map_err(|cause| Error::because(Code::Io, "find the working directory (--conf-dir)", cause))?;
        let network = list::find(&directory)?;
        let delegation = there.as_deref().and_then(list::delegation);
        let replace_bandwidth = self.replace_bandwidth || delegation.is_some_and(|there| there.replace_bandwidth);
        let delegation = Delegation { directory, replace_bandwidth };
        let in_network = files::read(&network.file).ok();
        let entry_there = self.keys_there(there.as_deref(), in_network.as_deref()).map(Entry::new).transpose()?;
        let entry = entry_there.as_ref().unwrap_or(entry);
        let after = text(entry, &delegation, capabilities(&network, there.as_deref()));
        self.warn_about_network(&network, &delegation, report);
        if in_network.is_some_and(|text| super::place::has_podshaper(&text)) {
            report.warn(format!(
                "podshaper is in {} as well, and is not called a second time there",
                network.file.display()
            ));
        }
        Ok(Edit { path, before, after, like: network.file, what: What::Delegating })
    }

    /// The keys that stay: those of the present entry, or those of the entry in the network's list until now.
    fn keys_there(&self, there: Option<&str>, in_network: Option<&str>) -> Option<Map<String, Value>> {
        let keys = |text: Option<&str>| Conflist::parse(text?).ok()?.entry_keys();
        let of_there = keys(there).filter(|_| !self.replaces_entry());
        // The network's entry does not count beside a list that delegates. So the keys that are given go before it.
        of_there.or_else(|| keys(in_network).filter(|_| self.config.is_none()))
    }

    fn check_that_it_is_first(&self) -> Result<()> {
        let own = self.delegating_path();
        for path in networks(&self.place.conf_dir())? {
            let is_multus = files::read(&path).is_ok_and(|text| multus::is(&text));
            let why = match () {
                () if is_multus => {
                    "it is Multus', which has a network of this directory make the interface: install without --delegate, and \
                                    podshaper goes into that one"
                }
                () if path < own => "it sorts before that one, and a runtime takes the first by name: rename it",
                () => continue,
            };
            let text = format!(
                "make {}, which delegates to the network's list, beside {}: {why}",
                own.display(),
                path.display()
            );
            return Err(Error::new(Code::Config, text));
        }
        Ok(())
    }

    fn warn_about_network(&self, network: &List, delegation: &Delegation, report: &mut Report) {
        let file = network.file.display();
        if network.has_bandwidth() && !delegation.replace_bandwidth {
            report.warn(format!(
                "the bandwidth plugin is in {file}, and limits every pod a second time, with a queue; --replace-bandwidth has it not called"
            ));
        }
        self.warn_about_program(network.primary(), report);
        if network.primary() == CILIUM {
            report.warn(format!(
                "Cilium's agent renames every conflist but its own ({file}), and so this one, unless its Helm value cni.exclusive is false"
            ));
        }
    }
}

/// The capabilities that the list declares; a runtime offers no others. What the present list says of a capability
/// stays: an administrator may have taken one off, and a network's list that is being written changes nothing.
fn capabilities(network: &List, there: Option<&str>) -> Value {
    let of_entry = |text: &str| -> Option<Map<String, Value>> {
        let entry: Value = serde_json::from_str(Conflist::parse(text).ok()?.entry()?).ok()?;
        entry["capabilities"].as_object().cloned()
    };
    let of_network = network.plugins.iter().flat_map(|plugin| plugin.capabilities.iter().cloned());
    let all = WELL_KNOWN.into_iter().map(str::to_owned).chain(of_network);
    let declared = all.map(|name| (name, Value::Bool(true)));
    declared.chain(there.and_then(of_entry).into_iter().flatten()).collect::<Map<_, _>>().into()
}

fn text(entry: &Entry, delegation: &Delegation, capabilities: Value) -> String {
    let own = [("capabilities", capabilities), (DELEGATE, serde_json::to_value(delegation).unwrap_or_default())];
    let mut lines = vec![format!("\"type\": {:?}", conflist::PODSHAPER)];
    lines.extend(own.iter().map(|(key, value)| format!("{key:?}: {value}")));
    lines.extend(entry.keys().iter().map(|(key, value)| format!("{}: {value}", Value::from(key.as_str()))));
    let (version, versions) = VERSIONS;
    format!(
        "{{\n  \"cniVersion\": {version:?},\n  \"cniVersions\": {versions:?},\n  \"name\": {NETWORK:?},\n  \
         \"loadOnlyInlinedPlugins\": true,\n  \"plugins\": [\n    {{\n      {}\n    }}\n  ]\n}}\n",
        lines.join(",\n      ")
    )
}
