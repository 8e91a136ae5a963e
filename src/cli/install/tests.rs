//! Tests of the edits of a conflist's text, on lists as people and programs write them, and of what the units do to
//! files. tests/install.rs tests the files of an installation.

use std::fs;
use std::path::Path;

use clap::Parser;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::conflist::{BANDWIDTH, Conflist, Entry, PODSHAPER, from_lone};
use super::edit::Edit;
use super::{Install, Report, keys};

fn entry(config: &str) -> Entry {
    Entry::new(keys(config).unwrap()).unwrap()
}

fn with(list: &str, config: &str) -> String {
    Conflist::parse(list).unwrap().with(&entry(config))
}

fn without(list: &str, kind: &str) -> String {
    Conflist::parse(list).unwrap().without(kind)
}

const CAPABILITIES: &str =
    r#""capabilities": { "bandwidth": true, "cgroupPath": true, "io.kubernetes.cri.pod-annotations": true }"#;

#[test]
fn the_entry_is_written_in_the_style_of_its_list() {
    for (list, entry) in [
        (
            "{\n  \"cniVersion\": \"0.3.1\",\n  \"plugins\": [\n    { \"type\": \"ptp\" }^\n  ]\n}\n",
            format!(",\n    {{\n      \"type\": \"podshaper\",\n      {CAPABILITIES}\n    }}"),
        ),
        (
            // kindnet's template
            "\n{\n\t\"cniVersion\": \"0.3.1\",\n\t\"plugins\": [\n\t{\n\t\t\"type\": \"portmap\"\n\t}^\n\t]\n}\n",
            format!(",\n\t{{\n\t\t\"type\": \"podshaper\",\n\t\t{CAPABILITIES}\n\t}}"),
        ),
        (
            r#"{"plugins":[{"type":"a"},{"type":"b"}^],"cniVersion":"1.0.0"}"#,
            format!(",{{ \"type\": \"podshaper\", {CAPABILITIES} }}"),
        ),
        (
            "{\"cniVersion\":\"0.4.0\",\"plugins\": [ {\"type\":\"a\"}, {\n\"type\":\"b\"\n}^ ]}",
            format!(", {{ \"type\": \"podshaper\", {CAPABILITIES} }}"),
        ),
    ] {
        assert_eq!(with(&list.replace('^', ""), "{}"), list.replace('^', &entry));
    }
    let list = r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#;
    let limited = with(list, r#"{"max": {"egress": "1G"}, "rateKey": "a\"b"}"#);
    let keys = format!(
        r#"{{"type":"a"}},{{ "type": "podshaper", {CAPABILITIES}, "max": {{"egress":"1G"}}, "rateKey": "a\"b" }}]"#
    );
    assert!(limited.contains(&keys), "{limited}");
    // The given keys replace those of the present entry.
    assert_eq!(with(&limited, "{}"), with(list, "{}"));
}

#[test]
fn a_plugin_is_taken_out_wherever_it_stands() {
    let list = |plugins: &str| format!(r#"{{"cniVersion":"1.0.0","plugins":[{plugins} ]}}"#);
    let (a, b, shaper) = (r#"{"type": "a"}"#, r#"{"type":"b", "type2":"podshaper"}"#, r#" {"type":"podshaper"}"#);
    for (before, after) in [
        (format!("{a}, {b},{shaper}"), format!("{a}, {b}")),
        (format!("{a},{shaper}, {b}"), format!("{a}, {b}")),
        (format!("{shaper} , {a}, {b}"), format!(" {a}, {b}")),
        (shaper.to_owned(), shaper.to_owned()),
        (a.to_owned(), a.to_owned()),
    ] {
        assert_eq!(without(&list(&before), PODSHAPER), list(&after), "{before}");
    }
    let twice = list(r#"{"type":"bandwidth"}, {"type":"a"} , {"type":"bandwidth"}"#);
    assert_eq!(without(&twice, BANDWIDTH), list(r#"{"type":"a"}"#));
}

#[test]
fn what_is_no_conflist_is_refused_with_the_reason() {
    for (text, reason) in [
        ("", "it is not the JSON of a CNI configuration: EOF while parsing a value at line 1 column 0"),
        ("[]", "it is not a JSON object"),
        (r#"{"cniVersion":"1.0.0"}"#, "it has no \"plugins\", so it is no conflist"),
        (r#"{"cniVersion":"1.0.0","plugins":{}}"#, "it is not the JSON of a CNI configuration: invalid type: map"),
        (r#"{"cniVersion":"1.0.0","plugins":[]}"#, "its list of \"plugins\" is empty"),
        (r#"{"cniVersion":"1.0.0","plugins":[{}]}"#, "one of its plugins has no \"type\""),
        (
            r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}],"plugins":[]}"#,
            "it is not the JSON of a CNI configuration: duplicate field",
        ),
        (
            r#"{"cniVersion":"1.0.0","plugins":[{"type":"podshaper"},{"type":"podshaper"}]}"#,
            "podshaper is in its \"plugins\" twice",
        ),
        (r#"{"plugins":[{"type":"a"}]}"#, "its \"cniVersion\" is missing, and podshaper speaks 0.3.0 to 1.1.0"),
        (r#"{"cniVersion":"0.2.0","plugins":[{"type":"a"}]}"#, "its \"cniVersion\" is \"0.2.0\", and podshaper speaks"),
    ] {
        let error = Conflist::parse(text).err().unwrap().to_string();
        assert!(error.starts_with(reason), "{text}: {error}");
    }
    for (config, reason) in [
        ("[]", "--config is not a JSON object: "),
        (r#"{"egres": "1G"}"#, "--config: \"egres\" is no key of podshaper's (those are "),
        (
            r#"{"namespaces": [{"name": "a", "egres": "1G"}]}"#,
            "--config: \"namespaces[0].egres\" is no key of podshaper's (those are name, ",
        ),
        (r#"{"max": {"egres": "1G"}}"#, "--config: configuration key \"max\" has no other keys than egress, ingress"),
        (r#"{"egress": "1MB"}"#, "--config: configuration key \"egress\": \"1MB\" is not a rate"),
        (r#"{"logLevel": 1}"#, "--config: configuration key \"logLevel\""),
    ] {
        let error = keys(config).unwrap_err().to_string();
        assert!(error.starts_with(reason), "{config}: {error}");
    }
    assert!(Entry::new(keys(r#"{"capabilities": {}}"#).unwrap()).is_err());
}

#[test]
fn a_lone_configuration_becomes_a_list_of_itself() {
    let lone = "{ \"cniVersion\": \"0.3.1\", \"name\": \"n\\u0041\",\n  \"type\": \"bridge\", \"x\": 1e400 }\n";
    let list = from_lone(lone).unwrap();
    assert_eq!(
        list,
        format!(
            "{{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"n\\u0041\",\n  \"plugins\": [\n    {}\n  ]\n}}\n",
            lone.trim()
        )
    );
    for (lone, reason) in [
        (r#"{"cniVersion": "0.3.1", "name": "n"}"#, "it has no \"type\""),
        (r#"{"cniVersion": "0.3.1", "name": "n", "type": "podshaper"}"#, "it has no \"type\""),
        (r#"{"cniVersion": "0.3.1", "type": "bridge"}"#, "it has no \"name\" or no \"cniVersion\""),
        (r#"{"cniVersion": "0.1.0", "name": "n", "type": "bridge"}"#, "its \"cniVersion\" is \"0.1.0\""),
    ] {
        let error = from_lone(lone).unwrap_err().to_string();
        assert!(error.starts_with(reason), "{lone}: {error}");
    }
}

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    install: Install,
}

/// What `install` with these options would write to the conflists of a directory.
fn edits(conf_dir: &Path, options: &[&str]) -> Vec<Edit> {
    let directory = ["install", "--conf-dir", conf_dir.to_str().unwrap()];
    let Command { install } = Command::parse_from([&directory, options].concat());
    let entry = entry(install.config.as_deref().unwrap_or("{}"));
    let mut report = Report::new(false, install.and_sync);
    match install.delegates() {
        true => vec![install.delegating(&entry, &mut report).unwrap()],
        false => install.edits(&entry, &mut report).unwrap(),
    }
}

/// Changes the conflists of a directory as `install` with these options does.
fn install(conf_dir: &Path, options: &[&str]) {
    let mut report = Report::new(false, true);
    edits(conf_dir, options).iter().for_each(|edit| edit.perform(&mut report).unwrap());
}

/// The options of the units of an installation with these keys.
const UNITS: [&str; 3] = ["--and-sync", "--config", r#"{"max":{"egress":"1G"}}"#];
const NETWORK: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a"}]}"#;
const LONE: &str = r#"{"cniVersion":"1.0.0","name":"n","type":"a"}"#;

/// The units put in a missing entry, with the keys of the installation. An entry that somebody has changed stays.
#[test]
fn the_units_leave_an_entry_as_somebody_has_changed_it() {
    let multus = format!(r#"{{"cniVersion":"1.0.0","name":"m","type":"multus","delegates":[{NETWORK}]}}"#);
    for (network, text, list, option) in [
        ("10.conflist", NETWORK, "10.conflist", None),
        ("10.conf", LONE, "10-podshaper.conflist", None),
        ("00-multus.conf", &multus, "00-multus.conf", None),
        ("10.conflist", NETWORK, "00-podshaper.conflist", Some("--delegate")),
    ] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(network), text).unwrap();
        let path = directory.path().join(list);
        let installed = |options: &[&str]| {
            let options: Vec<&str> = options.iter().copied().chain(option).collect();
            install(directory.path(), &options);
            fs::read_to_string(&path).unwrap()
        };
        let made = installed(&UNITS);
        assert!(made.contains(r#""max": {"egress":"1G"}"#), "{made}");
        let changed = made.replace("1G", "2G").replace(r#""cgroupPath": true"#, r#""cgroupPath": false"#);
        let changed = changed.replace(r#""cgroupPath":true"#, r#""cgroupPath":false"#);
        fs::write(&path, &changed).unwrap();
        assert_eq!(installed(&UNITS), changed);
        assert_eq!(installed(&[]), changed);
        // A person's keys replace those of the entry.
        let replaced = installed(&["--config", r#"{"max":{"egress":"3G"}}"#]);
        assert!(replaced.contains(r#""max": {"egress":"3G"}"#) && !replaced.contains("2G"), "{replaced}");
    }
}

/// The entry of our list stays when the network writes its lone configuration anew.
#[test]
fn the_units_follow_a_lone_configuration_around_the_entry() {
    let directory = tempfile::tempdir().unwrap();
    let [lone, list] = ["10.conf", "10-podshaper.conflist"].map(|name| directory.path().join(name));
    fs::write(&lone, LONE).unwrap();
    install(directory.path(), &UNITS);
    let changed = fs::read_to_string(&list).unwrap().replace("1G", "2G");
    fs::write(&list, &changed).unwrap();
    fs::write(&lone, LONE.replace(r#""a""#, r#""b""#)).unwrap();
    install(directory.path(), &UNITS);
    assert_eq!(fs::read_to_string(&list).unwrap(), changed.replace(r#""a""#, r#""b""#));
}

/// Beside a list that delegates, the network's entry does not count.
#[test]
fn a_list_that_delegates_comes_back_with_the_keys_of_the_units() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("00-podshaper.conflist");
    let network = with(NETWORK, r#"{"max":{"egress":"2G"}}"#);
    fs::write(directory.path().join("10.conflist"), network).unwrap();
    // An interrupted write, for example: the file is podshaper's by its name.
    for there in [None, Some("{")] {
        there.iter().for_each(|text| fs::write(&list, text).unwrap());
        install(directory.path(), &[&UNITS[..], &["--delegate"]].concat());
        let made = fs::read_to_string(&list).unwrap();
        assert!(made.contains(r#""max": {"egress":"1G"}"#), "{made}");
    }
}

#[test]
fn the_units_take_the_bandwidth_plugin_out_beside_an_entry_that_stays() {
    let bandwidth = NETWORK.replace(r#"{"type":"a"}"#, r#"{"type":"a"},{"type":"bandwidth"}"#);
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("10.conflist");
    for (there, keys) in [(bandwidth.clone(), r#"{"max":{"egress":"1G"}}"#), (with(&bandwidth, "{}"), "{}")] {
        fs::write(&list, &there).unwrap();
        install(directory.path(), &[&UNITS[..], &["--replace-bandwidth"]].concat());
        assert_eq!(fs::read_to_string(&list).unwrap(), with(NETWORK, keys), "{there}");
    }
}

/// The next round of the units puts podshaper into the new text.
#[test]
fn a_list_that_its_network_writes_during_an_edit_is_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("10.conflist");
    fs::write(&list, NETWORK).unwrap();
    let edits = edits(directory.path(), &UNITS);
    let anew = NETWORK.replace(r#""n""#, r#""other""#);
    fs::write(&list, &anew).unwrap();
    let error = edits[0].perform(&mut Report::new(false, true)).unwrap_err().to_string();
    assert!(error.contains("another program has written"), "{error}");
    assert_eq!(fs::read_to_string(&list).unwrap(), anew);
    install(directory.path(), &UNITS);
    assert_eq!(fs::read_to_string(&list).unwrap(), with(&anew, UNITS[2]));
}

/// White space, as JSON allows it anywhere between tokens.
fn space() -> impl Strategy<Value = String> {
    "[ \t\r\n]{0,4}"
}

/// A value as text, with brackets and quotes in places that would mislead a careless scan.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("true".to_owned()),
        Just("-1.50e+7".to_owned()),
        "[ -~]{0,8}".prop_map(|text| json!(text).to_string()),
        Just(r#""]}\"podshaper\\""#.to_owned()),
        Just(r#""\u00e9\ud83d\ude00é""#.to_owned()),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            (space(), prop::collection::vec(inner.clone(), 0..4))
                .prop_map(|(space, items)| format!("[{}{space}]", items.join(&format!("{space},")))),
            (space(), prop::collection::vec(inner, 0..4)).prop_map(|(space, items)| {
                let members: Vec<String> =
                    items.iter().enumerate().map(|(key, item)| format!("\"k{key}\"{space}:{item}")).collect();
                format!("{{{space}{}}}", members.join(&format!(",{space}")))
            }),
        ]
    })
}

fn plugin() -> impl Strategy<Value = String> {
    (prop::sample::select(vec!["bridge", "portmap", "bandwidth", "x/podshaper"]), space(), value(), any::<bool>())
        .prop_map(|(kind, space, value, first)| match first {
            true => format!("{{{space}\"type\":{space}\"{kind}\"{space},\"a\": {value}}}"),
            false => format!("{{\"a\":{value},{space}\"type\": \"{kind}\"{space}}}"),
        })
}

prop_compose! {
    fn conflist()(
        plugins in prop::collection::vec((space(), plugin(), space()), 1..5),
        before in space(), within in space(), behind in space(), extra in value(), version in prop::sample::select(vec!["0.3.0", "0.3.1", "1.1.0"]),
    ) -> String {
        let plugins: Vec<String> = plugins.into_iter().map(|(before, plugin, behind)| format!("{before}{plugin}{behind}")).collect();
        format!("{before}{{{within}\"cniVersion\":\"{version}\",\"x\":{extra},\"plugins\"{within}:{within}[{}]{behind}, \"y\":{extra}{within}}}{behind}", plugins.join(","))
    }
}

proptest! {
    #[test]
    fn install_and_uninstall_leave_every_byte(list in conflist()) {
        let with = with(&list, r#"{"max": {"egress": "1G"}}"#);
        prop_assert_eq!(without(&with, PODSHAPER), list);
    }

    #[test]
    fn install_adds_podshaper_and_changes_nothing_else(list in conflist()) {
        let (mut before, mut after): (Value, Value) = (serde_json::from_str(&list).unwrap(), serde_json::from_str(&with(&list, "{}")).unwrap());
        let added = after["plugins"].as_array_mut().unwrap().pop().unwrap();
        prop_assert_eq!(added, entry("{}").value());
        prop_assert_eq!(&after, &before);
        let less: Value = serde_json::from_str(&without(&list, BANDWIDTH)).unwrap();
        let all: Vec<Value> = before["plugins"].as_array_mut().unwrap().drain(..).collect();
        let kept: Vec<Value> = all.iter().filter(|plugin| plugin["type"] != BANDWIDTH).cloned().collect();
        if !kept.is_empty() {
            prop_assert_eq!(less["plugins"].as_array().unwrap(), &kept);
        }
    }

    #[test]
    fn no_text_makes_the_edits_panic(text in "[\\[\\]{}\",: a-c]{0,40}") {
        if let Ok(list) = Conflist::parse(&text) {
            let _ = (list.with(&entry("{}")), list.without("a"));
        }
        let _ = from_lone(&text);
    }
}
