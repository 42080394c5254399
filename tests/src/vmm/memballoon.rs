//! A machine with a memory balloon of device ID 13, and a driver for it (docs/memballoon.md).

use super::PAGE_BYTES;
use super::books::assert_balanced;
use super::device::Device;
use super::error::{Result, VmmError};
use super::eventfd::EventFd;
use super::guest::{Vmm, queue_config};
use super::ram::{GuestRam, RegionSpec};
use super::vring::{Piece, Placement, Used, Vring};
use aerostat::{
    AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_VERSION_1,
    AEROSTAT_KIND_MEMBALLOON, AEROSTAT_MEMBALLOON_FEATURE_NODE, aerostat_counters,
};
use std::sync::Arc;
use std::time::Duration;

/// The command that takes pages out of the balloon.
pub const GET: u64 = 0;
/// The one that puts them in.
pub const GIVE: u64 = 1;
/// The one that does both.
pub const EXCHANGE: u64 = 2;
/// What the device says on the fromdevq.
pub const MIN_BALLOON: u64 = 32768;
/// The same for each node of the guest.
pub const MIN_NODES: u64 = 32769;
/// The queue on which the device speaks.
pub const FROMDEVQ: u32 = 0;
/// The queue on which the driver does.
pub const TODEVQ: u32 = 1;
/// The most addresses of a command.
pub const MAX_ADDRESSES: usize = 1024;

const PATIENCE: Duration = Duration::from_secs(20);
const QUEUE_SIZE: u16 = 64;
/// Room for the longest command.
const COMMAND_BYTES: u64 = 3 * PAGE_BYTES;

/// The feature bit of a page size.
#[must_use]
pub fn size_feature(page_bytes: u64) -> u64 {
    1 << (page_bytes / PAGE_BYTES).trailing_zeros() << 1
}

/// What the device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// How large the balloon should at least be.
    Minimum(i64),
    /// How large it should at least be on each node, from 0 on.
    Nodes(Vec<u64>),
}

/// The machine.
#[derive(Debug)]
pub struct Memballoon {
    device: Arc<Device>,
    ram: Arc<GuestRam>,
    from: Vring,
    to: Vring,
    buffers: u64,
    features: u64,
    /// How long the buffers are that wait for what the device has to say.
    pub buffer_bytes: u32,
    /// Signalled when the device needs a reset.
    pub config_event: EventFd,
    /// Where the kernel's own memory ends.
    pub kernel_end: u64,
}

impl Memballoon {
    /// What a driver selects beside a page size.
    pub const TRANSPORT: u64 =
        AEROSTAT_FEATURE_INDIRECT_DESC | AEROSTAT_FEATURE_EVENT_IDX | AEROSTAT_FEATURE_VERSION_1;

    /// A machine whose driver is up. The lowest region holds its queues and buffers.
    ///
    /// # Errors
    /// Host or library refuse.
    pub fn boot(vmm: &Vmm, regions: &[RegionSpec], selected: u64) -> Result<Self> {
        let ram = Arc::new(GuestRam::new("memballoon", regions)?);
        let config_event = EventFd::new()?;
        let device = Device::of_kind(
            vmm.runtime(),
            AEROSTAT_KIND_MEMBALLOON,
            selected,
            config_event.raw(),
            -1,
        )?;
        device.set_memory(&ram)?;
        let start = regions.iter().map(|region| region.gpa).min().unwrap_or(0);
        let (from, next) = Placement::lay_out(start, QUEUE_SIZE);
        let (to, buffers) = Placement::lay_out(next, QUEUE_SIZE);
        let mut machine = Self {
            device: Arc::new(device),
            from: Vring::new(&ram, from, selected)?,
            to: Vring::new(&ram, to, selected)?,
            ram,
            buffers,
            features: selected,
            buffer_bytes: if selected & AEROSTAT_MEMBALLOON_FEATURE_NODE == 0 {
                16
            } else {
                144
            },
            config_event,
            kernel_end: buffers + COMMAND_BYTES + 2 * PAGE_BYTES,
        };
        // So that what the host has allocated changes by the balloon alone.
        for page in (start..machine.kernel_end).step_by(4096) {
            machine.ram.write(page, &[0; 8]);
        }
        machine.start()?;
        Ok(machine)
    }

    fn start(&mut self) -> Result<()> {
        self.device.set_features(self.features)?;
        for (index, queue) in [(FROMDEVQ, &self.from), (TODEVQ, &self.to)] {
            let config = queue_config(queue, false);
            self.device.start_queue(index, &config)?;
        }
        self.leave_buffer(self.buffer_bytes)?;
        self.device.activate()
    }

    /// The driver goes away and comes back.
    ///
    /// # Errors
    /// The device refuses.
    pub fn restart(&mut self) -> Result<()> {
        self.device.reset()?;
        self.from = Vring::new(&self.ram, self.from.placement(), self.features)?;
        self.to = Vring::new(&self.ram, self.to.placement(), self.features)?;
        self.start()
    }

    /// Moves to another device, as a migration does.
    ///
    /// # Errors
    /// A device refuses.
    pub fn move_to(&mut self, vmm: &Vmm) -> Result<()> {
        self.device.pause()?;
        let state = self.device.save()?;
        let device = Device::of_kind(
            vmm.runtime(),
            AEROSTAT_KIND_MEMBALLOON,
            self.features,
            self.config_event.raw(),
            -1,
        )?;
        device.set_memory(&self.ram)?;
        device.restore(&state)?;
        for (index, queue) in [(FROMDEVQ, &self.from), (TODEVQ, &self.to)] {
            let position = device.saved_position(index)?;
            let mut config = queue_config(queue, false);
            config.next_avail = position.next_avail;
            config.next_used = position.next_used;
            device.start_queue(index, &config)?;
        }
        device.activate()?;
        self.device = Arc::new(device);
        Ok(())
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
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

    /// Leaves a buffer of this length for what the device has to say.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn leave_buffer(&mut self, len: u32) -> Result<u16> {
        let gpa = self.message();
        self.ram.write(gpa, &[0xff; 24]);
        let piece = Piece {
            gpa,
            len,
            writable: true,
        };
        let head = self.from.add(&self.ram, &[piece])?;
        self.from.kick(&self.ram);
        Ok(head)
    }

    /// Waits for what the device has to say, and leaves a new buffer.
    ///
    /// # Errors
    /// It does not come.
    pub fn listen(&mut self) -> Result<Said> {
        let used = self.wait_message()?;
        self.understand(used)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn heard(&mut self) -> Result<Option<Said>> {
        let used = self.from.take_used(&self.ram);
        used.map(|used| self.understand(used)).transpose()
    }

    fn understand(&mut self, used: Used) -> Result<Said> {
        let (message, argument) = (self.field(self.message()), self.field(self.message() + 8));
        let said = if message == MIN_NODES {
            assert_eq!(u64::from(used.written), 16 + 8 * argument, "n numbers");
            let nodes = (0..argument).map(|node| self.field(self.message() + 16 + 8 * node));
            Said::Nodes(nodes.collect())
        } else {
            assert_eq!(used.written, 16, "a message and its argument");
            Said::Minimum(self.last_message())
        };
        self.leave_buffer(self.buffer_bytes)?;
        Ok(said)
    }

    /// Whether the device has said something, without waiting; a buffer is used up then.
    pub fn has_message(&mut self) -> bool {
        self.from.take_used(&self.ram).is_some()
    }

    /// Waits for a buffer of the fromdevq to come back.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_message(&mut self) -> Result<Used> {
        self.from.wait_used(&self.ram, PATIENCE)
    }

    /// Waits for the device's minimum, and leaves a new buffer.
    ///
    /// # Errors
    /// It does not come.
    pub fn minimum(&mut self) -> Result<i64> {
        let used = self.wait_message()?;
        assert_eq!(used.written, 16, "a command and its argument");
        let value = self.last_message();
        self.leave_buffer(16)?;
        Ok(value)
    }

    /// What the device wrote last.
    #[must_use]
    pub fn last_message(&self) -> i64 {
        assert_eq!(self.field(self.message()), MIN_BALLOON);
        self.field(self.message() + 8).cast_signed()
    }

    fn message(&self) -> u64 {
        self.buffers + COMMAND_BYTES
    }

    fn answer(&self) -> u64 {
        self.message() + PAGE_BYTES
    }

    fn field(&self, gpa: u64) -> u64 {
        let low = u64::from(self.ram.load_u32(gpa));
        low | u64::from(self.ram.load_u32(gpa + 4)) << 32
    }

    /// Where commands are written.
    #[must_use]
    pub fn command_gpa(&self) -> u64 {
        self.buffers
    }

    /// Sends any buffer on the todevq and waits for it.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn send(&mut self, pieces: &[Piece]) -> Result<Used> {
        self.to.exchange(&self.ram, pieces, PATIENCE)
    }

    /// Sends a command with room for an answer of `room` bytes; returns how much was written, and the
    /// answer.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn command(&mut self, fields: &[u64], room: u32) -> Result<(u32, u64)> {
        let bytes: Vec<u8> = fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        let length = bytes.len() as u64;
        if length > COMMAND_BYTES {
            return Err(VmmError::Absent("room for such a command"));
        }
        self.ram.write(self.buffers, &bytes);
        self.ram.write(self.answer(), &[0xee; 8]);
        let mut pieces = vec![Piece {
            gpa: self.buffers,
            len: u32::try_from(length).unwrap_or(0),
            writable: false,
        }];
        if room > 0 {
            pieces.push(Piece {
                gpa: self.answer(),
                len: room,
                writable: true,
            });
        }
        let used = self.send(&pieces)?;
        Ok((used.written, self.field(self.answer())))
    }

    /// Gives pages.
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn give(&mut self, pages: &[u64]) -> Result<()> {
        for pages in pages.chunks(MAX_ADDRESSES) {
            let fields: Vec<u64> = [GIVE].iter().chain(pages).copied().collect();
            assert_eq!(self.command(&fields, 0)?.0, 0, "nothing is written");
        }
        Ok(())
    }

    /// Wants pages; returns how many of them, from the first on, it got.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn get(&mut self, pages: &[u64]) -> Result<u64> {
        let fields: Vec<u64> = [GET].iter().chain(pages).copied().collect();
        let (written, count) = self.command(&fields, 8)?;
        assert_eq!(written, 8, "the count");
        Ok(count)
    }

    /// Wants pages for others; returns how many were exchanged.
    ///
    /// # Errors
    /// It is not acknowledged.
    pub fn exchange(&mut self, wanted: &[u64], given: &[u64]) -> Result<u64> {
        let fields: Vec<u64> = [EXCHANGE]
            .iter()
            .chain(wanted)
            .chain(given)
            .copied()
            .collect();
        let (written, count) = self.command(&fields, 8)?;
        assert_eq!(written, 8, "the count");
        Ok(count)
    }

    /// Makes the todevq's index jump, which no ring survives.
    pub fn break_todevq(&mut self) {
        let index = self.to.placement().avail_index();
        let jumped = self.ram.load_u16(index).wrapping_add(1000);
        self.ram.store_u16(index, jumped);
        self.to.kick.signal();
    }
}
