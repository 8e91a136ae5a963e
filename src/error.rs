//! The only error type of the control plane. It says what was being done, to which object, why it failed and what the
//! operator can do.
//!
//! The text is shown by `kubectl describe pod`: the runtime shows `msg; details` of the CNI error JSON. Each error
//! carries its CNI error code; only this file defines which codes exist.

use std::fmt::{self, Write};

use rscni_plugin::error::Error as CniError;

/// The CNI error code of an [`Error`] (SPEC.md, "Error": 0-99 belong to the specification, 100 and up to the plugin).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// 1: the configuration has a CNI version that podshaper does not support.
    IncompatibleVersion,
    /// 4: a `CNI_*` variable is missing or malformed.
    Environment,
    /// 5: reading stdin, writing stdout, or accessing a file failed.
    Io,
    /// 6: stdin is not the JSON the specification describes.
    Decode,
    /// 7: the network configuration, or a limit asked for in it or by the pod, is not valid.
    Config,
    /// 8: the pod's network namespace cannot be entered.
    Netns,
    /// 50: no pod can be added (answer to STATUS).
    Unavailable,
    /// 100: the pod's cgroup was not found.
    Cgroup,
    /// 101: the kernel refused a part of the shaper.
    Kernel,
    /// 102: CHECK found an attachment that differs from the limits asked for.
    Mismatch,
    /// 103: the API server, which is configured as a source of labels, gave none.
    ApiServer,
    /// The error code of another plugin that podshaper has called.
    Plugin,
}

/// A failed operation. `text` names the operation, the object and the remedy; the cause is in `source` and never
/// repeated in `text`.
#[derive(Debug)]
pub struct Error {
    code: Code,
    text: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error without a deeper cause: podshaper itself decided that the operation cannot go on.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), source: None }
    }

    /// An error caused by another one, whose text follows after a colon.
    pub fn because(
        code: Code,
        text: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { code, text: text.into(), source: Some(source.into()) }
    }

    /// The error that another plugin has returned. The runtime gets that plugin's code and text; `calling` says which
    /// plugin it was.
    pub fn of_plugin(calling: impl Into<String>, answered: CniError) -> Self {
        Self::because(Code::Plugin, calling, answered)
    }

    /// The CNI code with which this error is answered.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The error as the CNI library writes it to stdout.
    pub fn to_cni(&self) -> CniError {
        let details = self.to_string();
        let of_plugin = self.source.as_deref().and_then(|source| source.downcast_ref::<CniError>());
        match self.code {
            Code::IncompatibleVersion => CniError::IncompatibleVersion(details),
            Code::Environment => CniError::InvalidEnvValue(details),
            Code::Io => CniError::IOFailure(details),
            Code::Decode => CniError::FailedToDecode(details),
            Code::Config => CniError::InvalidNetworkConfig(details),
            Code::Netns => CniError::InvalidNetNS(details),
            Code::Unavailable => CniError::PluginNotAvailable(details),
            Code::Cgroup => CniError::Custom(100, "podshaper: no cgroup to limit".into(), details),
            Code::Kernel => CniError::Custom(101, "podshaper: the kernel refused".into(), details),
            Code::Mismatch => CniError::Custom(102, "podshaper: not as asked for".into(), details),
            Code::ApiServer => CniError::Custom(103, "podshaper: labels not known".into(), details),
            Code::Plugin => of_plugin.map_or(CniError::IOFailure(details), |answered| self.passed_on(answered)),
        }
    }
}

impl Error {
    /// Another plugin's error. Podshaper's own operation is appended to the details.
    fn passed_on(&self, answered: &CniError) -> CniError {
        let calling = printable(&self.text);
        let details = match answered.details() {
            "" => calling,
            details => format!("{details} ({calling})"),
        };
        CniError::Custom(answered.into(), answered.msg().to_owned(), details)
    }
}

impl fmt::Display for Error {
    /// The whole chain of causes on one line, outermost first. Paths and foreign texts may hold any character.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.text.clone();
        let mut cause = self.source.as_deref().map(|source| source as &dyn std::error::Error);
        while let Some(error) = cause {
            write!(text, ": {error}")?;
            cause = error.source();
        }
        f.write_str(&printable(&text))
    }
}

// `source()` returns nothing on purpose: Display prints the chain already, and a caller that walked it would print each
// cause twice.
impl std::error::Error for Error {}

impl From<CniError> for Error {
    /// Errors of the CNI library (identifiers, versions) keep their code; their details become the text.
    fn from(error: CniError) -> Self {
        let code = match error {
            CniError::IncompatibleVersion(_) => Code::IncompatibleVersion,
            CniError::InvalidEnvValue(_) => Code::Environment,
            CniError::IOFailure(_) => Code::Io,
            CniError::FailedToDecode(_) => Code::Decode,
            _ => Code::Config,
        };
        Self::new(code, error.details())
    }
}

/// The outcome of several operations that were all tried: every error, with the code of the first.
///
/// # Errors
/// The errors of the operations, on one line.
pub fn all(results: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let errors: Vec<Error> = results.into_iter().filter_map(Result::err).collect();
    let Some(first) = errors.first() else { return Ok(()) };
    let texts: Vec<String> = errors.iter().map(Error::to_string).collect();
    Err(Error::new(first.code, texts.join("; ")))
}

/// A text that is safe on a terminal: control characters, and characters that change the text direction, are escaped.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => shown.push(c),
            _ => shown.extend(c.escape_debug()),
        }
    }
    shown
}

/// Foreign text (a tenant's annotation, a runtime's argument) for an error text or a terminal: quoted, in printable
/// ASCII, and cut to its first 64 characters.
pub fn quoted(foreign: &str) -> String {
    const SHOWN: usize = 64;
    let shown: String = foreign.chars().take(SHOWN).flat_map(char::escape_default).collect();
    let more = if foreign.chars().nth(SHOWN).is_some() { ".." } else { "" };
    format!("\"{shown}\"{more}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_quoted_short_and_printable() {
        let long = "a".repeat(65);
        for (foreign, shown) in [
            ("10M", "\"10M\""),
            ("", "\"\""),
            ("a\"b\n\u{1b}[2J", r#""a\"b\n\u{1b}[2J""#),
            ("\u{202e}\u{e9}", r#""\u{202e}\u{e9}""#),
            (&long[..64], &format!("\"{}\"", &long[..64])),
            (&long, &format!("\"{}\"..", &long[..64])),
        ] {
            assert_eq!(quoted(foreign), shown);
        }
    }

    #[test]
    fn the_text_is_followed_by_every_cause_once() {
        let inner = std::io::Error::from_raw_os_error(libc::EPERM);
        let error = Error::because(Code::Kernel, "attach to /sys/fs/cgroup/a (needs CAP_BPF)", inner);
        assert_eq!(
            error.to_string(),
            "attach to /sys/fs/cgroup/a (needs CAP_BPF): Operation not permitted (os error 1)"
        );
    }

    #[test]
    fn an_error_is_one_line_and_writes_nothing_else_to_a_terminal() {
        let cause = std::io::Error::other("said \u{1b}]0;x\u{7}\r\n\u{9b}31m\u{202e}");
        let error = Error::because(Code::Io, "read \"/tmp/\u{e9}'\\\u{1b}[2J\"", cause);
        let expected = r#"read "/tmp/é'\\u{1b}[2J": said \u{1b}]0;x\u{7}\r\n\u{9b}31m\u{202e}"#;
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn another_plugins_error_keeps_its_code_and_its_words() {
        for (answered, code, msg, details) in [
            (CniError::Custom(7, "no range".into(), "full".into()), 7, "no range", "full (call \"bridge\")"),
            (CniError::PluginNotAvailable(String::new()), 50, "Plugin not available", "call \"bridge\""),
        ] {
            let cni = Error::of_plugin("call \"bridge\"", answered).to_cni();
            assert_eq!((u32::from(&cni), cni.msg(), cni.details()), (code, msg, details));
        }
        let error = Error::of_plugin("call \"bridge\"", CniError::Custom(7, "no range".into(), "full".into()));
        assert_eq!(error.to_string(), "call \"bridge\": no range; full");
    }

    #[test]
    fn of_several_operations_every_error_is_told() {
        let failed = |code, text: &str| Err(Error::new(code, text));
        assert!(all([Ok(()), Ok(())]).is_ok());
        let error = all([Ok(()), failed(Code::Netns, "one"), failed(Code::Kernel, "two"), Ok(())]).unwrap_err();
        assert_eq!((error.code(), error.to_string().as_str()), (Code::Netns, "one; two"));
    }

    #[test]
    fn codes_are_the_specifications_below_100_and_ours_above() {
        for (code, number) in [
            (Code::IncompatibleVersion, 1),
            (Code::Environment, 4),
            (Code::Io, 5),
            (Code::Decode, 6),
            (Code::Config, 7),
            (Code::Netns, 8),
            (Code::Unavailable, 50),
            (Code::Cgroup, 100),
            (Code::Kernel, 101),
            (Code::Mismatch, 102),
            (Code::ApiServer, 103),
        ] {
            assert_eq!(u32::from(&Error::new(code, "x").to_cni()), number, "{code:?}");
        }
    }
}
