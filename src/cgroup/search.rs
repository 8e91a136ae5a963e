//! Searches one or more mounts for the directory of a pod of which only the UID is known.
//!
//! The search first tries the places that kubelet uses by default: a dozen lstat calls, however many pods there are.
//! Only then does it walk the tree, to find prefixes that cannot be known in advance (kubelet --cgroup-root, k3s, a
//! cluster in a container). The walk is breadth first and bounded: a container can make cgroups of its own, and must
//! not be able to delay or mislead the ADD of another pod with them.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::names::{Shape, is_container_scope, pod_of};

/// How deep below the mount the pod's directory may lie. The depth of
/// docker/<id>/docker/<id>/kubelet/kubepods/burstable/pod<uid> is 8.
pub(super) const MAX_DEPTH: usize = 10;
/// How many directories the walk reads at most. A node has about a hundred services, each with one cgroup; the walk
/// does not descend into pods.
pub(super) const MAX_VISITED: usize = 4096;

/// The result of a search.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// The pod's directory, relative to the mount it was found on.
    Found(PathBuf),
    /// There is no such directory within the bounds.
    Absent {
        /// The walk read [`MAX_VISITED`] directories of one mount, and more were left.
        gave_up: bool,
    },
}

/// Searches for the pod `uid` below each of `roots`. An earlier root is preferred, and on one root a shallower place.
pub(super) fn by_uid(roots: &[&Path], uid: &str) -> Outcome {
    // A directory of the cgroupfs shape in a usual place is taken without a walk for the systemd shape. The systemd
    // shape is preferred only because of leftovers of kubelet 1.20; these lie under the same cgroup root as the pod's
    // slice, so the slice would be in a usual place as well.
    for shape in [Shape::Systemd, Shape::Cgroupfs] {
        for place in shape.usual_places(uid) {
            if roots.iter().any(|root| is_dir(root, &place)) {
                return Outcome::Found(place);
            }
        }
    }
    let walks: Vec<Walk> = roots.iter().map(|root| walk(root, roots, uid, MAX_VISITED)).collect();
    let gave_up = walks.iter().any(|walk| walk.gave_up);
    // min_by_key takes the first of equal elements.
    match walks.into_iter().filter_map(|walk| walk.found).min_by_key(|(shape, _)| *shape) {
        Some((_, place)) => Outcome::Found(place),
        None => Outcome::Absent { gave_up },
    }
}

/// Whether `place` is a directory below `root`, reached without a symbolic link.
pub(super) fn is_dir(root: &Path, place: &Path) -> bool {
    let mut components = place.ancestors().filter(|part| !part.as_os_str().is_empty());
    components.all(|part| root.join(part).symlink_metadata().is_ok_and(|found| found.is_dir()))
}

#[derive(Debug, PartialEq)]
struct Walk {
    found: Option<(Shape, PathBuf)>,
    gave_up: bool,
}

fn walk(root: &Path, mounts: &[&Path], uid: &str, max_visited: usize) -> Walk {
    let mut leftover = None;
    let mut queue = VecDeque::from([(PathBuf::new(), 0)]);
    for _ in 0..max_visited {
        let Some((parent, depth)) = queue.pop_front() else {
            return Walk { found: leftover, gave_up: false };
        };
        for name in subdirectories(&root.join(&parent)) {
            let place = parent.join(&name);
            match pod_of(&parent, &name) {
                Some((shape, spelt)) if spelt == shape.spell(uid) => match shape {
                    Shape::Systemd => return Walk { found: Some((shape, place)), gave_up: false },
                    Shape::Cgroupfs => leftover = leftover.or(Some((shape, place))),
                },
                Some(_) => {}
                // A v1 hierarchy can be mounted on a directory of cgroup2 (VPN clients do so with net_cls). Such a
                // hierarchy is searched as a root of its own.
                None if depth + 1 < MAX_DEPTH
                    && !is_container_scope(&name)
                    && !mounts.contains(&root.join(&place).as_path()) =>
                {
                    queue.push_back((place, depth + 1));
                }
                None => {}
            }
        }
    }
    Walk { found: leftover, gave_up: !queue.is_empty() }
}

/// The names of the subdirectories, sorted, so that the same tree always gives the same answer. A directory that is
/// removed meanwhile counts as empty. A name that is not UTF-8 is not one of kubelet's.
fn subdirectories(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut names: Vec<String> = dirs.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use std::fs::create_dir_all;
    use std::os::unix::fs::symlink;

    use tempfile::{TempDir, tempdir};

    use super::*;

    const UID: &str = "1f0c1f0c-0000-4000-8000-00000000000a";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    fn tree(dirs: &[&str]) -> TempDir {
        let root = tempdir().unwrap();
        for dir in dirs {
            create_dir_all(root.path().join(dir)).unwrap();
        }
        root
    }

    #[test]
    fn every_driver_class_and_nesting_is_found() {
        let scope = format!("docker/{}", "0f".repeat(32));
        for uid in [UID, STATIC] {
            let spelt = uid.replace('-', "_");
            for qos in ["", "burstable", "besteffort"] {
                let part = |before: &str, after: &str| match qos {
                    "" => String::new(),
                    _ => format!("{before}{qos}{after}"),
                };
                let class = |root: &str| part(&format!("{root}kubepods-"), ".slice/");
                let pod = format!("kubepods{}-pod{spelt}.slice", part("-", ""));
                let systemd = format!("kubepods.slice/{}{pod}", class(""));
                let kind = format!("kubelet.slice/kubelet-kubepods.slice/{}kubelet-{pod}", class("kubelet-"));
                let cgroupfs = format!("kubepods{}/pod{uid}", part("/", ""));
                for place in [
                    systemd.clone(),
                    cgroupfs.clone(),
                    kind.clone(),
                    format!("kubelet/{cgroupfs}"),
                    format!("k3s/{cgroupfs}"),
                    format!("user.slice/user-1000.slice/user@1000.service/{systemd}"),
                    format!("{scope}/kubelet/{cgroupfs}"),
                    format!("{scope}/{scope}/kubelet/{cgroupfs}"),
                    format!("{scope}/{kind}"),
                    format!("own.slice/own-kubepods.slice/{}own-{pod}", class("own-")),
                ] {
                    let root =
                        tree(&[&place, "system.slice/containerd.service", "kubepods/burstable/pod77", "init.scope"]);
                    assert_eq!(by_uid(&[root.path()], uid), Outcome::Found(place.into()));
                }
            }
        }
    }

    #[test]
    fn of_several_directories_the_same_one_is_chosen_every_time() {
        for (what, other, chosen) in [
            (
                "kubelet 1.20 leaves cgroupfs directories beside the slice",
                "kubepods/burstable/podu-1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice",
            ),
            (
                "under a cgroup root of the operator's too",
                "own/kubepods/podu-1",
                "own.slice/own-kubepods.slice/own-kubepods-podu_1.slice",
            ),
            ("the shallower of a shape, in usual places", "kubelet/kubepods/podu-1", "kubepods/podu-1"),
            ("and elsewhere", "a/b/kubepods/podu-1", "z/kubepods/podu-1"),
            ("the first by name at the same depth", "b/kubepods/podu-1", "a/kubepods/podu-1"),
        ] {
            for made in [[other, chosen], [chosen, other]] {
                assert_eq!(by_uid(&[tree(&made).path()], "u-1"), Outcome::Found(chosen.into()), "{what}");
            }
        }
    }

    #[test]
    fn a_slice_on_a_later_mount_is_preferred_to_a_leftover_on_an_earlier() {
        let (first, second) =
            (tree(&["own/kubepods/podu-1"]), tree(&["own.slice/own-kubepods.slice/own-kubepods-podu_1.slice"]));
        assert_eq!(
            by_uid(&[first.path(), second.path()], "u-1"),
            Outcome::Found("own.slice/own-kubepods.slice/own-kubepods-podu_1.slice".into())
        );
    }

    #[test]
    fn what_is_not_the_pods_directory_is_not_taken() {
        let scope = format!("system.slice/docker-{}.scope", "0f".repeat(32));
        for (what, dirs) in [
            ("another pod", "kubepods/burstable/podu-2"),
            ("a longer UID", "kubepods/podu-10"),
            ("a name of the right form outside kubepods", "user/podu-1"),
            ("a container's own directories in its pod", "kubepods/podu-2/kubepods/podu-1"),
            ("the same in a slice", "kubepods.slice/kubepods-podu_2.slice/x/kubepods.slice/kubepods-podu_1.slice"),
            ("a container's own directories in its scope", &format!("{scope}/kubepods/podu-1")),
            ("a dashed UID in a slice's name", "x.slice/kubepods-podu-1.slice"),
        ] {
            assert_eq!(by_uid(&[tree(&[dirs]).path()], "u-1"), Outcome::Absent { gave_up: false }, "{what}");
        }
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let outside = tree(&["kubepods/podu-1", "podu-1"]);
        for (what, parent, link, target) in [
            ("a prefix", "", "a", ""),
            ("a usual place's parent", "", "kubepods", "kubepods"),
            ("the pod itself", "kubepods", "podu-1", "podu-1"),
            ("the pod below a prefix", "a/kubepods", "podu-1", "podu-1"),
        ] {
            let root = tree(&[parent]);
            symlink(outside.path().join(target), root.path().join(parent).join(link)).unwrap();
            assert_eq!(by_uid(&[root.path()], "u-1"), Outcome::Absent { gave_up: false }, "{what}");
        }
    }

    #[test]
    fn the_walk_keeps_its_bounds() {
        let at_depth = |depth: usize| format!("{}kubepods/podu-1", "d/".repeat(depth - 2));
        let root = tree(&[&at_depth(MAX_DEPTH)]);
        assert_eq!(by_uid(&[root.path()], "u-1"), Outcome::Found(at_depth(MAX_DEPTH).into()));
        let root = tree(&[&at_depth(MAX_DEPTH + 1)]);
        assert_eq!(by_uid(&[root.path()], "u-1"), Outcome::Absent { gave_up: false });

        // The walk reads the mount, a and b; z/kubepods is still in the queue.
        let root = tree(&["a", "b", "z/kubepods/podu-1"]);
        let visiting = |most| walk(root.path(), &[], "u-1", most);
        assert_eq!(visiting(3), Walk { found: None, gave_up: true });
        let found = Some((Shape::Cgroupfs, "z/kubepods/podu-1".into()));
        assert_eq!(visiting(5), Walk { found, gave_up: false });
    }

    #[test]
    fn a_mount_below_a_mount_is_searched_by_itself() {
        let root = tree(&["net_cls/kubepods/x/podu-2", "net_cls/own/kubepods/podu-1"]);
        let v1 = root.path().join("net_cls");
        assert_eq!(by_uid(&[root.path(), &v1], "u-1"), Outcome::Found("own/kubepods/podu-1".into()));
    }
}
