//! The balloon driver in the guest: what Linux's virtio_balloon does, seen from the ring.
//!
//! It sends at most 256 page frame numbers a buffer, has one buffer outstanding a queue, waits for
//! the acknowledgement, writes `actual` after each, keeps one statistics buffer with the device,
//! and tells the host before it uses pages of the balloon again.

mod extensions;

pub use extensions::{CONFIG_RESET_ACK, CONFIG_RESET_ID, refused_of};

use super::PAGE_BYTES;
use super::allocator::PageAllocator;
use super::device::Device;
use super::error::{Result, VmmError};
use super::hinting::Hinting;
use super::ram::GuestRam;
use super::vring::{Piece, Used, Vring};
use aerostat_device::memory::Pfn;
use aerostat_device::trace::{Kind, TraceWriter};
use parking_lot::RwLock;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Linux's VIRTIO_BALLOON_ARRAY_PFNS_MAX.
pub const MAX_PFNS: usize = 256;
/// Linux's PAGE_REPORTING_CAPACITY: ranges in one report.
pub const MAX_REPORTED: usize = 32;
/// Where `num_pages` is in the configuration space.
pub const CONFIG_NUM_PAGES: u64 = 0;
/// Where `actual` is.
pub const CONFIG_ACTUAL: u64 = 4;
/// Where `poison_val` is.
pub const CONFIG_POISON: u64 = 12;
/// How long the driver waits before the test has failed; Linux waits for ever. Long enough for a machine
/// that is stopped or starved for minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pages into the balloon.
    Inflate,
    /// Pages out of it.
    Deflate,
    /// Statistics.
    Stats,
    /// Hints of unused pages.
    Hints,
    /// Reports of unused pages.
    Reporting,
}

/// All roles, in the order of their queues.
pub const ROLES: [Role; 5] = [
    Role::Inflate,
    Role::Deflate,
    Role::Stats,
    Role::Hints,
    Role::Reporting,
];

/// Where the driver finds its device. Whoever replaces the device writes; meanwhile the driver waits,
/// as a processor of a machine that stands still does.
pub type Slot = Arc<RwLock<Arc<Device>>>;

/// The driver's state.
#[derive(Debug)]
pub struct Driver {
    pub(super) device: Slot,
    ram: Arc<GuestRam>,
    queues: Vec<(Role, Vring)>,
    /// Two pages of the kernel's own: the array of page frame numbers, the statistics buffer.
    buffers: u64,
    /// Which pages the guest uses.
    pub allocator: PageAllocator,
    balloon: Vec<u64>,
    stats: Vec<(u16, u64)>,
    pub(super) hinting: Hinting,
    features: u64,
    /// Pages that the device does not want, put aside so that they are not offered again.
    refused: Vec<u64>,
    /// What is recorded, if anything is.
    recording: Option<TraceWriter<BufWriter<File>>>,
}

impl Driver {
    /// A driver with its queues; `buffers` are two pages of its own.
    #[must_use]
    pub fn new(
        device: Slot,
        ram: Arc<GuestRam>,
        queues: Vec<(Role, Vring)>,
        buffers: u64,
        allocator: PageAllocator,
    ) -> Self {
        Self {
            device,
            ram,
            queues,
            buffers,
            allocator,
            balloon: Vec::new(),
            stats: Vec::new(),
            hinting: Hinting::default(),
            features: 0,
            refused: Vec::new(),
            recording: None,
        }
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Goes on with other memory (hot-add, hot-remove); unused pages that are gone are forgotten.
    pub fn set_ram(&mut self, ram: Arc<GuestRam>) {
        self.ram = ram;
    }

    /// The queue of a role.
    ///
    /// # Errors
    /// Its feature was not negotiated.
    pub fn queue(&mut self, role: Role) -> Result<&mut Vring> {
        let mut queues = self.queues.iter_mut();
        let found = queues.find(|(of, _)| *of == role);
        found
            .map(|(_, queue)| queue)
            .ok_or(VmmError::Absent("queue for this"))
    }

    /// The queues that were set up.
    pub fn queues(&self) -> impl Iterator<Item = (Role, &Vring)> {
        self.queues.iter().map(|(role, queue)| (*role, queue))
    }

    /// The queues that follow a reset: the old ones are forgotten, and so are the balloon and what was
    /// hinted, whose pages are unused again.
    pub fn restart(&mut self, queues: Vec<(Role, Vring)>) {
        self.queues = queues;
        let pages = std::mem::take(&mut self.balloon);
        self.allocator.release(pages);
        self.allocator.release(self.hinting.restart());
        self.release_refused();
    }

    /// The pages in the balloon.
    #[must_use]
    pub fn balloon(&self) -> &[u64] {
        &self.balloon
    }

    /// How large the balloon is.
    #[must_use]
    pub fn ballooned_bytes(&self) -> u64 {
        self.balloon.len() as u64 * PAGE_BYTES
    }

    /// Where the array of page frame numbers is.
    #[must_use]
    pub fn pfn_array(&self) -> u64 {
        self.buffers
    }

    /// Offers a buffer of any content on the queue of `role` and waits for it.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn exchange(&mut self, role: Role, pieces: &[Piece]) -> Result<Used> {
        let ram = Arc::clone(&self.ram);
        self.queue(role)?.exchange(&ram, pieces, PATIENCE)
    }

    /// Sends page frame numbers as they are, at most 1024, and waits (Linux's tell_host).
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn tell(&mut self, role: Role, pfns: &[u64]) -> Result<Used> {
        self.note(role, pfns)?;
        let piece = self.write_pfns(pfns);
        self.exchange(role, &[piece])
    }

    /// Records from now on what it gives and takes (`aerostat_device::trace`), or no more: then what was
    /// recorded is complete.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn record(&mut self, path: Option<&Path>) -> Result<()> {
        let begin = |path| TraceWriter::new(BufWriter::new(File::create(path)?));
        let new = path.map(begin).transpose().map_err(unwritten)?;
        match std::mem::replace(&mut self.recording, new) {
            Some(mut old) => old.flush().map_err(unwritten),
            None => Ok(()),
        }
    }

    fn note(&mut self, role: Role, pfns: &[u64]) -> Result<()> {
        let kind = if role == Role::Deflate {
            Kind::Deflate
        } else {
            Kind::Inflate
        };
        let pages: Vec<Pfn> = pfns.iter().copied().map(Pfn).collect();
        match &mut self.recording {
            Some(recording) => recording.pages(kind, &pages).map_err(unwritten),
            None => Ok(()),
        }
    }

    /// Writes the array of page frame numbers.
    pub fn write_pfns(&self, pfns: &[u64]) -> Piece {
        assert!(pfns.len() <= 1024, "the array is a page");
        let low = |pfn: &u64| u32::try_from(*pfn).unwrap_or(u32::MAX).to_le_bytes();
        let bytes: Vec<u8> = pfns.iter().flat_map(low).collect();
        self.ram.write(self.buffers, &bytes);
        Piece {
            gpa: self.buffers,
            len: u32::try_from(bytes.len()).unwrap_or(0),
            writable: false,
        }
    }

    /// Puts up to `pages` pages, and no more than a buffer's worth, into the balloon; returns how
    /// many went in (fill_balloon).
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn fill(&mut self, pages: usize) -> Result<usize> {
        let wanted = pages.min(MAX_PFNS);
        let pfns: Vec<u64> = (0..wanted)
            .map_while(|_| self.allocator.allocate())
            .collect();
        let before = self.balloon.len();
        self.give(&pfns)?;
        Ok(self.balloon.len() - before)
    }

    /// Puts these pages into the balloon, unused or not: the caller knows that nobody needs them.
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn give(&mut self, pfns: &[u64]) -> Result<()> {
        for pfn in pfns {
            self.allocator.take(*pfn);
        }
        for pfns in pfns.chunks(MAX_PFNS) {
            if self.has_refusal() {
                self.give_or_put_aside(pfns)?;
                continue;
            }
            self.tell(Role::Inflate, pfns)?;
            self.balloon.extend_from_slice(pfns);
        }
        Ok(())
    }

    /// Takes up to `pages` pages, and no more than a buffer's worth, out of the balloon, newest
    /// first; returns how many (leak_balloon).
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn leak(&mut self, pages: usize) -> Result<usize> {
        let count = pages.min(MAX_PFNS).min(self.balloon.len());
        let pfns = self.balloon.split_off(self.balloon.len() - count);
        if !pfns.is_empty() {
            self.tell(Role::Deflate, &pfns)?;
        }
        self.allocator.release(pfns);
        Ok(count)
    }

    /// Takes these pages out of the balloon.
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn take(&mut self, pfns: &[u64]) -> Result<()> {
        for pfns in pfns.chunks(MAX_PFNS) {
            self.tell(Role::Deflate, pfns)?;
            self.balloon.retain(|pfn| !pfns.contains(pfn));
            self.allocator.release(pfns.iter().copied());
        }
        Ok(())
    }

    /// The target, from the configuration space, in pages.
    ///
    /// # Errors
    /// The device cannot be read.
    pub fn target_pages(&self) -> Result<usize> {
        let mut bytes = [0; 4];
        self.device
            .read()
            .read_config(CONFIG_NUM_PAGES, &mut bytes)?;
        Ok(usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX))
    }

    /// Writes `actual` (update_balloon_size).
    ///
    /// # Errors
    /// The device cannot be written.
    pub fn update_actual(&self) -> Result<()> {
        let actual = u32::try_from(self.balloon.len()).unwrap_or(u32::MAX);
        self.device
            .read()
            .write_config(CONFIG_ACTUAL, &actual.to_le_bytes())
            .map(drop)
    }

    /// One run of the work queue: moves towards the target by a buffer's worth. Returns how many
    /// pages were moved, and whether the target is reached (update_balloon_size_func).
    ///
    /// # Errors
    /// The device does not answer.
    pub fn step(&mut self) -> Result<(usize, bool)> {
        self.follow_host_reset()?;
        let nodes = self.node_targets()?;
        if !nodes.is_empty() {
            let (moved, reached) = self.step_nodes(&nodes)?;
            self.update_actual()?;
            return Ok((moved, reached && self.node_targets()? == nodes));
        }
        let (target, size) = (self.target_pages()?, self.balloon.len());
        let moved = if target > size {
            self.fill(target - size)?
        } else if target < size {
            self.leak(size - target)?
        } else {
            0
        };
        self.update_actual()?;
        let reached = self.balloon.len() == self.target_pages()?;
        if reached {
            self.release_refused();
        }
        Ok((moved, reached))
    }

    /// Moves to the target; gives up where the guest has nothing more to spare.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn follow_target(&mut self) -> Result<()> {
        while let (1.., false) = self.step()? {}
        Ok(())
    }

    /// What the guest says of its memory from now on.
    pub fn set_stats(&mut self, stats: &[(u16, u64)]) {
        self.stats = stats.to_vec();
    }

    /// Gives the statistics buffer to the device; does not wait, as it stays there.
    ///
    /// # Errors
    /// STATS_VQ was not negotiated.
    pub fn post_stats(&mut self) -> Result<()> {
        let record = |(tag, value): &(u16, u64)| {
            let (tag, value) = (tag.to_le_bytes(), value.to_le_bytes());
            tag.into_iter().chain(value).collect::<Vec<u8>>()
        };
        let bytes: Vec<u8> = self.stats.iter().flat_map(record).collect();
        let gpa = self.buffers + PAGE_BYTES;
        self.ram.write(gpa, &bytes);
        let len = u32::try_from(bytes.len()).unwrap_or(0);
        let ram = Arc::clone(&self.ram);
        let queue = self.queue(Role::Stats)?;
        let writable = false;
        queue.add(&ram, &[Piece { gpa, len, writable }])?;
        queue.kick(&ram);
        Ok(())
    }

    /// Answers the device if it has returned the statistics buffer; true if it had
    /// (stats_request).
    ///
    /// # Errors
    /// STATS_VQ was not negotiated.
    pub fn answer_stats(&mut self) -> Result<bool> {
        let ram = Arc::clone(&self.ram);
        let asked = self.queue(Role::Stats)?.take_used(&ram).is_some();
        if asked {
            self.post_stats()?;
        }
        Ok(asked)
    }

    /// Reports unused ranges (first page, pages), which are the device's until they come back.
    ///
    /// # Errors
    /// They are not acknowledged, or reporting was not negotiated.
    pub fn report(&mut self, ranges: &[(u64, u64)]) -> Result<()> {
        for ranges in ranges.chunks(MAX_REPORTED) {
            let pieces: Vec<Piece> = ranges
                .iter()
                .map(|(start, pages)| Piece {
                    gpa: start * PAGE_BYTES,
                    len: u32::try_from(pages * PAGE_BYTES).unwrap_or(u32::MAX),
                    writable: true,
                })
                .collect();
            self.exchange(Role::Reporting, &pieces)?;
        }
        Ok(())
    }

    /// Reports all unused memory that lies in aligned blocks of `pages` pages; returns how many
    /// bytes that was.
    ///
    /// # Errors
    /// As for [`Self::report`].
    pub fn report_unused(&mut self, pages: u64) -> Result<u64> {
        let mut blocks = Vec::new();
        while let Some(start) = self.allocator.allocate_block(pages) {
            blocks.push((start, pages));
        }
        let outcome = self.report(&blocks);
        for (start, pages) in &blocks {
            self.allocator.release(*start..start + pages);
        }
        outcome.map(|()| blocks.len() as u64 * pages * PAGE_BYTES)
    }

    /// Writes to `pages` unused pages, so that the host has to allocate them, and lets them go
    /// again. Returns how many there were.
    pub fn touch_unused(&mut self, pages: u64) -> u64 {
        let count = usize::try_from(pages).unwrap_or(usize::MAX);
        let mut touched = 0;
        for pfn in self.allocator.unused().take(count) {
            self.ram.touch(pfn);
            touched += 1;
        }
        touched
    }
}

fn unwritten(source: std::io::Error) -> VmmError {
    VmmError::Os {
        what: "cannot write a recording",
        source,
    }
}
