//! How long a guest waits for its turn beside one that asks for as much as it can (I3). One worker for both,
//! played by the calling thread, so that what is counted is exactly what came in between, and the time is
//! processor time: neither depends on what else the machine does.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "maps the memory of guests; a test ends with a panic when anything is not as it should be"
)]

use aerostat_device::memory::{Gpa, GuestNode, HostSlice};
use aerostat_device::{
    Device, DeviceConfig, DeviceKind, DeviceState, GuestMemory, QueueConfig, QueuePosition, Region,
    RingConfig, Runtime,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::os::fd::OwnedFd;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

const VERSION_1: u64 = 1 << 32;
const INDIRECT_DESC: u64 = 1 << 28;
const PAGE_REPORTING: u64 = 1 << 5;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORTING: u16 = 2;
/// Of the memory balloon: pages of 4 KiB, the queue of commands, and the one that gives pages.
const PAGES_OF_4K: u64 = 1 << 1;
const TODEVQ: u16 = 1;
const GIVE: u64 = 1;

const PAGE: u64 = 4096;
const SIZE: u16 = 256;
/// Each queue has four pages: descriptors, available ring, used ring.
const RINGS: u64 = 4 * PAGE;
/// Where lists and tables are written.
const BUFFERS: u64 = 1 << 20;
/// Two regions of 32 MiB, private memory and a file.
const REGION: u64 = 32 << 20;
/// What the hostile guest gives from, behind its own lists.
const PRIVATE: u64 = (8 << 20) / PAGE;
const FILE: u64 = REGION / PAGE;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The bounds of a turn: entries that a list may have, and that end a batch; so many may be served in one.
const MAX_ENTRIES: u64 = 1024 + 1023;

/// How long the other guest may wait: a turn that is under way, and one more. The limit is for unoptimised
/// builds on slow machines; docs/testing.md has what was measured.
const LIMIT: Duration = Duration::from_millis(25);

struct Machine {
    device: Device,
    memory: Arc<GuestMemory>,
    kicks: [Option<OwnedFd>; 3],
    sent: [u16; 3],
    places: [usize; 2],
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
struct Buffer {
    gpa: u64,
    len: u32,
    flags: u16,
}

fn map(fd: Option<&OwnedFd>) -> usize {
    let length = usize::try_from(REGION).unwrap();
    let both = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the place, so no mapping of this process is touched.
    let place = unsafe {
        match fd {
            Some(fd) => mmap(null_mut(), length, both, MapFlags::SHARED, fd, 0),
            None => mmap_anonymous(null_mut(), length, both, MapFlags::PRIVATE),
        }
    };
    place.unwrap() as usize
}

impl Machine {
    fn new(runtime: &Arc<Runtime>, kind: DeviceKind) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, REGION).unwrap();
        let places = [map(None), map(Some(&file))];
        let region = |index: usize, fd: Option<OwnedFd>| Region {
            gpa: Gpa(REGION * index as u64),
            len_bytes: REGION,
            hva: places[index],
            shared: fd.is_some(),
            fd: fd.map(Arc::new),
            fd_offset_bytes: 0,
            page_size_bytes: PAGE,
            frame_bytes: 0,
            readonly: false,
            pinned: false,
            extra: false,
            guest_node: GuestNode(0),
            node: None,
        };
        let regions = vec![region(0, None), region(1, Some(file))];
        // SAFETY: unmapped behind the device only, and nothing refers to the memory but by address.
        let memory = unsafe { GuestMemory::new(regions) }.unwrap();
        let config = DeviceConfig {
            kind,
            ..DeviceConfig::default()
        };
        let device = Device::new(runtime, config).unwrap();
        let (features, queues): (_, &[u16]) = match kind {
            DeviceKind::VirtioBalloon => (PAGE_REPORTING, &[INFLATE, DEFLATE, REPORTING]),
            _ => (PAGES_OF_4K, &[TODEVQ]),
        };
        let features = features | VERSION_1 | INDIRECT_DESC;
        device.set_features(features).unwrap();
        device.set_memory(Arc::clone(&memory)).unwrap();
        let mut machine = Self {
            device,
            memory,
            kicks: [const { None }; 3],
            sent: [0; 3],
            places,
        };
        for &queue in queues {
            let base = RINGS * u64::from(queue);
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            let ring = RingConfig {
                desc: Gpa(base),
                avail: Gpa(base + PAGE),
                used: Gpa(base + 2 * PAGE),
                kick: kick.try_clone().unwrap(),
                call: None,
                position: QueuePosition::SPLIT_START,
            };
            machine.kicks[usize::from(queue)] = Some(kick);
            let config = QueueConfig {
                size: SIZE,
                ring: Some(ring),
            };
            machine.device.start_queue(queue, config).unwrap();
        }
        machine.device.activate().unwrap();
        while runtime.turn(true) {}
        machine
    }

    fn slice(&self, gpa: u64, len: usize) -> HostSlice<'_> {
        self.memory.slice_prefix(Gpa(gpa), len as u64).unwrap()
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.slice(gpa, bytes.len()).write(0, bytes);
    }

    /// Has the host allocate pages from `first` on, so that taking them away is work.
    fn touch(&self, first: u64, pages: u64) {
        for page in first..first + pages {
            self.put(page * PAGE, &[1]);
        }
    }

    fn list(&self, gpa: u64, pages: impl Iterator<Item = u64>) -> Buffer {
        let low = |page| u32::try_from(page).unwrap().to_le_bytes();
        let bytes: Vec<u8> = pages.flat_map(low).collect();
        self.put(gpa, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        Buffer { gpa, len, flags: 0 }
    }

    fn descriptor(&self, at: u64, buffer: Buffer, next: u16) {
        self.put(at, &buffer.gpa.to_le_bytes());
        self.put(at + 8, &buffer.len.to_le_bytes());
        self.put(at + 12, &buffer.flags.to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes `chains` available at once and kicks. The first chain begins at the first descriptor.
    fn offer(&mut self, queue: u16, chains: &[Vec<Buffer>]) {
        let base = RINGS * u64::from(queue);
        let sent = &mut self.sent[usize::from(queue)];
        let (mut descriptor, mut index) = (0u16, *sent);
        let mut heads = Vec::new();
        for chain in chains {
            heads.push(descriptor);
            for (number, buffer) in chain.iter().enumerate() {
                let mut buffer = *buffer;
                if number + 1 < chain.len() {
                    buffer.flags |= NEXT;
                }
                let at = base + 16 * u64::from(descriptor);
                descriptor += 1;
                let mut whole = buffer.gpa.to_le_bytes().to_vec();
                whole.extend(buffer.len.to_le_bytes());
                whole.extend(buffer.flags.to_le_bytes());
                whole.extend(descriptor.to_le_bytes());
                self.memory
                    .slice_prefix(Gpa(at), 16)
                    .unwrap()
                    .write(0, &whole);
            }
        }
        for head in heads {
            let at = base + PAGE + 4 + 2 * u64::from(index % SIZE);
            self.memory
                .slice_prefix(Gpa(at), 2)
                .unwrap()
                .write(0, &head.to_le_bytes());
            index = index.wrapping_add(1);
        }
        *sent = index;
        self.put(base + PAGE + 2, &index.to_le_bytes());
        let kick = self.kicks[usize::from(queue)].as_ref().unwrap();
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
    }

    fn is_served(&self, queue: u16) -> bool {
        let mut used = [0; 2];
        let at = RINGS * u64::from(queue) + 2 * PAGE + 2;
        self.slice(at, 2).read(0, &mut used);
        u16::from_le_bytes(used) == self.sent[usize::from(queue)]
    }

    /// What it asked for that was dealt with, in pages.
    fn entries(&self) -> u64 {
        let counters = self.device.counters();
        let deflated = counters.returned_bytes + counters.rejected_take_bytes;
        (counters.balloon.requested_bytes + counters.report.requested_bytes + deflated) / PAGE
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.device.reset();
        for place in self.places {
            // SAFETY: nothing is in flight behind a reset, and rings are gone: nobody uses the mapping.
            unsafe { munmap(place as *mut _, usize::try_from(REGION).unwrap()) }.unwrap();
        }
    }
}

fn processor_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes to a live variable.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    Duration::new(
        now.tv_sec.try_into().unwrap(),
        now.tv_nsec.try_into().unwrap(),
    )
}

/// What the hostile guest has waiting when the other one kicks.
struct Load {
    what: &'static str,
    kind: DeviceKind,
    /// A turn is bounded by entries, not only by what they cost.
    counts_entries: bool,
    offer: fn(&mut Machine),
}

/// A load of the traditional balloon.
const fn load(what: &'static str, offer: fn(&mut Machine)) -> Load {
    Load {
        what,
        kind: DeviceKind::VirtioBalloon,
        counts_entries: true,
        offer,
    }
}

/// Fills all of a queue with lists that share their memory.
fn lists(machine: &mut Machine, queue: u16, pages: impl Iterator<Item = u64>) {
    let list = machine.list(BUFFERS, pages);
    machine.offer(queue, &vec![vec![list]; SIZE.into()]);
}

/// Fills three lists with every other page from `first` on, all of which the host has.
fn distinct_lists(machine: &mut Machine, first: u64) {
    machine.touch(first, 3 * 2048);
    let list = |machine: &Machine, number: u64| {
        let pages = scattered(first + 2048 * number);
        vec![machine.list(BUFFERS + PAGE * number, pages)]
    };
    let chains: Vec<_> = (0..3).map(|number| list(machine, number)).collect();
    machine.offer(INFLATE, &chains);
}

/// Every other page of as many as one list may name: none merges with another.
fn scattered(first: u64) -> impl Iterator<Item = u64> {
    (0..1024).map(move |number| first + 2 * number)
}

const LOADS: [Load; 9] = [
    Load {
        kind: DeviceKind::Memballoon,
        ..load("commands that give scattered pages of a file", |machine| {
            machine.touch(FILE, REGION / PAGE);
            let commands: Vec<_> = (0..4)
                .map(|number| {
                    let pages = scattered(FILE + 2048 * number).map(|page| page * PAGE);
                    let fields = [GIVE].into_iter().chain(pages);
                    let bytes: Vec<u8> = fields.flat_map(u64::to_le_bytes).collect();
                    let gpa = BUFFERS + 4 * PAGE * number;
                    machine.put(gpa, &bytes);
                    let len = u32::try_from(bytes.len()).unwrap();
                    vec![Buffer { gpa, len, flags: 0 }]
                })
                .collect();
            machine.offer(TODEVQ, &commands);
        })
    },
    load("scattered pages of private memory", |machine| {
        distinct_lists(machine, PRIVATE);
    }),
    load("scattered pages of a file", |machine| {
        distinct_lists(machine, FILE);
    }),
    load(
        "a list just short of the bound before the longest",
        |machine| {
            machine.touch(PRIVATE, 2048);
            machine.touch(FILE, 2048);
            let short = machine.list(BUFFERS, scattered(PRIVATE).take(1023));
            let long = machine.list(BUFFERS + 4 * PAGE, scattered(FILE));
            machine.offer(INFLATE, &[vec![short], vec![long]]);
        },
    ),
    load("pages that are not there, in no order", |machine| {
        let far = (0..1024u64).map(|number| 1 << 31 | (number * 0x9e37_79b9) & 0x7fff_ffff);
        lists(machine, INFLATE, far);
    }),
    load("taking back what is not in the balloon", |machine| {
        lists(machine, DEFLATE, scattered(PRIVATE));
    }),
    load("tables of empty buffers", |machine| {
        let entries = SIZE;
        for entry in 0..entries {
            let last = entry + 1 == entries;
            let empty = Buffer {
                gpa: BUFFERS,
                len: 0,
                flags: if last { 0 } else { NEXT },
            };
            machine.descriptor(BUFFERS + 16 * u64::from(entry), empty, entry + 1);
        }
        let table = Buffer {
            gpa: BUFFERS,
            len: 16 * u32::from(entries),
            flags: INDIRECT,
        };
        machine.offer(INFLATE, &vec![vec![table]; SIZE.into()]);
    }),
    load("scattered reports", |machine| {
        machine.touch(PRIVATE, 512);
        let one = |number: u64| Buffer {
            gpa: (PRIVATE + 2 * number) * PAGE,
            len: 4096,
            flags: WRITE,
        };
        let chains: Vec<_> = (0..u64::from(SIZE))
            .map(|number| vec![one(number)])
            .collect();
        machine.offer(REPORTING, &chains);
    }),
    Load {
        counts_entries: false,
        ..load("reports of all memory", |machine| {
            machine.touch(PRIVATE, 2048);
            let all = Buffer {
                gpa: PRIVATE * PAGE,
                len: 8 << 20,
                flags: WRITE,
            };
            machine.offer(REPORTING, &vec![vec![all]; SIZE.into()]);
        })
    },
];

#[test]
fn a_guest_waits_for_no_more_than_two_turns_of_a_hostile_one() {
    let runtime = Runtime::inline().unwrap();
    for Load {
        what,
        kind,
        counts_entries,
        offer,
    } in LOADS
    {
        let (mut least, mut most_entries) = (Duration::MAX, 0);
        for _ in 0..3 {
            let mut hostile = Machine::new(&runtime, kind);
            let mut modest = Machine::new(&runtime, DeviceKind::VirtioBalloon);
            offer(&mut hostile);
            let list = modest.list(BUFFERS, PRIVATE..PRIVATE + 256);
            modest.offer(INFLATE, &[vec![list]]);
            let (before, start) = (hostile.entries(), processor_time());
            let turns = (1..).find(|_| {
                assert!(
                    runtime.turn(true),
                    "nothing to do, and the modest guest waits"
                );
                modest.is_served(INFLATE)
            });
            least = least.min(processor_time() - start);
            let entries = hostile.entries() - before;
            assert!(turns <= Some(2), "{what}: {turns:?} turns");
            most_entries = most_entries.max(entries);
            assert_ne!(hostile.device.state(), DeviceState::NeedsReset, "{what}");
        }
        println!("{what}: {least:?} for {most_entries} entries in between");
        assert!(
            !counts_entries || most_entries <= 2 * MAX_ENTRIES,
            "{what}: {most_entries} entries"
        );
        assert!(least < LIMIT, "{what}: {least:?}");
    }
}
