//! Where the cgroup hierarchies of this host are mounted, according to /proc/self/mountinfo.
//!
//! A *hybrid* host has v1 controllers and, beside them, a cgroup2 mount that carries no controllers. eBPF programs
//! attach to cgroup2 only, whichever version owns the controllers. ../cgroup.rs decides which directory is a pod's.
//!
//! If cgroup2 itself is mounted on /sys/fs/cgroup, mountinfo is not read. kubelet and runc decide by that mount alone,
//! too (`IsCgroup2UnifiedMode`), and reading the mounts of a node with 500 pods takes 3 ms.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

use crate::error::{Code, Error, Result};

/// The mount points of cgroup v2 and, on a hybrid host, of the v1 hierarchies beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    /// The cgroup2 mount below which all programs are attached.
    pub unified: PathBuf,
    /// The v1 mounts, in the order of mountinfo; empty if the host has cgroup v2 only.
    pub v1: Vec<PathBuf>,
}

#[derive(Clone, Copy, PartialEq)]
enum Version {
    V1,
    V2,
}

struct Mount {
    version: Version,
    root: PathBuf,
    point: PathBuf,
}

impl Hierarchies {
    /// Reads the text of a mountinfo file (layout: Linux Documentation/filesystems/proc.rst, 3.5). Skips lines that do
    /// not have this layout.
    ///
    /// # Errors
    /// [`Code::Cgroup`] if no cgroup2 is mounted.
    #[cfg(test)]
    pub fn from_mountinfo(mountinfo: &str) -> Result<Self> {
        Self::from_mounts(mountinfo.lines().filter_map(Mount::parse).collect())
    }

    /// The hierarchies of the mount namespace in which podshaper runs.
    ///
    /// # Errors
    /// [`Code::Cgroup`] if mountinfo cannot be read or no cgroup2 is mounted.
    pub fn of_this_host() -> Result<Self> {
        const USUAL: &str = "/sys/fs/cgroup";
        if is(Path::new(USUAL), Version::V2) {
            return Ok(Self { unified: USUAL.into(), v1: Vec::new() });
        }
        const MOUNTINFO: &str = "/proc/self/mountinfo";
        // Any mount of the host may have a name that is not UTF-8. Only such a mount is garbled then, and it is not a
        // cgroup mount.
        let text = std::fs::read(MOUNTINFO).map_err(|cause| {
            Error::because(Code::Cgroup, format!("find the cgroup mounts: read {MOUNTINFO}"), cause)
        })?;
        let text = String::from_utf8_lossy(&text);
        // mountinfo also lists mounts that are hidden below another mount (docker-in-docker scripts put a tmpfs over
        // /sys/fs/cgroup).
        Self::from_mounts(text.lines().filter_map(Mount::parse).filter(Mount::is_visible).collect())
    }

    fn from_mounts(mounts: Vec<Mount>) -> Result<Self> {
        let (v2, v1): (Vec<_>, Vec<_>) = mounts.into_iter().partition(|mount| mount.version == Version::V2);
        let is_below_another =
            |mount: &Mount| v2.iter().any(|other| other.point != mount.point && mount.point.starts_with(&other.point));
        // A mount whose root is not "/" shows only a part of the tree: for example a container's own cgroup,
        // bind-mounted elsewhere.
        let Some(best) = v2.iter().min_by_key(|mount| (mount.root != Path::new("/"), is_below_another(mount))) else {
            return Err(Error::new(
                Code::Cgroup,
                "find the cgroup mounts: no cgroup2 is mounted here, and podshaper needs cgroup v2; boot this node with the \
                 kernel parameter systemd.unified_cgroup_hierarchy=1, or mount cgroup2 beside v1: \
                 mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
            ));
        };
        Ok(Self { unified: best.point.clone(), v1: v1.into_iter().map(|mount| mount.point).collect() })
    }

    /// Whether v1 hierarchies are mounted beside cgroup2.
    pub fn are_hybrid(&self) -> bool {
        !self.v1.is_empty()
    }

    /// All mounts, cgroup2 first.
    pub(super) fn roots(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(&self.unified).chain(&self.v1).map(PathBuf::as_path)
    }
}

impl Mount {
    /// `36 35 98:0 /root /point rw,noatime master:1 - cgroup2 source rw`: any number of optional fields before the
    /// dash.
    fn parse(line: &str) -> Option<Self> {
        let (before, after) = line.split_once(" - ")?;
        let version = match after.split(' ').next()? {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        let mut fields = before.split(' ').skip(3);
        Some(Self { version, root: unescape(fields.next()?), point: unescape(fields.next()?) })
    }

    fn is_visible(&self) -> bool {
        is(&self.point, self.version)
    }
}

/// Whether a cgroup hierarchy of this version is mounted at the path.
fn is(point: &Path, version: Version) -> bool {
    let magic = match version {
        Version::V1 => CGROUP_SUPER_MAGIC,
        Version::V2 => CGROUP2_SUPER_MAGIC,
    };
    statfs(point).is_ok_and(|found| found.filesystem_type() == magic)
}

/// Undoes the escapes of the kernel's seq_path(): space, tab, newline, backslash and '#' are written as a backslash and
/// three octal digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, tail @ ..] = rest {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURE: &str = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
26 22 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
";
    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 master:2 propagate_from:1 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn mountinfo_names_the_hierarchies() {
        let bound = format!("50 22 0:23 /docker/1f /srv/cg rw - cgroup2 none rw\n{PURE}");
        let below = format!("{PURE}51 26 0:23 / /sys/fs/cgroup/again rw - cgroup2 none rw\n");
        let below_listed_first = format!("51 26 0:23 / /sys/fs/cgroup/again rw - cgroup2 none rw\n{PURE}");
        let only_bound = "50 22 0:23 /../.. /srv/cg rw - cgroup2 none rw";
        let escaped = r"9 8 0:5 / /mnt/a\040b\134c\011d rw - cgroup2 none rw";
        let not_an_escape = r"9 8 0:5 / /mnt/a\9b\0 rw - cgroup2 none rw";
        let beside_junk = format!("\n- cgroup2\n1 2 3 - cgroup2 none\n{PURE}");
        let v1 = ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/systemd"];
        for (what, text, unified, v1) in [
            ("pure", PURE, "/sys/fs/cgroup", [].as_slice()),
            ("hybrid", HYBRID, "/sys/fs/cgroup/unified", &v1),
            ("a part bound elsewhere is not chosen", &bound, "/sys/fs/cgroup", &[]),
            ("a mount below another is not chosen", &below, "/sys/fs/cgroup", &[]),
            ("whichever comes first", &below_listed_first, "/sys/fs/cgroup", &[]),
            ("a part is better than nothing", only_bound, "/srv/cg", &[]),
            ("octal escapes", escaped, "/mnt/a b\\c\td", &[]),
            ("a lone backslash", not_an_escape, r"/mnt/a\9b\0", &[]),
            ("lines of another layout", &beside_junk, "/sys/fs/cgroup", &[]),
        ] {
            let expected = Hierarchies {
                unified: unified.into(),
                v1: v1.iter().map(|point: &&str| PathBuf::from(*point)).collect(),
            };
            assert_eq!(Hierarchies::from_mountinfo(text).unwrap(), expected, "{what}");
        }
    }

    #[test]
    fn a_host_without_cgroup2_is_told_how_to_get_it() {
        for text in ["", "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup2 rw,cpu"] {
            let error = Hierarchies::from_mountinfo(text).unwrap_err();
            assert_eq!(error.code(), Code::Cgroup);
            assert_eq!(
                error.to_string(),
                "find the cgroup mounts: no cgroup2 is mounted here, and podshaper needs cgroup v2; boot this node with the \
                 kernel parameter systemd.unified_cgroup_hierarchy=1, or mount cgroup2 beside v1: \
                 mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
            );
        }
    }

    #[test]
    fn hidden_mounts_are_not_visible() {
        let hidden = tempfile::tempdir().unwrap();
        for version in [Version::V1, Version::V2] {
            assert!(!Mount { version, root: "/".into(), point: hidden.path().into() }.is_visible());
        }
    }
}
