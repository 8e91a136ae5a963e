//! Gives running pods the programs of this podshaper. The links go on with the new programs, and limits, clocks and
//! connections keep their state.

use super::{Present, lock, other_paths};
use crate::{
    error::{self, Result},
    pins,
    shaper::NewPrograms,
};

/// The result of an upgrade.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Upgrade {
    /// Links that run this podshaper's programs now and did not before.
    pub links: usize,
    /// Attachments that an upgrade cannot change: they have another layout, or programs of their own.
    pub left: usize,
}

/// Replaces the programs of every attachment that shares the node's programs, if they are not this podshaper's. If a
/// call was killed midway, the next call repeats it.
///
/// # Errors
/// [`Code::Kernel`](crate::error::Code::Kernel): the kernel refuses a program, and nothing is changed; or it refuses to
/// change a link, and the other links are changed.
pub fn upgrade() -> Result<Upgrade> {
    let Some(pins) = lock()? else { return Ok(Upgrade::default()) };
    let left = pins.list().iter().filter(|(_, directory)| !pins::shares(directory)).count();
    let Some(programs) = NewPrograms::load(&pins)? else { return Ok(Upgrade { links: 0, left }) };
    let mut links = 0;
    error::all(pins.all_links().iter().map(|link| {
        links += usize::from(programs.run_on(link)?);
        Ok(())
    }))?;
    let present = pins.list().into_iter().filter(|(_, directory)| pins::shares(directory));
    error::all(present.filter_map(|(place, directory)| Present::read(place, directory).ok()).map(|present| {
        let Present { owner, limits, .. } = &present;
        other_paths::renew(&owner.interface, &limits.unwrap_or_default(), |name| programs.program(name))
    }))?;
    // Last: until this is done, the next call repeats everything.
    programs.commit()?;
    Ok(Upgrade { links, left })
}
