//! A target for each node of the guest, and what is in the balloon there (requirements X1, X2).
//!
//! What is in the balloon is counted by the guest addresses that the driver names, so it is known of
//! drivers, too, that know nothing of nodes.

use super::Device;
use crate::error::{Error, Result};
use crate::memory::GuestNode;
use crate::target::Target;

/// The balloon on one node of the guest, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeBalloon {
    /// What it should hold; `None` where the guest chooses the nodes.
    pub target_bytes: Option<u64>,
    /// What it holds.
    pub ballooned_bytes: u64,
    /// The memory of the node.
    pub memory_bytes: u64,
}

impl Device {
    /// Sets how many bytes the balloon should hold of each node of the guest, from node 0 on (rounded down
    /// to 4 KiB; others: 0), and lets the guest hear of it. The whole balloon's target is the sum of them,
    /// and all that a driver hears that did not select the feature. Returns that.
    ///
    /// # Errors
    /// The device does not offer it; refuses no or more than [`crate::MAX_TARGET_NODES`] nodes, more than a
    /// node's memory, and more than the protocol can say.
    pub fn set_node_targets(&self, bytes: &[u64]) -> Result<u64> {
        if !self.shared.protocol.has_node_targets() {
            return Err(Error::NotSupported("targets of nodes"));
        }
        let target = Target::by_node(bytes)?;
        let memory = self.shared.memory_on_nodes();
        let too_much = target.nodes().iter().zip(memory);
        let too_much = too_much.map(|(target, memory)| target.saturating_sub(memory));
        if self.memory_bytes() > 0 && too_much.sum::<u64>() > 0 {
            return Err(Error::Invalid {
                what: "target_bytes",
                value: target.bytes(),
                expected: "at most the memory of each of the guest's nodes",
            });
        }
        self.set_target(target)
    }

    /// The balloon on one of the guest's nodes; all zeros where the guest has none of that number. Waits
    /// until nothing is in flight.
    #[must_use]
    pub fn node_balloon(&self, node: GuestNode) -> NodeBalloon {
        let mut service = self.shared.service.lock();
        let target_bytes = self.shared.shown_target().on(node);
        let balloon = service.balloon.as_mut();
        let ballooned = balloon.map(|balloon| balloon.ballooned_on(node));
        let (ballooned_bytes, memory_bytes) = ballooned.unwrap_or_default();
        NodeBalloon {
            target_bytes,
            ballooned_bytes,
            memory_bytes,
        }
    }
}
