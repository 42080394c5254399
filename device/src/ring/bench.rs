//! A ring by itself, for benchmarks (feature `bench`): what a device does with it but for what the
//! chains mean.

use super::chain::Chain;
use super::{Ring, RingFeatures};
use crate::device::QueuePosition;
use crate::error::Result;
use crate::memory::{Gpa, GuestMemory};
use std::sync::Arc;

/// A ring without a device.
#[derive(Debug)]
pub struct BenchRing {
    ring: Ring,
    memory: Arc<GuestMemory>,
    chain: Chain,
    done: Vec<u64>,
}

impl BenchRing {
    /// A new ring of `size` descriptors at `places` (descriptors, driver's area, device's area).
    ///
    /// # Errors
    /// It does not lie in `memory`.
    pub fn new(
        memory: &Arc<GuestMemory>,
        size: u16,
        places: [Gpa; 3],
        packed: bool,
    ) -> Result<Self> {
        let features = RingFeatures {
            packed,
            indirect: true,
            event_idx: false,
            in_order: false,
        };
        let position = if packed {
            QueuePosition::PACKED_START
        } else {
            QueuePosition::SPLIT_START
        };
        Ok(Self {
            ring: Ring::new(memory, size, places, position, features)?,
            memory: Arc::clone(memory),
            chain: Chain::default(),
            done: Vec::new(),
        })
    }

    /// Pops and walks all chains that are there, completes and publishes them; returns how many
    /// buffers and bytes they had.
    pub fn serve(&mut self) -> (usize, u64) {
        let (mut buffers, mut bytes) = (0, 0);
        self.done.clear();
        while matches!(self.ring.pop(&self.memory, &mut self.chain), Ok(true)) {
            buffers += self.chain.buffers();
            bytes += self.chain.readable_bytes() + self.chain.writable_bytes();
            self.done.push(self.chain.token);
        }
        for token in &self.done {
            self.ring.complete(*token, 0);
        }
        self.ring.publish();
        (buffers, bytes)
    }
}
