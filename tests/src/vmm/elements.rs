//! The VMM's half of a virtqueue: it pops chains, hands them to the library as elements, collects
//! completions and pushes them, as QEMU's virtqueue_pop() and virtqueue_push() do.
//!
//! It trusts its guest: hostile rings are for the library's own.
#![allow(unsafe_code, reason = "hands addresses of guest memory to the library")]

use super::device::Device;
use super::driver::Role;
use super::error::{Result, VmmError};
use super::eventfd::{EventFd, wait_any};
use super::guest::Guest;
use super::ram::GuestRam;
use super::vring::{DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Placement};
use aerostat::{aerostat_completion, aerostat_element};
use libc::iovec;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::JoinHandle;
use std::time::Duration;

/// One queue as the VMM pops it.
#[derive(Debug)]
struct Popped {
    index: u32,
    placement: Placement,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    next_avail: u16,
    next_used: u16,
}

/// The readable and the writable part of a chain: host addresses and lengths.
type Parts = [Vec<(usize, usize)>; 2];

/// A chain that was popped and not submitted yet.
#[derive(Debug)]
struct Waiting {
    token: u64,
    queue: u32,
    parts: Parts,
}

impl Popped {
    /// # Errors
    /// A buffer is not in one region of guest memory, which no driver of these tests does.
    fn pop(&mut self, ram: &GuestRam) -> Result<Option<(u16, Parts)>> {
        if ram.load_u16(self.placement.avail_index()) == self.next_avail {
            return Ok(None);
        }
        let head = ram.load_u16(self.placement.avail_entry(self.next_avail));
        self.next_avail = self.next_avail.wrapping_add(1);
        // Keeps kicks coming where they are suppressed by index; otherwise nobody reads it.
        ram.store_u16(self.placement.avail_event(), self.next_avail);
        let mut parts = Parts::default();
        let (mut table, mut index) = (self.placement.desc, head);
        loop {
            let at = table + DESC_BYTES * u64::from(index);
            let low = u64::from(ram.load_u32(at));
            let gpa = low | u64::from(ram.load_u32(at + 4)) << 32;
            let len = ram.load_u32(at + 8);
            let flags = ram.load_u16(at + 12);
            if flags & DESC_F_INDIRECT != 0 {
                (table, index) = (gpa, 0);
                continue;
            }
            let base = ram.host_address(gpa, u64::from(len));
            let base = base.ok_or(VmmError::Absent("memory that a descriptor names"))?;
            let piece = (base as usize, usize::try_from(len).unwrap_or(0));
            parts[usize::from(flags & DESC_F_WRITE != 0)].push(piece);
            if flags & DESC_F_NEXT == 0 {
                return Ok(Some((head, parts)));
            }
            index = ram.load_u16(at + 14);
        }
    }

    fn push(&mut self, ram: &GuestRam, head: u16, written: u32) {
        let entry = self.placement.used_entry(self.next_used);
        ram.write(entry, &u32::from(head).to_le_bytes());
        ram.write(entry + 4, &written.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
        ram.store_u16(self.placement.used_index(), self.next_used);
        fence(Ordering::SeqCst);
        // More interrupts than asked for are allowed (2.7.7).
        self.call.signal();
    }
}

/// An element that was popped and not completed, and the memory that its iovecs point into.
#[derive(Debug)]
struct Submitted {
    queue: u32,
    head: u16,
    _ram: GuestRam,
}

fn iovecs(part: &[(usize, usize)]) -> Vec<iovec> {
    let one = |(address, len): &(usize, usize)| iovec {
        iov_base: *address as *mut libc::c_void,
        iov_len: *len,
    };
    part.iter().map(one).collect()
}

/// All queues of a device that is handed elements.
#[derive(Debug)]
pub struct ElementQueues {
    device: Arc<Device>,
    queues: Vec<Popped>,
    completion_event: Arc<EventFd>,
    waiting: Vec<Waiting>,
    submitted: HashMap<u64, Submitted>,
    next_token: u64,
}

impl ElementQueues {
    /// Takes over a guest's queues, which were started as element queues.
    ///
    /// # Errors
    /// A queue has no index.
    pub fn new(guest: &Guest) -> Result<Self> {
        let mut found: Vec<(Role, Placement, Arc<EventFd>, Arc<EventFd>)> = Vec::new();
        for (role, queue) in guest.driver().queues() {
            let (kick, call) = (Arc::clone(&queue.kick), Arc::clone(&queue.call));
            found.push((role, queue.placement(), kick, call));
        }
        let mut queues = Vec::new();
        for (role, placement, kick, call) in found {
            queues.push(Popped {
                index: guest.index_of(role)?,
                placement,
                kick,
                call,
                next_avail: 0,
                next_used: 0,
            });
        }
        Ok(Self {
            device: Arc::clone(guest.device()),
            queues,
            completion_event: Arc::clone(&guest.completion_event),
            waiting: Vec::new(),
            submitted: HashMap::new(),
            next_token: 1,
        })
    }

    /// How many elements the device has.
    #[must_use]
    pub fn submitted(&self) -> usize {
        self.submitted.len()
    }

    /// Pops everything that is available and hands it over; returns how many.
    ///
    /// # Errors
    /// The device refuses them; they are handed over with the next call.
    pub fn submit_available(&mut self) -> Result<usize> {
        let ram = self.device.ram()?;
        for queue in &mut self.queues {
            while let Some((head, parts)) = queue.pop(&ram)? {
                let (token, queue) = (self.next_token, queue.index);
                self.next_token += 1;
                let _ram = ram.clone();
                self.submitted
                    .insert(token, Submitted { queue, head, _ram });
                self.waiting.push(Waiting {
                    token,
                    queue,
                    parts,
                });
            }
        }
        let vectors: Vec<[Vec<iovec>; 2]> = self
            .waiting
            .iter()
            .map(|waiting| waiting.parts.each_ref().map(|part| iovecs(part)))
            .collect();
        let elements = self.waiting.iter().zip(&vectors);
        let elements: Vec<aerostat_element> = elements
            .map(|(waiting, [readable, writable])| aerostat_element {
                token: waiting.token,
                readable: readable.as_ptr(),
                writable: writable.as_ptr(),
                n_readable: u32::try_from(readable.len()).unwrap_or(u32::MAX),
                n_writable: u32::try_from(writable.len()).unwrap_or(u32::MAX),
                queue: waiting.queue,
                flags: 0,
            })
            .collect();
        if !elements.is_empty() {
            // SAFETY: the iovecs point into memory that `submitted` keeps mapped until the
            // completion is collected. If this value goes before that, the device still keeps the
            // same memory, until it is reset or gets another table.
            unsafe { self.device.submit(&elements) }?;
            self.waiting.clear();
        }
        Ok(elements.len())
    }

    /// Collects completions and pushes them to the guest, but for those that were not served.
    ///
    /// # Errors
    /// The device does not answer.
    ///
    /// # Panics
    /// If the device completes what it was not given, or completes it twice (I2).
    pub fn collect(&mut self) -> Result<Vec<aerostat_completion>> {
        let mut all = Vec::new();
        let ram = self.device.ram()?;
        loop {
            let completions = self.device.completions()?;
            for completion in &completions {
                let token = completion.token;
                let known = self.submitted.remove(&token);
                assert!(known.is_some(), "completion {token} is not outstanding");
                let Submitted { queue, head, .. } =
                    known.ok_or(VmmError::Absent("element of this token"))?;
                assert_eq!(u32::from(completion.queue), queue, "another queue's");
                let served = completion.flags & aerostat::AEROSTAT_COMPLETION_UNSERVED == 0;
                let mut queues = self.queues.iter_mut();
                if let Some(queue) = queues.find(|popped| popped.index == queue && served) {
                    queue.push(&ram, head, completion.written_bytes);
                }
            }
            let last = completions.len() < 64;
            all.extend(completions);
            if last {
                return Ok(all);
            }
        }
    }

    /// Waits for completions, and collects them.
    ///
    /// # Errors
    /// None came in time, or the device does not answer.
    pub fn collect_within(&mut self, timeout: Duration) -> Result<Vec<aerostat_completion>> {
        if !self.completion_event.wait(timeout) {
            return Err(VmmError::TimedOut {
                what: "completions",
                millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            });
        }
        self.collect()
    }
}

/// A thread that serves a guest's element queues until this is dropped: QEMU's main loop.
#[derive(Debug)]
pub struct ElementPump {
    stopping: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ElementPump {
    /// Starts it.
    ///
    /// # Errors
    /// There are no descriptors or threads left.
    pub fn start(guest: &Guest) -> Result<Self> {
        let mut queues = ElementQueues::new(guest)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new()?);
        let (stop, waker) = (Arc::clone(&stopping), Arc::clone(&wake));
        let thread = std::thread::Builder::new()
            .name("vmm-loop".to_owned())
            .spawn(move || {
                let mut events = vec![waker, Arc::clone(&queues.completion_event)];
                events.extend(queues.queues.iter().map(|queue| Arc::clone(&queue.kick)));
                let polled: Vec<&EventFd> = events.iter().map(AsRef::as_ref).collect();
                while !stop.load(Ordering::Acquire) {
                    let submitted = queues.submit_available().map(drop);
                    let mut sleep = Duration::from_secs(3600);
                    let outcome = match submitted {
                        // The VM is stopped: its elements have to wait.
                        Err(error) if error.errno() == Some(libc::EBUSY) => {
                            sleep = Duration::from_millis(1);
                            Ok(())
                        }
                        other => other,
                    };
                    if let Err(error) = outcome.and_then(|()| queues.collect().map(drop)) {
                        eprintln!("the VMM's loop gives up: {error}");
                        return;
                    }
                    wait_any(&polled, sleep);
                    for event in &polled {
                        event.take();
                    }
                }
            })
            .map_err(|source| VmmError::Os {
                what: "cannot start the VMM's loop",
                source,
            })?;
        Ok(Self {
            stopping,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for ElementPump {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            // It told of its own failure.
            let _ = thread.join();
        }
    }
}
