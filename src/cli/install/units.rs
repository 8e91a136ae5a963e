//! What the node's systemd is given, so that podshaper stays in a conflist that its network writes anew, and pods follow what is asked of
//! them: a service that does both once, a path unit that starts it when a conflist or a pod's CNI result comes or goes, and a timer for
//! what leaves no trace on the node, such as an annotation.
//!
//! A path unit does not see what happens while its service runs. The service looks again before it ends (`install --and-sync`), and what
//! comes after that, until systemd has seen the end and watches again, is for a second service. systemd starts that one when the first has
//! ended, and most often it finds that nothing has changed since (`--if-changed`).

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use super::files;
use crate::error::{Code, Error, Result};

/// Where an administrator's units are.
pub(super) const DIRECTORY: &str = "/etc/systemd/system";
/// What is there where systemd runs (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// Those that are enabled.
const ENABLED: [&str; 2] = ["podshaper.path", "podshaper.timer"];
const SERVICE: &str = "podshaper.service";
/// The one that looks once more, after it.
const AGAIN: &str = "podshaper-again.service";
/// Seconds between two runs. With the second that systemd may be late by, and a run, an annotation is followed within ten.
const EVERY_S: u32 = 8;

/// A unit by its name.
pub(super) type Unit = (&'static str, String);

/// Whether this host is systemd's.
pub(super) fn are_possible() -> bool {
    Path::new(BOOTED).is_dir()
}

/// All of them. `command` is the service's, program first; what is watched are directories.
pub(super) fn all(command: &[String], watched: &[PathBuf]) -> Vec<Unit> {
    let written_by = "# Written by `podshaper install`; `podshaper uninstall` removes it.\n";
    let service = |description: &str, order: &str, option: &[&str]| {
        let words = command.iter().map(String::as_str).chain(option.iter().copied());
        let command: Vec<String> = words.map(quote).collect();
        format!(
            "[Unit]\nDescription={description}\n{written_by}{order}\n\
             # Pods may start in any number at once.\nStartLimitIntervalSec=0\n\n\
             [Service]\nType=oneshot\nTimeoutStartSec=60\nExecStart={}\n\
             # What is done is logged, and not that there was nothing to do.\nSyslogLevel=notice\nLogLevelMax=notice\n",
            command.join(" ")
        )
    };
    let first = service(
        "Keep podshaper in the conflist and pods at the limits they ask for",
        &format!("# For what comes while this one ends, which podshaper.path does not see.\nWants={AGAIN}"),
        &[],
    );
    let again =
        service("Look for what has come while podshaper.service ended", &format!("After={SERVICE}"), &["--if-changed"]);
    let watched: String =
        watched.iter().map(|path| format!("PathChanged={}\n", escape(&path.display().to_string()))).collect();
    let path = format!(
        "[Unit]\nDescription=Conflists and results of CNI calls, for podshaper\n{written_by}\n[Path]\n{watched}\n\
         [Install]\nWantedBy=paths.target\n"
    );
    let timer = format!(
        "[Unit]\nDescription=Follow what is asked of pods, every {EVERY_S} seconds\n{written_by}\n\
         [Timer]\nOnBootSec={EVERY_S}\nOnUnitActiveSec={EVERY_S}\nAccuracySec=1\nUnit={SERVICE}\n\n\
         [Install]\nWantedBy=timers.target\n"
    );
    vec![(SERVICE, first), (AGAIN, again), ("podshaper.path", path), ("podshaper.timer", timer)]
}

/// The value that an option had in the service that is there.
pub(super) fn option_before(directory: &Path, option: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(SERVICE)).ok()?;
    let words = unquote(text.lines().find_map(|line| line.strip_prefix("ExecStart="))?);
    words.iter().zip(words.iter().skip(1)).find(|(word, _)| *word == option).map(|(_, value)| value.clone())
}

/// Those that are not there as they should be.
pub(super) fn missing(directory: &Path, units: &[Unit]) -> Vec<Unit> {
    let is_there = |(name, text): &&Unit| fs::read_to_string(directory.join(name)).is_ok_and(|there| there == *text);
    units.iter().filter(|unit| !is_there(unit)).cloned().collect()
}

/// Writes them.
pub(super) fn write(directory: &Path, units: &[Unit]) -> Result<()> {
    units.iter().try_for_each(|(name, text)| files::write_new(&directory.join(name), text.as_bytes()))
}

/// Has systemd read them and start those that wait.
pub(super) fn enable() -> Result<()> {
    systemctl(&["daemon-reload"])?;
    systemctl(&[&["enable", "--now"], &ENABLED[..]].concat())
}

/// Has systemd stop them and forget that it was to start them.
pub(super) fn disable() -> Result<()> {
    systemctl(&[&["disable", "--now"], &ENABLED[..]].concat())
}

/// Has systemd read again what is there.
pub(super) fn reload() -> Result<()> {
    systemctl(&["daemon-reload"])
}

/// Those that systemd would not start after a boot, where it runs on this host: not there, or not enabled.
pub fn not_enabled() -> Vec<&'static str> {
    if are_possible() { not_enabled_in(Path::new(DIRECTORY)) } else { Vec::new() }
}

fn not_enabled_in(directory: &Path) -> Vec<&'static str> {
    let wanted = [("podshaper.path", "paths.target.wants"), ("podshaper.timer", "timers.target.wants")];
    let is_enabled = |(name, target): &(&str, &str)| directory.join(target).join(name).exists();
    wanted.into_iter().filter(|unit| !is_enabled(unit)).map(|(name, _)| name).collect()
}

/// Those of this directory that are podshaper's.
pub(super) fn there(directory: &Path) -> Vec<PathBuf> {
    let names = ENABLED.into_iter().chain([SERVICE, AGAIN]);
    names.map(|name| directory.join(name)).filter(|path| path.exists()).collect()
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    let call = || format!("call systemctl {} (--no-units installs without)", arguments.join(" "));
    let failed = |cause: io::Error| Error::because(Code::Io, call(), cause);
    // In a container (--host-root) it would think that the system is none that runs.
    let mut command = Command::new("systemctl");
    let output = command.args(arguments).env("SYSTEMD_IGNORE_CHROOT", "1").output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(Code::Io, format!("{}: {}: {}", call(), output.status, said.trim())))
}

/// A word of a command, as systemd.service(5) reads it.
fn quote(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('$', "$$");
    format!("\"{}\"", escape(&escaped))
}

/// Without systemd's specifiers.
fn escape(text: &str) -> String {
    text.replace('%', "%%")
}

/// The words of a command that [`quote`] has written.
fn unquote(command: &str) -> Vec<String> {
    let command = command.replace("%%", "%").replace("$$", "$");
    let (mut words, mut word, mut characters) = (Vec::new(), None, command.chars());
    while let Some(character) = characters.next() {
        match (character, &mut word) {
            ('"', None) => word = Some(String::new()),
            ('"', Some(_)) => words.extend(word.take()),
            ('\\', Some(word)) => word.extend(characters.next().map(|next| if next == 'n' { '\n' } else { next })),
            (_, Some(word)) => word.push(character),
            (_, None) => {}
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_option_of_the_service_that_is_there_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(option_before(directory.path(), "--node"), None);
        let command = ["/opt/cni/bin/podshaper", "install", "--config", "{\"rateKey\": \"50%$\"}", "--node", "n 1"];
        let units = all(&command.map(str::to_owned), &["/etc/cni/net.d".into(), "/a%b".into()]);
        write(directory.path(), &units).unwrap();
        assert_eq!(option_before(directory.path(), "--config").as_deref(), Some("{\"rateKey\": \"50%$\"}"));
        assert_eq!(option_before(directory.path(), "--node").as_deref(), Some("n 1"));
        assert_eq!(option_before(directory.path(), "--kubeconfig"), None);
        assert!(missing(directory.path(), &units).is_empty());
        assert_eq!(there(directory.path()).len(), units.len());
        assert_eq!(not_enabled_in(directory.path()), ENABLED);
        for (name, target) in [("podshaper.path", "paths.target.wants"), ("podshaper.timer", "timers.target.wants")] {
            fs::create_dir(directory.path().join(target)).unwrap();
            std::os::unix::fs::symlink(directory.path().join(name), directory.path().join(target).join(name)).unwrap();
        }
        assert!(not_enabled_in(directory.path()).is_empty());
        fs::remove_file(directory.path().join("podshaper.timer")).unwrap();
        assert_eq!(not_enabled_in(directory.path()), ["podshaper.timer"]);
        write(directory.path(), &units).unwrap();
        let path = fs::read_to_string(directory.path().join("podshaper.path")).unwrap();
        assert!(path.contains("\nPathChanged=/etc/cni/net.d\nPathChanged=/a%%b\n"), "{path}");
    }

    proptest! {
        #[test]
        fn words_that_are_quoted_are_found_again(words in prop::collection::vec("[a\"$%\\\\ n\n{}]{0,8}", 0..4)) {
            let quoted: Vec<String> = words.iter().map(|word| quote(word)).collect();
            prop_assert!(!quoted.join(" ").contains('\n'));
            prop_assert_eq!(unquote(&quoted.join(" ")), words);
        }
    }
}
