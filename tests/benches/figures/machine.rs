//! A guest whose device is the library's own, linked into this program, so that a runtime with the
//! rival's way to discard can serve it too.

use super::arena::Arena;
use super::trace::{ARRAY, Trace};
use aerostat::{
    AEROSTAT_FEATURE_EVENT_IDX, AEROSTAT_FEATURE_INDIRECT_DESC, AEROSTAT_FEATURE_MUST_TELL_HOST,
    AEROSTAT_FEATURE_PAGE_REPORTING, AEROSTAT_FEATURE_VERSION_1,
};
use aerostat_device::{
    Device, DeviceConfig, Gpa, QueueConfig, QueuePosition, RingConfig, Runtime, WriteBehind,
};
use aerostat_tests::vmm::eventfd::EventFd;
use aerostat_tests::vmm::vring::{Piece, Placement, Vring};
use aerostat_tests::vmm::{MIB, PAGE_BYTES, VmmError};
use std::error::Error;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Write-behind off: everything is discarded before it is acknowledged.
pub(crate) const BEFORE: WriteBehind = WriteBehind {
    limit_bytes: 0,
    delay: Duration::ZERO,
};

const FEATURES: u64 = AEROSTAT_FEATURE_MUST_TELL_HOST
    | AEROSTAT_FEATURE_PAGE_REPORTING
    | AEROSTAT_FEATURE_INDIRECT_DESC
    | AEROSTAT_FEATURE_EVENT_IDX
    | AEROSTAT_FEATURE_VERSION_1;
/// Linux numbers its queues without gaps.
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORTING: u16 = 2;
const QUEUE_SIZE: u16 = 256;
/// Where the arrays lie in the guest.
const BUFFERS: u64 = 16 * MIB;
const PATIENCE: Duration = Duration::from_secs(30);

/// How the guest waits for an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until the interrupt, as a processor that has nothing else to do sleeps.
    Interrupt,
    /// Looking at the used ring all the time: nothing but the device is measured.
    Spin,
}

pub(crate) struct Machine<'a> {
    arena: &'a Arena,
    pub(crate) device: Device,
    pub(crate) inflate: Vring,
    pub(crate) deflate: Vring,
    pub(crate) reporting: Vring,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(
        runtime: &Arc<Runtime>,
        arena: &'a Arena,
        write_behind: WriteBehind,
    ) -> Result<Self> {
        let device = Device::new(runtime, DeviceConfig::default())?;
        device.set_memory(Arc::clone(&arena.memory))?;
        device.set_write_behind(write_behind);
        device.set_target_bytes(arena.bytes())?;
        let [inflate, deflate, reporting] = start(&device, arena)?;
        Ok(Self {
            arena,
            device,
            inflate,
            deflate,
            reporting,
        })
    }

    /// The driver goes and comes back: the balloon is empty again.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.device.reset();
        [self.inflate, self.deflate, self.reporting] = start(&self.device, self.arena)?;
        Ok(())
    }

    /// Puts the arrays of `trace` into the guest's memory, and asks the guest for as much.
    pub(crate) fn write_arrays(&self, trace: &Trace) -> Result<Vec<Piece>> {
        self.device.set_target_bytes(trace.pages() * PAGE_BYTES)?;
        let place = (0..).map(|index| BUFFERS + index * 4 * ARRAY as u64);
        let write = |(array, gpa): (&Vec<u64>, u64)| {
            let number = |page: &u64| u32::try_from(Arena::first_pfn() + page).unwrap_or(u32::MAX);
            let bytes: Vec<u8> = array
                .iter()
                .flat_map(|page| number(page).to_le_bytes())
                .collect();
            assert!(bytes.len() <= 4 * ARRAY, "an array is as Linux sends it");
            self.arena.ram.write(gpa, &bytes);
            Piece {
                gpa,
                len: u32::try_from(bytes.len()).unwrap_or(0),
                writable: false,
            }
        };
        Ok(trace.arrays.iter().zip(place).map(write).collect())
    }

    /// Offers all arrays, as many at a time as the ring holds, and waits for them.
    pub(crate) fn inflate_full_ring(&mut self, arrays: &[Piece]) -> Result<()> {
        let ram = &self.arena.ram;
        for arrays in arrays.chunks(usize::from(QUEUE_SIZE)) {
            for array in arrays {
                self.inflate.add(ram, &[*array])?;
            }
            self.inflate.kick(ram);
            for _ in arrays {
                self.inflate.wait_used(ram, PATIENCE)?;
            }
        }
        Ok(())
    }

    /// Offers one array after the other, each when the one before has come back and the guest has
    /// been busy for `think`; tells `each` how long the device took from the kick on.
    pub(crate) fn inflate_one_by_one(
        &mut self,
        arrays: &[Piece],
        wait: Wait,
        think: Duration,
        mut each: impl FnMut(Duration),
    ) -> Result<()> {
        let ram = &self.arena.ram;
        for array in arrays {
            let busy = Instant::now();
            while busy.elapsed() < think {
                std::hint::spin_loop();
            }
            self.inflate.add(ram, &[*array])?;
            let kicked = Instant::now();
            self.inflate.kick(ram);
            match wait {
                Wait::Interrupt => {
                    self.inflate.wait_used(ram, PATIENCE)?;
                }
                Wait::Spin => {
                    while self.inflate.take_used(ram).is_none() {
                        if kicked.elapsed() > PATIENCE {
                            return Err(VmmError::Absent("acknowledgement").into());
                        }
                        std::hint::spin_loop();
                    }
                }
            }
            each(kicked.elapsed());
        }
        Ok(())
    }

    /// Waits until nothing that was acknowledged waits to be discarded.
    pub(crate) fn settle(&self) -> Result<()> {
        let start = Instant::now();
        while self.device.counters().balloon.pending_bytes > 0 {
            if start.elapsed() > PATIENCE {
                return Err(VmmError::Absent("end to what is pending").into());
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let counters = self.device.counters();
        assert!(counters.balloon.balances(), "{counters:?}");
        assert_eq!(counters.balloon.skipped_bytes(), 0, "{counters:?}");
        Ok(())
    }
}

fn start(device: &Device, arena: &Arena) -> Result<[Vring; 3]> {
    device.set_features(FEATURES & device.offered_features())?;
    let mut next = 0;
    let mut rings = Vec::new();
    for index in [INFLATE, DEFLATE, REPORTING] {
        let (placement, end) = Placement::lay_out(next, QUEUE_SIZE);
        next = end;
        let ring = Vring::new(&arena.ram, placement, FEATURES)?;
        let config = RingConfig {
            desc: Gpa(placement.desc),
            avail: Gpa(placement.avail),
            used: Gpa(placement.used),
            kick: duplicate(&ring.kick)?,
            call: Some(duplicate(&ring.call)?),
            position: QueuePosition::SPLIT_START,
        };
        let config = QueueConfig {
            size: QUEUE_SIZE,
            ring: Some(config),
        };
        device.start_queue(index, config)?;
        rings.push(ring);
    }
    assert!(next <= BUFFERS, "the rings reach into the buffers");
    device.activate()?;
    rings.try_into().map_err(|_| "three queues".into())
}

#[allow(unsafe_code, reason = "a number becomes a descriptor again")]
fn duplicate(event: &EventFd) -> Result<OwnedFd> {
    // SAFETY: the descriptor is the event's own and open as long as it is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.raw()) };
    Ok(fd.try_clone_to_owned()?)
}
