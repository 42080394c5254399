//! The host's NUMA nodes and their processors, from hwloc.

use crate::memory::NodeId;
use hwlocality::Topology;
use hwlocality::cpu::binding::CpuBindingFlags;
use hwlocality::cpu::cpuset::CpuSet;
use hwlocality::object::types::ObjectType;

/// One NUMA node that threads of this process may run on.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// The operating system's number.
    pub(crate) id: NodeId,
    /// The processors to bind to; `None` leaves the thread where the scheduler wants it.
    pub(crate) cpus: Option<CpuSet>,
    /// How many processors that is.
    pub(crate) processors: u32,
}

/// The host as far as the pool cares.
#[derive(Debug)]
pub(crate) struct Host {
    topology: Option<Topology>,
    /// Nodes with processors; at least one.
    pub(crate) nodes: Vec<Node>,
    /// One more than the highest number of a node with memory: how many pages the books need.
    pub(crate) node_count: u32,
}

impl Host {
    /// Reads the topology. A host that hwloc cannot read counts as one node.
    pub(crate) fn discover() -> Self {
        match Topology::new() {
            Ok(topology) => Self::of(topology),
            Err(error) => {
                log::warn!("hwloc cannot read this host's topology ({error}); assuming one node");
                Self {
                    topology: None,
                    nodes: vec![single_node()],
                    node_count: 1,
                }
            }
        }
    }

    fn of(topology: Topology) -> Self {
        // A VMM may be confined to some processors; the pool stays inside them.
        let allowed = topology.cpu_binding(CpuBindingFlags::THREAD).ok();
        let mut nodes = Vec::new();
        let mut node_count = 1;
        for object in topology.objects_with_type(ObjectType::NUMANode) {
            let Some(id) = object.os_index().and_then(|id| u32::try_from(id).ok()) else {
                continue;
            };
            node_count = node_count.max(id + 1);
            let Some(cpus) = object.cpuset() else {
                continue;
            };
            let cpus = match &allowed {
                Some(allowed) => cpus.clone_target() & allowed,
                None => cpus.clone_target(),
            };
            let processors = cpus.weight().and_then(|count| u32::try_from(count).ok());
            if let Some(processors) = processors.filter(|count| *count > 0) {
                nodes.push(Node {
                    id: NodeId(id),
                    cpus: Some(cpus),
                    processors,
                });
            }
        }
        match nodes.as_mut_slice() {
            [] => nodes.push(single_node()),
            // Binding to the only node there is would only take choice from the scheduler.
            [only] => only.cpus = None,
            _ => {}
        }
        Self {
            topology: Some(topology),
            nodes,
            node_count,
        }
    }

    /// A host with these nodes, whatever the one that the test runs on has.
    #[cfg(test)]
    pub(crate) fn of_nodes(nodes: Vec<Node>) -> Self {
        let node_count = nodes.iter().map(|node| node.id.0 + 1).max().unwrap_or(1);
        Self {
            topology: None,
            nodes,
            node_count,
        }
    }

    /// The processors of all nodes.
    pub(crate) fn processors(&self) -> u32 {
        self.nodes.iter().map(|node| node.processors).sum()
    }

    /// Binds the calling thread to a node's processors. Failing is no error: it runs elsewhere.
    pub(crate) fn bind_current_thread(&self, node: &Node) {
        if let (Some(topology), Some(cpus)) = (&self.topology, &node.cpus)
            && let Err(error) = topology.bind_cpu(cpus, CpuBindingFlags::THREAD)
        {
            log::warn!("cannot bind a worker to node {}: {error}", node.id.0);
        }
    }
}

fn single_node() -> Node {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Node {
        id: NodeId(0),
        cpus: None,
        processors: u32::try_from(processors).unwrap_or(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_a_node_with_a_processor() {
        let host = Host::discover();
        assert!(!host.nodes.is_empty());
        assert!(
            host.nodes
                .iter()
                .all(|node| node.processors > 0 && node.id.0 < host.node_count)
        );
    }
}
