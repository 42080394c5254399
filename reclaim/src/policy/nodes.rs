//! Demand and targets by host node (X2).
//!
//! A VM with per-node targets is asked on the node that lacks memory. Any other VM helps a node as
//! far as its memory lies there: its balloon takes pages from wherever the guest finds them, so what
//! a node gets of it is its part of the VM.

use super::{
    aerostat::{GRANULE_BYTES, Plan},
    amount::{ratio, scaled, whole_pages},
    types::{HostSample, NodeId, NodeTarget, VmSample},
};

/// Where memory is lacking.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Place {
    Host,
    /// A node, and how much a VM helps of which it is not known where it is.
    Node(NodeId, f64),
    /// The budget of limits.
    Budget,
}

/// A place with a demand of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Domain {
    pub(super) place: Place,
    /// What guests should give there.
    pub(super) demand_bytes: u64,
}

/// Divides the demand over the nodes: each at least what it lacks itself, the rest by size. What is
/// on its way is expected everywhere in the same proportion.
///
/// A node may lack memory for ever although the host does not: something else is on it. So its own lack is for
/// those alone that are known to be there.
pub(super) fn domains(
    host: &HostSample,
    demand_bytes: u64,
    by_node: Vec<u64>,
    pending_bytes: u64,
    vms: &[VmSample],
) -> Vec<Domain> {
    if host.nodes.len() < 2 {
        return vec![Domain {
            place: Place::Host,
            demand_bytes,
        }];
    }
    let is_there = |vm: &VmSample, node| known_part(vm, node).is_some_and(|part| part > 0.0);
    let nodes = host.nodes.iter().zip(by_node);
    let by_node: Vec<u64> = nodes
        .map(|(node, lacks)| {
            let known = vms.iter().any(|vm| is_there(vm, node.node));
            if known { lacks } else { 0 }
        })
        .collect();
    let lacking: u64 = by_node.iter().copied().fold(0, u64::saturating_add);
    let arriving = ratio(pending_bytes, lacking).min(1.0);
    let still = scaled(lacking, 1.0 - arriving);
    let rest = demand_bytes.saturating_sub(still);
    let total: u64 = host.nodes.iter().map(|node| node.total_bytes).sum();
    let nodes = host.nodes.iter().zip(by_node);
    nodes
        .map(|(node, lacks)| {
            let part = ratio(node.total_bytes, total);
            let unknown = if demand_bytes > 0 { part } else { 0.0 };
            Domain {
                place: Place::Node(node.node, unknown),
                demand_bytes: scaled(lacks, 1.0 - arriving) + scaled(rest, part),
            }
        })
        .collect()
}

/// Whether memory that the VM got back would lack somewhere.
pub(super) fn lacks_where_it_is(vm: &VmSample, domains: &[Domain]) -> bool {
    let lacking = |domain: &&Domain| domain.demand_bytes >= GRANULE_BYTES;
    let mut lacking = domains.iter().filter(lacking);
    lacking.any(|domain| part_on(vm, domain) > 0.0)
}

/// Targets of this VM can be set by node, and its nodes are known.
pub(super) fn by_node(vm: &VmSample) -> bool {
    vm.capabilities.per_node_targets && !vm.nodes.is_empty()
}

/// The part of the VM's memory that helps where the domain is. Where its nodes are not known, the node's part
/// of the host.
pub(super) fn part_on(vm: &VmSample, domain: &Domain) -> f64 {
    let (node, unknown) = match domain.place {
        Place::Host => return 1.0,
        Place::Budget => return if vm.limited { 1.0 } else { 0.0 },
        Place::Node(node, unknown) => (node, unknown),
    };
    known_part(vm, node).unwrap_or(unknown)
}

/// The part of the VM's memory on the node, if its nodes are known. A few pages of every VM are on every node: an
/// eighth of an even part is none.
fn known_part(vm: &VmSample, node: NodeId) -> Option<f64> {
    let all: u64 = vm.nodes.iter().map(|node| node.current_bytes).sum();
    if all == 0 {
        return None;
    }
    let here = vm.nodes.iter().filter(|sample| sample.node == node);
    let part = ratio(here.map(|sample| sample.current_bytes).sum(), all);
    let even = 1.0 / vm.nodes.len() as f64;
    Some(if part < even / 8.0 { 0.0 } else { part })
}

/// The plan's target by node; empty for a balloon with one target. What a round gives is added where
/// it is needed; what goes back comes from every node in proportion, and so does a floor.
pub(super) fn targets(plan: &Plan<'_>) -> Vec<NodeTarget> {
    let vm = plan.vm;
    if !by_node(vm) {
        return Vec::new();
    }
    let mut targets: Vec<NodeTarget> = vm
        .nodes
        .iter()
        .map(|node| {
            let gives = plan.node_gives.iter().filter(|(id, _)| *id == node.node);
            let add: u64 = gives.map(|(_, bytes)| bytes).sum();
            NodeTarget {
                node: node.node,
                target_bytes: node.target_bytes.saturating_add(add),
            }
        })
        .collect();
    let sum: u64 = targets.iter().map(|node| node.target_bytes).sum();
    let occupied: u64 = vm.nodes.iter().map(|node| node.current_bytes).sum();
    if sum != plan.target_bytes {
        let factor = ratio(plan.target_bytes, sum);
        for (target, node) in targets.iter_mut().zip(&vm.nodes) {
            target.target_bytes = if sum == 0 {
                scaled(plan.target_bytes, ratio(node.current_bytes, occupied))
            } else {
                scaled(target.target_bytes, factor)
            };
        }
    }
    for target in &mut targets {
        target.target_bytes = whole_pages(target.target_bytes);
    }
    // Rounding goes to the first node, so that the sum is the target.
    let others: u64 = targets.iter().skip(1).map(|node| node.target_bytes).sum();
    if let Some(first) = targets.first_mut() {
        first.target_bytes = plan.target_bytes.saturating_sub(others);
    }
    targets
}
