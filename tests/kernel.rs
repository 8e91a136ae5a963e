//! Every test makes its own sandbox, with a UID, a network and a namespace of its own, and looks at nothing else: they run at
//! the same time as each other and as other people's pods. There is no global lock, then.

mod attach;
mod cgroups;
mod failures;
mod interface;
pub mod mounts;
mod races;
mod verbs;
