//! Whether the programs of an attachment are on its cgroup.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use crate::shaper::Pinned;

/// Whether an attachment's programs are on its cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    live: usize,
    /// The number of links whose cgroup is gone according to the kernel.
    dead: usize,
    faults: Vec<String>,
}

impl Links {
    pub(super) fn read(pinned: &Pinned<'_>, names: &[String], cgroup: &Path) -> Self {
        let wanted = fs::metadata(cgroup).map(|directory| directory.ino()).ok();
        let mut links = Self::default();
        for name in names {
            match pinned.linked_cgroup(name) {
                Ok(Some(id)) if Some(id) == wanted => links.live += 1,
                Ok(Some(_)) if wanted.is_none() => links.faults.push(format!("{name}: its cgroup is gone")),
                Ok(Some(id)) => links.faults.push(format!("{name}: on another cgroup, with id {id}")),
                Ok(None) => {
                    links.dead += 1;
                    links.faults.push(format!("{name}: dead, its cgroup is gone"));
                }
                Err(error) => links.faults.push(format!("{name}: {error}")),
            }
        }
        links
    }

    /// Whether no program is attached.
    pub fn are_dead(&self) -> bool {
        self.live == 0
    }

    /// Whether no program can be attached again through these links: a new cgroup of the same name is another cgroup.
    pub fn are_dead_for_good(&self) -> bool {
        self.live == 0 && self.dead > 0 && self.dead == self.faults.len()
    }

    /// What is wrong with each link that is not live.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// `live`, `dead`, or how many are live.
    pub fn text(&self) -> String {
        match (self.live, self.faults.len()) {
            (0, _) => "dead".to_owned(),
            (_, 0) => "live".to_owned(),
            (live, faults) => format!("{live} of {} live", live + faults),
        }
    }
}
