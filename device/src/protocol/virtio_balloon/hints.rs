//! Free page hints (5.5.6.5; S9): in a round that the VMM starts, the guest says which of its pages are
//! free, so that a migration need not copy them. The device hands the ranges to the VMM and discards
//! nothing: only the VMM knows whether a page was written since the round began.
//!
//! The guest gives up nearly all of its memory until the round is done, so a round ends by itself when
//! its time is up, whatever the VMM does.

use super::{ConfigSpace, Turn};
use crate::balloon::{bump, in_regions};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PfnRange};
use crate::ring::RingError;
use crate::ring::chain::Chain;
use crate::ring::source::Source;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Values of `free_page_hint_cmd_id` that name no round.
const CMD_STOP: u32 = 0;
pub(crate) const CMD_DONE: u32 = 1;
/// The first id of a round.
const FIRST_ID: u32 = 2;
/// Ranges kept for the VMM. Hints beyond them are dropped, which only costs the VMM some
/// copying: a guest's numbers must not grow our memory (I3).
const MAX_RANGES: usize = 1 << 16;
/// Chains taken in one turn.
const MAX_CHAINS_PER_TURN: usize = 1024;
/// The longest a round may last.
pub(crate) const MAX_ROUND: Duration = Duration::from_secs(600);

/// Where a round stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum HintState {
    /// No round was started, or the last one is done.
    #[default]
    Idle = 0,
    /// The guest was asked, or is sending.
    Running = 1,
    /// The guest has said all; it waits for the end of the round.
    Complete = 2,
}

/// The current round.
#[derive(Debug, Default)]
struct Round {
    state: HintState,
    id: u32,
    /// The id that the driver sent last: what follows belongs to it.
    sent: Option<u32>,
    ranges: VecDeque<PfnRange>,
    deadline: Option<Instant>,
}

/// Hints as the VMM and the workers share them.
#[derive(Debug, Default)]
pub(crate) struct HintBoard {
    round: Mutex<Round>,
}

impl HintBoard {
    /// Begins a round; returns its id. Ranges of an earlier one are forgotten.
    pub(crate) fn start(&self, config: &ConfigSpace, limit: Duration) -> Result<u32> {
        let mut round = self.round.lock();
        if round.state != HintState::Idle {
            return Err(Error::AlreadyStarted("a round of free page hints"));
        }
        // Ids are used in turn, so none comes back before the driver has long sent STOP for it.
        round.id = round.id.checked_add(1).unwrap_or(FIRST_ID).max(FIRST_ID);
        round.state = HintState::Running;
        round.sent = None;
        round.ranges.clear();
        round.deadline = Some(Instant::now() + limit.min(MAX_ROUND));
        config.set_hint_cmd_id(round.id);
        Ok(round.id)
    }

    /// Ends the round: the guest may use its pages again. Returns whether there was one.
    pub(crate) fn done(&self, config: &ConfigSpace) -> bool {
        let mut round = self.round.lock();
        Self::finish(&mut round, config)
    }

    /// Ends the round if its time is up. Returns whether it did.
    pub(crate) fn expire(&self, config: &ConfigSpace) -> bool {
        let mut round = self.round.lock();
        let over = round
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline);
        over && Self::finish(&mut round, config)
    }

    /// When the round ends at the latest.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.round.lock().deadline
    }

    fn finish(round: &mut Round, config: &ConfigSpace) -> bool {
        if round.state == HintState::Idle {
            return false;
        }
        round.state = HintState::Idle;
        round.deadline = None;
        config.set_hint_cmd_id(CMD_DONE);
        true
    }

    /// The driver is gone: its round and its hints mean nothing any more.
    pub(crate) fn reset(&self, config: &ConfigSpace) {
        let mut round = self.round.lock();
        *round = Round {
            id: round.id,
            ..Round::default()
        };
        config.set_hint_cmd_id(CMD_STOP);
    }

    /// The id of the last round; 0 if there was none.
    pub(crate) fn id(&self) -> u32 {
        self.round.lock().id
    }

    /// Goes on with ids behind `id`. Whatever its round was, it is done: its hints were for a migration
    /// that is over, and the guest waits for its pages.
    pub(crate) fn restore(&self, config: &ConfigSpace, id: u32) {
        let mut round = self.round.lock();
        *round = Round {
            id,
            ..Round::default()
        };
        config.set_hint_cmd_id(if id == 0 { CMD_STOP } else { CMD_DONE });
    }

    /// Takes up to `max` of the ranges that came, oldest first, and says where the round stands. No
    /// more ranges will come once it is not running.
    pub(crate) fn take(&self, max: usize, into: &mut Vec<PfnRange>) -> HintState {
        let mut round = self.round.lock();
        let count = max.min(round.ranges.len());
        into.extend(round.ranges.drain(..count));
        round.state
    }
}

/// Takes what the queue has; true if there is more.
pub(super) fn serve(source: &mut Source, turn: &mut Turn<'_>) -> Result<bool, RingError> {
    let (mut served, mut buffers) = (0, 0);
    let end = loop {
        if served == MAX_CHAINS_PER_TURN || buffers >= super::MAX_BUFFERS_PER_TURN {
            break Ok(true);
        }
        let memory = turn.balloon.memory();
        let chain = &mut turn.scratch.chain;
        match source.pop(memory, chain) {
            Ok(true) => {}
            Ok(false) if source.want_kicks() => {
                served += 1;
                continue;
            }
            Ok(false) => break Ok(false),
            Err(error) => break Err(error),
        }
        served += 1;
        buffers += chain.buffers();
        turn.scratch.ranges.clear();
        let understood = accept(turn.hints, chain, memory, &mut turn.scratch.ranges);
        turn.books.enter(|entry| {
            let device = entry.device();
            bump(&mut device.hint_chains, 1);
            bump(&mut device.chain_errors, u64::from(!understood));
        });
        source.complete(chain.token, 0);
    };
    source.publish();
    end
}

/// A chain carries an id to read, free pages to name, or both; Linux sends one or the other.
fn accept(
    hints: &HintBoard,
    chain: &Chain,
    memory: &GuestMemory,
    ranges: &mut Vec<PfnRange>,
) -> bool {
    if chain.malformed {
        return false;
    }
    // Read without the lock: the guest's memory may take its time.
    let mut bytes = Vec::new();
    let id = (chain.readable_bytes() == 4
        && chain.read(memory, |piece| bytes.extend_from_slice(piece)))
    .then(|| <[u8; 4]>::try_from(bytes.as_slice()).ok())
    .flatten()
    .map(u32::from_le_bytes);
    let mut understood = chain.readable.is_empty() || id.is_some();
    let mut round = hints.round.lock();
    if let Some(id) = id {
        if id == CMD_STOP && round.sent == Some(round.id) && round.state == HintState::Running {
            round.state = HintState::Complete;
        }
        round.sent = Some(id);
    }
    if chain.writable.is_empty() {
        return understood;
    }
    understood &= super::read_reports_of(&chain.writable, memory, ranges);
    let wanted = round.state == HintState::Running && round.sent == Some(round.id);
    for range in ranges.iter() {
        // The VMM gets nothing but guest memory, whatever the guest says.
        let outside = in_regions(memory, *range, |_, _, part| {
            if wanted && round.ranges.len() < MAX_RANGES {
                round.ranges.push_back(part);
            }
        });
        understood &= outside == 0;
    }
    understood
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::heap_memory;
    use crate::memory::{Gpa, Pfn};
    use crate::ring::chain::Segment;

    /// What a driver sends: an id, or a free range.
    struct Driver {
        hints: HintBoard,
        config: ConfigSpace,
        memory: std::sync::Arc<GuestMemory>,
    }

    impl Driver {
        fn new() -> Self {
            let memory = heap_memory(&[(0, 0x10000)]);
            Self {
                hints: HintBoard::default(),
                config: ConfigSpace::default(),
                memory,
            }
        }

        fn say(&self, id: u32) -> bool {
            self.memory
                .slice_prefix(Gpa(0), 4)
                .unwrap()
                .write(0, &id.to_le_bytes());
            let mut chain = Chain::default();
            chain.push(
                Segment::Guest {
                    gpa: Gpa(0),
                    len: 4,
                },
                false,
            );
            accept(&self.hints, &chain, &self.memory, &mut Vec::new())
        }

        fn free(&self, pfn: u64) -> bool {
            let mut chain = Chain::default();
            chain.push(
                Segment::Guest {
                    gpa: Gpa(pfn << 12),
                    len: 4096,
                },
                true,
            );
            accept(&self.hints, &chain, &self.memory, &mut Vec::new())
        }

        fn taken(&self) -> (Vec<u64>, HintState) {
            let mut ranges = Vec::new();
            let state = self.hints.take(10, &mut ranges);
            (ranges.iter().map(|range| range.start.0).collect(), state)
        }

        fn cmd_id(&self) -> u32 {
            let mut bytes = [0; 4];
            self.config.read(8, &mut bytes);
            u32::from_le_bytes(bytes)
        }
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_round_collects_what_belongs_to_it_and_nothing_else() {
        let driver = Driver::new();
        assert!(driver.free(1), "before any round: acknowledged, not kept");
        let id = driver.hints.start(&driver.config, LIMIT).unwrap();
        assert_eq!((id, driver.cmd_id()), (2, 2));
        assert!(driver.free(2), "before the driver said which round");
        assert!(
            driver.say(id + 1) && driver.free(3),
            "a stale or invented id"
        );
        assert!(
            driver.say(CMD_DONE) && driver.free(4),
            "DONE is not the driver's to say"
        );
        assert!(driver.say(id) && driver.free(5));
        assert_eq!(driver.taken(), (vec![5], HintState::Running));
        assert!(driver.say(CMD_STOP) && driver.free(6), "behind STOP");
        assert_eq!(driver.taken(), (vec![], HintState::Complete));
        assert!(driver.hints.start(&driver.config, LIMIT).is_err());
        assert!(driver.hints.done(&driver.config) && !driver.hints.done(&driver.config));
        assert_eq!(driver.cmd_id(), CMD_DONE);
        assert_eq!(
            driver.hints.start(&driver.config, LIMIT).unwrap(),
            3,
            "no id comes back"
        );
    }

    #[test]
    fn hints_outside_memory_are_cut_off() {
        let driver = Driver::new();
        let id = driver.hints.start(&driver.config, LIMIT).unwrap();
        assert!(driver.say(id));
        assert!(!driver.free(0x10), "memory has 16 pages");
        assert!(!driver.free((1 << 51) - 1));
        assert!(driver.free(0xf));
        assert_eq!(driver.taken().0, [0xf]);
    }

    #[test]
    fn a_round_ends_by_itself_and_with_the_driver() {
        let driver = Driver::new();
        driver
            .hints
            .start(&driver.config, Duration::from_nanos(1))
            .unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert!(driver.hints.expire(&driver.config));
        assert_eq!(driver.cmd_id(), CMD_DONE);
        driver.hints.start(&driver.config, LIMIT).unwrap();
        assert!(!driver.hints.expire(&driver.config));
        driver.hints.reset(&driver.config);
        assert_eq!((driver.cmd_id(), driver.hints.deadline()), (CMD_STOP, None));
    }

    #[test]
    fn odd_ids_and_pages_are_not_understood_and_hints_are_bounded() {
        let driver = Driver::new();
        let id = driver.hints.start(&driver.config, LIMIT).unwrap();
        let mut chain = Chain::default();
        chain.push(
            Segment::Guest {
                gpa: Gpa(0),
                len: 3,
            },
            false,
        );
        assert!(!accept(
            &driver.hints,
            &chain,
            &driver.memory,
            &mut Vec::new()
        ));
        chain.clear();
        chain.push(
            Segment::Guest {
                gpa: Gpa(17),
                len: 4096,
            },
            true,
        );
        assert!(!accept(
            &driver.hints,
            &chain,
            &driver.memory,
            &mut Vec::new()
        ));
        driver.say(id);
        for pfn in 0..MAX_RANGES as u64 + 100 {
            driver.free(pfn % 16);
        }
        assert!(!driver.free(16), "outside memory");
        let mut ranges = Vec::new();
        driver.hints.take(usize::MAX, &mut ranges);
        assert_eq!(ranges.len(), MAX_RANGES);
        assert_eq!(ranges[7], PfnRange::new(Pfn(7), 1));
    }
}
