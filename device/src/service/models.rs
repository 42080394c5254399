//! Models of what goes on between workers, the VMM's threads and the guest, played through by loom in
//! every order of threads that matters (`make loom`).
//!
//! The device is the real one, with its locks, atomics, channels and clock taken from `sync.rs`; so are
//! its rings, its memory, its eventfds and the system calls that discard. The threads of a model are its
//! workers. Whatever order they run in, in the end the host is idle: nothing may be left lying then.

#![allow(
    unsafe_code,
    clippy::arc_with_non_send_sync,
    reason = "maps memory for a guest; the threads of a model are coroutines of one thread"
)]

use crate::device::{Device, DeviceConfig, QueueConfig, QueuePosition, RingConfig};
use crate::discard::WriteBehind;
use crate::discard::probe::Capabilities;
use crate::memory::tests::anonymous_region;
use crate::memory::{Gpa, GuestMemory, HostSlice, Region};
use crate::ring::source::{Completion, Element};
use crate::runtime::Runtime;
use crate::sync::{Instant, step};
use loom::thread::{self, JoinHandle};
use memmap2::{MmapMut, MmapRaw};
use std::cell::Cell;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

const MUST_TELL_HOST: u64 = 1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;

/// Each queue has a page of its own: rings of four buffers, and lists of a page number each.
const PAGE: u64 = 4096;
const SIZE: u16 = 4;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const LISTS: u64 = 0xc00;
/// The page that goes into the balloon.
const GIVEN: u32 = 2;
const PAGES: u64 = 4;

/// What the guest's page holds before, and what the guest writes once it has it back.
const BEFORE: u8 = 1;
const WRITTEN: u8 = 7;

/// A guest's memory and what its drivers remember.
struct Guest {
    memory: Arc<GuestMemory>,
    kicks: [OwnedFd; 2],
    sent: [Cell<u16>; 2],
    event_idx: bool,
    /// Unmapped last.
    _mapping: MmapRaw,
}

fn eventfd() -> OwnedFd {
    // SAFETY: eventfd takes two integers, and what it returns is nobody else's.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
}

fn table(mapping: &MmapRaw) -> Arc<GuestMemory> {
    let region = Region {
        len_bytes: PAGES * PAGE,
        hva: mapping.as_mut_ptr() as usize,
        ..anonymous_region()
    };
    // SAFETY: the mapping outlives the device, and only atomic accesses are made to it.
    unsafe { GuestMemory::new(vec![region]) }.unwrap()
}

impl Guest {
    fn new(features: u64) -> Self {
        let mapping = MmapRaw::from(MmapMut::map_anon((PAGES * PAGE) as usize).unwrap());
        let guest = Self {
            memory: table(&mapping),
            kicks: [eventfd(), eventfd()],
            sent: Default::default(),
            event_idx: features & EVENT_IDX != 0,
            _mapping: mapping,
        };
        guest.write_page(BEFORE);
        guest
    }

    fn at(&self, gpa: u64, len: u64) -> HostSlice<'_> {
        self.memory.slice_prefix(Gpa(gpa), len).unwrap()
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.at(gpa, bytes.len() as u64).write(0, bytes);
    }

    fn get_u16(&self, gpa: u64) -> u16 {
        let mut bytes = [0; 2];
        self.at(gpa, 2).read(0, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Puts the page into the balloon or takes it out, by one more buffer, as a stock driver does; kicks
    /// if the device wants that.
    fn send(&self, queue: u16) {
        self.send_page(queue, GIVEN);
    }

    fn send_page(&self, queue: u16, page: u32) {
        let base = u64::from(queue) * PAGE;
        let sent = self.sent[usize::from(queue)].get();
        let slot = sent % SIZE;
        let list = base + LISTS + 4 * u64::from(slot);
        self.put(list, &page.to_le_bytes());
        let descriptor = base + 16 * u64::from(slot);
        self.put(descriptor, &list.to_le_bytes());
        self.put(descriptor + 8, &4u32.to_le_bytes());
        self.put(base + AVAIL + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        step();
        let next = sent.wrapping_add(1);
        self.put(base + AVAIL + 2, &next.to_le_bytes());
        fence(Ordering::SeqCst);
        self.sent[usize::from(queue)].set(next);
        step();
        let wanted = if self.event_idx {
            self.get_u16(base + USED + 4 + 8 * u64::from(SIZE)) == sent
        } else {
            self.get_u16(base + USED) == 0
        };
        if wanted {
            self.kick(queue);
        }
    }

    fn kick(&self, queue: u16) {
        step();
        let fd = &self.kicks[usize::from(queue)];
        write_one(fd);
    }

    fn used(&self, queue: u16) -> u16 {
        step();
        self.get_u16(u64::from(queue) * PAGE + USED + 2)
    }

    fn write_page(&self, value: u8) {
        step();
        self.put(u64::from(GIVEN) * PAGE, &[value; 16]);
    }

    fn page(&self) -> u8 {
        step();
        let mut bytes = [0; 16];
        self.at(u64::from(GIVEN) * PAGE, 16).read(0, &mut bytes);
        assert_eq!(bytes, [bytes[0]; 16]);
        bytes[0]
    }
}

fn write_one(fd: &OwnedFd) {
    use std::os::fd::AsRawFd;
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes 8 bytes of a live array to an open descriptor.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// A host with one device.
struct Host {
    device: Device,
    runtime: Arc<Runtime>,
    guest: Guest,
}

impl Host {
    /// An active device with rings.
    fn new(capabilities: &Arc<Capabilities>, features: u64) -> Arc<Self> {
        let host = Self::with_memory(capabilities, features);
        for queue in [INFLATE, DEFLATE] {
            let base = u64::from(queue) * PAGE;
            let ring = RingConfig {
                desc: Gpa(base),
                avail: Gpa(base + AVAIL),
                used: Gpa(base + USED),
                kick: host.guest.kicks[usize::from(queue)].try_clone().unwrap(),
                call: None,
                position: QueuePosition::SPLIT_START,
            };
            let config = QueueConfig {
                size: SIZE,
                ring: Some(ring),
            };
            host.device.start_queue(queue, config).unwrap();
        }
        host.device.activate().unwrap();
        while host.runtime.turn(true) {}
        host
    }

    fn with_memory(capabilities: &Arc<Capabilities>, features: u64) -> Arc<Self> {
        Instant::start_again();
        let runtime = Runtime::modelled(Arc::clone(capabilities));
        let device = Device::new(&runtime, DeviceConfig::default()).unwrap();
        device.set_features(features | VERSION_1).unwrap();
        let guest = Guest::new(features);
        device.set_memory(Arc::clone(&guest.memory)).unwrap();
        if features & MUST_TELL_HOST != 0 {
            // No target is set, so all that comes is flushed as soon as there is a worker.
            device.set_write_behind(WriteBehind {
                limit_bytes: 1 << 20,
                delay: Duration::from_secs(3600),
            });
        }
        Arc::new(Self {
            device,
            runtime,
            guest,
        })
    }

    /// A worker that does `pieces` pieces of work, and then something else.
    fn worker(self: &Arc<Self>, pieces: u32) -> JoinHandle<()> {
        self.thread(move |host| {
            for _ in 0..pieces {
                host.runtime.turn(true);
            }
        })
    }

    fn thread(self: &Arc<Self>, body: impl FnOnce(&Self) + 'static) -> JoinHandle<()> {
        let host = Arc::clone(self);
        thread::spawn(move || body(&host))
    }

    /// Works until there is nothing to do, or `done`.
    fn work_until(&self, done: impl Fn() -> bool) {
        while !done() {
            if !self.runtime.turn(true) {
                // What is still to come is with another worker.
                thread::yield_now();
            }
        }
    }

    /// When all other threads are gone: nothing may be left lying.
    fn settle(&self) {
        while self.runtime.turn(true) {}
        for queue in [INFLATE, DEFLATE] {
            let sent = self.guest.sent[usize::from(queue)].get();
            assert_eq!(
                self.guest.used(queue),
                sent,
                "queue {queue} has a buffer that nobody serves"
            );
        }
        self.device.flush();
        self.check_books();
    }

    fn check_books(&self) {
        let flow = self.device.counters().balloon;
        assert_eq!(flow.pending_bytes, 0, "pending behind a barrier");
        assert_eq!(
            flow.requested_bytes,
            flow.discarded_bytes
                + flow.withdrawn_bytes
                + flow.skipped_duplicate_bytes
                + flow.skipped_inhibited_bytes
        );
    }
}

/// Runs `body` in every order of its threads that takes no more than `preemptions` switches in the middle
/// of something.
fn model(preemptions: usize, body: impl Fn(&Arc<Capabilities>) + Sync + Send + 'static) {
    let capabilities = Arc::new(Capabilities::probe().unwrap());
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 20_000;
    model.check(move || body(&capabilities));
}

/// A guest whose buffers come one soon after the other, while a worker looks for more of them: they are
/// served whether the guest was asked to kick or not.
fn buffers_of_a_busy_guest(features: u64) {
    model(2, move |capabilities| {
        let host = Host::new(capabilities, features);
        // All queues are looked at, soon after they were looked at for the first time: the worker below stays
        // with both for a while.
        host.device.pause().unwrap();
        host.device.resume().unwrap();
        let worker = host.worker(1);
        host.guest.send(INFLATE);
        host.guest.send(INFLATE);
        host.guest.send(DEFLATE);
        worker.join().unwrap();
        host.settle();
    });
}

#[test]
fn no_buffer_is_left_lying_by_a_worker_that_looked_for_more() {
    buffers_of_a_busy_guest(0);
}

#[test]
fn no_buffer_is_left_lying_by_a_worker_that_looked_for_more_with_event_idx() {
    buffers_of_a_busy_guest(EVENT_IDX);
}

/// I1: a deflate is acknowledged behind the flush that has its page, whoever does which.
#[test]
fn what_the_guest_writes_after_its_deflate_is_not_discarded() {
    model(3, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let worker = host.worker(3);
        host.work_until(|| host.guest.used(INFLATE) == 1);
        host.guest.send(DEFLATE);
        host.work_until(|| host.guest.used(DEFLATE) == 1);
        host.guest.write_page(WRITTEN);
        worker.join().unwrap();
        host.settle();
        assert_eq!(host.guest.page(), WRITTEN);
    });
}

/// What came while a flush was under way is flushed after it, by itself.
#[test]
fn what_waits_behind_a_flush_is_discarded_without_another_kick() {
    model(3, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let worker = host.worker(4);
        host.work_until(|| host.guest.used(INFLATE) == 1);
        // The pool has one worker, so this one has to wait if the first is still being discarded.
        host.guest.send_page(INFLATE, GIVEN + 1);
        for _ in 0..4 {
            host.runtime.turn(true);
            thread::yield_now();
        }
        worker.join().unwrap();
        while host.runtime.turn(true) {}
        host.check_books();
        host.settle();
    });
}

/// I2: nothing is discarded behind a reset, and the guest may use its pages at once.
#[test]
fn nothing_is_discarded_behind_a_reset() {
    model(3, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let workers = [host.worker(3), host.worker(2)];
        host.device.reset();
        host.check_books();
        host.guest.write_page(WRITTEN);
        let used = host.guest.used(INFLATE);
        for worker in workers {
            worker.join().unwrap();
        }
        while host.runtime.turn(true) {}
        assert_eq!(host.guest.page(), WRITTEN);
        assert_eq!(
            host.guest.used(INFLATE),
            used,
            "a ring was written to behind a reset"
        );
    });
}

/// I2: a paused device is quiet, and when it goes on no kick of meanwhile is lost.
#[test]
fn a_pause_is_quiet_and_loses_no_kick() {
    model(2, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let worker = host.worker(3);
        let vmm = host.thread(|host| {
            host.device.pause().unwrap();
            host.check_books();
            let used = [INFLATE, DEFLATE].map(|queue| host.guest.used(queue));
            let page = host.guest.page();
            thread::yield_now();
            assert_eq!(used, [INFLATE, DEFLATE].map(|queue| host.guest.used(queue)));
            assert_eq!(page, host.guest.page());
            host.device.resume().unwrap();
        });
        host.guest.send(DEFLATE);
        worker.join().unwrap();
        vmm.join().unwrap();
        host.settle();
    });
}

/// From the return of `inhibit` on nothing is discarded, and nothing is pending.
#[test]
fn nothing_is_discarded_behind_an_inhibit() {
    model(3, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let worker = host.worker(3);
        host.device.inhibit();
        host.check_books();
        let page = host.guest.page();
        worker.join().unwrap();
        host.settle();
        assert_eq!(host.guest.page(), page);
    });
}

/// A VMM may unmap the memory of the old table once it has set another.
#[test]
fn no_use_of_the_old_memory_table_is_left_when_another_is_set() {
    model(3, |capabilities| {
        let host = Host::new(capabilities, MUST_TELL_HOST);
        host.guest.send(INFLATE);
        let worker = host.worker(3);
        let other = table(&host.guest._mapping);
        host.device.set_memory(other).unwrap();
        assert_eq!(
            Arc::strong_count(&host.guest.memory),
            1,
            "the old table is in use"
        );
        worker.join().unwrap();
        host.settle();
    });
}

/// Each element completes exactly once, on whichever side of a barrier it was handed over.
fn elements_across(barrier: fn(&Device)) {
    model(2, move |capabilities| {
        let host = Host::with_memory(capabilities, 0);
        for queue in [INFLATE, DEFLATE] {
            let config = QueueConfig {
                size: 0,
                ring: None,
            };
            host.device.start_queue(queue, config).unwrap();
        }
        host.device.activate().unwrap();
        // A guest that owes pages is worth a longer look: its worker may be waiting for more elements.
        host.device.set_target_bytes(PAGE).unwrap();
        while host.runtime.turn(true) {}
        let element = |token| Element {
            queue: INFLATE,
            token,
            ..Element::default()
        };
        let submitter = host.thread(move |host| {
            // Refused when the device is not active.
            for token in 1..3 {
                let submitted = if token == 1 {
                    host.device.submit(vec![element(token)])
                } else {
                    host.device.submit_and_serve(vec![element(token)])
                };
                if submitted.is_err() {
                    host.guest.sent[usize::from(token as u16 - 1)].set(1);
                }
            }
        });
        let worker = host.worker(2);
        barrier(&host.device);
        submitter.join().unwrap();
        worker.join().unwrap();
        while host.runtime.turn(true) {}
        let mut completions = Vec::new();
        host.device.completions(10, &mut completions);
        for token in 1..3u64 {
            let refused = host.guest.sent[token as usize - 1].get() == 1;
            let of_token = |completion: &&Completion| completion.token == token;
            let completed = completions.iter().filter(of_token).count();
            assert_eq!(completed, usize::from(!refused), "element {token}");
        }
    });
}

/// One that comes while another is served is served, too.
#[test]
fn elements_complete_once_without_a_barrier() {
    elements_across(|_| {});
}

#[test]
fn elements_complete_once_across_a_pause() {
    elements_across(|device| {
        device.pause().unwrap();
        device.resume().unwrap();
    });
}

#[test]
fn elements_complete_once_across_a_reset() {
    elements_across(Device::reset);
}
