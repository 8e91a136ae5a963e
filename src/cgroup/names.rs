//! How kubelet names the cgroup of a pod, and in which form a runtime passes such a name on. No I/O.
//!
//! kubelet has two drivers. *systemd*: a slice, `kubepods-burstable-pod<uid>.slice`. The dashes of the UID are replaced
//! by `_`, since a dash in the name of a slice means "child of". *cgroupfs*: plain directories,
//! `kubepods/burstable/pod<uid>`. For Guaranteed pods both leave out the class. kubelet's --cgroup-root puts more names
//! in front. (Kubernetes pkg/kubelet/cm/cgroup_manager_linux.go: ToSystemd, ToCgroupfs.)

use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};

/// The cgroup drivers of kubelet, the preferred one first. With the systemd driver kubelet 1.20 leaves empty
/// directories of the cgroupfs shape behind; with the cgroupfs driver it leaves no slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    Systemd,
    Cgroupfs,
}

impl Shape {
    /// The UID as this driver spells it in the name of the pod's directory.
    pub(super) fn spell(self, uid: &str) -> String {
        match self {
            Self::Systemd => uid.replace('-', "_"),
            Self::Cgroupfs => uid.to_owned(),
        }
    }

    /// Where kubelet puts this pod with the default cgroup root, and with the root of kind (`/kubelet`), relative to
    /// the mount.
    pub(super) fn usual_places(self, uid: &str) -> impl Iterator<Item = PathBuf> {
        let pod = format!("pod{}", self.spell(uid));
        ["", "kubelet"].into_iter().flat_map(|root| ["", "burstable", "besteffort"].map(|qos| (root, qos))).map(
            move |(root, qos)| {
                let names = [root, "kubepods", qos, &pod].into_iter().filter(|name| !name.is_empty());
                match self {
                    Self::Systemd => slice_path(names),
                    Self::Cgroupfs => names.collect(),
                }
            },
        )
    }
}

/// The shape and the UID (in the spelling of the directory) of the pod whose directory is `name` in `parent`; `None` if
/// it is not the directory of a pod.
pub(super) fn pod_of<'a>(parent: &Path, name: &'a str) -> Option<(Shape, &'a str)> {
    if let Some((class, uid)) = name.strip_suffix(".slice").and_then(|stem| stem.rsplit_once("-pod")) {
        let class = class.strip_suffix("-burstable").or(class.strip_suffix("-besteffort")).unwrap_or(class);
        return (class == "kubepods" || class.ends_with("-kubepods")).then_some((Shape::Systemd, uid));
    }
    let uid = name.strip_prefix("pod")?;
    let classes = ["kubepods", "kubepods/burstable", "kubepods/besteffort"];
    classes.iter().any(|class| parent.ends_with(class)).then_some((Shape::Cgroupfs, uid))
}

/// Whether this is the scope of one container (`cri-containerd-<id>.scope`, `docker-<id>.scope`, `libpod-<id>.scope`).
/// The directories below belong to that container, which can make directories of any name.
pub(super) fn is_container_scope(name: &str) -> bool {
    let id = name.strip_suffix(".scope").and_then(|stem| stem.rsplit_once('-')).map_or("", |(_, id)| id);
    id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The directory, relative to the cgroup2 mount, that a `cgroupPath` means. There are three forms: a path (with or
/// without a leading slash); the bare name of a slice; or `<slice>:<prefix>:<name>`, with which the systemd driver
/// passes a container to the OCI runtime.
///
/// # Errors
/// [`Code::Cgroup`] if the path leads out of the mount, means the mount itself, or is not the name of a slice.
pub(super) fn relative(given: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        let text = format!(
            "use the cgroupPath {given:?}: {why}; expected a path below the cgroup2 mount such as /kubepods/burstable/pod<uid>, \
             or the name of a slice"
        );
        Err(Error::new(Code::Cgroup, text))
    };
    if given.contains('\0') {
        return refuse("it contains a NUL");
    }
    let names: Vec<&str> = given.split('/').filter(|name| !name.is_empty() && *name != ".").collect();
    if names.contains(&"..") {
        return refuse("it contains \"..\"");
    }
    match names[..] {
        [] => refuse("it names no cgroup below the mount"),
        [name] if name.ends_with(".slice") || name.contains(".slice:") => match expand(name) {
            Some(path) => Ok(path),
            None => refuse("it is not the name of a slice"),
        },
        _ => Ok(names.iter().collect()),
    }
}

fn expand(name: &str) -> Option<PathBuf> {
    let (slice, container) = name.split_once(':').map_or((name, None), |(slice, container)| (slice, Some(container)));
    let stem = slice.strip_suffix(".slice")?;
    if stem.split('-').any(str::is_empty) {
        return None; // systemd: no empty part, and "-.slice" is the root of all
    }
    let path = slice_path(stem.split('-'));
    match container {
        // The pod's slice holds its containers. Any other slice (system.slice) also holds unrelated processes, and must
        // not be limited.
        Some(container) if pod_of(Path::new(""), slice).is_none() => {
            let (prefix, id) = container.split_once(':')?;
            Some(path.join(format!("{prefix}-{id}.scope")))
        }
        _ => Some(path),
    }
}

/// The path of the slice `a-b-c.slice` is `a.slice/a-b.slice/a-b-c.slice` (systemd.slice(5)).
fn slice_path<'a>(parts: impl Iterator<Item = &'a str>) -> PathBuf {
    let mut stem = String::new();
    parts
        .map(|part| {
            if !stem.is_empty() {
                stem.push('-');
            }
            stem.push_str(part);
            format!("{stem}.slice")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_paths_are_relative_to_the_mount() {
        let id = "0f".repeat(32);
        for (given, expected) in [
            ("/kubepods/burstable/pod1-2", "kubepods/burstable/pod1-2"),
            ("kubepods/pod1-2", "kubepods/pod1-2"),
            ("//kubepods/./pod1-2//", "kubepods/pod1-2"),
            ("/a..b/...", "a..b/..."),
            ("/kubepods.slice/kubepods-pod1_2.slice", "kubepods.slice/kubepods-pod1_2.slice"),
            ("kubepods-pod1_2.slice", "kubepods.slice/kubepods-pod1_2.slice"),
            (
                "/kubepods-burstable-pod1_2.slice",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
            ),
            (
                &format!("kubepods-burstable-pod1_2.slice:crio:{id}"),
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
            ),
            ("system.slice:docker:77", "system.slice/docker-77.scope"),
            ("machine.slice", "machine.slice"),
            ("libpod_parent", "libpod_parent"),
        ] {
            assert_eq!(relative(given).unwrap(), Path::new(expected), "{given}");
        }
    }

    #[test]
    fn hostile_cgroup_paths_are_refused() {
        let expected =
            "expected a path below the cgroup2 mount such as /kubepods/burstable/pod<uid>, or the name of a slice";
        for (given, why) in [
            ("", "it names no cgroup below the mount"),
            ("/", "it names no cgroup below the mount"),
            ("/./", "it names no cgroup below the mount"),
            ("..", "it contains \"..\""),
            ("/kubepods/../../etc", "it contains \"..\""),
            ("kubepods/pod1/..", "it contains \"..\""),
            ("/kubepods/pod1\0", "it contains a NUL"),
            ("-.slice", "it is not the name of a slice"),
            (".slice", "it is not the name of a slice"),
            ("a--b.slice", "it is not the name of a slice"),
            ("a-.slice:crio:1", "it is not the name of a slice"),
            ("a.slice:crio", "it is not the name of a slice"),
        ] {
            let error = relative(given).unwrap_err();
            assert_eq!(error.code(), Code::Cgroup);
            assert_eq!(error.to_string(), format!("use the cgroupPath {given:?}: {why}; {expected}"));
        }
    }

    #[test]
    fn pod_directories_are_known_by_name_and_parent() {
        use Shape::{Cgroupfs, Systemd};
        for (parent, name, expected) in [
            ("kubepods.slice", "kubepods-pod1_2.slice", Some((Systemd, "1_2"))),
            ("", "kubepods-burstable-pod1_2.slice", Some((Systemd, "1_2"))),
            ("x", "kubelet-kubepods-besteffort-pod1_2.slice", Some((Systemd, "1_2"))),
            ("kubepods", "pod1-2", Some((Cgroupfs, "1-2"))),
            ("kubelet/kubepods/burstable", "pod1-2", Some((Cgroupfs, "1-2"))),
            ("a/b/kubepods/besteffort", "pod1-pod2", Some((Cgroupfs, "1-pod2"))),
            ("kubepods.slice", "kubepods-burstable.slice", None),
            ("", "mykubepods-pod1_2.slice", None),
            ("", "my-podium.slice", None),
            ("besteffort", "pod1-2", None),
            ("xkubepods", "pod1-2", None),
            ("", "podruntime", None),
        ] {
            assert_eq!(pod_of(Path::new(parent), name), expected, "{parent}/{name}");
        }
    }

    #[test]
    fn container_scopes_are_known_by_their_id() {
        let id = "0123456789abcdef".repeat(4);
        for (name, expected) in [
            (format!("cri-containerd-{id}.scope"), true),
            (format!("docker-{id}.scope"), true),
            (format!("crio-conmon-{id}.scope"), true),
            (format!("docker-{id}"), false),
            ("run-r1234.scope".into(), false),
            ("init.scope".into(), false),
        ] {
            assert_eq!(is_container_scope(&name), expected, "{name}");
        }
    }

    #[test]
    fn usual_places_are_the_default_root_and_kinds() {
        let places = |shape: Shape| shape.usual_places("1-2").collect::<Vec<_>>();
        let paths = |paths: [&str; 6]| paths.map(PathBuf::from).to_vec();
        assert_eq!(
            places(Shape::Systemd),
            paths([
                "kubepods.slice/kubepods-pod1_2.slice",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice",
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1_2.slice",
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod1_2.slice",
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod1_2.slice",
            ])
        );
        assert_eq!(
            places(Shape::Cgroupfs),
            paths([
                "kubepods/pod1-2",
                "kubepods/burstable/pod1-2",
                "kubepods/besteffort/pod1-2",
                "kubelet/kubepods/pod1-2",
                "kubelet/kubepods/burstable/pod1-2",
                "kubelet/kubepods/besteffort/pod1-2",
            ])
        );
    }
}
