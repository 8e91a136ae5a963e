//! Notes which attachments are in one network namespace, and so may share an interface. Without the notes each ADD and
//! DEL would have to read the record of every attachment of the node.
//!
//! A note is a hint: its reader looks at the attachment itself. So a note that a killed call left costs one look, and
//! no more. A note is made before anything in the namespace is changed, and goes after the attachment.

use std::path::PathBuf;

use super::{
    LockedPins, Pins, Place,
    bpffs::{directories, make_directory, remove_if_empty},
    names::{decode, encode},
};
use crate::error::{self, Result};

const DIRECTORY: &str = "netns";
/// Between pod and interface. [`encode`] never returns it.
const ON: &str = "%on%";

impl Pins {
    /// The attachments that are noted for the namespace with this inode number.
    pub fn noted(&self, netns_inode: u64) -> Vec<Place> {
        let entries = directories(&self.namespaces().join(netns_inode.to_string()));
        entries.iter().filter_map(|(name, _)| place(name)).collect()
    }

    fn namespaces(&self) -> PathBuf {
        self.root.join(DIRECTORY)
    }

    fn entry(&self, netns_inode: u64, place: &Place) -> PathBuf {
        let name = encode(&place.pod) + ON + &encode(&place.interface);
        self.namespaces().join(netns_inode.to_string()).join(name)
    }
}

impl LockedPins {
    /// Notes that an attachment is in a namespace.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn note(&self, netns_inode: u64, place: &Place) -> Result<()> {
        let entry = self.entry(netns_inode, place);
        let mut missing: Vec<_> = entry.ancestors().take_while(|path| *path != self.root).collect();
        missing.reverse();
        missing.into_iter().try_for_each(make_directory)
    }

    /// Removes the note of an attachment.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn forget(&self, netns_inode: u64, place: &Place) -> Result<()> {
        let entry = self.entry(netns_inode, place);
        entry.ancestors().take_while(|path| *path != self.root).try_for_each(remove_if_empty)
    }

    /// Removes the notes of attachments that are gone.
    pub(super) fn prune(&self) -> Result<()> {
        let namespaces = directories(&self.namespaces());
        let entries = namespaces.iter().filter_map(|(name, _)| name.parse().ok());
        let entries = entries.flat_map(|inode| self.noted(inode).into_iter().map(move |place| (inode, place)));
        let gone = entries.filter(|(_, place)| self.find(place).is_none());
        error::all(gone.map(|(inode, place)| self.forget(inode, &place)))
    }
}

fn place(name: &str) -> Option<Place> {
    let (pod, interface) = name.split_once(ON)?;
    Some(Place { pod: decode(pod)?, interface: decode(interface)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_are_written_and_are_no_attachments() {
        let pins = Pins { root: "/p".into() };
        let at = Place { pod: "a.b".into(), interface: "eth0.100".into() };
        let entry = pins.entry(7, &at);
        assert_eq!(entry.to_str(), Some("/p/netns/7/a%2eb%on%eth0%2e100"));
        let name = entry.file_name().and_then(|name| name.to_str()).unwrap();
        // Earlier versions take a directory at this depth for an attachment if its name can be decoded.
        assert_eq!((place(name), decode(name)), (Some(at), None));
    }
}
