//! Virtqueues: how the guest hands over buffers (virtio 1.x, sections 2.6 to 2.8).
//!
//! [`chain`] is what the rest of the crate sees, `split` reads and publishes the split layout, and
//! `source` puts rings and elements that the VMM popped itself behind one interface. Two kinds of
//! fault are told apart: a [`RingError`] leaves nothing to go on with (NEEDS_RESET, S4), while a
//! fault inside a chain is acknowledged and counted (I3).

pub(crate) mod chain;
pub(crate) mod source;
pub(crate) mod split;

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
    #[error("an indirect descriptor with NEXT")]
    IndirectWithNext,
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    #[error("an indirect table outside guest memory")]
    IndirectOutsideMemory,
}
