use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::harness::cni::Cni;
use super::sandbox::{ok, refused};

const PODSHAPER: &str = env!("CARGO_BIN_EXE_podshaper");
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const DECODE: u64 = 6;
const CONFIG: u64 = 7;

/// A well-formed call for a sandbox that does not exist.
fn cni(verb: &str) -> Cni {
    Cni::new(PODSHAPER, verb)
        .env("CNI_CONTAINERID", "c1")
        .env("CNI_NETNS", "/run/netns/podshaper-nowhere")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
}

/// stdin with `keys`, inserted as literal JSON, beside the keys that every configuration has.
fn config(keys: &str) -> String {
    format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "podshaper", "prevResult": {{"ips": []}}{keys}}}"#)
}

/// One way for a call to ask for an egress rate.
struct Source {
    what: &'static str,
    /// stdin and CNI_ARGS of a call that asks for this value (literal JSON).
    spell: fn(&str) -> (String, String),
}

const SOURCES: [Source; 7] = [
    Source {
        what: "runtimeConfig.bandwidth egressRate",
        spell: |value| {
            (config(&format!(r#", "runtimeConfig": {{"bandwidth": {{"egressRate": {value}}}}}"#)), "".into())
        },
    },
    Source {
        what: "pod annotation kubernetes.io/egress-bandwidth",
        spell: |value| {
            let annotations = format!(r#"{{"kubernetes.io/egress-bandwidth": {value}}}"#);
            let runtime = format!(r#", "runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {annotations}}}"#);
            (config(&runtime), "".into())
        },
    },
    Source {
        what: "pod annotation rate",
        spell: |value| {
            let runtime = format!(r#", "runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {{"rate": {value}}}}}"#);
            (config(&runtime), "".into())
        },
    },
    Source {
        what: "args.cni kubernetes.io/egress-bandwidth",
        spell: |value| {
            (config(&format!(r#", "args": {{"cni": {{"kubernetes.io/egress-bandwidth": {value}}}}}"#)), "".into())
        },
    },
    Source {
        what: "CNI_ARGS kubernetes.io/egress-bandwidth",
        spell: |value| (config(""), format!("kubernetes.io/egress-bandwidth={}", value.trim_matches('"'))),
    },
    Source {
        what: "configuration key \"egress\"",
        spell: |value| (config(&format!(r#", "egress": {value}"#)), "".into()),
    },
    Source {
        what: "configuration key \"max.egress\"",
        spell: |value| (config(&format!(r#", "max": {{"egress": {value}}}"#)), "".into()),
    },
];

#[test]
fn a_rate_that_is_none_is_refused_wherever_it_stands() {
    // Invalid everywhere: too large, too small, not a quantity, not a number.
    let values = [
        "\"1e30\"",
        "\"10MB\"",
        "\"-5M\"",
        "\"0x10\"",
        "\"0\"",
        "\"NaN\"",
        "\"inf\"",
        "\"1 M\"",
        "\"\\u0661M\"",
        "\"999999999999999999999999999999999999999999999999999999999999999999\"",
        "-5000000",
        "1e400",
        "18446744073709551616",
        "99999999999999999",
    ];
    // Only strings can be spelt in CNI_ARGS, which is text.
    let of_json = ["true", "{}", "[10000000]", "\"\""];
    for source in &SOURCES {
        let is_json = !source.what.starts_with("CNI_ARGS");
        for value in values.iter().chain(of_json.iter().filter(|_| is_json)) {
            let (stdin, arguments) = (source.spell)(value);
            let (code, details) = refused(&cni("ADD").env("CNI_ARGS", arguments).stdin(stdin));
            assert_eq!(code, CONFIG, "{} {value}: {details}", source.what);
            let named = details.starts_with(&format!("{}: ", source.what));
            assert!(named && details.len() < 400, "{} {value}: {details}", source.what);
        }
        if is_json {
            let (stdin, _) = (source.spell)("NaN");
            let (code, details) = refused(&cni("ADD").stdin(stdin));
            assert_eq!(code, DECODE, "{} NaN: {details}", source.what);
        }
    }
    // A number in an annotation is read as a quantity, like its text. Where a number is required, it must be an
    // integer.
    for source in [&SOURCES[0], &SOURCES[5], &SOURCES[6]] {
        let (code, details) = refused(&cni("ADD").stdin((source.spell)("10000.5").0));
        assert_eq!(code, CONFIG, "{} 10000.5: {details}", source.what);
    }
}

#[test]
fn errors_are_whole() {
    let annotation = |value| (SOURCES[1].spell)(value).0;
    let no_prev = r#"{"cniVersion": "0.4.0", "name": "net"}"#;
    for (call, expected) in [
        (
            cni("ADD").stdin(no_prev),
            json!({ "cniVersion": "0.4.0", "code": 7, "msg": "Invalid network config",
                "details": "there is no prevResult: podshaper is a chained plugin, put it behind the one that makes the \
                            interface, in the \"plugins\" list of a .conflist" }),
        ),
        (
            cni("ADD").stdin(r#"{"cniVersion": "2.0.0", "name": "net"}"#),
            json!({ "cniVersion": "2.0.0", "code": 1, "msg": "Incompatible CNI version",
                "details": "config is \"2.0.0\", plugin supports [\"0.3.0\", \"0.3.1\", \"0.4.0\", \"1.0.0\", \"1.1.0\"]" }),
        ),
        (
            cni("BLESS").stdin(no_prev),
            json!({ "cniVersion": "1.1.0", "code": 4, "msg": "Invalid necessary environment variables",
                "details": "CNI_COMMAND: \"BLESS\" is not ADD, DEL, CHECK, STATUS, GC or VERSION" }),
        ),
        (
            cni("").env("CNI_COMMAND", "").stdin(no_prev),
            json!({ "cniVersion": "1.1.0", "code": 4, "msg": "Invalid necessary environment variables",
                "details": "CNI_COMMAND is empty" }),
        ),
        (
            Cni::new(PODSHAPER, "ADD").stdin(no_prev),
            json!({ "cniVersion": "0.4.0", "code": 4, "msg": "Invalid necessary environment variables",
                "details": "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME] missing" }),
        ),
        (
            cni("ADD").env("CNI_ARGS", "K8S_POD_UID=../../x").stdin(config("")),
            json!({ "cniVersion": "1.1.0", "code": 4, "msg": "Invalid necessary environment variables",
                "details": "CNI_ARGS: K8S_POD_UID: \"../../x\" is not a pod UID (1 to 63 letters, digits and dashes, no dash \
                            first)" }),
        ),
        (
            cni("ADD").stdin("{\"cniVersion\": \"1.0.0\", \"name\""),
            json!({ "cniVersion": "1.1.0", "code": 6, "msg": "Failed to decode content",
                "details": "decode the network configuration on stdin (30 bytes): EOF while parsing an object at line 1 \
                            column 30" }),
        ),
        (
            cni("ADD").stdin(annotation("\"10MB\"")),
            json!({ "cniVersion": "1.1.0", "code": 7, "msg": "Invalid network config",
                "details": "pod annotation kubernetes.io/egress-bandwidth: \"10MB\" is not a rate (write bits per second, 1k \
                            to 1P, such as \"10M\"): the number is followed by something else than k, M, G, T, P, Ki, Mi, Gi \
                            or an exponent" }),
        ),
        (
            cni("ADD").stdin(config(r#", "kubeconfig": "kubelet.conf", "egress": "1M""#)),
            json!({ "cniVersion": "1.1.0", "code": 7, "msg": "Invalid network config",
                "details": "configuration key \"kubeconfig\": \"kubelet.conf\" is not an absolute path (4096 bytes at most)" }),
        ),
    ] {
        let call = call.call().unwrap();
        assert_eq!(call.status.code(), Some(1), "{call}");
        assert_eq!(serde_json::from_str::<Value>(&call.stdout).unwrap(), expected, "{call}");
    }
}

#[test]
fn stdin_that_is_no_configuration_is_refused_by_every_verb_but_a_del_which_goes_by_its_variables() {
    let mut huge = config("");
    huge.insert_str(1, &" ".repeat(8 << 20));
    let whole = config("");
    let deep = "[".repeat(500_000);
    let mut inputs: Vec<(Vec<u8>, u64)> = vec![
        (Vec::new(), DECODE),
        (huge.into(), DECODE),
        (deep.into(), DECODE),
        (b"\0".to_vec(), DECODE),
        (b"\xff\xfe{\0}\0".to_vec(), DECODE),
        (b"{\"name\": \"\xff\"}".to_vec(), DECODE),
        (b"podshaper".to_vec(), DECODE),
        (b"null".to_vec(), DECODE),
        (b"[]".to_vec(), DECODE),
        (br#"["1.1.0", "net"]"#.to_vec(), DECODE),
        (whole.replace("\"1.1.0\"", "1.1").into(), DECODE),
        (whole.replace("\"net\"", "[\"net\"]").into(), DECODE),
        (whole.replace("\"net\"", "\"a\", \"name\": \"b\"").into(), DECODE),
        (config(r#", "runtimeConfig": "x""#).into(), DECODE),
        ((whole.clone() + "}").into(), DECODE),
        (whole.replace("\"1.1.0\"", "\"one\"").into(), DECODE),
        (whole.replace("\"net\"", "\"../net\"").into(), CONFIG),
        (whole.replace("\"net\"", "\"\"").into(), CONFIG),
    ];
    inputs.extend([1, 10, 30, 60, whole.len() - 1].map(|length| (whole.as_bytes()[..length].to_vec(), DECODE)));
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for (stdin, code) in &inputs {
            let shown = String::from_utf8_lossy(&stdin[..stdin.len().min(100)]).into_owned();
            let output = run(cni(verb).command(), stdin);
            let text = String::from_utf8(output.stdout).unwrap();
            if verb == "DEL" && *code == DECODE {
                let stderr = String::from_utf8_lossy(&output.stderr);
                assert_eq!((output.status.code(), text.as_str()), (Some(0), ""), "{shown}: {stderr}");
                assert!(stderr.contains("DEL goes on without: ") && !stderr.contains("panicked"), "{shown}: {stderr}");
                continue;
            }
            let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{verb} {shown}: {text}"));
            assert_eq!(
                (error["code"].as_u64(), output.status.code()),
                (Some(*code), Some(1)),
                "{verb} {shown}: {error}"
            );
            assert!(text.len() < 1000 && error["msg"].is_string() && error["details"].is_string(), "{text}");
            assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{verb} {shown}");
        }
    }
}

/// The most annotations that an API server takes, twice, each byte written as six bytes by Go.
#[test]
fn the_largest_annotations_of_a_pod_are_read() {
    let annotation = "\\u003c".repeat(256 << 10);
    let runtime = format!(
        r#", "runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {{"a": "{annotation}"}}}}, "args": {{"cni": {{"a": "{annotation}"}}}}"#
    );
    let stdin = config(&runtime);
    assert!(stdin.len() > 3 << 20);
    for (verb, answer) in [("ADD", r#"{"ips": []}"#), ("DEL", "")] {
        let output = run(cni(verb).command(), stdin.as_bytes());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()),
            (Some(0), answer),
            "{stderr}"
        );
    }
}

#[test]
fn names_the_specification_forbids_are_refused_and_a_del_of_them_succeeds() {
    let (id, interface, long) = ("CNI_CONTAINERID", "CNI_IFNAME", "a".repeat(129));
    let uid = |uid: &str| ("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_UID={uid}"));
    let mut variables = vec![(id, "../c1".to_owned()), (id, "-c1".into()), (id, "c 1".into()), (id, "c/1".into())];
    variables.extend([(id, "c\n1".into()), (id, "\u{e9}".into()), (id, ".".into()), (id, long)]);
    let interfaces = ["a-name-of-16-byt", ".", "..", "eth/0", "eth:0", "eth 0", "eth\t0", "../eth0"];
    variables.extend(interfaces.map(|name| (interface, name.to_owned())));
    variables.extend(["../x", "..", "a/../../b", "a/b", "-rf", "a_b", "a b", "%2e%2e", &"a".repeat(64)].map(uid));
    for (name, value) in variables {
        for verb in ["ADD", "CHECK"] {
            let (code, details) = refused(&cni(verb).env(name, &value).stdin(config(r#", "egress": "1M""#)));
            assert_eq!(code, 4, "{verb} {name}={value}: {details}");
            assert!(details.starts_with(name), "{details}");
        }
        let del = ok(&cni("DEL").env(name, &value).stdin(config("")));
        assert_eq!(del.stdout, "", "{del}");
    }
}

#[test]
fn a_variable_that_is_not_text_is_refused() {
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_ARGS", "CNI_NETNS"] {
        let mut command = cni("ADD").command();
        command.env(name, OsString::from_vec(b"a=\xff".to_vec()));
        let output = run(command, config("").as_bytes());
        let error: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((error["code"].as_u64(), output.status.code()), (Some(4), Some(1)), "{error}");
    }
}

#[test]
fn each_version_is_spoken_and_no_other() {
    for version in VERSIONS {
        let stdin = config("").replace("1.1.0", version);
        assert_eq!(ok(&cni("ADD").stdin(&stdin)).stdout, r#"{"ips": []}"#);
        assert_eq!(ok(&cni("DEL").stdin(&stdin)).stdout, "");
        let since = |verb, first: &str| {
            let call = cni(verb).stdin(&stdin);
            if version >= first {
                assert_eq!(ok(&call).stdout, "");
            } else {
                let details = format!("config version does not allow {verb}");
                assert_eq!(refused(&call), (1, details));
            }
        };
        since("CHECK", "0.4.0");
        since("GC", "1.1.0");
        if version < "1.1.0" {
            assert_eq!(refused(&cni("STATUS").stdin(&stdin)), (1, "config version does not allow STATUS".into()));
        }
    }
    for version in ["0.1.0", "0.2.0", "0.3.2", "1.2.0", "2.0.0", ""] {
        for verb in ["ADD", "DEL"] {
            let (code, details) = refused(&cni(verb).stdin(config("").replace("1.1.0", version)));
            assert_eq!(code, 1, "{version}: {details}");
        }
    }
    let (code, _) = refused(&cni("ADD").stdin(r#"{"name": "net", "prevResult": {}}"#));
    assert_eq!(code, 1, "a configuration without a version is of 0.1.0");
}

#[test]
fn version_answers_in_the_version_it_is_asked_in() {
    let supported = r#""supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}"#;
    for (stdin, version) in [
        (r#"{"cniVersion": "0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion": "1.1.0", "name": 1}"#, "1.1.0"),
        (r#"{"cniVersion": "9.9.9"}"#, "9.9.9"),
        // A person, or a runtime from before the specification required the version on stdin.
        ("", "1.1.0"),
        ("{}", "1.1.0"),
        ("nonsense", "1.1.0"),
    ] {
        let call = ok(&Cni::new(PODSHAPER, "VERSION").stdin(stdin));
        assert_eq!(call.stdout, format!("{{\"cniVersion\":\"{version}\",{supported}"), "{call}");
        assert_eq!(call.stderr, "");
    }
}

/// A process without capabilities. It may still read a plugin that only root may read.
fn unprivileged(cni: &Cni) -> Cni {
    let root = nix::unistd::Uid::effective().is_root();
    let without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];
    cni.clone().through(if root { &without } else { &[] })
}

#[test]
fn an_add_without_a_limit_gives_back_what_it_got_and_needs_no_privilege() {
    let weave = include_str!("records/weave.result.json").trim();
    let flannel = include_str!("records/flannel.result.json").trim();
    let odd = "{ \"cniVersion\" :\t\"1.0.0\",\r\n  \"ips\":[ ] , \"\\u0069ps\": \"\\u00e9\\ud83d\\ude00\\/\", \"x\": {\"y\": [1e400, \
               0.1e-5, -0, 123456789012345678901234567890, null]},\"x\":2}";
    for prev in [weave, flannel, odd, "{}", "[ 1 ]", "\"text\""] {
        let stdin =
            format!(r#"{{"cniVersion": "1.0.0", "name": "net", "example.org/other": [{{}}], "prevResult":  {prev} }}"#);
        for arguments in ["", "IgnoreUnknown=1;K8S_POD_UID=b210522c-ecca-47e2-908a-76691272b43d"] {
            let call = ok(&unprivileged(&cni("ADD")).env("CNI_ARGS", arguments).stdin(&stdin));
            assert_eq!(call.stdout, prev, "{call}");
            assert_eq!(call.stderr, "", "{call}");
        }
    }
}

#[test]
fn a_key_that_nobody_knows_is_warned_of() {
    let stdin = r#"{"cniVersion": "1.0.0", "name": "net", "egres": "1M", "prevResult": {}}"#;
    let call = ok(&cni("ADD").stdin(stdin));
    assert!(call.stderr.contains("WARN") && call.stderr.contains("\"egres\" is no key of podshaper's"), "{call}");
}

#[test]
fn a_del_succeeds_whatever_the_pod_and_its_runtime_write() {
    let nested = "[".repeat(50_000) + &"]".repeat(50_000);
    // The most annotations that an API server takes, as Go writes them when it escapes each character; the runtime
    // passes them twice.
    let most = r"\u003c".repeat(256 << 10);
    for keys in [
        &format!(
            r#", "runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {{"a": "{most}"}}}}, "args": {{"a": "{most}"}}"#
        ),
        r#", "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"kubernetes.io/egress-bandwidth": "1e30"}}"#,
        r#", "runtimeConfig": {"io.kubernetes.cri.pod-annotations": "all of them", "bandwidth": 1e400}"#,
        r#", "runtimeConfig": {"cgroupPath": "/../../etc"}, "args": "none", "max": 3"#,
        r#", "runtimeConfig": null, "egress": -1, "logLevel": "loud", "logFile": "relative", "kubeconfig": 1"#,
        r#", "exemptSubnets": ["10.0.0.0/33"], "rateKey": [], "cni.dev/valid-attachments": "all""#,
        &format!(r#", "args": {nested}, "egress": {nested}"#),
    ] {
        for arguments in ["", "A;B=;=C", "IgnoreUnknown=1;K8S_POD_NAME=a/b;rate=x"] {
            let call = ok(&cni("DEL").env("CNI_NETNS", "").env("CNI_ARGS", arguments).stdin(config(keys)));
            assert_eq!(call.stdout, "", "{call}");
        }
    }
}

/// Text that would change a terminal, or break a line of a log, if it were written there.
pub const HOSTILE: &str = "\u{1b}[2J\u{1b}]0;x\u{7}\r\n\u{8}\u{7f}\u{85}\u{9b}31m\u{202e}\u{2028}\"\\'";

/// Panics if the text has such a character.
#[track_caller]
pub fn assert_printable(what: &str, text: &str) {
    let is_hostile = |c: char| c.is_control() && c != '\n' || matches!(c, '\u{202e}' | '\u{2028}');
    assert!(!text.contains(is_hostile), "{what}: {text:?}");
}

/// Whoever wrote the text: a pod, its runtime, or an administrator.
#[test]
fn foreign_text_is_spelt_out_in_answers_and_logs() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let logged = json!({ "logFile": log, "logLevel": "trace", "prevResult": {} });
    let annotations = |key: &str| json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { key: HOSTILE } } });
    let own = format!("podshaper.io/{HOSTILE}");
    let mut calls: Vec<(Value, &str, &str)> =
        ["kubernetes.io/egress-bandwidth", "rate", "podshaper.io/egress-burst", &own]
            .map(|key| (annotations(key), "CNI_PATH", "/opt/cni/bin"))
            .to_vec();
    let limited =
        json!({ "runtimeConfig": { "bandwidth": { "egressRate": 1_000_000 }, "cgroupPath": format!("/{HOSTILE}") } });
    calls.push((limited.clone(), "CNI_PATH", ""));
    calls.extend(
        [HOSTILE, "egress", "max", "name", "kubeconfig", "cgroupPath", "exemptSubnets", "namespaces"]
            .into_iter()
            .flat_map(|key| {
                [json!({ key: HOSTILE }), json!({ key: { HOSTILE: HOSTILE } }), json!({ key: [{ HOSTILE: HOSTILE }] })]
                    .map(|keys| (keys, "CNI_PATH", ""))
            }),
    );
    let arguments =
        ["K8S_POD_NAME", "K8S_POD_UID", "rate", HOSTILE].map(|key| format!("K8S_POD_NAMESPACE=a;{key}={HOSTILE}"));
    calls.extend(arguments.iter().map(|arguments| (json!({}), "CNI_ARGS", arguments.as_str())));
    calls.extend(
        ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_COMMAND"]
            .map(|name| (json!({ "egress": "1M" }), name, HOSTILE)),
    );
    for (keys, variable, value) in &calls {
        for verb in ["ADD", "CHECK", "DEL", "STATUS", "GC"] {
            let mut stdin: Value = serde_json::from_str(&config("")).unwrap();
            for more in [&logged, keys] {
                stdin.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            }
            let _ = fs::remove_file(&log);
            let call = cni(verb).env(variable, *value).stdin(stdin.to_string()).call().unwrap();
            let what = format!("{verb} {keys} {variable}");
            assert_printable(&what, &call.stdout.replace('\n', ""));
            assert_printable(&what, &call.stderr);
            let lines = fs::read_to_string(&log).unwrap_or_default();
            assert_printable(&what, &lines);
            assert!(lines.lines().all(|line| line.starts_with("20")), "{what}: a line of somebody else's: {lines}");
        }
    }
}

#[test]
fn a_person_gets_help_and_a_wrong_argument_a_2() {
    let call = |arguments: &[&str]| {
        let mut command = Command::new(PODSHAPER);
        command.args(arguments).env_clear().stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let version = format!("podshaper {}\n", env!("CARGO_PKG_VERSION"));
    for argument in ["--version", "-V"] {
        assert_eq!(call(&[argument]), (0, version.clone(), String::new()));
    }
    let help = call(&["--help"]);
    assert!(help.0 == 0 && help.1.contains("chained CNI plugin") && help.2.is_empty(), "{help:?}");
    assert_eq!(call(&[]), help);
    assert!(call(&["-h"]).1.contains("doctor"));
    for arguments in
        [&["frobnicate"][..], &["--colour"], &[""], &["list", "-o", "xml"], &["set", "web"], &["run", "true"]]
    {
        let (code, stdout, stderr) = call(arguments);
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(stderr.starts_with("podshaper: "), "{stderr}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    for arguments in [&["--help"][..], &["man"], &["man", "list"], &["completions", "bash"], &["completions", "zsh"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(PODSHAPER).args(arguments).env_clear().stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]), "{arguments:?}");
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(PODSHAPER).arg("--help").env_clear().stdout(full).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr, "podshaper: write to stdout: No space left on device (os error 28)\n");
}

#[test]
fn a_result_that_nobody_reads_is_a_failure_and_no_panic() {
    let mut command = cni("ADD").command();
    command.stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let output = run(command, config("").as_bytes());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("write the result to stdout: No space left on device (os error 28)"), "{stderr}");
}

/// Runs a plugin with bytes on stdin that need not be text.
fn run(mut command: Command, stdin: &[u8]) -> Output {
    let mut child = command.spawn().unwrap();
    // The plugin may stop reading before the end.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

/// The modules that a source file uses: the names after `crate::` outside of comments, also several of them in
/// braces.
fn used(source: &str) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let source = lines.map(|line| format!("{line}\n")).collect::<String>();
    let first_word =
        |text: &str| text.trim_start().split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned);
    let mut found = BTreeSet::new();
    for (at, _) in source.match_indices("crate::") {
        let rest = &source[at + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.extend(first_word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in list.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => found.extend(first_word(&std::mem::take(&mut item))),
                c => item.push(c),
            }
        }
        found.extend(first_word(&item));
    }
    found
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// The modules below a directory, each with the modules of that directory that it uses. The crate's root is left out,
/// since it uses all.
fn modules(root: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut needs: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in sources(root) {
        let below = path.strip_prefix(root).unwrap().with_extension("");
        let module = below.components().next().unwrap().as_os_str().to_str().unwrap().to_owned();
        needs.entry(module).or_default().extend(used(&fs::read_to_string(&path).unwrap()));
    }
    needs.remove("main");
    let modules: BTreeSet<String> = needs.keys().cloned().collect();
    needs.iter_mut().for_each(|(module, needed)| needed.retain(|other| other != module && modules.contains(other)));
    needs
}

#[test]
fn no_two_modules_need_each_other() {
    for (root, user, needed) in [("src", "cli", "attachment"), ("bpf/src", "window", "clock")] {
        let mut needs = modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join(root));
        assert!(needs[user].contains(needed), "{root}: {needs:?}");
        // Modules that need no remaining module are removed, until none is left.
        while let Some(module) = needs.iter().find(|(_, needed)| needed.is_empty()).map(|(module, _)| module.clone()) {
            needs.remove(&module);
            needs.values_mut().for_each(|needed| needed.retain(|other| *other != module));
        }
        assert!(needs.is_empty(), "these of {root} need each other: {needs:?}");
    }
}

/// rustfmt breaks code at its width and leaves comments as they are.
#[test]
fn no_comment_is_wider_than_code_may_be() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let configuration = fs::read_to_string(root.join("rustfmt.toml")).unwrap();
    let width = configuration.lines().find_map(|line| line.strip_prefix("max_width = ")).unwrap().parse().unwrap();
    let is_wide = |line: &str| line.trim_start().starts_with("//") && line.chars().count() > width;
    let directories = ["src", "bpf/src", "bpf/abi", "tests"].map(|directory| sources(&root.join(directory)));
    let is_source = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "rs")
            && !path.components().any(|of| of.as_os_str() == "target")
    };
    let files: Vec<PathBuf> = directories.into_iter().flatten().filter(is_source).collect();
    assert!(files.len() > 100, "{files:?}");
    let wide = files.iter().flat_map(|path| {
        let text = fs::read_to_string(path).unwrap();
        let lines = (1..).zip(text.lines()).filter(|(_, line)| is_wide(line)).map(|(number, _)| number);
        lines.map(|number| format!("{}:{number}", path.display())).collect::<Vec<_>>()
    });
    let wide: Vec<String> = wide.collect();
    assert!(wide.is_empty(), "wider than {width} columns: {wide:#?}");
}
