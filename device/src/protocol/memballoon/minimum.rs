//! MIN_BALLOON (R7): the device tells the driver how large the balloon should at least be.
//!
//! The driver leaves a buffer in the fromdevq, and the device takes it when it has something to say. While
//! there is none, only the latest value is kept. So nothing is ever held, and nothing has to be put back.

use super::EXTRA_MEM;
use crate::balloon::bump;
use crate::protocol::contract::Turn;
use crate::ring::RingError;
use crate::ring::source::Source;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The command's number.
const MIN_BALLOON: u64 = 32768;
/// A command and its argument.
const MESSAGE_BYTES: usize = 16;
/// Buffers that are of no use, taken in one turn.
const MAX_CHAINS_PER_TURN: u32 = 64;

/// What is to be said, and whether it was.
#[derive(Debug, Default)]
pub(super) struct Minimum {
    target_bytes: AtomicU64,
    extra_grant_bytes: AtomicU64,
    /// There is something that the driver was not told.
    unsaid: AtomicBool,
}

impl Minimum {
    pub(super) fn set_target(&self, bytes: u64) {
        self.target_bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn set_extra_grant(&self, bytes: u64) {
        self.extra_grant_bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn extra_grant_bytes(&self) -> u64 {
        self.extra_grant_bytes.load(Ordering::Acquire)
    }

    /// The driver is to be told, be it for the second time.
    pub(super) fn announce(&self) {
        self.unsaid.store(true, Ordering::Release);
    }

    /// A new driver takes the minimum for zero.
    pub(super) fn reset(&self) {
        let target = self.target_bytes.load(Ordering::Acquire);
        let unsaid = target != 0 || self.extra_grant_bytes() != 0;
        self.unsaid.store(unsaid, Ordering::Release);
    }

    /// The target; where there is none, as far below zero as the driver may go.
    fn value(&self, features: u64) -> i64 {
        let target = self.target_bytes.load(Ordering::Acquire);
        if target > 0 || features & EXTRA_MEM == 0 {
            i64::try_from(target).unwrap_or(i64::MAX)
        } else {
            i64::try_from(self.extra_grant_bytes()).map_or(i64::MIN, |grant| -grant)
        }
    }

    /// Says what was not said yet, if the driver left a buffer for it; true if there is more to do.
    pub(super) fn serve(
        &self,
        source: &mut Source,
        turn: &mut Turn<'_>,
    ) -> Result<bool, RingError> {
        for _ in 0..MAX_CHAINS_PER_TURN {
            if !self.unsaid.load(Ordering::Acquire) {
                return Ok(false);
            }
            let memory = turn.balloon.memory();
            let chain = &mut turn.scratch.chain;
            if !source.pop(memory, chain)? {
                if !source.want_kicks() {
                    return Ok(false);
                }
                continue;
            }
            let usable = !chain.malformed
                && chain.readable.is_empty()
                && chain.room(memory, MESSAGE_BYTES) == MESSAGE_BYTES;
            let written = if usable {
                // What is set from now on is said with the next buffer.
                self.unsaid.store(false, Ordering::Release);
                let value = self.value(turn.features);
                let mut message = [0; MESSAGE_BYTES];
                let (command, argument) = message.split_at_mut(8);
                command.copy_from_slice(&MIN_BALLOON.to_le_bytes());
                argument.copy_from_slice(&value.to_le_bytes());
                chain.write(memory, &message)
            } else {
                turn.books
                    .enter(|entry| bump(&mut entry.device().chain_errors, 1));
                0
            };
            source.complete(chain.token, u32::try_from(written).unwrap_or(0));
            source.publish();
        }
        Ok(true)
    }
}
