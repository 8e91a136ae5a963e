//! Gives running pods this podshaper's programs: their links go on with new programs, and limits, clocks and connections with what they have.

use super::{Present, lock, other_paths};
use crate::{
    error::{self, Result},
    pins,
    shaper::NewPrograms,
};

/// What became of an upgrade.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Upgrade {
    /// Links that have this podshaper's programs now and had not before.
    pub links: usize,
    /// Attachments that it is not for: of another layout, or with programs of their own.
    pub left: usize,
}

/// Replaces the programs of every attachment that shares the node's, if they are not this podshaper's. A call that was killed in the middle
/// is repeated by the next one.
///
/// # Errors
/// [`Code::Kernel`](crate::error::Code::Kernel): the kernel refuses a program, and then nothing is changed; or it refuses to change a link,
/// and then the others are changed.
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
    // Last: until then the next call does it all again.
    programs.commit()?;
    Ok(Upgrade { links, left })
}
