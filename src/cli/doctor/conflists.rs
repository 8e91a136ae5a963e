//! Checks the runtime's network configuration: whether podshaper is called, with the data that it needs, and as the
//! only plugin that limits.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{super::install, Finding, State};
use crate::{
    delegate::list,
    request::{DELEGATE, Delegation, Request},
};

const CHECK: &str = "conflist";
/// The two capabilities through which limits reach podshaper. At least one of them is needed.
const BANDWIDTH: &str = "bandwidth";
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The capability that saves the search for the cgroup.
const CGROUP_PATH: &str = "cgroupPath";

/// The keys that the check reads.
#[derive(Deserialize)]
struct Conflist {
    #[serde(default)]
    plugins: Vec<Plugin>,
}

impl Conflist {
    fn has_podshaper(&self) -> bool {
        self.plugins.iter().any(Plugin::is_podshaper)
    }
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    capabilities: Option<Map<String, Value>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

impl Plugin {
    fn is_podshaper(&self) -> bool {
        self.kind == "podshaper"
    }
}

/// Checks the directories of configurations and of plugins.
pub(super) fn check(conf_dir: &Path, bin_dir: &Path) -> Vec<Finding> {
    let files = match list::configurations(conf_dir) {
        Ok(files) if !files.is_empty() => files,
        Ok(_) => return vec![none(conf_dir, "it is empty")],
        Err(cause) => return vec![none(conf_dir, &cause.to_string())],
    };
    let ranked = files.iter().scan(0, |rank, path| {
        let own = *rank;
        *rank += usize::from(!is_multus(path));
        Some((own, path))
    });
    // Podshaper is called through this list. Entries of podshaper in other lists are passed over.
    let delegation = files.iter().find(|path| !is_multus(path)).and_then(|path| delegation(path));
    let mut findings: Vec<Finding> = ranked
        .filter(|(rank, _)| *rank == 0 || delegation.is_none())
        .flat_map(|(rank, path)| check_file(rank, path))
        .collect();
    if findings.is_empty() {
        let text = format!(
            "no file in {} names podshaper: add it to the end of the \"plugins\" list of {}",
            conf_dir.display(),
            files.first().map(|path| path.display().to_string()).unwrap_or_default()
        );
        findings.push(Finding::new(CHECK, State::Missing, text));
        return findings;
    }
    findings.extend(in_force(conf_dir).filter(|(_, list)| !list.has_podshaper()).map(|(path, _)| {
        let text = format!(
            "{}: podshaper is not in it, and it is what runtimes read, so that new pods have no limit: podshaper install",
            path.display()
        );
        Finding::new(CHECK, State::Missing, text)
    }));
    findings.extend(delegation.iter().map(delegated));
    findings.extend(binary(&bin_dir.join("podshaper")));
    findings
}

fn delegation(path: &Path) -> Option<Delegation> {
    list::delegation(&fs::read_to_string(path).ok()?)
}

/// The network's list to which podshaper's own list delegates.
fn delegated(delegation: &Delegation) -> Finding {
    match list::find(&delegation.directory) {
        Ok(list) if list.has_bandwidth() && !delegation.replace_bandwidth => {
            let text = format!(
                "{}, to which podshaper delegates, has the bandwidth plugin, which limits the same pods a second time, by a queue: \
                 podshaper install --replace-bandwidth has it not called",
                list.file.display()
            );
            Finding::new(CHECK, State::Missing, text)
        }
        Ok(list) => {
            let text = format!("podshaper delegates to {} as it stands at each call", list.file.display());
            Finding::new(CHECK, State::Ok, text)
        }
        Err(error) => {
            Finding::new(CHECK, State::Missing, format!("podshaper delegates, and no pod can be made: {error}"))
        }
    }
}

/// Whether podshaper is in the file that a runtime uses for new pods. `None` if there is no such file, or if it cannot
/// be parsed.
pub fn has_podshaper(conf_dir: &Path) -> Option<bool> {
    in_force(conf_dir).map(|(_, list)| list.has_podshaper())
}

/// The file that a runtime uses for new pods. `None` if there is none, or if it cannot be parsed; another finding says
/// so.
fn in_force(conf_dir: &Path) -> Option<(PathBuf, Conflist)> {
    let path = list::configurations(conf_dir).ok()?.into_iter().find(|path| !is_multus(path))?;
    let conflist = read(&path).ok()?;
    Some((path, conflist))
}

/// Whether the file is Multus'. Multus calls the network that it delegates to, which makes the pod's interface.
fn is_multus(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| install::is_multus(&text))
}

fn none(conf_dir: &Path, why: &str) -> Finding {
    let text =
        format!("{}: {why}: no runtime makes pods by it (--conf-dir names another directory)", conf_dir.display());
    Finding::new(CHECK, State::Warn, text)
}

/// The findings of one file; none if the file does not concern podshaper.
fn check_file(rank: usize, path: &Path) -> Vec<Finding> {
    let shown = path.display();
    let finding = |state, text: &str| Finding::new(CHECK, state, format!("{shown}: {text}"));
    let conflist = match read(path) {
        Ok(conflist) => conflist,
        Err(cause) => {
            return vec![finding(
                State::Missing,
                &format!("cannot be parsed ({cause}), and a runtime stops at it: correct it or move it away"),
            )];
        }
    };
    let Some(problems) = problems(&conflist.plugins) else { return Vec::new() };
    let mut findings: Vec<Finding> = problems.iter().map(|(state, text)| finding(*state, text)).collect();
    if rank > 0 {
        let text = "is not the first file in its directory, and runtimes read the first only (unless told to read more): \
                    name it so that it sorts first";
        findings.push(finding(State::Warn, text));
    }
    if findings.is_empty() {
        findings.push(finding(State::Ok, "podshaper is in it, last and with its capabilities"));
    }
    findings
}

fn read(path: &Path) -> Result<Conflist, String> {
    let text = fs::read_to_string(path).map_err(|cause| cause.to_string())?;
    serde_json::from_str(&text).map_err(|cause| cause.to_string())
}

/// The problems of a chain with podshaper in it; `None` if podshaper is not in the chain.
fn problems(plugins: &[Plugin]) -> Option<Vec<(State, String)>> {
    let place = plugins.iter().position(Plugin::is_podshaper)?;
    let podshaper = plugins.get(place)?;
    let mut problems = Vec::new();
    let mut say = |state, text: &str| problems.push((state, text.to_owned()));
    match Request::of_keys(&podshaper.others) {
        Ok(request) => {
            request.unknown_keys.iter().for_each(|key| say(State::Missing, &key.to_string()));
            if let Err(error) = request.check_namespaces() {
                say(State::Missing, &error.to_string());
            }
        }
        Err(error) => say(State::Missing, &format!("every ADD fails: {error}")),
    }
    let delegates = podshaper.others.contains_key(DELEGATE);
    if place == 0 && !delegates {
        say(State::Missing, "podshaper is the first plugin, and there is no interface to limit yet: put it last");
    } else if delegates && plugins.len() > 1 {
        say(
            State::Missing,
            "podshaper delegates in it, and is not its only plugin, so that every ADD fails: podshaper install --delegate",
        );
    } else if place + 1 < plugins.len() {
        say(
            State::Warn,
            "podshaper is not the last plugin: what comes after it may change what it has prepared; put it last",
        );
    }
    if plugins.iter().filter(|plugin| plugin.is_podshaper()).count() > 1 {
        say(State::Warn, "podshaper is in it twice, and the last one counts: take one out");
    }
    if plugins.iter().any(|plugin| plugin.kind == "bandwidth") {
        say(State::Missing, "the bandwidth plugin limits the same pods a second time, by a queue: take it out");
    }
    problems.extend(lacks(podshaper));
    Some(problems)
}

/// The capabilities that podshaper lacks in this conflist, and the consequences.
fn lacks(podshaper: &Plugin) -> Vec<(State, String)> {
    let all = podshaper.capabilities.as_ref();
    let has = |name: &str| all.and_then(|all| all.get(name)).and_then(Value::as_bool) == Some(true);
    if !has(BANDWIDTH) && !has(ANNOTATIONS) {
        let text = format!(
            "podshaper has neither the capability \"{BANDWIDTH}\" nor \"{ANNOTATIONS}\", so no pod's annotation reaches it: add \
             \"capabilities\": {{\"{BANDWIDTH}\": true, \"{ANNOTATIONS}\": true, \"{CGROUP_PATH}\": true}}"
        );
        return vec![(State::Missing, text)];
    }
    let wanted = [
        (BANDWIDTH, "by which kubelet's own reading of the annotations comes"),
        (ANNOTATIONS, "by which it gets the annotation \"rate\""),
        (CGROUP_PATH, "by which runtimes that know the pod's cgroup name it"),
    ];
    let lacking = wanted.into_iter().filter(|(name, _)| !has(name));
    lacking
        .map(|(name, why)| (State::Warn, format!("podshaper has not the capability \"{name}\", {why}: add it")))
        .collect()
}

fn binary(path: &Path) -> Vec<Finding> {
    let text = match fs::metadata(path) {
        Ok(file) if file.is_file() && file.permissions().mode() & 0o111 != 0 => {
            return vec![Finding::new("plugin", State::Ok, format!("{} is there", path.display()))];
        }
        Ok(_) => "is no executable file: install -m 755 puts one there".to_owned(),
        Err(cause) => format!(
            "{cause}: copy podshaper there, or no pod is made by a conflist that names it (--bin-dir names another directory)"
        ),
    };
    vec![Finding::new("plugin", State::Missing, format!("{}: {text}", path.display()))]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str =
        r#""capabilities": {"bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true}"#;

    fn directory(files: &[(&str, String)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(directory.path().join(name), text).unwrap());
        directory
    }

    fn chain(plugins: &str) -> String {
        format!(r#"{{"cniVersion": "1.0.0", "name": "net", "plugins": [{plugins}]}}"#)
    }

    fn found(files: &[(&str, String)]) -> Vec<(State, String)> {
        let directory = directory(files);
        let bin = self::directory(&[("podshaper", String::new())]);
        fs::set_permissions(bin.path().join("podshaper"), fs::Permissions::from_mode(0o755)).unwrap();
        let findings = check(directory.path(), bin.path()).into_iter().filter(|finding| finding.check == CHECK);
        let prefix = format!("{}/", directory.path().display());
        findings.map(|finding| (finding.state, finding.found.replace(&prefix, ""))).collect()
    }

    #[test]
    fn what_is_wrong_with_a_chain_is_said_with_its_file() {
        let podshaper = format!(r#"{{"type": "podshaper", {ALL}}}"#);
        let bridge = r#"{"type": "bridge"}"#;
        for (plugins, state, text) in [
            (format!("{bridge}, {podshaper}"), State::Ok, "podshaper is in it, last and with its capabilities"),
            (podshaper.clone(), State::Missing, "podshaper is the first plugin"),
            (
                format!(r#"{bridge}, {podshaper}, {{"type": "portmap"}}"#),
                State::Warn,
                "podshaper is not the last plugin",
            ),
            (
                format!(r#"{bridge}, {{"type": "bandwidth"}}, {podshaper}"#),
                State::Missing,
                "the bandwidth plugin limits the same pods",
            ),
            (
                format!(r#"{bridge}, {{"type": "podshaper", "egres": "1M", {ALL}}}"#),
                State::Missing,
                "\"egres\" is no key of podshaper's",
            ),
            (
                format!(r#"{bridge}, {{"type": "podshaper", "namespaces": [{{"name": "a", "egres": "1M"}}], {ALL}}}"#),
                State::Missing,
                "\"namespaces[0].egres\" is no key of podshaper's (those are name, ",
            ),
            (
                format!(r#"{bridge}, {{"type": "podshaper", "max": {{"egress": "1MB"}}, {ALL}}}"#),
                State::Missing,
                "every ADD fails: configuration key \"max.egress\": \"1MB\" is not a rate",
            ),
            (
                format!(r#"{bridge}, {{"type": "podshaper"}}"#),
                State::Missing,
                "podshaper has neither the capability \"bandwidth\" nor",
            ),
            (
                format!(
                    r#"{bridge}, {{"type": "podshaper", "capabilities": {{"bandwidth": true, "cgroupPath": true}}}}"#
                ),
                State::Warn,
                "podshaper has not the capability \"io.kubernetes.cri.pod-annotations\"",
            ),
        ] {
            let found = found(&[("10-net.conflist", chain(&plugins))]);
            assert_eq!(found[0].0, state, "{found:?}");
            assert!(found[0].1.starts_with(&format!("10-net.conflist: {text}")), "{found:?}");
        }
    }

    #[test]
    fn a_list_that_delegates_is_told_with_the_one_it_delegates_to() {
        let directory = tempfile::tempdir().unwrap();
        let found = |network: Option<&str>, keys: &str| {
            let write = |name: &str, text: String| fs::write(directory.path().join(name), text).unwrap();
            let delegate =
                format!(r#""delegate": {{"directory": {:?}{keys}}}"#, directory.path().display().to_string());
            write("00-podshaper.conflist", chain(&format!(r#"{{"type": "podshaper", {ALL}, {delegate}}}"#)));
            let file = directory.path().join("10-net.conflist");
            network.map_or_else(|| drop(fs::remove_file(&file)), |plugins| fs::write(&file, chain(plugins)).unwrap());
            let findings =
                check(directory.path(), directory.path()).into_iter().filter(|finding| finding.check == CHECK);
            let prefix = format!("{}/", directory.path().display());
            findings.map(|finding| (finding.state, finding.found.replace(&prefix, ""))).collect::<Vec<_>>()
        };
        let bridge = r#"{"type": "bridge"}"#;
        let in_it = "00-podshaper.conflist: podshaper is in it";
        let delegates = "podshaper delegates to 10-net.conflist as it stands at each call";
        let both = format!(r#"{bridge}, {{"type": "bandwidth"}}, {{"type": "podshaper"}}"#);
        for (network, keys, state, text) in [
            (Some(bridge), "", State::Ok, delegates),
            (Some(both.as_str()), r#", "replaceBandwidth": true"#, State::Ok, delegates),
            (
                Some(both.as_str()),
                "",
                State::Missing,
                "10-net.conflist, to which podshaper delegates, has the bandwidth plugin",
            ),
            (None, "", State::Missing, "podshaper delegates, and no pod can be made: "),
        ] {
            let found = found(network, keys);
            assert!(found.len() == 2 && found[0].0 == State::Ok && found[0].1.starts_with(in_it), "{found:?}");
            assert!(found[1].0 == state && found[1].1.starts_with(text), "{found:?}");
        }
        assert_eq!(has_podshaper(directory.path()), Some(true));
    }

    #[test]
    fn files_that_hide_or_break_it_are_named() {
        let good = chain(&format!(r#"{{"type": "bridge"}}, {{"type": "podshaper", {ALL}}}"#));
        let other = chain(r#"{"type": "bridge"}"#);
        let second = found(&[("10-a.conflist", other.clone()), ("20-b.conflist", good.clone())]);
        assert!(
            second[0].0 == State::Warn && second[0].1.starts_with("20-b.conflist: is not the first file"),
            "{second:?}"
        );
        let multus = r#"{"type": "multus", "name": "m"}"#.to_owned();
        let behind_multus = found(&[("00-multus.conf", multus), ("20-b.conflist", good.clone())]);
        assert!(behind_multus.len() == 1 && behind_multus[0].0 == State::Ok, "{behind_multus:?}");
        let broken = found(&[("10-a.conflist", "{".into()), ("20-b.conflist", good)]);
        assert!(
            broken[0].0 == State::Missing && broken[0].1.starts_with("10-a.conflist: cannot be parsed"),
            "{broken:?}"
        );
        let absent = found(&[("10-a.conflist", other)]);
        assert!(
            absent.len() == 1 && absent[0].0 == State::Missing && absent[0].1.starts_with("no file in"),
            "{absent:?}"
        );
        assert_eq!(found(&[("README", String::new())])[0].0, State::Warn);
    }

    #[test]
    fn podshaper_is_in_the_file_in_force_or_not_or_that_is_not_known() {
        let good = chain(r#"{"type": "bridge"}, {"type": "podshaper"}"#);
        let other = chain(r#"{"type": "bridge"}"#);
        let multus = r#"{"type": "multus", "name": "m"}"#.to_owned();
        for (files, expected) in [
            (vec![("10-a.conflist", good.clone())], Some(true)),
            (vec![("10-a.conflist", other.clone()), ("20-b.conflist", good.clone())], Some(false)),
            (vec![("00-multus.conf", multus.clone()), ("20-b.conflist", good.clone())], Some(true)),
            (vec![("00-multus.conf", multus)], None),
            (vec![("10-a.conflist", "{".into()), ("20-b.conflist", good)], None),
            (vec![("README", other)], None),
        ] {
            assert_eq!(has_podshaper(directory(&files).path()), expected, "{files:?}");
        }
        assert_eq!(has_podshaper(Path::new("/nowhere")), None);
    }
}
