//! Virtqueues: how the guest hands over buffers (virtio 1.x, sections 2.6 to 2.8).
//!
//! [`chain`] is what the rest of the crate sees, `split` and `packed` read and publish the two layouts,
//! and `source` puts rings and elements that the VMM popped itself behind one interface. Two kinds of
//! fault are told apart: a [`RingError`] leaves nothing to go on with (NEEDS_RESET, S4), while a
//! fault inside a chain is acknowledged and counted (I3).

#[cfg(feature = "bench")]
pub(crate) mod bench;
pub(crate) mod chain;
mod indirect;
mod packed;
pub(crate) mod source;
mod split;

use crate::device::QueuePosition;
use crate::error::Result;
use crate::memory::{Gpa, GuestMemory};
use chain::Chain;
use std::sync::Arc;

/// The largest queue of either layout (2.7, 2.8).
const MAX_SIZE: u16 = 32768;

/// What was negotiated for the rings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RingFeatures {
    pub(crate) packed: bool,
    pub(crate) indirect: bool,
    pub(crate) event_idx: bool,
    /// One used entry stands for a batch of buffers, where it may (2.7.9, 2.8.9).
    pub(crate) in_order: bool,
}

impl RingFeatures {
    /// What the selected feature bits say, which are the same for all devices (virtio 6).
    pub(crate) fn negotiated(features: u64) -> Self {
        let has = |bit: u32| features >> bit & 1 == 1;
        Self {
            packed: has(34),
            indirect: has(28),
            event_idx: has(29),
            in_order: has(35),
        }
    }
}

/// The mark in a ring's tokens that a later chain may share this one's used entry (IN_ORDER). Where
/// something could be written none may: what an entry skips is assumed to be written in full.
const SHARES_ENTRY: u64 = 1 << 32;

/// The token of `chain`, of which the lower bits say what names it.
fn token(name: u64, chain: &Chain, features: RingFeatures) -> u64 {
    let shares = features.in_order && chain.writable_bytes() == 0;
    name | if shares { SHARES_ENTRY } else { 0 }
}

/// A ring that can no longer be served: its own structure is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error("the available index jumped by {0}, more than the queue holds")]
    AvailableIndexJumped(u16),
    #[error("descriptor {0} is beyond the table")]
    DescriptorBeyondTable(u16),
    #[error("a chain is longer than the queue, or loops")]
    ChainTooLong,
    #[error("an indirect table was used without being negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect table inside an indirect table")]
    NestedIndirect,
    #[error("an indirect descriptor that is not the end of its chain, or not alone in it")]
    IndirectWithNext,
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    #[error("an indirect table outside guest memory")]
    IndirectOutsideMemory,
}

/// Whether moving an index from `old` to `new` passed `event` (2.7.10.1).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A ring of either layout.
#[derive(Debug)]
pub(crate) enum Ring {
    Split(split::SplitRing),
    Packed(packed::PackedRing),
}

/// Calls the same method of whichever layout it is.
macro_rules! either {
    ($ring:expr, $inner:ident => $call:expr) => {
        match $ring {
            Ring::Split($inner) => $call,
            Ring::Packed($inner) => $call,
        }
    };
}

impl Ring {
    /// Checks where a queue lies and takes it over. `places` are the descriptors, the driver's area
    /// (available ring), and the device's area (used ring).
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        size: u16,
        places: [Gpa; 3],
        position: QueuePosition,
        features: RingFeatures,
    ) -> Result<Self> {
        Ok(if features.packed {
            Self::Packed(packed::PackedRing::new(
                memory, size, places, position, features,
            )?)
        } else {
            Self::Split(split::SplitRing::new(
                memory, size, places, position, features,
            )?)
        })
    }

    /// The same ring over another memory table.
    pub(crate) fn moved(&self, memory: &Arc<GuestMemory>) -> Result<Self> {
        Ok(match self {
            Self::Split(ring) => Self::Split(ring.moved(memory)?),
            Self::Packed(ring) => Self::Packed(ring.moved(memory)?),
        })
    }

    /// Where serving would go on.
    pub(crate) fn position(&self) -> QueuePosition {
        either!(self, ring => ring.position())
    }

    /// The same, were the chain `held` that was popped last not popped yet.
    pub(crate) fn position_before(&self, held: Option<u64>) -> QueuePosition {
        match held {
            None => self.position(),
            Some(token) => either!(self, ring => ring.position_before(token)),
        }
    }

    /// Whether the guest has made a chain available, or broken its index.
    pub(crate) fn has_next(&self) -> bool {
        either!(self, ring => ring.has_next())
    }

    /// Takes the next chain; `Ok(false)` if the guest has none.
    pub(crate) fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, RingError> {
        either!(self, ring => ring.pop(memory, chain))
    }

    /// Takes back the last [`Self::pop`], of a chain that was not completed.
    pub(crate) fn unpop(&mut self, token: u64) {
        either!(self, ring => ring.unpop(token));
    }

    /// Completes a chain; the guest sees it after [`Self::publish`].
    pub(crate) fn complete(&mut self, token: u64, written: u32) {
        either!(self, ring => ring.complete(token, written));
    }

    /// Shows all completed chains to the guest at once. Returns whether it wants to be told.
    pub(crate) fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Asks the guest not to kick while the ring is being served.
    pub(crate) fn suppress_kicks(&mut self) {
        either!(self, ring => ring.suppress_kicks());
    }

    /// Asks the guest to kick again; returns true if chains came in meanwhile, which it may not
    /// kick for.
    pub(crate) fn want_kicks(&mut self) -> bool {
        either!(self, ring => ring.want_kicks())
    }
}

#[cfg(test)]
mod differential_tests;
#[cfg(test)]
mod model_tests;
