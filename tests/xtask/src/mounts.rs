//! Separate mounts for the tests, so that leftovers of other runs and pins of this machine's own pods do not disturb
//! them.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Directories of podshaper and of `ip netns`, and the type of the filesystem to mount there.
const OWN: [(&str, &str); 3] = [("/sys/fs/bpf", "bpf"), ("/run/netns", "tmpfs"), ("/run/podshaper", "tmpfs")];

/// Gives this thread, and all processes that it starts from now on, an empty bpffs, no named network namespaces, and
/// no memory of podshaper's. The kernel removes the mounts with the last process that sees them, even after a kill.
pub fn have_own() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| {
        format!("leave this machine's mounts: {error} (that takes CAP_SYS_ADMIN: call it on the machine itself, or in a privileged container)")
    })?;
    // Otherwise the mounts below would appear on the machine as well.
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|error| format!("keep mounts to this process: {error}"))?;
    OWN.iter().try_for_each(|(place, filesystem)| replace(Path::new(place), filesystem))
}

fn replace(place: &Path, filesystem: &str) -> Result<(), String> {
    // A test that unmounts bpffs must find no other filesystem below.
    while umount2(place, MntFlags::MNT_DETACH).is_ok() {}
    let mount_it = || {
        fs::create_dir_all(place)?;
        mount(Some("podshaper-tests"), place, Some(filesystem), MsFlags::empty(), Some("mode=755"))?;
        Ok(())
    };
    mount_it().map_err(|error: std::io::Error| format!("mount an empty {filesystem} on {}: {error}", place.display()))
}
