//! The threads that serve the devices, and where they run.
//!
//! One [`Runtime`] serves many devices.

use crate::error::Result;
use std::sync::Arc;

/// How a runtime is set up.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuntimeConfig {
    /// Worker threads for each host node that has processors; 0 chooses by the processors.
    pub workers_per_node: u32,
}

/// The worker pool. Dropping the last reference stops its threads.
#[derive(Debug)]
pub struct Runtime {}

impl Runtime {
    /// Probes the host, then starts all threads; none is created later.
    ///
    /// # Errors
    /// Fails if threads or descriptors cannot be had, or the topology cannot be read.
    pub fn new(_config: &RuntimeConfig) -> Result<Arc<Self>> {
        todo!()
    }

    /// The number of host NUMA nodes with memory.
    #[must_use]
    pub fn nodes(&self) -> u32 {
        todo!()
    }

    /// How many worker threads there are.
    #[must_use]
    pub fn workers(&self) -> u32 {
        todo!()
    }
}
