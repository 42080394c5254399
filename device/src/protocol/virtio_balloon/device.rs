//! The traditional balloon as the core sees it.

use super::{
    ConfigSpace, Features, HintBoard, QUEUES, Role, SavedConfig, StatsBoard, Turn, role_of,
    serve_pages,
};
use crate::balloon::bump;
use crate::error::{Error, Result};
use crate::memory::BALLOON_PAGE_SHIFT;
use crate::metrics::Books;
use crate::protocol::DeviceKind;
use crate::protocol::contract::Turn as Loan;
use crate::protocol::contract::{ASKED, Broken, Due, Notice, Protocol, Written};
use crate::service::queues::Queues;
use crate::target::Target;
use std::time::Instant;

/// What one device of this protocol knows, beside the balloon.
#[derive(Debug)]
pub(crate) struct VirtioBalloon {
    offered: Features,
    pub(super) config: ConfigSpace,
    pub(super) stats: StatsBoard,
    pub(super) hints: HintBoard,
}

impl VirtioBalloon {
    /// The protocol of a new device that offers `features`.
    pub(crate) fn new(features: u64) -> Self {
        let offered = Features::from_bits_retain(features);
        Self {
            offered,
            config: ConfigSpace::new(offered),
            stats: StatsBoard::default(),
            hints: HintBoard::default(),
        }
    }
}

/// The started queue that has `role`.
fn index_of(role: Role, features: Features, queues: &Queues) -> Option<u16> {
    let (started, known) = (queues.started(), queues.known());
    (0..QUEUES)
        .find(|index| started & (1 << index) != 0 && role_of(*index, features, known) == Some(role))
}

impl Protocol for VirtioBalloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::VirtioBalloon
    }

    fn offered(&self) -> u64 {
        self.offered.bits()
    }

    fn tells_before_use(&self, features: u64) -> bool {
        Features::from_bits_retain(features).contains(Features::MUST_TELL_HOST)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8], features: u64, active: bool) -> Written {
        let features = Features::from_bits_retain(features);
        self.config.write(offset, data, features, active)
    }

    fn check_target(&self, bytes: u64) -> Result<()> {
        let pages = u32::try_from(bytes >> BALLOON_PAGE_SHIFT);
        pages.map(|_| ()).map_err(|_| Error::Invalid {
            what: "target_bytes",
            value: bytes,
            expected: "less than 16 TiB",
        })
    }

    fn has_node_targets(&self) -> bool {
        self.offered.contains(Features::NODE_TARGETS)
    }

    fn show_target(&self, target: &Target) {
        self.config.set_target(target);
    }

    fn announce(&self) -> Notice {
        Notice::ConfigChange
    }

    fn actual_bytes(&self) -> Option<u64> {
        Some(u64::from(self.config.actual()) << BALLOON_PAGE_SHIFT)
    }

    fn serve(&self, work: u32, queues: &mut Queues, loan: &mut Loan<'_>) -> Result<u32, Broken> {
        let features = Features::from_bits_retain(loan.features);
        let mut turn = Turn {
            balloon: loan.balloon,
            scratch: loan.scratch,
            books: loan.books,
            tape: loan.tape,
            stats: &self.stats,
            hints: &self.hints,
            config: &self.config,
            refusal: features.contains(Features::PAGE_REFUSAL),
            ballooned_bytes: loan.ballooned_bytes,
            poisoned: self.config.poison_val() != 0 && features.contains(Features::PAGE_POISON),
        };
        let mut more = 0;
        for role in Role::ALL {
            let Some(index) = index_of(role, features, queues) else {
                continue;
            };
            let Some(source) = queues.source(index) else {
                continue;
            };
            if role == Role::Stats && work & ASKED != 0 {
                self.stats.request(source);
            }
            if work & (1 << index) == 0 {
                continue;
            }
            match serve_pages(role, source, &mut turn) {
                Ok(true) => more |= 1 << index,
                Ok(false) => {}
                Err(error) => {
                    let queue = index;
                    return Err(Broken { queue, error });
                }
            }
        }
        Ok(more)
    }

    fn held(&self, features: u64, queues: &Queues) -> Option<(u16, u64)> {
        let features = Features::from_bits_retain(features);
        let index = index_of(Role::Stats, features, queues)?;
        Some((index, self.stats.held()?))
    }

    fn put_back(&self, index: u16, features: u64, queues: &mut Queues) {
        let features = Features::from_bits_retain(features);
        let stats = index_of(Role::Stats, features, queues);
        if stats == Some(index)
            && let Some(source) = queues.source(index)
        {
            self.stats.put_back(source);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let due = [self.hints.deadline(), self.stats.next_poll()];
        due.into_iter().flatten().min()
    }

    fn on_timer(&self) -> Due {
        let expired = self.hints.expire(&self.config);
        if expired {
            log::info!("a round of free page hints took too long; the guest has its pages back");
        }
        Due {
            config_change: expired,
            work: if self.stats.poll_is_due() { ASKED } else { 0 },
        }
    }

    fn check_host_reset(&self, features: u64) -> Result<()> {
        let negotiated = Features::from_bits_retain(features).contains(Features::HOST_RESET);
        negotiated
            .then_some(())
            .ok_or(Error::NotSupported("HOST_RESET"))
    }

    fn ask_for_host_reset(&self) {
        self.config.ask_for_reset();
    }

    fn host_reset_pending(&self) -> bool {
        self.config.reset_pending()
    }

    fn reset(&self, books: &Books) {
        self.stats.reset();
        let ended = self.config.reset();
        books.enter(|entry| bump(&mut entry.device().host_resets_acknowledged, ended));
        self.hints.reset(&self.config);
    }

    fn save(&self) -> Vec<u8> {
        let config = self.config.save();
        let words = [
            config.actual,
            config.poison_val,
            self.hints.id(),
            config.reset_id,
            config.reset_ack,
        ];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn check_saved(&self, own: &[u8], negotiated: u64, empty: bool) -> Result<u64> {
        let [_, _, _, reset_id, reset_ack] = words(own).ok_or(Error::SavedState {
            what: "a part of this protocol that is not 20 bytes long",
            offset: 0,
        })?;
        let bad = |what| Error::SavedState { what, offset: 0 };
        let host_reset = Features::HOST_RESET.bits();
        if reset_id != reset_ack {
            if negotiated & host_reset == 0 {
                return Err(bad("a host reset that the driver knows nothing of"));
            }
            if !empty {
                return Err(bad("pages in a balloon that the host has reset"));
            }
        }
        Ok(if (reset_id, reset_ack) == (0, 0) {
            0
        } else {
            host_reset
        })
    }

    fn restore(&self, own: &[u8], books: &Books) {
        let Some([actual, poison_val, hint_id, reset_id, reset_ack]) = words(own) else {
            return;
        };
        let pending = self.config.restore(SavedConfig {
            actual,
            poison_val,
            reset_id,
            reset_ack,
        });
        if pending {
            // So that asked is never below acknowledged in this device's books.
            books.enter(|entry| bump(&mut entry.device().host_resets, 1));
        }
        self.hints.restore(&self.config, hint_id);
    }
}

/// The fields of a saved state that are this protocol's.
fn words(own: &[u8]) -> Option<[u32; 5]> {
    let (words, rest) = own.as_chunks::<4>();
    let words: [[u8; 4]; 5] = words.try_into().ok()?;
    rest.is_empty().then(|| words.map(u32::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A saved state said so, was restored, and then had a balloon that was empty and full.
    #[test]
    fn a_pending_host_reset_means_that_it_was_negotiated_and_that_the_balloon_is_empty() {
        let protocol = VirtioBalloon::new(Features::all().bits());
        let own = |id: u32, ack: u32| [0, 0, 0, id, ack].map(u32::to_le_bytes).concat();
        let host_reset = Features::HOST_RESET.bits();
        let check = |id, ack, negotiated, empty| {
            protocol.check_saved(&own(id, ack), negotiated, empty).ok()
        };
        assert_eq!(check(9, 8, 0, true), None, "not negotiated");
        assert_eq!(check(9, 8, host_reset, false), None, "pages");
        assert_eq!(check(9, 8, host_reset, true), Some(host_reset));
        assert_eq!(
            check(9, 9, 0, false),
            Some(host_reset),
            "the fields are there"
        );
        assert_eq!(check(0, 0, 0, false), Some(0));
    }
}
