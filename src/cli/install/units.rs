//! The systemd units of a node. They put podshaper back into a conflist that its network rewrites, and make running
//! pods follow what is asked of them. A service does both once. A path unit starts the service when a conflist or a
//! pod's CNI result comes or goes. A timer starts it for changes that leave no trace on the node, such as an
//! annotation.
//!
//! A path unit does not see changes while its service runs. The service checks again before it ends
//! (`install --and-sync`). A second service covers changes between this check and the moment when systemd watches
//! again. The first service has systemd start the second one after it has ended; most often the second one finds that
//! nothing has changed since (`--if-changed`). A second service that runs already is started anew: it may have looked
//! before the first service began.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use super::files;
use crate::error::{Code, Error, Result};

/// The directory of the administrator's units.
pub(super) const DIRECTORY: &str = "/etc/systemd/system";
/// The directory that exists if systemd runs (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// The units that are enabled.
const ENABLED: [&str; 2] = ["podshaper.path", "podshaper.timer"];
const SERVICE: &str = "podshaper.service";
/// The second service, which checks once more after the first one.
const AGAIN: &str = "podshaper-again.service";
/// Seconds between two runs. systemd may be a second late, and a run takes time; with both, an annotation is followed
/// within ten seconds.
const EVERY_S: u32 = 8;

/// A unit's name and its text.
pub(super) type Unit = (&'static str, String);

/// Whether systemd runs on this host.
pub(super) fn are_possible() -> bool {
    Path::new(BOOTED).is_dir()
}

/// All units. `command` is the service's command, program first; `watched` are directories.
pub(super) fn all(command: &[String], watched: &[PathBuf]) -> Vec<Unit> {
    let written_by = "# Written by `podshaper install`; `podshaper uninstall` removes it.\n";
    // The option makes another command of the service's; the lines are added to its two sections.
    let service = |description: &str, option: Option<&str>, unit_lines: &str, service_lines: &str| {
        let words = command.iter().map(String::as_str).chain(option);
        let command: Vec<String> = words.map(quote).collect();
        format!(
            "[Unit]\nDescription={description}\n{written_by}{unit_lines}\
             # Pods may start in any number at once.\nStartLimitIntervalSec=0\n\n\
             [Service]\nType=oneshot\nTimeoutStartSec=60\nExecStart={}\n\
             # What is done is logged, and not that there was nothing to do.\nSyslogLevel=notice\nLogLevelMax=notice\n\
             {service_lines}",
            command.join(" ")
        )
    };
    let start_again = format!(
        "# For what comes while this one ends, which podshaper.path does not see. One that runs may have looked before.\n\
         ExecStopPost=-systemctl --no-block restart {AGAIN}\n"
    );
    let first = service("Keep podshaper in the conflist and pods at the limits they ask for", None, "", &start_again);
    let after = format!("After={SERVICE}\n");
    let again = service("Look for what has come while podshaper.service ended", Some("--if-changed"), &after, "");
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

/// The value of an option in the service that is installed now.
pub(super) fn option_before(directory: &Path, option: &str) -> Option<String> {
    let words = command_before(directory);
    words.iter().zip(words.iter().skip(1)).find(|(word, _)| *word == option).map(|(_, value)| value.clone())
}

/// Whether the service that is installed now has an option, which takes no value.
pub(super) fn has_option(directory: &Path, option: &str) -> bool {
    command_before(directory).iter().any(|word| word == option)
}

/// The words of the command of the service that is installed now; none if no service is installed.
fn command_before(directory: &Path) -> Vec<String> {
    let text = fs::read_to_string(directory.join(SERVICE)).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("ExecStart=")).map(unquote).unwrap_or_default()
}

/// The units that are missing or have another text.
pub(super) fn missing(directory: &Path, units: &[Unit]) -> Vec<Unit> {
    let is_there = |(name, text): &&Unit| fs::read_to_string(directory.join(name)).is_ok_and(|there| there == *text);
    units.iter().filter(|unit| !is_there(unit)).cloned().collect()
}

/// Writes the units.
pub(super) fn write(directory: &Path, units: &[Unit]) -> Result<()> {
    units.iter().try_for_each(|(name, text)| files::write_new(&directory.join(name), text.as_bytes()))
}

/// Makes systemd read the units, and enables and starts the path unit and the timer.
pub(super) fn enable() -> Result<()> {
    systemctl(&["daemon-reload"])?;
    systemctl(&[&["enable", "--now"], &ENABLED[..]].concat())
}

/// Makes systemd stop and disable the path unit and the timer, and stop the services of this directory. A service that
/// ran on would put podshaper back.
pub(super) fn disable(directory: &Path) -> Result<()> {
    systemctl(&[&["disable", "--now"], &ENABLED[..]].concat())?;
    // The first service starts the second one when it is stopped, so the second one is stopped last.
    let services = [SERVICE, AGAIN].into_iter().filter(|name| directory.join(name).exists());
    services.into_iter().try_for_each(|service| {
        systemctl(&["stop", service])?;
        // systemd calls a stopped run failed, and lists it even without its file. The call may fail for a service that
        // did not run.
        let _ = systemctl(&["reset-failed", service]);
        Ok(())
    })
}

/// Makes systemd read its units again.
pub(super) fn reload() -> Result<()> {
    systemctl(&["daemon-reload"])
}

/// The units that are missing or not enabled, so that systemd would not start them at boot; empty if systemd does not
/// run here.
pub fn not_enabled() -> Vec<&'static str> {
    if are_possible() { not_enabled_in(Path::new(DIRECTORY)) } else { Vec::new() }
}

fn not_enabled_in(directory: &Path) -> Vec<&'static str> {
    let wanted = [("podshaper.path", "paths.target.wants"), ("podshaper.timer", "timers.target.wants")];
    let is_enabled = |(name, target): &(&str, &str)| directory.join(target).join(name).exists();
    wanted.into_iter().filter(|unit| !is_enabled(unit)).map(|(name, _)| name).collect()
}

/// podshaper's units in this directory.
pub(super) fn there(directory: &Path) -> Vec<PathBuf> {
    let names = ENABLED.into_iter().chain([SERVICE, AGAIN]);
    names.map(|name| directory.join(name)).filter(|path| path.exists()).collect()
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    let call = || format!("call systemctl {} (--no-units installs without)", arguments.join(" "));
    let failed = |cause: io::Error| Error::because(Code::Io, call(), cause);
    // In a container (--host-root) systemctl would conclude that systemd does not run.
    let mut command = Command::new("systemctl");
    let output = command.args(arguments).env("SYSTEMD_IGNORE_CHROOT", "1").output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(Code::Io, format!("{}: {}: {}", call(), output.status, said.trim())))
}

/// Quotes a word of a command for systemd.service(5).
fn quote(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n").replace('$', "$$");
    format!("\"{}\"", escape(&escaped))
}

/// Escapes systemd's specifiers.
fn escape(text: &str) -> String {
    text.replace('%', "%%")
}

/// The words of a command that [`quote`] has quoted.
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
        assert!(!has_option(directory.path(), "install"));
        let command = ["/opt/cni/bin/podshaper", "install", "--config", "{\"rateKey\": \"50%$\"}", "--node", "n 1"];
        let units = all(&command.map(str::to_owned), &["/etc/cni/net.d".into(), "/a%b".into()]);
        write(directory.path(), &units).unwrap();
        assert_eq!(option_before(directory.path(), "--config").as_deref(), Some("{\"rateKey\": \"50%$\"}"));
        assert_eq!(option_before(directory.path(), "--node").as_deref(), Some("n 1"));
        assert_eq!(option_before(directory.path(), "--kubeconfig"), None);
        assert!(has_option(directory.path(), "install") && !has_option(directory.path(), "--replace-bandwidth"));
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
