//! The memory balloon with device ID 13 (docs/memballoon.md; requirements R).

mod commands;
mod control;
mod minimum;

use crate::error::{Error, Result};
use crate::metrics::Books;
use crate::protocol::DeviceKind;
use crate::protocol::contract::{ASKED, Broken, Notice, Protocol, Turn, Written};
use crate::service::queues::Queues;
use crate::target::Target;
use minimum::Minimum;

/// The balloon may go below zero (R2).
const EXTRA_MEM: u64 = 1 << 0;
/// The driver can be told of a target for each node of the guest (X2).
const NODE: u64 = 1 << 50;
/// Pages of 4 KiB << (bit - 1), one bit a size.
const PAGE_SIZES: u64 = 0xff_fffe;
/// INDIRECT_DESC, EVENT_IDX, VERSION_1.
const RINGS: u64 = 1 << 28 | 1 << 29 | 1 << 32;
/// RING_PACKED, IN_ORDER: VMMs have to know about them.
const OTHER_RINGS: u64 = 1 << 34 | 1 << 35;

/// Every feature that can be offered.
pub(crate) const SUPPORTED: u64 = EXTRA_MEM | PAGE_SIZES | RINGS | OTHER_RINGS | NODE;
/// What is offered unless the VMM chooses.
pub(crate) const DEFAULT: u64 = PAGE_SIZES | RINGS;
/// The number of queues.
pub(crate) const QUEUES: u16 = 2;

/// Where the device tells the driver of its minimum.
const FROMDEVQ: u16 = 0;
/// Where the driver commands.
const TODEVQ: u16 = 1;

/// Pages of 4 KiB in one page of the size that was negotiated.
fn pages_per_page(features: u64) -> u64 {
    // FEATURES_OK was refused but for exactly one size.
    let sizes = features & PAGE_SIZES;
    1 << sizes.trailing_zeros().saturating_sub(1).min(22)
}

/// What one device of this protocol knows, beside the balloon.
#[derive(Debug)]
pub(crate) struct Memballoon {
    offered: u64,
    minimum: Minimum,
}

impl Memballoon {
    /// The protocol of a new device that offers `features`.
    ///
    /// # Errors
    /// At least one page size has to be offered (R2).
    pub(crate) fn new(features: u64) -> Result<Self> {
        if features & PAGE_SIZES == 0 {
            return Err(Error::Invalid {
                what: "features",
                value: features,
                expected: "at least one page size",
            });
        }
        Ok(Self {
            offered: features,
            minimum: Minimum::default(),
        })
    }
}

impl Protocol for Memballoon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Memballoon
    }

    fn offered(&self) -> u64 {
        self.offered
    }

    fn check_features(&self, selected: u64) -> Result<()> {
        match (selected & PAGE_SIZES).count_ones() {
            1 => Ok(()),
            _ => Err(Error::Invalid {
                what: "features",
                value: selected,
                expected: "exactly one page size",
            }),
        }
    }

    fn has_extra_memory(&self) -> bool {
        self.offered & EXTRA_MEM != 0
    }

    /// A driver must not touch a page before it has got it back (R4).
    fn tells_before_use(&self, _features: u64) -> bool {
        true
    }

    /// There is no configuration space (R1).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: u64, data: &[u8], _features: u64, _active: bool) -> Written {
        Written {
            refused: !data.is_empty(),
            ..Written::default()
        }
    }

    /// What a signed number of bytes can say (R7).
    fn check_target(&self, bytes: u64) -> Result<()> {
        i64::try_from(bytes)
            .map(|_| ())
            .map_err(|_| Error::Invalid {
                what: "target_bytes",
                value: bytes,
                expected: "less than 8 EiB",
            })
    }

    fn has_node_targets(&self) -> bool {
        self.offered & NODE != 0
    }

    fn show_target(&self, target: &Target) {
        self.minimum.set_target(target.clone());
    }

    fn announce(&self) -> Notice {
        self.minimum.announce();
        Notice::Queue
    }

    fn actual_bytes(&self) -> Option<u64> {
        None
    }

    fn serve(&self, work: u32, queues: &mut Queues, turn: &mut Turn<'_>) -> Result<u32, Broken> {
        let mut more = 0;
        let broken = |queue| move |error| Broken { queue, error };
        if work & (1 << TODEVQ) != 0
            && let Some(source) = queues.source(TODEVQ)
            && commands::serve(source, turn).map_err(broken(TODEVQ))?
        {
            more |= 1 << TODEVQ;
        }
        if work & (ASKED | 1 << FROMDEVQ) != 0
            && let Some(source) = queues.source(FROMDEVQ)
            && self.minimum.serve(source, turn).map_err(broken(FROMDEVQ))?
        {
            more |= 1 << FROMDEVQ;
        }
        Ok(more)
    }

    fn reset(&self, _books: &Books) {
        self.minimum.reset();
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn check_saved(&self, own: &[u8], _negotiated: u64, _empty: bool) -> Result<u64> {
        if own.is_empty() {
            Ok(0)
        } else {
            Err(Error::SavedState {
                what: "a part of this protocol, which has none",
                offset: 0,
            })
        }
    }

    fn restore(&self, _own: &[u8], _books: &Books) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_bits_one_to_twenty_three_are_4k_to_16g() {
        assert_eq!(pages_per_page(1 << 1 | EXTRA_MEM | RINGS), 1);
        assert_eq!(pages_per_page(1 << 10), 512);
        assert_eq!(pages_per_page(1 << 23) << 12, 16 << 30);
        let device = Memballoon::new(DEFAULT).unwrap();
        for selected in 0..1u64 << 24 {
            if selected.count_ones() <= 3 {
                let sizes = (selected >> 1).count_ones();
                assert_eq!(device.check_features(selected).is_ok(), sizes == 1);
            }
        }
    }
}
