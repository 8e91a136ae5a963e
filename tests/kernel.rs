//! Every test makes its own sandbox, with a UID, a network and a namespace of its own, and looks at nothing else. So
//! the tests can run at the same time as each other and as pods of others, and need no global lock.

mod attach;
mod cgroups;
mod failures;
mod interface;
pub mod mounts;
mod races;
mod verbs;
