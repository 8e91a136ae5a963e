//! Where the pins lie in a layout. `pins.rs` shows the tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use podshaper_abi::LAYOUT;

use super::{FLOWS, HOST_ENDS, LIMITS, LINKS, METERS, NODE, OTHERS, OWNER, SCOPES, bpffs::directories, names::decode};

/// The layout in which an attachment is pinned, such as `v1`.
pub fn layout_of(directory: &Path) -> &str {
    let layout = directory.ancestors().nth(2).and_then(Path::file_name);
    layout.and_then(|name| name.to_str()).unwrap_or_default()
}

/// Whether an attachment's maps have the layout that this podshaper knows.
pub fn is_current(directory: &Path) -> bool {
    layout_of(directory) == format!("v{LAYOUT}")
}

/// Whether an attachment has maps and programs of its own, as every attachment had in the layouts before the sixth.
pub fn has_own_maps(directory: &Path) -> bool {
    directory.join(LIMITS).exists()
}

/// The directory of the maps of an attachment's programs.
pub fn maps_of(directory: &Path) -> PathBuf {
    match directory.ancestors().nth(2) {
        Some(layout) if shares(directory) => layout.join(NODE),
        _ => directory.to_path_buf(),
    }
}

/// The directory of the links of an attachment's programs.
pub fn links_of(directory: &Path) -> PathBuf {
    match directory.parent() {
        Some(pod) if shares(directory) => pod.join(LINKS),
        _ => directory.to_path_buf(),
    }
}

/// Whether an attachment shares the node's programs.
pub fn shares(directory: &Path) -> bool {
    is_current(directory) && !has_own_maps(directory)
}

/// The names of the links of an attachment of any layout.
pub fn links(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(links_of(directory)).into_iter().flatten().flatten();
    let names = names.filter_map(|pin| pin.file_name().into_string().ok());
    let maps = [OWNER, FLOWS, LIMITS, METERS, SCOPES, OTHERS, HOST_ENDS];
    let mut links: Vec<_> = names.filter(|name| !maps.contains(&name.as_str())).collect();
    links.sort();
    links
}

/// When an attachment was made: a pin has the time of its making, and OWNER is pinned when the attachment is made.
pub fn made_at(directory: &Path) -> Option<std::time::SystemTime> {
    fs::metadata(directory.join(OWNER)).and_then(|pin| pin.modified()).ok()
}

/// The directories of the layouts, this podshaper's first. A killed call may have left an older layout beside it.
pub fn layouts(root: &Path) -> Vec<PathBuf> {
    let current = format!("v{LAYOUT}");
    let mut layouts: Vec<_> = directories(root).into_iter().filter(|(name, _)| name.starts_with('v')).collect();
    layouts.sort_by_key(|(name, _)| *name != current);
    layouts.into_iter().map(|(_, path)| path).collect()
}

/// The directories of pods in a layout, by their encoded names.
pub fn pods(layout: &Path) -> Vec<(String, PathBuf)> {
    directories(layout).into_iter().filter(|(name, _)| decode(name).is_some()).collect()
}
