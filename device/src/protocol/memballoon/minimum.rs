//! MIN_BALLOON (R7) and MIN_NODES (X2): the device tells the driver how large the balloon should at least be,
//! as a whole or on each node of the guest.
//!
//! The driver leaves a buffer in the fromdevq, and the device takes it when it has something to say. While
//! there is none, only the latest value is kept. So nothing is ever held, and nothing has to be put back.

use super::commands::MAX_BUFFERS_PER_TURN;
use super::{EXTRA_MEM, NODE};
use crate::balloon::bump;
use crate::protocol::contract::Turn;
use crate::ring::RingError;
use crate::ring::source::Source;
use crate::target::Target;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The messages' numbers.
const MIN_BALLOON: u64 = 32768;
const MIN_NODES: u64 = 32769;
/// Buffers that are of no use, taken in one turn.
const MAX_CHAINS_PER_TURN: u32 = 64;

/// What is to be said, and whether it was.
#[derive(Debug, Default)]
pub(super) struct Minimum {
    target: Mutex<Target>,
    extra_grant_bytes: AtomicU64,
    /// There is something that the driver was not told.
    unsaid: AtomicBool,
}

impl Minimum {
    pub(super) fn set_target(&self, target: Target) {
        *self.target.lock() = target;
    }

    pub(super) fn set_extra_grant(&self, bytes: u64) {
        self.extra_grant_bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn extra_grant_bytes(&self) -> u64 {
        self.extra_grant_bytes.load(Ordering::Acquire)
    }

    /// The driver is to be told, be it for the second time.
    pub(super) fn announce(&self) {
        let _target = self.target.lock();
        self.unsaid.store(true, Ordering::Release);
    }

    /// A new driver takes the minimum for zero.
    pub(super) fn reset(&self) {
        // Under the lock: a target that is set meanwhile is announced behind it.
        let target = self.target.lock();
        let unsaid = *target != Target::default() || self.extra_grant_bytes() != 0;
        self.unsaid.store(unsaid, Ordering::Release);
    }

    /// What is to be said to a driver that selected `features`.
    fn message(&self, features: u64) -> Vec<u8> {
        let target = self.target.lock();
        let nodes = target.nodes();
        let fields: Vec<u64> = if features & NODE != 0 && !nodes.is_empty() {
            let head = [MIN_NODES, nodes.len() as u64];
            head.iter().chain(nodes).copied().collect()
        } else {
            let value = self.value(target.bytes(), features);
            vec![MIN_BALLOON, value.cast_unsigned()]
        };
        fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    /// The target; where there is none, as far below zero as the driver may go.
    fn value(&self, target: u64, features: u64) -> i64 {
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
        let (mut chains, mut buffers) = (0, 0);
        while chains < MAX_CHAINS_PER_TURN && buffers < MAX_BUFFERS_PER_TURN {
            chains += 1;
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
            buffers += chain.buffers();
            // What is set from now on is said with the next buffer.
            self.unsaid.store(false, Ordering::Release);
            let message = self.message(turn.features);
            let usable = !chain.malformed
                && chain.readable.is_empty()
                && chain.room(memory, message.len()) == message.len();
            let written = if usable {
                chain.write(memory, &message)
            } else {
                self.unsaid.store(true, Ordering::Release);
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
