//! Which files of a node podshaper goes into.

use std::path::{Path, PathBuf};

use clap::Args;
use nix::unistd::{chdir, chroot};

use super::super::directories::Directories;
use super::conflist::{Conflist, PODSHAPER};
use super::{Report, files, multus, networks, units};
use crate::delegate::list;
use crate::error::{Code, Error, Result};
use crate::pins::{BPFFS, is_bpffs};

/// Where the node's runtime looks.
#[derive(Args, Debug)]
pub(super) struct Place {
    /// Directory of the runtime's network configurations [default: what containerd, k3s or RKE2 says, else
    /// /etc/cni/net.d]
    #[arg(long, value_name = "DIR")]
    conf_dir: Option<PathBuf>,
    /// Directory of the CNI plugins [default: what containerd, k3s or RKE2 says, else /opt/cni/bin]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Conflist to change, by name in --conf-dir or by path
    #[arg(long, value_name = "FILE")]
    conflist: Option<PathBuf>,
    /// The conflist of the last installation.
    #[arg(skip)]
    kept_conflist: Option<PathBuf>,
    /// Directory for the systemd units, which are then yours to enable [default: /etc/systemd/system, enabled, if
    /// systemd runs here]
    #[arg(long, value_name = "DIR")]
    unit_dir: Option<PathBuf>,
    /// The node's root directory, where this runs in a container that has it mounted: directories, files and systemd
    /// are the node's then
    #[arg(long, value_name = "DIR")]
    host_root: Option<PathBuf>,
    /// Show what would be changed, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// A file that podshaper goes into.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A conflist.
    List(PathBuf),
    /// A lone configuration, which stays unchanged: podshaper is in a list beside it.
    Lone(PathBuf),
    /// Multus' file, with a copy of the cluster's network in it.
    Delegate(PathBuf),
}

impl Target {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::List(path) | Self::Lone(path) | Self::Delegate(path) => path,
        }
    }

    /// The file that holds podshaper's entry.
    pub(super) fn edited(&self) -> PathBuf {
        match self {
            Self::List(path) | Self::Delegate(path) => path.clone(),
            Self::Lone(path) => files::own_list(path),
        }
    }
}

impl Place {
    /// Changes the root directory. From here on every path is the node's.
    pub(super) fn enter(&self) -> Result<()> {
        let Some(root) = &self.host_root else { return Ok(()) };
        let entered = chroot(root).and_then(|()| chdir("/"));
        entered.map_err(|cause| {
            let text = format!("make {} the root directory (--host-root; it takes CAP_SYS_CHROOT)", root.display());
            Error::because(Code::Io, text, cause)
        })
    }

    /// Fails where `sync` would mount bpffs in a container: the node would not see what is pinned there, and the pins
    /// would go with the container.
    pub(super) fn check_bpffs(&self) -> Result<()> {
        if self.host_root.is_none() || is_bpffs(Path::new(BPFFS)) {
            return Ok(());
        }
        let text = format!(
            "find the node's bpffs on {BPFFS}: it is not mounted there, and a container cannot mount it for the node \
             (on the node: mount -t bpf bpf {BPFFS})"
        );
        Err(Error::new(Code::Kernel, text))
    }

    pub(super) fn conf_dir(&self) -> PathBuf {
        Directories::of_this_node(self.conf_dir.as_deref(), None).conf
    }

    pub(super) fn bin_dir(&self) -> PathBuf {
        Directories::of_this_node(None, self.bin_dir.as_deref()).bin
    }

    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// The conflist that the operator has named, now or at the last installation.
    pub(super) fn named(&self) -> Option<&Path> {
        self.conflist.as_deref().or(self.kept_conflist.as_deref())
    }

    /// Sets the conflist of the last installation. It counts if the operator names none.
    pub(super) fn keep_conflist(&mut self, of_last_installation: Option<PathBuf>) {
        self.kept_conflist = of_last_installation;
    }

    pub(super) fn unit_dir(&self) -> &Path {
        self.unit_dir.as_deref().unwrap_or(Path::new(units::DIRECTORY))
    }

    /// Whether to write systemd units: systemd runs, or the operator has named their directory.
    pub(super) fn has_systemd(&self) -> bool {
        self.unit_dir.is_some() || units::are_possible()
    }

    /// Whether this host's systemd reads the units.
    pub(super) fn systemd_reads_units(&self) -> bool {
        units::are_possible() && self.unit_dir() == Path::new(units::DIRECTORY)
    }

    /// The file that the operator has named, or else the network that the runtime uses: the first by name. With Multus
    /// these are the network that makes the pod's interface and the copy of that network in Multus' own file.
    pub(super) fn targets(&self) -> Result<Vec<Target>> {
        if let Some(named) = self.named() {
            return Ok(vec![self.named_target(named)?]);
        }
        // Lists that install has made of a lone configuration are not targets themselves.
        let mut found = networks(&self.conf_dir())?;
        found.retain(|path| files::lone_of(path).is_none());
        let Some((first, others)) = found.split_first() else {
            let text = format!(
                "{} has no network yet (*.conflist, *.conf, *.json): install the cluster's network first",
                self.conf_dir().display()
            );
            return Err(Error::new(Code::Config, text));
        };
        let text = files::read(first)?;
        if !multus::is(&text) {
            return Ok(vec![Target::of(resolve(first)?)]);
        }
        let others: Vec<PathBuf> = others.iter().filter(|path| !is_multus(path)).cloned().collect();
        let network = multus::cluster_network(&text, &others).map(|path| resolve(&path)).transpose()?.map(Target::of);
        let copy = multus::with_delegate(&text, |list| Ok(list.to_owned()))?.map(|_| resolve(first)).transpose()?;
        let targets: Vec<Target> = network.into_iter().chain(copy.map(Target::Delegate)).collect();
        if targets.is_empty() {
            let text = format!(
                "{} is Multus', and the network it delegates to is not in {}: name its file with --conflist",
                first.display(),
                self.conf_dir().display()
            );
            return Err(Error::new(Code::Config, text));
        }
        Ok(targets)
    }

    fn named_target(&self, named: &Path) -> Result<Target> {
        let path = if named.components().count() > 1 { named.to_path_buf() } else { self.conf_dir().join(named) };
        let of_last = "use the conflist of the last installation (--conflist names another one, uninstall forgets it)";
        let found = resolve(&path).map_err(|error| match self.conflist {
            Some(_) => error,
            None => Error::because(Code::Config, of_last, error),
        });
        found.map(Target::of)
    }

    /// Removes lists of ours that were made of a lone configuration; the lone configuration itself is unchanged. A
    /// delegating list would take such a list for the network's.
    pub(super) fn clear_own_lists(&self, report: &mut Report) -> Result<()> {
        for path in networks(&self.conf_dir())? {
            let is_ours = files::lone_of(&path).is_some() && files::read(&path).is_ok_and(|text| has_podshaper(&text));
            if is_ours {
                report.say(format!("{}: removed, what it was made of is delegated to", path.display()));
            }
            if is_ours && !report.dry_run {
                files::remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes lists of ours whose lone configuration, and so the network, is gone: a runtime would go on using them.
    /// Also removes a list that an earlier version made under the name of the lone configuration, once that
    /// configuration is back.
    pub(super) fn clear_leftovers(&self, report: &mut Report) -> Result<()> {
        for path in networks(&self.conf_dir())? {
            let is_ours = files::read(&path).is_ok_and(|text| has_podshaper(&text));
            let why = match files::lone_of(&path) {
                Some(lone) if !lone.iter().any(|lone| lone.exists()) => "its network is gone",
                None if is_superseded(&path) => "the configuration it was made of is back",
                _ => continue,
            };
            if !is_ours {
                continue;
            }
            report.say(format!("{}: removed, {why}", path.display()));
            if !report.dry_run {
                files::remove(&path)?;
                for lone in ["conf", "json"].map(|extension| path.with_extension(extension)) {
                    files::remove(&files::backup(&lone))?;
                }
            }
        }
        Ok(())
    }
}

impl Target {
    fn of(path: PathBuf) -> Self {
        if list::is_list(&path) { Self::List(path) } else { Self::Lone(path) }
    }
}

/// Whether the list was made of a lone configuration that an earlier version had moved away, and which is back.
fn is_superseded(list: &Path) -> bool {
    let lone = ["conf", "json"].map(|extension| list.with_extension(extension));
    list::is_list(list) && lone.iter().any(|lone| lone.exists() && files::backup(lone).exists())
}

fn is_multus(path: &Path) -> bool {
    files::read(path).is_ok_and(|text| multus::is(&text))
}

/// Whether podshaper is in a configuration, or in the copy that Multus' configuration holds.
pub(super) fn has_podshaper(text: &str) -> bool {
    multus::has_podshaper(text) || Conflist::parse(text).is_ok_and(|list| list.has(PODSHAPER))
}

/// Resolves links: an edit replaces the file, and the link to it stays a link.
fn resolve(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|cause| Error::because(Code::Io, format!("find {}", path.display()), cause))
}
