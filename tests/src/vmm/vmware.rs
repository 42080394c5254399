//! A machine whose guest speaks VMware's balloon commands, as Linux's vmw_balloon does: it starts anew when
//! it is told of a reset, sends batches of pages of 2 MiB and then of 4 KiB, keeps refused pages aside
//! until the target is reached, and tells the host before it uses a page again.

use super::PAGE_BYTES;
use super::allocator::{Order, PageAllocator};
use super::books::assert_balanced;
use super::device::Device;
use super::error::Result;
use super::guest::Vmm;
use super::ram::{GuestRam, RegionSpec};
use aerostat::{AEROSTAT_KIND_VMWARE, aerostat_counters};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Commands, by their numbers.
pub const START: u64 = 0;
/// Asks for the target.
pub const GET_TARGET: u64 = 1;
/// Gives a page.
pub const LOCK: u64 = 2;
/// Takes one back.
pub const UNLOCK: u64 = 3;
/// Says what the guest is.
pub const GUEST_ID: u64 = 4;
/// The first of the batched commands: LOCK, UNLOCK, and both for pages of 2 MiB.
pub const BATCHED_LOCK: u64 = 6;
/// See [`BATCHED_LOCK`].
pub const BATCHED_UNLOCK: u64 = 7;
/// See [`BATCHED_LOCK`].
pub const BATCHED_2M_LOCK: u64 = 8;
/// See [`BATCHED_LOCK`].
pub const BATCHED_2M_UNLOCK: u64 = 9;

/// The command was carried out.
pub const SUCCESS: u32 = 0;
/// So was START, and capabilities came back.
pub const SUCCESS_WITH_CAPABILITIES: u32 = 0x0300_0000;
/// The guest has to begin anew.
pub const RESET: u32 = 7;

/// Capabilities: single pages, batches, batches of large pages, targets of 64 bits.
pub const ALL_CAPABILITIES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;
/// The first version of the protocol.
pub const FIRST_VERSION: u64 = 2;
/// Pages of 4 KiB in a large one.
pub const LARGE: u64 = 512;
/// Entries of a batch.
const MAX_ENTRIES: usize = 512;
/// Linux's VMW_BALLOON_MAX_REFUSED.
const MAX_REFUSED: usize = 16;
const LINUX: u64 = 1;

/// The machine and its driver.
#[derive(Debug)]
pub struct VmwareGuest {
    device: Arc<Device>,
    ram: GuestRam,
    batch_page: u64,
    /// Unused pages of 4 KiB.
    pub allocator: PageAllocator,
    /// Unused pages of 2 MiB, by the number of their first.
    pub large_free: BTreeSet<u64>,
    wanted_capabilities: u64,
    capabilities: u64,
    reset_required: bool,
    target_pages: u64,
    small: Vec<u64>,
    large: Vec<u64>,
    /// Pages that the host refused in the last poll, by status.
    pub refusals: Vec<u32>,
}

impl VmwareGuest {
    /// A machine whose driver has not said anything yet. The first 2 MiB are its own.
    ///
    /// # Errors
    /// Host or library refuse.
    pub fn boot(vmm: &Vmm, regions: &[RegionSpec], wanted_capabilities: u64) -> Result<Self> {
        let ram = GuestRam::new("vmware", regions)?;
        let device = Device::of_kind(vmm.runtime(), AEROSTAT_KIND_VMWARE, 0, -1, -1)?;
        device.set_memory(&ram)?;
        device.activate()?;
        let large_free = if wanted_capabilities & 1 << 3 == 0 {
            BTreeSet::new()
        } else {
            let firsts = ram.pfns().filter(|pfn| pfn.is_multiple_of(LARGE));
            firsts.filter(|pfn| *pfn >= LARGE).collect()
        };
        let small = ram
            .pfns()
            .filter(|pfn| *pfn >= LARGE && !large_free.contains(&(pfn / LARGE * LARGE)));
        let allocator = PageAllocator::new(small, Order::Ascending);
        // So that what the host has allocated changes by the balloon alone.
        ram.write(PAGE_BYTES, &[0; 8]);
        Ok(Self {
            device: Arc::new(device),
            batch_page: 1,
            allocator,
            large_free,
            wanted_capabilities,
            capabilities: 0,
            reset_required: true,
            target_pages: 0,
            small: Vec::new(),
            large: Vec::new(),
            refusals: Vec::new(),
            ram,
        })
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Goes on with another device.
    pub fn plug(&mut self, device: Device) {
        self.device = Arc::new(device);
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How large its balloon is.
    #[must_use]
    pub fn ballooned_bytes(&self) -> u64 {
        (self.small.len() as u64 + self.large.len() as u64 * LARGE) * PAGE_BYTES
    }

    /// The books, which have to balance (I4).
    ///
    /// # Errors
    /// The device does not answer.
    #[track_caller]
    pub fn books(&self) -> Result<aerostat_counters> {
        let counters = self.device.counters()?;
        assert_balanced(&counters);
        Ok(counters)
    }

    /// Sends a command, and takes from the answer what the driver takes from any.
    ///
    /// # Errors
    /// The device is of another kind.
    pub fn command(&mut self, command: u64, arguments: [u64; 2]) -> Result<(u32, u64)> {
        let (status, result) = self.device.vmware_command(command, arguments)?;
        let with_target = [1, 2, 3, 6, 7, 8, 9].contains(&command);
        if status == SUCCESS && with_target {
            self.target_pages = result;
        }
        self.reset_required |= status == RESET;
        Ok((status, result))
    }

    /// What the driver does every second.
    ///
    /// # Errors
    /// As for [`Self::command`].
    pub fn poll(&mut self) -> Result<()> {
        self.refusals.clear();
        if self.reset_required {
            self.start_anew()?;
        }
        let limit = self.ram.total_bytes() / PAGE_BYTES;
        if self.command(GET_TARGET, [limit, 0])?.0 == SUCCESS {
            self.inflate()?;
            self.deflate()?;
        }
        Ok(())
    }

    /// All pages go back without a word; then START and GUEST_ID.
    fn start_anew(&mut self) -> Result<()> {
        self.allocator.release(std::mem::take(&mut self.small));
        self.large_free.extend(std::mem::take(&mut self.large));
        let (status, result) = self.command(START, [self.wanted_capabilities, 0])?;
        self.capabilities = match status {
            SUCCESS_WITH_CAPABILITIES => result,
            SUCCESS => FIRST_VERSION,
            _ => return Ok(()),
        };
        self.reset_required = false;
        self.command(GUEST_ID, [LINUX, 0])?;
        Ok(())
    }

    fn missing_pages(&self) -> u64 {
        let size = self.ballooned_bytes() / PAGE_BYTES;
        if self.reset_required {
            0
        } else {
            self.target_pages.saturating_sub(size)
        }
    }

    fn inflate(&mut self) -> Result<()> {
        let mut refused = Vec::new();
        let batched = self.capabilities & 1 << 2 != 0;
        if batched && self.capabilities & 1 << 3 != 0 {
            while self.missing_pages() > 0 && refused.len() < MAX_REFUSED {
                let count = self.missing_pages().div_ceil(LARGE).min(MAX_ENTRIES as u64);
                let pages: Vec<u64> = (0..count)
                    .map_while(|_| self.large_free.pop_first())
                    .collect();
                if pages.is_empty() {
                    break;
                }
                let (taken, others) = self.tell(BATCHED_2M_LOCK, pages)?;
                self.large.extend(taken);
                refused.extend(others);
            }
            // Refused large pages are split, and their parts tried; here they go back.
            self.large_free.extend(std::mem::take(&mut refused));
        }
        while self.missing_pages() > 0 && refused.len() < MAX_REFUSED {
            let count = if batched { MAX_ENTRIES as u64 } else { 1 };
            let count = self.missing_pages().min(count);
            let pages: Vec<u64> = (0..count)
                .map_while(|_| self.allocator.allocate())
                .collect();
            if pages.is_empty() {
                break;
            }
            let command = if batched { BATCHED_LOCK } else { LOCK };
            let (taken, others) = self.tell(command, pages)?;
            self.small.extend(taken);
            refused.extend(others);
        }
        self.allocator.release(refused);
        Ok(())
    }

    fn deflate(&mut self) -> Result<()> {
        let batched = self.capabilities & 1 << 2 != 0;
        let excess = |this: &Self| {
            let size = this.ballooned_bytes() / PAGE_BYTES;
            let excess = size.saturating_sub(this.target_pages);
            // Less than a large page is left alone, but for an empty balloon.
            if this.reset_required || (excess < LARGE && this.target_pages != 0) {
                0
            } else {
                excess
            }
        };
        while excess(self) > 0 && !self.small.is_empty() {
            let most = if batched { MAX_ENTRIES } else { 1 };
            let count = usize::try_from(excess(self))
                .unwrap_or(most)
                .min(most)
                .min(self.small.len());
            let pages = self.small.split_off(self.small.len() - count);
            let command = if batched { BATCHED_UNLOCK } else { UNLOCK };
            let (taken, kept) = self.tell(command, pages)?;
            let done = taken.is_empty();
            self.allocator.release(taken);
            self.small.extend(kept);
            if done {
                break;
            }
        }
        while excess(self) >= LARGE && !self.large.is_empty() {
            let count = usize::try_from(excess(self) / LARGE).unwrap_or(1);
            let count = count.min(MAX_ENTRIES).min(self.large.len());
            let pages = self.large.split_off(self.large.len() - count);
            let (taken, kept) = self.tell(BATCHED_2M_UNLOCK, pages)?;
            let done = taken.is_empty();
            self.large_free.extend(taken);
            self.large.extend(kept);
            if done {
                break;
            }
        }
        Ok(())
    }

    /// Tells of pages, one or a batch; returns those for which it went well, and the others.
    fn tell(&mut self, command: u64, pages: Vec<u64>) -> Result<(Vec<u64>, Vec<u64>)> {
        let single = [LOCK, UNLOCK].contains(&command);
        let arguments = if single {
            [pages.first().copied().unwrap_or(0), 1]
        } else {
            let entries: Vec<u8> = pages
                .iter()
                .flat_map(|page| (page << 12).to_le_bytes())
                .collect();
            self.ram.write(self.batch_page * PAGE_BYTES, &entries);
            [self.batch_page, pages.len() as u64]
        };
        let (status, _) = self.command(command, arguments)?;
        let (mut taken, mut others) = (Vec::new(), Vec::new());
        for (page, index) in pages.into_iter().zip(0..) {
            let entry = self.ram.load_u32(self.batch_page * PAGE_BYTES + 8 * index) & 0x1f;
            let status = if single || status != SUCCESS {
                status
            } else {
                entry
            };
            if status == SUCCESS {
                taken.push(page);
            } else {
                self.refusals.push(status);
                others.push(page);
            }
        }
        Ok((taken, others))
    }
}
