//! The `CNI_*` variables of a call, and the pairs that a runtime puts into `CNI_ARGS`.
//!
//! SPEC.md, "CNI operations", says which variables a verb needs. An empty variable counts as unset, as in the reference
//! implementation: runtimes repeat the DEL of a sandbox with `CNI_NETNS=`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use rscni_plugin::error::Error as CniError;
use rscni_plugin::types::{CNI_ARGS, CNI_COMMAND, CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS, CNI_PATH, Cmd};

use super::{Endpoint, MAX_PATH_BYTES, Subject, Tolerance};
use crate::error::{Code, Error, Result, quoted};
use crate::pod::{PodKey, container_id, interface_name, object_name};

/// The variables as set in the environment.
#[derive(Clone, Debug, Default)]
pub struct Env {
    /// `CNI_COMMAND`
    pub command: Option<OsString>,
    /// `CNI_CONTAINERID`
    pub container_id: Option<OsString>,
    /// `CNI_NETNS`
    pub netns: Option<OsString>,
    /// `CNI_IFNAME`
    pub ifname: Option<OsString>,
    /// `CNI_ARGS`
    pub args: Option<OsString>,
    /// `CNI_PATH`
    pub path: Option<OsString>,
}

/// The content of the variables.
pub(super) struct Call {
    pub(super) subject: Subject,
    pub(super) netns: Option<PathBuf>,
    pub(super) pod_namespace: Option<String>,
    pub(super) pod_name: Option<String>,
    pub(super) args: Vec<(String, String)>,
}

impl Env {
    /// The variables of this process.
    pub fn from_process() -> Self {
        let [command, container_id, netns, ifname, args, path] =
            [CNI_COMMAND, CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME, CNI_ARGS, CNI_PATH].map(std::env::var_os);
        Self { command, container_id, netns, ifname, args, path }
    }

    /// The verb; `None` if the caller is not a runtime.
    ///
    /// # Errors
    /// `CNI_COMMAND` is not one of the specification's.
    pub fn command(&self) -> Result<Option<Cmd>> {
        let Some(command) = utf8(CNI_COMMAND, self.command.as_deref())? else { return Ok(None) };
        let verbs = "ADD, DEL, CHECK, STATUS, GC or VERSION";
        let unknown = |_| Error::new(Code::Environment, format!("CNI_COMMAND: {} is not {verbs}", quoted(command)));
        command.parse().map(Some).map_err(unknown)
    }

    /// Checks and reads the variables of `cmd`.
    pub(super) fn read(&self, cmd: Cmd, tolerance: &mut Tolerance) -> Result<Call> {
        self.require(cmd)?;
        let node = Call { subject: Subject::Node, netns: None, pod_namespace: None, pod_name: None, args: Vec::new() };
        if !matches!(cmd, Cmd::Add | Cmd::Check | Cmd::Del) {
            return Ok(node);
        }
        let (args, malformed) = pairs(utf8(CNI_ARGS, self.args.as_deref())?.unwrap_or_default());
        tolerance.weigh(malformed.map_or(Ok(()), Err))?;
        let subject = match self.endpoint(&args) {
            Ok(endpoint) => Subject::Endpoint(endpoint),
            Err(error) if cmd == Cmd::Del => Subject::NeverAdded(error),
            Err(error) => return Err(error),
        };
        let netns = match utf8(CNI_NETNS, self.netns.as_deref())? {
            Some(netns) if netns.len() > MAX_PATH_BYTES => {
                tolerance.weigh(Err(Error::new(Code::Environment, "CNI_NETNS has more than 4096 bytes")))?
            }
            netns => netns.map(PathBuf::from),
        };
        let pod_namespace = tolerance.weigh(arg(&args, "K8S_POD_NAMESPACE", object_name))?;
        let pod_name = tolerance.weigh(arg(&args, "K8S_POD_NAME", object_name))?;
        Ok(Call { subject, netns, pod_namespace, pod_name, args })
    }

    /// Returns an error that names every variable that `cmd` needs and that is not set.
    fn require(&self, cmd: Cmd) -> Result<()> {
        let needed: &[(&str, &Option<OsString>)] = match cmd {
            Cmd::Add | Cmd::Check => {
                &[(CNI_CONTAINERID, &self.container_id), (CNI_NETNS, &self.netns), (CNI_IFNAME, &self.ifname)]
            }
            // The specification requires DEL to succeed when the namespace is gone.
            Cmd::Del => &[(CNI_CONTAINERID, &self.container_id), (CNI_IFNAME, &self.ifname)],
            Cmd::Gc => &[(CNI_PATH, &self.path)],
            Cmd::Status | Cmd::Version => &[],
        };
        let unset = |value: &Option<OsString>| value.as_ref().is_none_or(|value| value.is_empty());
        let missing: Vec<&str> = needed.iter().filter(|(_, value)| unset(value)).map(|(name, _)| *name).collect();
        if missing.is_empty() { Ok(()) } else { Err(CniError::missing_env(&missing).into()) }
    }

    fn endpoint(&self, args: &[(String, String)]) -> Result<Endpoint> {
        let named = |name, error| Error::because(Code::Environment, name, error);
        let id = utf8(CNI_CONTAINERID, self.container_id.as_deref())?.unwrap_or_default();
        let container_id = container_id(id).map_err(|error| named(CNI_CONTAINERID, error))?;
        let ifname = utf8(CNI_IFNAME, self.ifname.as_deref())?.unwrap_or_default();
        let ifname = interface_name(ifname).map_err(|error| named(CNI_IFNAME, error))?;
        let uid = arg(args, "K8S_POD_UID", str::parse)?;
        let key = uid.map_or_else(|| PodKey::Container(container_id.clone()), PodKey::Uid);
        Ok(Endpoint { key, container_id, ifname })
    }
}

/// A variable as text; `None` if unset or empty.
fn utf8<'a>(name: &str, value: Option<&'a OsStr>) -> Result<Option<&'a str>> {
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(None) };
    let shown = || quoted(&value.to_string_lossy());
    value.to_str().map(Some).ok_or_else(|| Error::new(Code::Environment, format!("{name}: {} is not UTF-8", shown())))
}

/// The value of a key of `CNI_ARGS`; `None` if absent or empty.
fn arg<T>(args: &[(String, String)], key: &str, read: impl Fn(&str) -> Result<T>) -> Result<Option<T>> {
    let named = |error| Error::because(Code::Environment, format!("CNI_ARGS: {key}"), error);
    value(args, key).filter(|value| !value.is_empty()).map(read).transpose().map_err(named)
}

/// The value of a key of `CNI_ARGS`.
pub(super) fn value<'a>(args: &'a [(String, String)], key: &str) -> Option<&'a str> {
    args.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
}

/// Splits `CNI_ARGS`: `K=V;K=V`. Returns the well-formed pairs, the first of each key, and the error of the first
/// malformed one. Unknown keys are ignored, with and without `IgnoreUnknown`.
fn pairs(text: &str) -> (Vec<(String, String)>, Option<Error>) {
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut malformed = None;
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let wrong = match pair.split_once('=') {
            None => "is not of the form KEY=VALUE",
            Some(("", _)) => "has no key",
            // Two UIDs would be two pods.
            Some((key, _)) if value(&pairs, key).is_some() => "repeats a key",
            Some((key, value)) => {
                pairs.push((key.to_owned(), value.to_owned()));
                continue;
            }
        };
        malformed.get_or_insert_with(|| Error::new(Code::Environment, format!("CNI_ARGS: {} {wrong}", quoted(pair))));
    }
    (pairs, malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;
    use crate::request::tests::{add, config, env};
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::path::Path;

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn cni_args_are_pairs() {
        for (text, expected, wrong) in [
            ("", owned(&[]), None),
            ("A=1;B=2", owned(&[("A", "1"), ("B", "2")]), None),
            ("A=1;;B=;", owned(&[("A", "1"), ("B", "")]), None),
            ("A=b=c;rate=1M", owned(&[("A", "b=c"), ("rate", "1M")]), None),
            ("A;B=2", owned(&[("B", "2")]), Some(r#"CNI_ARGS: "A" is not of the form KEY=VALUE"#)),
            ("=1;B=2", owned(&[("B", "2")]), Some(r#"CNI_ARGS: "=1" has no key"#)),
            ("A=1;A=2", owned(&[("A", "1")]), Some(r#"CNI_ARGS: "A=2" repeats a key"#)),
        ] {
            let (pairs, malformed) = pairs(text);
            assert_eq!((pairs, malformed.map(|error| error.to_string()).as_deref()), (expected, wrong), "{text:?}");
        }
    }

    #[test]
    fn commands_are_the_specifications() {
        let command = |text: &str| Env { command: Some(text.into()), ..Env::default() }.command();
        assert_eq!(command("ADD").unwrap(), Some(Cmd::Add));
        assert_eq!(command("").unwrap(), None);
        assert_eq!(Env::default().command().unwrap(), None);
        let error = command("add\n").unwrap_err().to_string();
        assert_eq!(error, r#"CNI_COMMAND: "add\n" is not ADD, DEL, CHECK, STATUS, GC or VERSION"#);
    }

    #[test]
    fn each_verb_names_the_variables_it_lacks() {
        let empty = Env { netns: Some("".into()), ..Env::default() };
        for (cmd, missing) in [
            (Cmd::Add, "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
            (Cmd::Check, "CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME"),
            (Cmd::Del, "CNI_CONTAINERID,CNI_IFNAME"),
            (Cmd::Gc, "CNI_PATH"),
        ] {
            let error = Request::parse(cmd, &empty, b"not looked at").unwrap_err();
            assert_eq!(error.code(), Code::Environment);
            assert_eq!(error.to_string(), format!("required env variables [{missing}] missing"));
        }
        assert!(Request::parse(Cmd::Status, &empty, config("").as_bytes()).is_ok());
        let late = Env { netns: Some("".into()), ..env("") };
        assert_eq!(Request::parse(Cmd::Del, &late, config("").as_bytes()).unwrap().netns, None);
    }

    #[test]
    fn a_del_of_what_no_add_can_have_made_is_told_apart_from_an_error() {
        for (env, expected) in [
            (
                Env { container_id: Some("../c".into()), ..env("") },
                "CNI_CONTAINERID: \"../c\" is not a container id (a letter or digit, then letters, digits, '_', '.' and '-', \
                 128 at most)",
            ),
            (
                Env { ifname: Some("..".into()), ..env("") },
                "CNI_IFNAME: \"..\" is not an interface name (1 to 15 bytes, no space, '/', ':' or control character, not \
                 '.' or '..')",
            ),
            (
                env("K8S_POD_UID=../../x"),
                "CNI_ARGS: K8S_POD_UID: \"../../x\" is not a pod UID (1 to 63 letters, digits and dashes, no dash first)",
            ),
        ] {
            for cmd in [Cmd::Add, Cmd::Check] {
                let error = Request::parse(cmd, &env, config("").as_bytes()).unwrap_err();
                assert_eq!((error.code(), error.to_string().as_str()), (Code::Environment, expected));
            }
            let request = Request::parse(Cmd::Del, &env, config("").as_bytes()).unwrap();
            let Subject::NeverAdded(error) = request.subject else { panic!("{:?}", request.subject) };
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn without_a_uid_the_container_is_the_key() {
        for (args, key) in [("", "c1"), ("K8S_POD_UID=", "c1"), ("IgnoreUnknown=1;K8S_POD_UID=6c9b65a9", "6c9b65a9")] {
            let request = add(args, &config("")).unwrap();
            let Subject::Endpoint(endpoint) = &request.subject else { panic!("{:?}", request.subject) };
            assert_eq!(endpoint.key.as_str(), key, "{args}");
            let owner = crate::owner::Owner::of(&request, endpoint, Path::new("/sys/fs/cgroup/a"));
            assert!(owner.is(&request.network, &endpoint.container_id, &endpoint.ifname));
            assert_eq!((owner.uid.is_some(), owner.interface.netns.as_deref()), (key != "c1", Some("/run/netns/n1")));
        }
    }

    #[test]
    fn variables_that_are_not_text_are_refused() {
        use std::os::unix::ffi::OsStringExt;
        let bytes = || Some(std::ffi::OsString::from_vec(b"a=\xff".to_vec()));
        let error = Request::parse(Cmd::Add, &Env { args: bytes(), ..env("") }, b"{}").unwrap_err();
        assert_eq!(
            (error.code(), error.to_string().as_str()),
            (Code::Environment, "CNI_ARGS: \"a=\\u{fffd}\" is not UTF-8")
        );
        let error = Request::parse(Cmd::Add, &Env { netns: bytes(), ..env("") }, b"{}").unwrap_err();
        assert_eq!(error.code(), Code::Environment);
    }

    proptest! {
        #[test]
        fn no_cni_args_make_the_parser_panic(text in "(?s)[a-c;=.]{0,20}|.{0,40}") {
            let (pairs, _) = pairs(&text);
            prop_assert!(pairs.iter().all(|(key, _)| !key.is_empty()));
        }

        #[test]
        fn pairs_that_are_joined_are_found_again(map in prop::collection::btree_map(".{0,8}", ".{0,8}", 0..6)) {
            let map: BTreeMap<_, _> = map
                .into_iter()
                .map(|(key, value)| (key.replace([';', '='], "_"), value.replace(';', "_")))
                .filter(|(key, _)| !key.is_empty())
                .collect();
            let text: Vec<String> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let (pairs, malformed) = pairs(&text.join(";"));
            prop_assert!(malformed.is_none());
            prop_assert_eq!(pairs.into_iter().collect::<BTreeMap<_, _>>(), map);
        }
    }
}
