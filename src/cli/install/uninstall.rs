//! `podshaper uninstall`: restores the files of a node as they were before `install`, byte for byte if nobody has
//! changed them since.

use std::path::{Path, PathBuf};

use clap::Args;

use super::conflist::{self, BANDWIDTH, Conflist, PODSHAPER};
use super::place::{Place, Target, has_podshaper};
use super::{Report, files, multus, networks, units};
use crate::cli::{attachments, detach};
use crate::delegate::{list, record};
use crate::error::{Code, Error, Result};
use crate::probe;

/// Take podshaper out of the conflists of this node, with its units. Running pods keep their limits until they end, or
/// lose them by --detach.
#[derive(Args, Debug)]
pub struct Uninstall {
    #[command(flatten)]
    place: Place,
    /// Remove the program, too. CRI-O, and podman, call it for each pod that was made with it: only when those are
    /// gone
    #[arg(long)]
    remove_binary: bool,
    /// Take the limits off running pods and cgroups, too, so that nothing of podshaper is left in the kernel
    #[arg(long)]
    detach: bool,
}

impl Uninstall {
    /// Uninstalls; returns what was done, line by line.
    ///
    /// # Errors
    /// A file could not be read or written.
    pub fn run(self) -> Result<String> {
        self.place.enter()?;
        let mut report = Report::new(self.place.is_dry_run(), false);
        // The units are removed first, or they would install podshaper again.
        self.remove_units(&mut report)?;
        let files = match self.place.named() {
            Some(_) => self.place.targets()?.iter().map(Target::edited).collect(),
            None => networks(&self.place.conf_dir())?,
        };
        let mut found = false;
        for path in &files {
            found |= self.take_out(path, &mut report)?;
        }
        if !found {
            report.say(format!("podshaper is in no conflist of {}", self.place.conf_dir().display()));
        }
        self.take_off_limits(&mut report)?;
        self.remove_program(&mut report)?;
        if !report.dry_run {
            probe::forget(Path::new(probe::MEMORY));
        }
        Ok(report.text)
    }

    fn remove_units(&self, report: &mut Report) -> Result<()> {
        let directory = self.place.unit_dir();
        let there = units::there(directory);
        if there.is_empty() {
            return Ok(());
        }
        report.say(format!("{}: podshaper's units removed", directory.display()));
        if report.dry_run {
            return Ok(());
        }
        let is_read = self.place.systemd_reads_units();
        if is_read {
            units::disable(directory)?;
        }
        there.iter().try_for_each(|path| files::remove(path))?;
        if is_read { units::reload() } else { Ok(()) }
    }

    /// Takes podshaper out of a file. Returns whether podshaper was in the file.
    fn take_out(&self, path: &Path, report: &mut Report) -> Result<bool> {
        let Some(bytes) = files::read_if_there(path)? else { return Ok(false) };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if list::is_list(path)
            && let Err(error) = Conflist::parse(&text)
        {
            report.warn(format!("left alone: {}: {error}", path.display()));
        }
        if !has_podshaper(&text) {
            return Ok(false);
        }
        if list::delegation(&text).is_some() {
            report.change(path, &text, "");
            if !report.dry_run {
                files::remove(path)?;
                report.say(format!(
                    "{}: removed; the network's list, which it delegated to, is there as it was",
                    path.display()
                ));
            }
            return Ok(true);
        }
        if files::lone_of(path).is_some() {
            report.change(path, &text, "");
            if !report.dry_run {
                files::remove(path)?;
                report.say(format!("{}: removed; what it was made of is there as it was", path.display()));
            }
            return Ok(true);
        }
        let without = if multus::has_podshaper(&text) {
            multus::with_delegate(&text, |list| Ok(Conflist::parse(list)?.without(PODSHAPER)))?.unwrap_or_default()
        } else {
            Conflist::parse(&text)?.without(PODSHAPER)
        };
        self.put_back(path, &text, &without, report).map(|()| true)
    }

    fn put_back(&self, path: &Path, text: &str, without: &str, report: &mut Report) -> Result<()> {
        if without == text {
            let text = format!(
                "{}: podshaper is its only plugin: remove the file if the node is to have no network",
                path.display()
            );
            return Err(Error::new(Code::Config, text));
        }
        let original = Original::of(path)?;
        let restores = original.as_ref().is_some_and(|original| original.became(without));
        let after = original.as_ref().filter(|_| restores).map_or(without, |original| &original.text);
        report.change(path, text, after);
        if report.dry_run {
            return Ok(());
        }
        match original {
            Some(original) if restores && original.path != path => {
                files::rename(&original.backup, &original.path)?;
                files::remove(path)?;
                report.say(format!("{} is as it was before install", original.path.display()));
            }
            Some(original) if restores => {
                files::replace_text(path, Some(text), &original.text, path)?;
                files::remove(&original.backup)?;
                report.say(format!("{} is as it was before install", path.display()));
            }
            original => {
                files::replace_text(path, Some(text), without, path)?;
                report.say(format!("{}: podshaper's entry is out", path.display()));
                if let Some(Original { backup, .. }) = original {
                    let changed = "it was changed after install, so no more was undone; as it was before";
                    report.warn(format!("{}: {changed}: {}", path.display(), backup.display()));
                }
            }
        }
        Ok(())
    }

    fn take_off_limits(&self, report: &mut Report) -> Result<()> {
        let found = if self.detach { attachments::read()? } else { Vec::new() };
        if !report.dry_run {
            let (gone, done) = detach::take_off(&found);
            gone.lines().for_each(|line| report.say(line));
            return done;
        }
        for attachment in &found {
            report.say(detach::line(attachment).trim_end());
        }
        Ok(())
    }

    fn remove_program(&self, report: &mut Report) -> Result<()> {
        let program = self.place.bin_dir().join(PODSHAPER);
        if !program.exists() {
            return Ok(());
        }
        if !self.remove_binary {
            report.say(format!("{} is left for the pods that were made with it (--remove-binary)", program.display()));
            return Ok(());
        }
        report.say(format!("{}: removed", program.display()));
        if report.dry_run {
            return Ok(());
        }
        files::remove(&program)?;
        // No later call reads the records.
        record::forget_all()
    }
}

/// The backup that install kept of a file, or, in an earlier version, of the lone configuration that became a
/// conflist.
struct Original {
    backup: PathBuf,
    path: PathBuf,
    text: String,
}

impl Original {
    fn of(file: &Path) -> Result<Option<Self>> {
        let lone = ["conf", "json"].map(|extension| file.with_extension(extension));
        for path in std::iter::once(file.to_path_buf()).chain(lone) {
            let backup = files::backup(&path);
            if let Some(bytes) = files::read_if_there(&backup)? {
                return Ok(Some(Self { backup, path, text: String::from_utf8_lossy(&bytes).into_owned() }));
            }
        }
        Ok(None)
    }

    /// Whether `without`, the text without podshaper, is the text that install had put podshaper into.
    fn became(&self, without: &str) -> bool {
        let less = |list: &str| Conflist::parse(list).map(|parsed| parsed.without(BANDWIDTH));
        let is_it = |list: &str| list == without || less(list).is_ok_and(|less| less == without);
        let of_multus = || {
            // A copy that was a lone configuration has become a list.
            let [whole, less] = [
                |list: &str| Ok(list.to_owned()),
                |list: &str| Conflist::parse(list).map(|parsed| parsed.without(BANDWIDTH)),
            ]
            .map(|edit: fn(&str) -> Result<String>| multus::with_delegate(&self.text, edit));
            [whole, less].into_iter().any(|edited| matches!(edited, Ok(Some(edited)) if edited == without))
        };
        is_it(&self.text) || conflist::from_lone(&self.text).is_ok_and(|list| is_it(&list)) || of_multus()
    }
}
