//! Rounds of free page hints (S9), which touch neither pages nor books: the VMM gets what the guest said of
//! the round that is under way, and nothing else.

use super::model::Model;
use super::{Random, some_ranges};
use aerostat_tests::vmm::hinting::{CMD_DONE, CMD_STOP};
use aerostat_tests::vmm::{Guest, PAGE_BYTES, Result};
use std::collections::VecDeque;

/// What the model knows of rounds.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// The id of the one under way, or not yet finished.
    current: Option<u32>,
    /// The id that the driver said last, in this round.
    said: Option<u32>,
    complete: bool,
    /// What the VMM has not taken yet: first page and pages.
    hinted: VecDeque<(u64, u64)>,
}

impl Rounds {
    /// The driver is gone, and what it said.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn say(&mut self, id: u32) {
        let running = self.current.filter(|_| !self.complete);
        self.complete |= id == CMD_STOP && running.is_some() && self.said == self.current;
        self.said = Some(id);
    }

    fn hint(&mut self, start: u64, pages: u64) {
        if self.current.is_some() && !self.complete && self.said == self.current {
            self.hinted.push_back((start, pages));
        }
    }
}

/// One thing that the driver or the VMM does about hints.
pub(super) fn step(
    random: &mut Random,
    guest: &Guest,
    model: &mut Model,
    first: u64,
) -> Result<String> {
    Ok(match random.below(8) {
        0..=1 => {
            let started = guest.device().start_hints(600_000).is_ok();
            assert_eq!(
                started,
                model.rounds.current.is_none(),
                "one round at a time"
            );
            if started {
                let id = guest.driver().hint_command()?;
                assert!(id > CMD_DONE, "{id} is no round");
                model.rounds.reset();
                model.rounds.current = Some(id);
            }
            format!("start a round: {started}")
        }
        2..=4 => {
            // The round's own id mostly, else an old one, one that nobody gave out, or the end.
            let command = guest.driver().hint_command()?;
            let ids = [
                command,
                command,
                command,
                CMD_STOP,
                CMD_DONE,
                command ^ 0x100,
            ];
            let id = ids[random.below(ids.len() as u64) as usize];
            guest.driver().say_hint_id(id)?;
            model.rounds.say(id);
            model.flush_if_settled();
            format!("say {id}")
        }
        5..=6 => {
            let ranges = some_ranges(random, model, first, true);
            for (start, pages) in &ranges {
                guest.driver().hint_range(*start, *pages)?;
                model.rounds.hint(*start, *pages);
            }
            model.flush_if_settled();
            format!("hint {ranges:x?}")
        }
        _ => {
            let max = 1 + random.below(8) as usize;
            let (ranges, _) = guest.device().take_hints(max)?;
            let count = max.min(model.rounds.hinted.len());
            let expected: Vec<_> = model.rounds.hinted.drain(..count).collect();
            let pages = |range: &aerostat::aerostat_range| {
                (range.gpa / PAGE_BYTES, range.len_bytes / PAGE_BYTES)
            };
            let seen: Vec<_> = ranges.iter().map(pages).collect();
            assert_eq!(seen, expected, "hints as the guest gave them");
            if random.below(2) == 0 {
                let finished = guest.device().finish_hints().is_ok();
                assert_eq!(finished, model.rounds.current.take().is_some());
                if finished {
                    assert_eq!(guest.driver().hint_command()?, CMD_DONE);
                }
            }
            format!("take {count} hints")
        }
    })
}
