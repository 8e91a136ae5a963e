//! Which attachments are not in force as they were made, because another program has removed filters or queues since.

use super::{Attachment, Measured, OtherPaths, Sets};
use crate::{
    attachment::Node,
    error::{Code, Result},
};

/// Checks all attachments and notes why one is not in force. Each check takes some system calls, also in the network
/// namespace.
pub fn look_whether_held(found: &mut [Attachment]) {
    let (node, mut sets) = (Node::default(), Sets::default());
    for attachment in found {
        attachment.look_whether_held(&node, &mut sets);
    }
}

impl Attachment {
    fn look_whether_held(&mut self, node: &Node, sets: &mut Sets) {
        // These faults are reported elsewhere.
        if self.problem.is_some() || self.links.are_dead() || self.has_lost_namespace() {
            return;
        }
        let limits = self.limits();
        let check = |sets: &mut Sets| -> Result<()> { node.check(&self.owner, &limits, sets.of(&self.directory)?) };
        // No packet passes an interface that is gone.
        let Some(error) = check(sets).err().filter(|error| error.code() != Code::Netns) else { return };
        self.not_held = Some(error.to_string());
        let are_held = sets.of(&self.directory).and_then(|set| node.check_other_paths(&self.owner, &limits, set));
        for measured in [&mut self.egress, &mut self.ingress].into_iter().flatten() {
            measured.lose(are_held.is_ok());
        }
    }
}

impl Measured {
    /// `are_others_held`: only the pod's queue is gone, and other packets are still limited.
    fn lose(&mut self, are_others_held: bool) {
        match self.others {
            OtherPaths::Held(others) if !are_others_held => self.others = OtherPaths::Lost(others),
            OtherPaths::ByTbf => self.others = OtherPaths::Free,
            _ => {}
        }
    }
}
