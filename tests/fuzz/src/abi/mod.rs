//! Calls of the C interface in any order, with arguments that are right, wrong or absent, as far as C can
//! pass them at all: handles are alive or NULL, pointers valid or NULL, everything else is anything.
//!
//! What is looked at: each answer is one of the errnos of the header, with a message; no call panics;
//! outputs are written as far as their size says and not a byte further; books balance; elements come
//! back once, and all of them.
#![allow(unsafe_code, reason = "calls the C interface")]

mod arguments;
mod setup;

use aerostat::*;
use arbitrary::{Arbitrary, Unstructured};
use arguments::{Call, Fd, Size, checked, with_room};
use libc::iovec;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;

/// Guest memory: this much private, and as much in a file.
const MEMORY_BYTES: usize = 64 << 10;
/// Handles of each kind.
const SLOTS: usize = 2;
/// The most calls of a script.
const MAX_CALLS: usize = 64;
struct Host {
    runtime: *mut aerostat_runtime,
    memory: usize,
    file: OwnedFd,
    events: [OwnedFd; 2],
    null: OwnedFd,
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// Plays the calls.
///
/// # Panics
/// If an answer, an output or the books are wrong.
pub fn run(bytes: &[u8]) {
    let Ok(calls) = Vec::<Call>::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(Host::new);
        let mut play = Play::new(host);
        for call in calls.iter().take(MAX_CALLS) {
            play.call(call);
        }
        play.end();
    });
}

impl Host {
    fn new() -> Self {
        let config = aerostat_runtime_config {
            size: 16,
            workers_per_node: 1,
            ..Default::default()
        };
        let mut runtime = null_mut();
        // SAFETY: pointers to this function's variables.
        checked(unsafe { aerostat_runtime_new(&raw const config, &raw mut runtime) });
        assert!(!runtime.is_null(), "a runtime");
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place.
        let memory = unsafe { mmap_anonymous(null_mut(), MEMORY_BYTES, both, MapFlags::PRIVATE) };
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&file, MEMORY_BYTES as u64).expect("room in a memfd");
        Self {
            runtime,
            memory: memory.expect("memory") as usize,
            file,
            events: [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd")),
            null: std::fs::File::open("/dev/null").expect("/dev/null").into(),
        }
    }

    fn fd(&self, fd: Fd) -> c_int {
        match fd {
            Fd::Event => self.events[0].as_raw_fd(),
            Fd::Other => self.events[1].as_raw_fd(),
            Fd::None => -1,
            Fd::File => self.file.as_raw_fd(),
            Fd::Null => self.null.as_raw_fd(),
            Fd::Closed => 1 << 20,
        }
    }
}

struct Play<'a> {
    host: &'a Host,
    devices: [*mut aerostat_device; SLOTS],
    memories: [*mut aerostat_memory; SLOTS],
    /// Tokens on their way, by device.
    elements: [BTreeSet<u64>; SLOTS],
    token: u64,
    /// What was saved last.
    saved: Vec<u8>,
}

impl<'a> Play<'a> {
    fn new(host: &'a Host) -> Self {
        let mut play = Self {
            host,
            devices: [null_mut(); SLOTS],
            memories: [null_mut(); SLOTS],
            elements: Default::default(),
            token: 1,
            saved: Vec::new(),
        };
        play.make_device(0, Size::Right, 0, u64::MAX, [Fd::Event, Fd::Other], 0);
        play
    }

    /// A handle: NULL for one choice in sixteen.
    fn device(&self, choice: u8) -> *mut aerostat_device {
        if choice >= 0xf0 {
            null_mut()
        } else {
            self.devices[usize::from(choice) % SLOTS]
        }
    }

    #[allow(
        clippy::undocumented_unsafe_blocks,
        reason = "one argument for all of them"
    )]
    fn call(&mut self, call: &Call) {
        // SAFETY: (all calls in this function) handles are alive or NULL, pointers are to variables of
        // this function that are as large as is said, or NULL.
        match call {
            Call::SetUp { device, elements } => self.set_up(*device, *elements),
            Call::Runtime {
                size,
                flags,
                workers,
                reserved,
                null,
            } => {
                let config = aerostat_runtime_config {
                    size: size.of(16).min(16),
                    flags: (*flags / 128).into(),
                    workers_per_node: if *workers >= 0xf0 { 65 } else { 1 },
                    reserved: (*reserved / 128).into(),
                };
                let mut runtime = null_mut();
                let place = if *null == 1 {
                    null_mut()
                } else {
                    &raw mut runtime
                };
                let config = if *null == 2 {
                    std::ptr::null()
                } else {
                    &raw const config
                };
                checked(unsafe { aerostat_runtime_new(config, place) });
                unsafe { aerostat_runtime_destroy(&raw mut runtime) };
                assert!(runtime.is_null(), "destroyed");
            }
            Call::Device {
                device,
                size,
                flags,
                features,
                fds,
                null,
            } => {
                self.make_device(*device, *size, flags / 128, *features, *fds, *null);
            }
            Call::Destroy(device) => self.destroy(usize::from(*device) % SLOTS),
            Call::Memory {
                memory,
                regions,
                null,
            } => self.make_memory(*memory, regions, *null),
            Call::DestroyMemory(memory) => {
                let slot = &mut self.memories[usize::from(*memory) % SLOTS];
                unsafe { aerostat_memory_destroy(slot) };
                assert!(slot.is_null(), "destroyed");
            }
            Call::SetMemory(device, memory) => {
                let memory = self.memories[usize::from(*memory) % SLOTS];
                checked(unsafe { aerostat_device_set_memory(self.device(*device), memory) });
            }
            Call::SetFeatures(device, choice, features) => {
                let mut offered = 0;
                let handle = self.device(*device);
                checked(unsafe { aerostat_device_offered_features(handle, &raw mut offered) });
                let features = if choice % 4 == 0 {
                    *features
                } else {
                    features & offered
                };
                checked(unsafe { aerostat_device_set_features(handle, features) });
                let mut now = 0;
                checked(unsafe { aerostat_device_features(handle, &raw mut now) });
                assert_eq!(now & !offered, 0, "only what was offered");
            }
            Call::Simple(device, what) => self.simple(*device, *what),
            Call::Start {
                device,
                index,
                size,
                flags,
                entries,
                at,
                next,
                fds,
            } => {
                let page = |at: u32| u64::from(at % 20) * 4096 + u64::from(at >> 28);
                let config = aerostat_queue_config {
                    size: size.of(48).min(48),
                    flags: if *flags < 200 {
                        u32::from(*flags & 1)
                    } else {
                        u32::from(*flags)
                    },
                    queue_size: if entries % 4 == 0 {
                        *entries
                    } else {
                        1 << (entries % 9)
                    },
                    next_avail: if next[0] % 2 == 0 { 0 } else { next[0] },
                    next_used: if next[1] % 2 == 0 { 0 } else { next[1] },
                    reserved: 0,
                    kick_fd: self.host.fd(fds[0]),
                    call_fd: self.host.fd(fds[1]),
                    desc_gpa: page(at[0]),
                    avail_gpa: page(at[1]),
                    used_gpa: page(at[2]),
                };
                let index = u32::from(*index) % 6;
                let device = self.device(*device);
                checked(unsafe { aerostat_device_start_queue(device, index, &raw const config) });
            }
            Call::Stop(device, index, size) => {
                let (device, index) = (self.device(*device), u32::from(*index) % 6);
                with_room(*size, |out| unsafe {
                    aerostat_device_stop_queue(device, index, out)
                });
            }
            Call::Interrupt(device, index, fd) => {
                let (index, fd) = (u32::from(*index) % 6, self.host.fd(*fd));
                checked(unsafe { aerostat_device_set_queue_call(self.device(*device), index, fd) });
            }
            Call::Submit(device, elements, null) => self.submit(*device, elements, *null),
            Call::Completions(device, max) => self.completions(*device, *max),
            Call::ReadConfig(device, offset, len) => {
                let mut data = [0xa5; 256];
                let (to, len) = (data.as_mut_ptr().cast(), usize::from(*len));
                let device = self.device(*device);
                checked(unsafe { aerostat_device_read_config(device, *offset, to, len) });
                assert!(
                    data[len..].iter().all(|byte| *byte == 0xa5),
                    "written behind its end"
                );
            }
            Call::WriteConfig(device, offset, data) => {
                let (from, len) = (data.0.as_ptr().cast(), data.0.len());
                let device = self.device(*device);
                checked(unsafe {
                    aerostat_device_write_config(device, (*offset).into(), from, len)
                });
            }
            Call::Target(device, bytes) => {
                checked(unsafe { aerostat_device_set_target(self.device(*device), *bytes) });
            }
            Call::Query(device, null, size) => {
                let device = self.device(*device);
                if *null == 0 {
                    checked(unsafe { aerostat_device_query(device, null_mut()) });
                }
                with_room(*size, |out| unsafe { aerostat_device_query(device, out) });
            }
            Call::Counters(device, node, size) => self.counters(*device, *node, *size),
            Call::Stats(device, ask, size) => {
                let (device, wait) = (self.device(*device), u32::from(*ask));
                with_room(*size, |out| unsafe {
                    aerostat_device_guest_stats(device, wait, out)
                });
            }
            Call::Hints(device, what, limit) => self.hints(*device, *what, *limit),
            Call::WriteBehind(device, limit, delay) => {
                let device = self.device(*device);
                checked(unsafe { aerostat_device_set_write_behind(device, *limit, *delay) });
            }
            Call::History(device, since, max) => self.history(*device, *since, *max),
            Call::Save(device, room, null) => self.save(*device, *room, *null),
            Call::Restore(device, edits, seal) => {
                let state = crate::saved::tampered(&self.saved, &edits.0, seal % 8 != 0);
                let (from, len) = (state.as_ptr().cast(), state.len());
                let from = if *seal == 255 { std::ptr::null() } else { from };
                let device = self.device(*device);
                checked(unsafe { aerostat_device_restore(device, from, len) });
            }
            Call::Position(device, index, size) => {
                let (device, index) = (self.device(*device), u32::from(*index) % 6);
                with_room(*size, |out| unsafe {
                    aerostat_device_saved_position(device, index, out)
                });
            }
            Call::Poke(at, bytes) => {
                for (place, byte) in (usize::from(*at)..MEMORY_BYTES).zip(&bytes.0) {
                    // The guest, on another processor so to speak.
                    unsafe { ((self.host.memory + place) as *mut u8).write_volatile(*byte) };
                }
            }
            Call::Kick => {
                let _ = rustix::io::write(&self.host.events[0], &1u64.to_ne_bytes());
            }
            Call::NodeTargets(device, bytes, count) => {
                let bytes = bytes.map(u64::from);
                let count = usize::from(*count % 4).min(bytes.len());
                let from = if *bytes.first().unwrap_or(&0) == 1 {
                    std::ptr::null()
                } else {
                    bytes.as_ptr()
                };
                let device = self.device(*device);
                checked(unsafe { aerostat_device_set_node_targets(device, from, count) });
            }
            Call::QueryNode(device, node, size) => {
                let (device, node) = (self.device(*device), u32::from(*node));
                with_room(*size, |out| unsafe {
                    aerostat_device_query_node(device, node, out)
                });
            }
            Call::Deflate(device, flags) => {
                let device = self.device(*device);
                checked(unsafe { aerostat_device_set_deflate(device, (*flags).into()) });
            }
            Call::ExtraGrant(device, bytes) => {
                let device = self.device(*device);
                checked(unsafe { aerostat_device_set_extra_grant(device, (*bytes).into()) });
            }
            Call::Vmware(device, command, arguments, null) => {
                let (mut status, mut result) = (0, 0);
                let status = if *null == 1 {
                    null_mut()
                } else {
                    &raw mut status
                };
                let result = if *null == 2 {
                    null_mut()
                } else {
                    &raw mut result
                };
                let [first, second] = arguments.map(u64::from);
                let (device, command) = (self.device(*device), u64::from(command % 16));
                checked(unsafe {
                    aerostat_vmware_command(device, command, first, second, status, result)
                });
            }
            Call::Discard(memory, ranges, null) => self.discard(*memory, &ranges.0, *null),
            Call::Cgroup(device, what, size) => {
                let device = self.device(*device);
                let nowhere = c"/sys/fs/cgroup/aerostat-is-not-there".as_ptr();
                match what % 3 {
                    0 => {
                        let path = if *what == 0 {
                            std::ptr::null()
                        } else {
                            nowhere
                        };
                        let answer =
                            checked(unsafe { aerostat_device_attach_cgroup(device, path) });
                        assert!(answer < 0, "attached to what is not there");
                    }
                    1 => drop(checked(unsafe { aerostat_device_detach_cgroup(device) })),
                    _ => {
                        with_room(*size, |out| unsafe {
                            aerostat_device_query_cgroup(device, out)
                        });
                    }
                }
            }
        }
    }

    /// Range mode: what is answered for each range agrees with how many are free.
    fn discard(&mut self, memory: u8, ranges: &[(u16, u16)], null: u8) {
        const UNTOUCHED: c_int = 77;
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(first, pages)| aerostat_range {
                gpa: u64::from(*first % 260) * 4096 + u64::from(*first >> 15),
                len_bytes: u64::from(*pages % 20) * 4096 + u64::from(*pages >> 15),
            })
            .collect();
        let mut results = vec![UNTOUCHED; ranges.len()];
        let memory = self.memories[usize::from(memory) % SLOTS];
        let from = if null == 1 {
            std::ptr::null()
        } else {
            ranges.as_ptr()
        };
        let into = if null >= 128 {
            null_mut()
        } else {
            results.as_mut_ptr()
        };
        // SAFETY: alive or NULL; as many ranges and results as are said, or NULL.
        let answer = checked(unsafe {
            aerostat_runtime_discard(self.host.runtime, memory, from, ranges.len(), into)
        });
        if answer < 0 || into.is_null() {
            assert!(results.iter().all(|result| *result == UNTOUCHED));
            return;
        }
        let free = results.iter().filter(|result| **result == 0).count();
        assert_eq!(usize::try_from(answer), Ok(free), "{results:?}");
        let known = [
            libc::EINVAL,
            libc::EFAULT,
            libc::EROFS,
            libc::EBUSY,
            libc::EAGAIN,
            libc::EIO,
        ];
        let is_known = |result: &c_int| *result == 0 || known.contains(&-result);
        assert!(results.iter().all(is_known), "{results:?}");
    }

    fn simple(&mut self, device: u8, what: u8) {
        let handle = self.device(device);
        // SAFETY: alive or NULL.
        let answer = unsafe {
            match what % 10 {
                0 => aerostat_device_activate(handle),
                1 => aerostat_device_pause(handle),
                2 => aerostat_device_resume(handle),
                3 => aerostat_device_reset(handle),
                4 => aerostat_device_inhibit(handle),
                5 => aerostat_device_uninhibit(handle),
                6 => aerostat_device_state(handle),
                7 => aerostat_device_flush(handle),
                8 => aerostat_device_reset_balloon(handle),
                _ => aerostat_device_set_stats_interval(handle, u32::from(what) * 100),
            }
        };
        if checked(answer) == 0 && what % 10 == 3 {
            for _ in 0..=u8::MAX {
                self.completions(device, u8::MAX);
            }
            let left = &self.elements[usize::from(device) % SLOTS];
            assert!(left.is_empty(), "elements are lost: {left:?}");
        }
    }

    fn submit(&mut self, device: u8, parts: &[(u8, u16, u16, bool)], null: bool) {
        let iovecs: Vec<_> = parts
            .iter()
            .take(16)
            .map(|(_, at, len, _)| {
                let at = usize::from(*at);
                let iov_base = (self.host.memory + at) as *mut c_void;
                iovec {
                    iov_base,
                    iov_len: usize::from(*len).min(MEMORY_BYTES - at),
                }
            })
            .collect();
        let elements: Vec<_> = parts
            .iter()
            .zip(&iovecs)
            .map(|((queue, _, _, writable), iovec)| {
                self.token += 1;
                let iovec = std::ptr::from_ref(iovec);
                let (readable, writable) = if *writable {
                    (std::ptr::null(), iovec)
                } else {
                    (iovec, std::ptr::null())
                };
                aerostat_element {
                    token: self.token,
                    readable,
                    writable,
                    n_readable: u32::from(!readable.is_null()),
                    n_writable: u32::from(!writable.is_null()),
                    queue: u32::from(queue % 6),
                    flags: u32::from(*queue == 255),
                }
            })
            .collect();
        let from = if null {
            std::ptr::null()
        } else {
            elements.as_ptr()
        };
        let handle = self.device(device);
        // SAFETY: as many elements as are said, or NULL; their memory stays mapped.
        let answer = checked(unsafe { aerostat_device_submit(handle, from, elements.len()) });
        if answer == 0 {
            let tokens = elements.iter().map(|element| element.token);
            self.elements[usize::from(device) % SLOTS].extend(tokens);
        }
    }

    fn completions(&mut self, device: u8, max: u8) {
        let mut out = [aerostat_completion::default(); 256];
        let handle = self.device(device);
        // SAFETY: room for as many as are said.
        let answer = unsafe { aerostat_device_completions(handle, out.as_mut_ptr(), max.into()) };
        let count = usize::try_from(checked(answer)).unwrap_or(0);
        assert!(count <= usize::from(max), "more completions than asked for");
        for completion in &out[..count] {
            let known = self.elements[usize::from(device) % SLOTS].remove(&completion.token);
            assert!(known, "{completion:?} came twice, or was never submitted");
        }
    }

    fn counters(&mut self, device: u8, node: i8, size: Size) {
        let device = self.device(device);
        // SAFETY: as large as it says.
        with_room(size, |out| unsafe {
            aerostat_device_node_counters(device, node.into(), out)
        });
        // SAFETY: as above.
        let room = with_room(Size::Right, |out| unsafe {
            aerostat_device_counters(device, out)
        });
        let Some(mut room) = room else { return };
        // SAFETY: it was filled in.
        let counters = unsafe { room.place::<aerostat_counters>().read() };
        for flow in [counters.balloon, counters.report] {
            let skipped = [
                flow.skipped_inhibited_bytes,
                flow.skipped_out_of_range_bytes,
                flow.skipped_duplicate_bytes,
                flow.skipped_pinned_bytes,
                flow.skipped_partial_bytes,
                flow.skipped_failed_bytes,
                flow.skipped_over_target_bytes,
                flow.skipped_late_bytes,
            ];
            let rest = [
                flow.discarded_bytes,
                flow.pending_bytes,
                flow.held_bytes,
                flow.withdrawn_bytes,
            ];
            let sum = skipped
                .iter()
                .chain(&rest)
                .fold(0u64, |sum, part| sum.wrapping_add(*part));
            assert_eq!(
                flow.requested_bytes.wrapping_add(flow.reopened_bytes),
                sum,
                "{flow:?}"
            );
        }
    }

    fn history(&mut self, device: u8, since: u64, max: u8) {
        let mut out = [aerostat_history_entry::default(); 256];
        let handle = self.device(device);
        let place = out.as_mut_ptr();
        // SAFETY: room for as many as are said.
        let answer = checked(unsafe { aerostat_device_history(handle, since, place, max.into()) });
        let count = usize::try_from(answer).unwrap_or(0);
        assert!(count <= usize::from(max), "more entries than asked for");
        let numbers = out[..count].windows(2);
        let mut numbers = numbers.map(|two| two[0].sequence < two[1].sequence);
        assert!(numbers.all(|ascending| ascending), "in order");
    }

    /// Saves into as much room as is said; what fits is kept, to be restored.
    fn save(&mut self, device: u8, room: u16, null: u8) {
        let handle = self.device(device);
        let mut state = vec![0xa5; usize::from(room) % 512 + 1];
        let (room, mut needed) = (state.len() - 1, 0);
        let place = if null == 1 {
            null_mut()
        } else {
            state.as_mut_ptr().cast()
        };
        let out = if null == 2 {
            null_mut()
        } else {
            &raw mut needed
        };
        // SAFETY: room for as many bytes as are said, or NULL.
        let answer = checked(unsafe { aerostat_device_save(handle, place, room, out) });
        assert_eq!(state[room], 0xa5, "written behind its end");
        if answer >= 0 && null != 1 && null != 2 {
            assert!(needed <= room, "more than there is room for");
            state.truncate(needed);
            self.saved = state;
        }
    }

    fn hints(&mut self, device: u8, what: u8, limit: u32) {
        let device = self.device(device);
        let mut ranges = [aerostat_range::default(); 8];
        let mut state = 0;
        // SAFETY: alive or NULL; room for as many ranges as are said, or NULL.
        checked(unsafe {
            match what % 4 {
                0 => aerostat_device_start_hints(device, limit),
                1 => aerostat_device_finish_hints(device),
                2 => aerostat_device_take_hints(device, null_mut(), 8, &raw mut state),
                _ => aerostat_device_take_hints(device, ranges.as_mut_ptr(), 8, &raw mut state),
            }
        });
    }

    fn end(mut self) {
        for index in 0..SLOTS {
            self.simple(u8::try_from(index).unwrap_or(0), 3);
            self.destroy(index);
            // SAFETY: alive or NULL, and used no more.
            unsafe { aerostat_memory_destroy(&raw mut self.memories[index]) };
        }
    }
}
