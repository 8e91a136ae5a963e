//! What this node can do: the answer to STATUS. Features are tried, not deduced from the kernel's version, which distributions
//! patch.

use std::path::Path;

use crate::{
    cgroup::Hierarchies,
    error::{Code, Error, Result},
    ingress::IngressBy,
    pins,
    pod::Owner,
    request::{Limit, Limits, Source, Subnets},
    shaper::{self, Settings},
    units::Rate,
};

/// Whether an ADD with a limit could succeed: cgroup v2, bpffs, and a kernel that takes the programs.
///
/// # Errors
/// [`Code::Unavailable`] with the reason.
pub fn node(bpffs: &Path) -> Result<()> {
    let unavailable = |error: Error| Error::new(Code::Unavailable, format!("this node cannot limit pods: {error}"));
    Hierarchies::of_this_host().map_err(unavailable)?;
    pins::mount_bpffs(bpffs).map_err(unavailable)?;
    // Loads and drops them: the kernel checks each program and all it uses.
    let limit = Limit::of(Rate::MAX, Source::Config);
    let limits = Limits { egress: Some(limit), ingress: Some(limit) };
    let settings = Settings { ifindex: 0, limits, has_fq: true, ingress_by: Some(IngressBy::HeldAcks) };
    shaper::load(&settings, &Subnets::default(), &Owner::default()).map_err(unavailable)?;
    Ok(())
}
