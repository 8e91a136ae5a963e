//! The text of a conflist, edited in place: every byte outside of podshaper's entry is kept, including white space.
//!
//! serde finds the members as slices of the text. The text between them is kept or copied, never regenerated. So
//! putting an entry in and taking it out again restores the file exactly.

use std::ops::Range;

use rscni_plugin::version::{PluginInfo, SpecVersion};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result, quoted};
use crate::request::DELEGATE;

/// `type` of podshaper's entry, and the file name of its program.
pub(super) const PODSHAPER: &str = "podshaper";
/// `type` of the bandwidth plugin. With both plugins a pod would be limited twice.
pub(super) const BANDWIDTH: &str = "bandwidth";
/// The capabilities that podshaper's entry declares: the data that the runtime is to pass.
pub(super) const CAPABILITIES: [&str; 3] = ["bandwidth", "cgroupPath", "io.kubernetes.cri.pod-annotations"];

/// The keys of podshaper's entry that install itself writes.
const OF_INSTALL: [&str; 3] = ["type", "capabilities", DELEGATE];

/// A conflist, and the positions of its plugins in the text.
pub(super) struct Conflist<'a> {
    text: &'a str,
    plugins: Vec<Plugin>,
}

struct Plugin {
    at: Range<usize>,
    kind: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct List<'a> {
    cni_version: Option<String>,
    #[serde(borrow)]
    plugins: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl<'a> Conflist<'a> {
    /// Parses a conflist.
    ///
    /// # Errors
    /// [`Code::Decode`], without the file's name, which the caller knows.
    pub(super) fn parse(text: &'a str) -> Result<Self> {
        let list: List<'a> = object(text)?;
        check_version(list.cni_version.as_deref())?;
        let Some(plugins) = list.plugins else {
            return Err(Error::new(Code::Decode, "it has no \"plugins\", so it is no conflist"));
        };
        let plugins: Vec<&RawValue> = decode(plugins.get())?;
        let plugins = plugins.into_iter().map(|raw| Plugin::find(text, raw)).collect::<Result<Vec<_>>>()?;
        if plugins.is_empty() {
            return Err(Error::new(
                Code::Decode,
                "its list of \"plugins\" is empty: podshaper goes behind a plugin that makes an interface",
            ));
        }
        if plugins.iter().filter(|plugin| plugin.kind == PODSHAPER).count() > 1 {
            return Err(Error::new(Code::Decode, "podshaper is in its \"plugins\" twice: take one out"));
        }
        Ok(Self { text, plugins })
    }

    pub(super) fn has(&self, kind: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin.kind == kind)
    }

    /// `type` of the plugin that makes the interface.
    pub(super) fn primary(&self) -> &str {
        self.plugins.first().map_or("", |plugin| &plugin.kind)
    }

    /// podshaper's entry as it stands in the text.
    pub(super) fn entry(&self) -> Option<&'a str> {
        let entry = self.plugins.iter().find(|plugin| plugin.kind == PODSHAPER)?;
        Some(&self.text[entry.at.clone()])
    }

    /// The keys of the entry that belong to podshaper's configuration, in the form that `--config` takes.
    pub(super) fn entry_keys(&self) -> Option<Map<String, Value>> {
        let mut keys: Map<String, Value> = serde_json::from_str(self.entry()?).ok()?;
        OF_INSTALL.iter().for_each(|key| drop(keys.remove(*key)));
        Some(keys)
    }

    /// The text with podshaper as the last plugin, or with its present entry replaced.
    pub(super) fn with(&self, entry: &Entry) -> String {
        if let Some(index) = self.plugins.iter().position(|plugin| plugin.kind == PODSHAPER) {
            let new = entry.text(self.space_before(index));
            return self.replaced(self.plugins[index].at.clone(), &new);
        }
        self.with_last(|space| entry.text(space))
    }

    /// The text with podshaper's entry of another list as the last plugin, as the entry stands there. `None` if the
    /// other list has no entry.
    pub(super) fn with_entry_of(&self, other: &str) -> Option<String> {
        let other = Conflist::parse(other).ok()?;
        other.entry().map(|entry| self.with_last(|_| entry.to_owned()))
    }

    /// The text with one more plugin, whose text depends on the white space in front of it.
    fn with_last(&self, plugin: impl FnOnce(&str) -> String) -> String {
        let Some(last) = self.plugins.last() else { return self.text.to_owned() };
        let space = self.space_before(self.plugins.len() - 1);
        self.replaced(last.at.end..last.at.end, &format!(",{space}{}", plugin(space)))
    }

    /// The text without the plugins of this type. Each is removed together with the comma in front of it. If it is the
    /// only plugin, it stays.
    pub(super) fn without(&self, kind: &str) -> String {
        let Some(index) = self.plugins.iter().rposition(|plugin| plugin.kind == kind) else {
            return self.text.to_owned();
        };
        let at = &self.plugins[index].at;
        let from_the_one_before = index.checked_sub(1).map(|before| self.plugins[before].at.end..at.end);
        let to_the_next = self.plugins.get(index + 1).map(|next| at.start..next.at.start);
        let Some(range) = from_the_one_before.or(to_the_next) else { return self.text.to_owned() };
        let text = self.replaced(range, "");
        // The positions of the other plugins have changed, so the text is parsed again. The shorter text is still a
        // list.
        Conflist::parse(&text).map(|shorter| shorter.without(kind)).unwrap_or(text)
    }

    /// The white space in front of a plugin, which is copied in front of the next one.
    fn space_before(&self, index: usize) -> &'a str {
        let before = &self.text[..self.plugins[index].at.start];
        &before[before.trim_end().len()..]
    }

    fn replaced(&self, range: Range<usize>, by: &str) -> String {
        let mut text = self.text.to_owned();
        text.replace_range(range, by);
        text
    }
}

impl Plugin {
    fn find(text: &str, raw: &RawValue) -> Result<Self> {
        // Both pointers are into the same buffer: serde_json borrows from the text.
        let start = raw.get().as_ptr().addr() - text.as_ptr().addr();
        let Kind { kind } = object(raw.get())?;
        let kind = kind.ok_or_else(|| Error::new(Code::Decode, "one of its plugins has no \"type\""))?;
        Ok(Self { at: start..start + raw.get().len(), kind })
    }
}

/// podshaper's entry for the list.
pub(super) struct Entry {
    keys: Map<String, Value>,
}

impl Entry {
    /// An entry with these keys of podshaper's configuration, see [`crate::request::Config`].
    pub(super) fn new(keys: Map<String, Value>) -> Result<Self> {
        if let Some(taken) = OF_INSTALL.into_iter().find(|key| keys.contains_key(*key)) {
            return Err(Error::new(
                Code::Config,
                format!("--config: the key {taken:?} is written by install itself: leave it out"),
            ));
        }
        Ok(Self { keys })
    }

    /// The keys of podshaper's configuration.
    pub(super) fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    pub(super) fn value(&self) -> Value {
        let mut keys = self.keys.clone();
        keys.insert("type".into(), PODSHAPER.into());
        keys.insert(
            "capabilities".into(),
            CAPABILITIES.into_iter().map(|name| (name.to_owned(), Value::Bool(true))).collect(),
        );
        Value::Object(keys)
    }

    /// The entry in the style of a list whose plugins follow `space`: on several lines, or on one.
    fn text(&self, space: &str) -> String {
        let capabilities = CAPABILITIES.map(|name| format!("{name:?}: true")).join(", ");
        let mut members = vec![format!("\"type\": {PODSHAPER:?}"), format!("\"capabilities\": {{ {capabilities} }}")];
        members.extend(self.keys.iter().map(|(key, value)| format!("{}: {value}", Value::from(key.as_str()))));
        let Some((_, indent)) = space.rsplit_once('\n') else {
            return format!("{{ {} }}", members.join(", "));
        };
        let deeper = format!("\n{indent}{}", if indent.contains('\t') { "\t" } else { "  " });
        format!("{{{deeper}{}\n{indent}}}", members.join(&format!(",{deeper}")))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lone<'a> {
    #[serde(borrow)]
    cni_version: Option<&'a RawValue>,
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// The conflist that is equivalent to the configuration of a lone plugin (`.conf`). The lone configuration is copied
/// unchanged: libcni gives each plugin of a list the list's name and version, so the keys of the same name do no harm.
pub(super) fn from_lone(text: &str) -> Result<String> {
    let lone: Lone<'_> = object(text)?;
    if lone.kind.is_none_or(|kind| kind == PODSHAPER) {
        return Err(Error::new(
            Code::Decode,
            "it has no \"type\" of a plugin that makes an interface, so it is no network",
        ));
    }
    let (Some(version), Some(name)) = (lone.cni_version, lone.name) else {
        return Err(Error::new(
            Code::Decode,
            "it has no \"name\" or no \"cniVersion\", which a conflist needs: write them into it",
        ));
    };
    let (version, name, plugin) = (version.get(), name.get(), text.trim());
    let list =
        format!("{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n    {plugin}\n  ]\n}}\n");
    Conflist::parse(&list)?;
    Ok(list)
}

/// With an older version every ADD of podshaper would fail, and so every pod.
fn check_version(version: Option<&str>) -> Result<()> {
    let supported = PluginInfo::default();
    let known =
        |text: &str| text.parse::<SpecVersion>().is_ok_and(|version| supported.supported_versions().contains(&version));
    if version.is_some_and(known) {
        return Ok(());
    }
    let shown = version.map_or("missing".to_owned(), quoted);
    Err(Error::new(
        Code::IncompatibleVersion,
        format!(
            "its \"cniVersion\" is {shown}, and podshaper speaks 0.3.0 to 1.1.0: raise it if every plugin of the list allows"
        ),
    ))
}

fn decode<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|cause| Error::because(Code::Decode, "it is not the JSON of a CNI configuration", cause))
}

/// Decodes an object only: serde would also accept an array for a struct, member by member.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    let whole: &RawValue = decode(text)?;
    if whole.get().starts_with('{') { decode(text) } else { Err(Error::new(Code::Decode, "it is not a JSON object")) }
}
