//! Calls of CNI plugins: single calls, and chains called as libcni calls them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use wait4::Wait4;

use super::netns::Netns;
use super::process::{collect, text};
use super::{Context, Failure, Result};

/// One call that has not been made yet: a program, its environment and its stdin.
#[derive(Clone, Debug)]
pub struct Cni {
    program: PathBuf,
    /// A program, with its arguments, that runs the plugin: setpriv, unshare.
    wrapper: Vec<String>,
    environment: BTreeMap<String, String>,
    stdin: String,
}

/// One call and its answer.
#[derive(Clone)]
pub struct Call {
    pub program: PathBuf,
    pub environment: BTreeMap<String, String>,
    pub stdin: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    /// From fork to exit.
    pub elapsed: Duration,
    /// An upper bound: the kernel also counts the memory of this process from before the child's exec.
    pub peak_rss_bytes: u64,
}

impl Cni {
    /// `verb` is CNI_COMMAND; with an empty verb the variable is not set.
    pub fn new(program: impl Into<PathBuf>, verb: &str) -> Self {
        let call =
            Self { program: program.into(), wrapper: Vec::new(), environment: BTreeMap::new(), stdin: String::new() };
        if verb.is_empty() { call } else { call.env("CNI_COMMAND", verb) }
    }

    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }

    pub fn stdin(mut self, stdin: impl Into<String>) -> Self {
        self.stdin = stdin.into();
        self
    }

    /// Makes the call through another program, which gets the plugin as its last argument.
    pub fn through(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// The process that [`Cni::call`] starts, for callers that end it early.
    pub fn command(&self) -> Command {
        let mut words = self.wrapper.iter().map(Path::new).chain([self.program.as_path()]);
        let mut command = Command::new(words.next().unwrap_or(&self.program));
        command.args(words).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(&self.environment);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Makes the call in this thread's network namespace. An error answer of the plugin is a `Call`, too: see
    /// [`Call::success`].
    pub fn call(&self) -> Result<Call> {
        let doing = || format!("call {}", self.program.display());
        let start = Instant::now();
        let mut child = self.command().spawn().context(doing())?;
        let (stdout, stderr) = (child.stdout.take().map(collect), child.stderr.take().map(collect));
        if let Some(mut pipe) = child.stdin.take() {
            // A plugin may answer without reading stdin. The closed pipe is then no failure of the call.
            let _ = pipe.write_all(self.stdin.as_bytes());
        }
        let used = child.wait4().context(doing())?;
        Ok(Call {
            program: self.program.clone(),
            environment: self.environment.clone(),
            stdin: self.stdin.clone(),
            status: used.status,
            elapsed: start.elapsed(),
            stdout: text(stdout),
            stderr: text(stderr),
            peak_rss_bytes: used.rusage.maxrss,
        })
    }

    /// Makes the call in a namespace: a plugin runs in its node's namespace.
    pub fn call_in(&self, netns: &Netns) -> Result<Call> {
        netns.inside(|| self.call())?
    }
}

impl Call {
    /// The plugin's name.
    pub fn plugin(&self) -> &str {
        self.program.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }

    pub fn verb(&self) -> &str {
        self.environment.get("CNI_COMMAND").map_or("", String::as_str)
    }

    /// The plugin's stdout, or an error that shows the call if the plugin failed or did not print JSON.
    pub fn json(&self) -> Result<Value> {
        self.success()?;
        serde_json::from_str(&self.stdout).context(self)
    }

    /// An error that shows the call if the plugin failed.
    pub fn success(&self) -> Result<&Self> {
        if self.status.success() { Ok(self) } else { Err(Failure::new(self)) }
    }

    /// The `code` of the error JSON a plugin failed with.
    pub fn error_code(&self) -> Option<u64> {
        let error: Value = serde_json::from_str(&self.stdout).ok()?;
        error.get("code")?.as_u64()
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}: {} after {:?}", self.program.display(), self.verb(), self.status, self.elapsed)?;
        for (name, value) in &self.environment {
            writeln!(f, "  {name}={value}")?;
        }
        for (name, text) in [("stdin", &self.stdin), ("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                writeln!(f, "  {name}: {}", text.trim())?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A conflist, and the directories its plugins are looked for in.
#[derive(Clone, Debug)]
pub struct Chain {
    pub name: String,
    pub cni_version: String,
    pub plugins: Vec<Map<String, Value>>,
    pub dirs: Vec<PathBuf>,
}

impl Chain {
    /// From the text of a conflist.
    pub fn parse(conflist: &str, dirs: &[impl AsRef<Path>]) -> Result<Self> {
        let value: Value = serde_json::from_str(conflist).context("parse the conflist")?;
        Self::new(&value, dirs)
    }

    pub fn read(path: &Path, dirs: &[impl AsRef<Path>]) -> Result<Self> {
        let text = fs::read_to_string(path).context(format_args!("read {}", path.display()))?;
        Self::parse(&text, dirs).context(path.display())
    }

    pub fn new(conflist: &Value, dirs: &[impl AsRef<Path>]) -> Result<Self> {
        let text = |key: &str| conflist.get(key).and_then(Value::as_str).map(String::from);
        let object = |plugin: &Value| plugin.as_object().cloned();
        let plugins: Option<Vec<_>> =
            conflist.get("plugins").and_then(Value::as_array).and_then(|list| list.iter().map(object).collect());
        let (Some(name), Some(plugins)) = (text("name"), plugins) else {
            return Err(Failure::new("a conflist has a `name` and a list of `plugins`"));
        };
        let cni_version = text("cniVersion").unwrap_or_else(|| "0.1.0".into());
        Ok(Self { name, cni_version, plugins, dirs: dirs.iter().map(|dir| dir.as_ref().to_owned()).collect() })
    }

    /// Adds a plugin at the end.
    pub fn then(mut self, plugin: Value) -> Self {
        self.plugins.extend(plugin.as_object().cloned());
        self
    }

    /// Adds a directory to look for plugins in, before the others.
    pub fn with_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dirs.insert(0, dir.into());
        self
    }

    /// The call that libcni would make of one plugin: its configuration, completed with the network's name and
    /// version, the result so far, and those of the runtime's offers (`runtimeConfig`) that the plugin declares as
    /// `capabilities`.
    pub fn call(
        &self,
        plugin: &Map<String, Value>,
        verb: &str,
        offers: &Map<String, Value>,
        prev: Option<&Value>,
    ) -> Result<Cni> {
        let kind = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
        let program = self.dirs.iter().map(|dir| dir.join(kind)).find(|path| path.is_file());
        let program =
            program.ok_or_else(|| Failure::new(format_args!("find the plugin {kind:?} in {:?}", self.dirs)))?;
        let mut stdin = plugin.clone();
        stdin.insert("name".into(), json!(self.name));
        stdin.insert("cniVersion".into(), json!(self.cni_version));
        let capabilities = plugin.get("capabilities").and_then(Value::as_object);
        let declared = |name: &str| capabilities.is_some_and(|known| known.get(name) == Some(&Value::Bool(true)));
        let runtime_config: Map<String, Value> = offers
            .iter()
            .filter(|(name, _)| declared(name))
            .map(|(name, offer)| (name.clone(), offer.clone()))
            .collect();
        if !runtime_config.is_empty() {
            stdin.insert("runtimeConfig".into(), Value::Object(runtime_config));
        }
        if let Some(prev) = prev {
            stdin.insert("prevResult".into(), prev.clone());
        }
        let path: Vec<String> = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
        Ok(Cni::new(program, verb).env("CNI_PATH", path.join(":")).stdin(Value::Object(stdin).to_string()))
    }
}
