//! Free page hints as Linux's driver gives them (virtio_balloon's report_free_page_func; S9).
//!
//! For a round that the device starts it sends the round's id, then blocks of 4 MiB one by one, then
//! STOP, and keeps the blocks until the configuration space says DONE.

use super::PAGE_BYTES;
use super::driver::{Driver, Role};
use super::error::Result;
use super::vring::Piece;

/// Where `free_page_hint_cmd_id` is in the configuration space.
pub const CONFIG_HINT_CMD_ID: u64 = 8;
/// The driver has said all; also the value before any round.
pub const CMD_STOP: u32 = 0;
/// The device needs no more hints.
pub const CMD_DONE: u32 = 1;
/// Pages in a block: Linux's largest order on x86, 4 MiB.
pub const BLOCK_PAGES: u64 = 1024;

/// The driver's side of hinting.
#[derive(Clone, Debug, Default)]
pub(super) struct Hinting {
    /// The round that was answered last.
    answered: u32,
    /// Blocks that are kept for the device, by their first page.
    blocks: Vec<u64>,
    /// How many ids were sent: each has a place of its own, as the device may still read the last one.
    ids_sent: u64,
}

impl Hinting {
    /// Gives up all blocks; the next driver starts anew.
    pub(super) fn restart(&mut self) -> impl Iterator<Item = u64> + use<> {
        let blocks = std::mem::take(self).blocks;
        blocks
            .into_iter()
            .flat_map(|start| start..start + BLOCK_PAGES)
    }
}

impl Driver {
    /// What the configuration space says of rounds.
    ///
    /// # Errors
    /// The device cannot be read.
    pub fn hint_command(&self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.device
            .read()
            .read_config(CONFIG_HINT_CMD_ID, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// How much memory is kept for a round.
    #[must_use]
    pub fn hinted_bytes(&self) -> u64 {
        self.hinting.blocks.len() as u64 * BLOCK_PAGES * PAGE_BYTES
    }

    /// Does what the configuration space asks for (report_free_page_func); true if it did anything.
    ///
    /// # Errors
    /// The device does not take a buffer.
    pub fn answer_hints(&mut self) -> Result<bool> {
        match self.hint_command()? {
            CMD_DONE => {
                let blocks = std::mem::take(&mut self.hinting.blocks);
                let pages = blocks.iter().flat_map(|start| *start..start + BLOCK_PAGES);
                self.allocator.release(pages);
                Ok(!blocks.is_empty())
            }
            CMD_STOP => Ok(false),
            id if id == self.hinting.answered => Ok(false),
            id => {
                self.hinting.answered = id;
                self.say_hint_id(id)?;
                while self.hint_command()? == id && self.hint_block()? {}
                self.say_hint_id(CMD_STOP)?;
                Ok(true)
            }
        }
    }

    /// Sends an id.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn say_hint_id(&mut self, id: u32) -> Result<()> {
        // Behind the statistics, which are short.
        let gpa = self.pfn_array() + PAGE_BYTES + 2048 + 4 * (self.hinting.ids_sent % 256);
        self.hinting.ids_sent += 1;
        self.ram().write(gpa, &id.to_le_bytes());
        let (len, writable) = (4, false);
        self.exchange(Role::Hints, &[Piece { gpa, len, writable }])
            .map(drop)
    }

    /// Takes an unused block, sends it and keeps it; false if there is none left.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn hint_block(&mut self) -> Result<bool> {
        let Some(start) = self.allocator.allocate_block(BLOCK_PAGES) else {
            return Ok(false);
        };
        self.hinting.blocks.push(start);
        self.hint_range(start, BLOCK_PAGES)?;
        Ok(true)
    }

    /// Sends a range, whoever owns it.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn hint_range(&mut self, start: u64, pages: u64) -> Result<()> {
        let piece = Piece {
            gpa: start * PAGE_BYTES,
            len: u32::try_from(pages * PAGE_BYTES).unwrap_or(u32::MAX),
            writable: true,
        };
        self.exchange(Role::Hints, &[piece]).map(drop)
    }
}
