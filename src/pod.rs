//! The names that identify pods, networks and attachments: checked once, then carried as types.
//!
//! `request` reads these names and `pins` stores them. Each name becomes a part of a path or of a message. That is why
//! none can hold a slash or a control character, and each has a bounded length. Surprising: the UID of a static pod is
//! 32 hex digits without dashes, and some runtimes pass no UID.

use std::fmt;
use std::str::FromStr;

use rscni_plugin::types::{ContainerId, InterfaceName};

use crate::error::{Code, Error, Result, quoted};

/// The longest container id that is accepted. Runtimes use 64 characters; the specification sets no bound, but a file
/// name has one.
const MAX_CONTAINER_ID: usize = 128;
/// The longest network name that is accepted: one file name, since other plugins keep state in files of this name.
const MAX_NETWORK: usize = 255;
/// The longest name of a Kubernetes object (RFC 1123 subdomain).
const MAX_OBJECT_NAME: usize = 253;

/// The UID of a pod: `b210522c-ecca-47e2-908a-76691272b43d`, or 32 hex digits for a static pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(String);

impl PodUid {
    /// The UID as the runtime passed it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PodUid {
    type Err = Error;

    /// Accepts letters, digits and dashes, at most 63, without a leading dash. This covers the UIDs that kubelets make
    /// and API servers accept, and excludes everything that could lead out of a directory.
    fn from_str(text: &str) -> Result<Self> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if text.is_empty() || text.len() > 63 || text.starts_with('-') || !text.bytes().all(allowed) {
            let rule = "1 to 63 letters, digits and dashes, no dash first";
            return Err(Error::new(Code::Environment, format!("{} is not a pod UID ({rule})", quoted(text))));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The key under which a pod's pins are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodKey {
    /// The pod's UID, which outlives its sandboxes.
    Uid(PodUid),
    /// The sandbox's container id, if the runtime passes no UID (containerd 1.4, podman).
    Container(ContainerId),
}

impl PodKey {
    /// The key as text: letters, digits and `-`; a container id may also hold `.` and `_`.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Uid(uid) => uid.as_str(),
            Self::Container(id) => id,
        }
    }

    /// The pod's UID, if the runtime passed it.
    pub fn uid(&self) -> Option<&PodUid> {
        match self {
            Self::Uid(uid) => Some(uid),
            Self::Container(_) => None,
        }
    }
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The name of a CNI network, as SPEC.md ("Network configuration format") restricts it: an alphanumeric character, then
/// alphanumeric characters, `_`, `.` and `-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkName(String);

impl NetworkName {
    /// The name as configured.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if !is_spec_name(text, MAX_NETWORK) {
            let rule = "a letter or digit, then letters, digits, '_', '.' and '-', 255 at most";
            let text = format!("configuration key \"name\": {} is not a network name ({rule})", quoted(text));
            return Err(Error::new(Code::Config, text));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A container id of bounded length.
///
/// # Errors
/// The text violates the specification's rule for `CNI_CONTAINERID`, or has more than 128 characters.
pub fn container_id(text: &str) -> Result<ContainerId> {
    let id = Some(text).filter(|text| text.len() <= MAX_CONTAINER_ID).and_then(|text| text.parse().ok());
    let rule = "a letter or digit, then letters, digits, '_', '.' and '-', 128 at most";
    id.ok_or_else(|| Error::new(Code::Environment, format!("{} is not a container id ({rule})", quoted(text))))
}

/// An interface name that the kernel accepts.
///
/// # Errors
/// The text violates dev_valid_name() of the kernel, or has a control character, which the kernel would accept.
pub fn interface_name(text: &str) -> Result<InterfaceName> {
    let name = Some(text).filter(|text| !text.contains(char::is_control)).and_then(|text| text.parse().ok());
    let rule = "1 to 15 bytes, no space, '/', ':' or control character, not '.' or '..'";
    name.ok_or_else(|| Error::new(Code::Environment, format!("{} is not an interface name ({rule})", quoted(text))))
}

/// A name or namespace of a Kubernetes object, or the name that another orchestrator passes in its place.
///
/// # Errors
/// The text has other characters than letters, digits, `_`, `.` and `-`, or more than 253 characters.
pub fn object_name(text: &str) -> Result<String> {
    if !is_spec_name(text, MAX_OBJECT_NAME) {
        let rule = "letters, digits, '_', '.' and '-', 253 at most";
        return Err(Error::new(Code::Environment, format!("{} is not the name of an object ({rule})", quoted(text))));
    }
    Ok(text.to_owned())
}

/// SPEC.md has one rule for networks and container ids; podshaper adds a bound on the length.
fn is_spec_name(text: &str, longest: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    text.len() <= longest && text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_never_leads_out_of_its_directory() {
        let longest = "a".repeat(63);
        for uid in ["b210522c-ecca-47e2-908a-76691272b43d", "6c9b65a97e5b6608241b55bb2f041b71", "A", &longest] {
            assert_eq!(uid.parse::<PodUid>().unwrap().as_str(), uid);
        }
        let too_long = "a".repeat(64);
        for uid in
            ["", ".", "..", "../x", "a/b", "a.b", "a_b", "-a", "a b", "a\n", "a\0", "\u{e9}", "\u{661}", &too_long]
        {
            let error = uid.parse::<PodUid>().unwrap_err();
            assert_eq!(error.code(), Code::Environment, "{uid:?}");
        }
        assert_eq!(
            "../x".parse::<PodUid>().unwrap_err().to_string(),
            "\"../x\" is not a pod UID (1 to 63 letters, digits and dashes, no dash first)"
        );
    }

    #[test]
    fn names_follow_the_specification_and_are_bounded() {
        for (name, legal) in [
            ("cbr0", true),
            ("k8s-pod-network", true),
            ("0.a_b-c", true),
            ("", false),
            (".hidden", false),
            ("-a", false),
            ("_a", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("a\u{e9}", false),
        ] {
            assert_eq!(name.parse::<NetworkName>().is_ok(), legal, "network {name:?}");
            assert_eq!(container_id(name).is_ok(), legal, "container {name:?}");
            assert_eq!(object_name(name).is_ok(), legal, "object {name:?}");
        }
        let of = |length| "a".repeat(length);
        assert!(of(255).parse::<NetworkName>().is_ok() && of(256).parse::<NetworkName>().is_err());
        assert!(container_id(&of(128)).is_ok() && container_id(&of(129)).is_err());
        assert!(object_name(&of(253)).is_ok() && object_name(&of(254)).is_err());
    }

    #[test]
    fn interface_names_are_what_the_kernel_takes() {
        for (name, legal) in [
            ("eth0", true),
            ("eth0.100", true),
            ("abcdefghijklmno", true),
            ("abcdefghijklmnop", false),
            ("", false),
            (".", false),
            ("..", false),
            ("a/b", false),
            ("a:b", false),
            ("a b", false),
            ("a\u{1b}", false),
        ] {
            assert_eq!(interface_name(name).is_ok(), legal, "{name:?}");
        }
    }
}
