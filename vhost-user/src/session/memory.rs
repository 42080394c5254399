//! The memory table: replaced as a whole, or region by region.
//!
//! Specification: vhost-user, SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG.

use super::{Refusal, Session};
use crate::mapping::{MemoryTable, Slot, check_total};
use crate::message::{MemRegion, Message, Request};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The most regions that ADD_MEM_REG may add up to. Each holds a descriptor.
pub(super) const MAX_MEM_SLOTS: usize = 64;
/// The most mappings that a session has at a time: a new table is mapped before the old one goes.
pub(crate) const MAX_MAPPINGS: usize = 2 * MAX_MEM_SLOTS;

impl Session<'_> {
    pub(super) fn change_memory(
        &mut self,
        request: Request,
        mut message: Message,
    ) -> Result<(), Refusal> {
        let mut slots = self.slots.clone();
        match request {
            Request::AddMemReg => {
                let region = message.mem_region()?;
                if slots.len() >= MAX_MEM_SLOTS {
                    return Err(Refusal::TooManyRegions(MAX_MEM_SLOTS));
                }
                let before = slots.iter().map(Slot::len_bytes);
                check_total(before.chain([region.len_bytes]))?;
                slots.push(self.map(region, message.single_fd()?)?);
            }
            Request::RemMemReg => {
                let region = message.mem_region()?;
                let index = slots.iter().position(|slot| slot.is(&region));
                slots.remove(index.ok_or(Refusal::NoRegion)?);
                if slots.is_empty() {
                    // A device has no way to be without memory, so the last region stays with it
                    // until it gets another, or the session ends.
                    self.slots = slots;
                    return Ok(());
                }
            }
            _ => {
                let regions = message.mem_table()?;
                check_total(regions.iter().map(|region| region.len_bytes))?;
                slots = regions
                    .into_iter()
                    .zip(message.fds.drain(..))
                    .map(|(region, fd)| self.map(region, fd))
                    .collect::<Result<_, _>>()?;
            }
        }
        let table = MemoryTable::new(&slots)?;
        // Let go of the old table first: its mappings stay as long as anybody has it.
        let memory = Arc::clone(table.memory());
        let old = self.memory.take();
        match self.attached.set_memory(table) {
            Ok(()) => {
                self.memory = Some(memory);
                self.slots = slots;
                drop(old);
                self.attached.sweep();
                Ok(())
            }
            Err(error) => {
                self.memory = old;
                drop(memory);
                self.attached.sweep();
                Err(error.into())
            }
        }
    }

    fn map(&self, region: MemRegion, file: OwnedFd) -> Result<Slot, Refusal> {
        let slot = Slot::map(region, file, self.vm.only_node())?;
        if let Some(flaw) = slot.flaw() {
            let level = self.vm.front_end_log.level(log::Level::Warn);
            log::log!(level, "{}: {flaw}", self.vm.name);
        }
        Ok(slot)
    }
}
