//! How large the balloon should be: as a whole, or on each node of the guest (requirements X1, X2).
//!
//! A target always is of the ballooned area, and an upper bound (A2). The nodes are the guest's, as its
//! memory is described to it; the VMM says which region is on which.

use crate::error::{Error, Result};
use crate::memory::{BALLOON_PAGE_BYTES, GuestMemory, GuestNode};

/// Nodes that can have a target of their own: 0 to 15. A guest's further nodes are left alone.
pub const MAX_TARGET_NODES: usize = 16;

/// A target: at most so many bytes in all, and on each node if there are nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    bytes: u64,
    /// Empty where the guest chooses the nodes; else the sum of these is `bytes`, and nodes behind
    /// the last one have 0.
    nodes: Vec<u64>,
}

/// How much memory of a table is on each node that can have a target.
pub(crate) type NodeBytes = [u64; MAX_TARGET_NODES];

/// The part of a target that pages of 4 KiB can reach.
fn whole_pages(bytes: u64) -> u64 {
    bytes - bytes % BALLOON_PAGE_BYTES
}

impl Target {
    /// A target whose nodes are for the guest to choose.
    pub(crate) fn whole(bytes: u64) -> Self {
        Self {
            bytes: whole_pages(bytes),
            nodes: Vec::new(),
        }
    }

    /// A target for each node from 0 on; the others get 0.
    ///
    /// # Errors
    /// None, or too many, or more than a sum can say.
    pub(crate) fn by_node(nodes: &[u64]) -> Result<Self> {
        if nodes.is_empty() || nodes.len() > MAX_TARGET_NODES {
            return Err(Error::Invalid {
                what: "n_nodes",
                value: nodes.len() as u64,
                expected: "1 to 16",
            });
        }
        let nodes: Vec<u64> = nodes.iter().copied().map(whole_pages).collect();
        let sum = nodes
            .iter()
            .try_fold(0u64, |sum, node| sum.checked_add(*node));
        let bytes = sum.ok_or(Error::Invalid {
            what: "target_bytes",
            value: u64::MAX,
            expected: "targets whose sum is less than 2^64",
        })?;
        Ok(Self { bytes, nodes })
    }

    /// In all.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// On each node; empty where the guest chooses.
    pub(crate) fn nodes(&self) -> &[u64] {
        &self.nodes
    }

    /// The target of `node`, if nodes have one.
    pub(crate) fn on(&self, node: GuestNode) -> Option<u64> {
        let index = usize::try_from(node.0).unwrap_or(usize::MAX);
        let target = self.nodes.get(index).copied().unwrap_or(0);
        (!self.nodes.is_empty() && index < MAX_TARGET_NODES).then_some(target)
    }

    /// As much of it as a guest with `memory_bytes`, and so much of it on each node, can give.
    pub(crate) fn within(&self, memory_bytes: u64, on_nodes: &NodeBytes) -> Self {
        let nodes: Vec<u64> = self
            .nodes
            .iter()
            .zip(on_nodes)
            .map(|(node, most)| *node.min(most))
            .collect();
        let bytes = if nodes.is_empty() {
            self.bytes.min(memory_bytes)
        } else {
            nodes.iter().sum()
        };
        Self { bytes, nodes }
    }
}

/// The memory of each node of the guest.
pub(crate) fn node_bytes(memory: &GuestMemory) -> NodeBytes {
    let mut bytes = NodeBytes::default();
    for region in memory.regions() {
        let index = usize::try_from(region.guest_node.0).unwrap_or(usize::MAX);
        if let Some(node) = bytes.get_mut(index) {
            *node += region.len_bytes;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_by_node_is_their_sum_in_whole_pages() {
        let target = Target::by_node(&[4096 + 5, 0, 3 << 12]).unwrap();
        assert_eq!(
            (target.bytes(), target.nodes()),
            (4 << 12, &[4096, 0, 3 << 12][..])
        );
        let on = |node| target.on(GuestNode(node));
        assert_eq!(
            (on(0), on(2), on(3), on(15)),
            (Some(4096), Some(3 << 12), Some(0), Some(0))
        );
        assert_eq!(on(16), None, "no target can be said for it");
        assert_eq!(
            Target::whole(4097),
            Target {
                bytes: 4096,
                nodes: vec![]
            }
        );
        assert_eq!(Target::whole(4096).on(GuestNode(0)), None);
    }

    #[test]
    fn none_too_many_and_more_than_a_number_can_say_are_refused() {
        assert!(Target::by_node(&[]).is_err());
        assert!(Target::by_node(&[0; 17]).is_err());
        assert!(Target::by_node(&[1 << 63, 1 << 63]).is_err());
    }

    #[test]
    fn no_node_is_asked_for_more_than_it_has() {
        let mut on_nodes = NodeBytes::default();
        on_nodes[..2].copy_from_slice(&[8 << 12, 2 << 12]);
        let target = Target::by_node(&[4 << 12, 4 << 12, 1 << 12]).unwrap();
        let within = target.within(10 << 12, &on_nodes);
        assert_eq!(
            (within.bytes(), within.nodes()),
            (6 << 12, &[4 << 12, 2 << 12, 0][..])
        );
        assert_eq!(
            Target::whole(1 << 30).within(10 << 12, &on_nodes).bytes(),
            10 << 12
        );
    }
}
