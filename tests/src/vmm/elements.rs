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

/// The readable and the writable part of a chain.
type Iovecs = [Vec<iovec>; 2];

impl Popped {
    fn pop(&mut self, ram: &GuestRam) -> Option<(u16, Iovecs)> {
        if ram.load_u16(self.placement.avail_index()) == self.next_avail {
            return None;
        }
        let head = ram.load_u16(self.placement.avail_entry(self.next_avail));
        self.next_avail = self.next_avail.wrapping_add(1);
        let event_idx_keeps_kicks_coming = self.placement.avail_event();
        ram.store_u16(event_idx_keeps_kicks_coming, self.next_avail);
        let mut parts = Iovecs::default();
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
            let base = ram.host_address(gpa, u64::from(len))?;
            parts[usize::from(flags & DESC_F_WRITE != 0)].push(iovec {
                iov_base: base.cast(),
                iov_len: usize::try_from(len).unwrap_or(0),
            });
            if flags & DESC_F_NEXT == 0 {
                return Some((head, parts));
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

/// All queues of a device that is handed elements.
#[derive(Debug)]
pub struct ElementQueues {
    device: Arc<Device>,
    ram: Arc<GuestRam>,
    queues: Vec<Popped>,
    completion_event: Arc<EventFd>,
    /// Tokens of elements that the device has, with queue and head.
    submitted: HashMap<u64, (u32, u16)>,
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
            ram: Arc::clone(guest.ram()),
            queues,
            completion_event: Arc::clone(&guest.completion_event),
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
    /// The device refuses them; they count as popped.
    pub fn submit_available(&mut self) -> Result<usize> {
        let mut popped = Vec::new();
        for queue in &mut self.queues {
            while let Some((head, parts)) = queue.pop(&self.ram) {
                popped.push((queue.index, head, parts));
            }
        }
        let mut elements = Vec::new();
        for (queue, head, [readable, writable]) in &popped {
            let token = self.next_token;
            self.next_token += 1;
            self.submitted.insert(token, (*queue, *head));
            let count = |part: &Vec<iovec>| u32::try_from(part.len()).unwrap_or(u32::MAX);
            elements.push(aerostat_element {
                token,
                readable: readable.as_ptr(),
                writable: writable.as_ptr(),
                n_readable: count(readable),
                n_writable: count(writable),
                queue: *queue,
                flags: 0,
            });
        }
        if !elements.is_empty() {
            // SAFETY: the iovecs point into the guest's memory, which `self.ram` keeps mapped; this
            // value is dropped after the device was reset or has completed them, or with a device
            // whose last handle goes before its memory does.
            unsafe { self.device.submit(&elements) }?;
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
        loop {
            let completions = self.device.completions()?;
            for completion in &completions {
                let token = completion.token;
                let known = self.submitted.remove(&token);
                assert!(known.is_some(), "completion {token} is not outstanding");
                let (index, head) = known.ok_or(VmmError::Absent("element of this token"))?;
                assert_eq!(u32::from(completion.queue), index, "another queue's");
                let served = completion.flags & aerostat::AEROSTAT_COMPLETION_UNSERVED == 0;
                let mut queues = self.queues.iter_mut();
                if let Some(queue) = queues.find(|queue| queue.index == index && served) {
                    queue.push(&self.ram, head, completion.written_bytes);
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
                    let outcome = queues.submit_available().and_then(|_| queues.collect());
                    if let Err(error) = outcome {
                        eprintln!("the VMM's loop gives up: {error}");
                        return;
                    }
                    wait_any(&polled, Duration::from_secs(3600));
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
