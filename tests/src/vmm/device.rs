//! Handles of the library, with errors as values. One method is one call of the C ABI.
#![allow(unsafe_code, reason = "calls C functions")]

use super::error::{Result, VmmError};
use super::library::{Symbols, symbols};
use super::ram::GuestRam;
use aerostat::{
    AEROSTAT_KIND_VIRTIO_BALLOON, aerostat_balloon, aerostat_cgroup_account, aerostat_completion,
    aerostat_counters, aerostat_device, aerostat_device_config, aerostat_element,
    aerostat_guest_stats, aerostat_history_entry, aerostat_memory, aerostat_queue_config,
    aerostat_queue_position, aerostat_range, aerostat_runtime, aerostat_runtime_config,
};
use parking_lot::Mutex;
use std::ffi::{CStr, CString, c_int};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// Where a device stands, as `enum aerostat_state` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// New or reset.
    Configuring,
    /// Serving.
    Active,
    /// Set up, not serving.
    Paused,
    /// A ring broke.
    NeedsReset,
}

/// A call's value, or the error that the library explains.
fn checked(symbols: &Symbols, call: &'static str, value: c_int) -> Result<c_int> {
    if value >= 0 {
        return Ok(value);
    }
    // SAFETY: the function takes nothing; its result is a C string that lives until this thread's
    // next call of the library.
    let message = unsafe { CStr::from_ptr((symbols.aerostat_last_error)()) };
    Err(VmmError::Call {
        call,
        errno: -value,
        message: message.to_string_lossy().into_owned(),
    })
}

/// Calls a function of the table and checks what it returns.
macro_rules! call {
    ($symbols:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let symbols: &Symbols = $symbols;
        // SAFETY: handles come from the library and are alive, as the values that own them are
        // borrowed; structures carry their size; buffers live across the call.
        let value = unsafe { (symbols.$name)($($argument),*) };
        checked(symbols, stringify!($name), value)
    }};
}

mod kinds;

/// `sizeof`, as structures of the C ABI carry it.
#[must_use]
pub fn size_of_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// The library's threads.
#[derive(Debug)]
pub struct Runtime {
    symbols: &'static Symbols,
    handle: *mut aerostat_runtime,
}

// SAFETY: the header allows every call on a handle from any thread, several at a time; destroying
// takes the value itself.
unsafe impl Send for Runtime {}
// SAFETY: as above.
unsafe impl Sync for Runtime {}

impl Runtime {
    /// Loads the library and starts its threads.
    ///
    /// # Errors
    /// The library is missing, or refuses.
    pub fn new(workers_per_node: u32) -> Result<Self> {
        let symbols = symbols()?;
        let config = aerostat_runtime_config {
            size: size_of_u32::<aerostat_runtime_config>(),
            workers_per_node,
            ..Default::default()
        };
        let mut handle = ptr::null_mut();
        call!(
            symbols,
            aerostat_runtime_new(&raw const config, &raw mut handle)
        )?;
        Ok(Self { symbols, handle })
    }

    /// How many worker threads there are.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn workers(&self) -> Result<c_int> {
        call!(self.symbols, aerostat_runtime_workers(self.handle))
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        // SAFETY: the handle is alive, and nobody else has it: this is its last use.
        unsafe { (self.symbols.aerostat_runtime_destroy)(&raw mut self.handle) };
    }
}

/// A memory table, for as long as it takes to hand it over.
struct Table {
    symbols: &'static Symbols,
    handle: *mut aerostat_memory,
}

impl Table {
    fn new(ram: &GuestRam) -> Result<Self> {
        let symbols = symbols()?;
        let regions = ram.table();
        let mut handle = ptr::null_mut();
        call!(
            symbols,
            aerostat_memory_new(regions.as_ptr(), regions.len(), &raw mut handle)
        )?;
        Ok(Self { symbols, handle })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: as for the runtime.
        unsafe { (self.symbols.aerostat_memory_destroy)(&raw mut self.handle) };
    }
}

/// A device, and the mappings that it was told of: they stay until it has let go of them.
#[derive(Debug)]
pub struct Device {
    symbols: &'static Symbols,
    handle: *mut aerostat_device,
    ram: Mutex<Option<GuestRam>>,
}

// SAFETY: as for the runtime.
unsafe impl Send for Device {}
// SAFETY: as for the runtime.
unsafe impl Sync for Device {}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: as for the runtime. The mappings go after this call, with the field.
        unsafe { (self.symbols.aerostat_device_destroy)(&raw mut self.handle) };
    }
}

/// A call without arguments or result, under the name of the method.
macro_rules! plain_calls {
    ($($(#[$doc:meta])* $method:ident => $name:ident;)*) => {
        $($(#[$doc])*
        ///
        /// # Errors
        /// As the header says.
        pub fn $method(&self) -> Result<()> {
            call!(self.symbols, $name(self.handle)).map(drop)
        })*
    };
}

impl Device {
    plain_calls! {
        /// DRIVER_OK.
        activate => aerostat_device_activate;
        /// Stops serving and drains.
        pause => aerostat_device_pause;
        /// Serves again.
        resume => aerostat_device_resume;
        /// Status 0.
        reset => aerostat_device_reset;
        /// Gives the whole balloon back to the guest.
        reset_balloon => aerostat_device_reset_balloon;
        /// Forbids discarding and drains.
        inhibit => aerostat_device_inhibit;
        /// Allows it again.
        uninhibit => aerostat_device_uninhibit;
        /// Lets the limit of the attached cgroup be.
        detach_cgroup => aerostat_device_detach_cgroup;
        /// Ends a round of free page hints.
        finish_hints => aerostat_device_finish_hints;
    }

    /// Makes a device; the descriptors are -1 or eventfds.
    ///
    /// # Errors
    /// As the header says.
    pub fn new(
        runtime: &Runtime,
        features: u64,
        config_fd: RawFd,
        completion_fd: RawFd,
    ) -> Result<Self> {
        let kind = AEROSTAT_KIND_VIRTIO_BALLOON;
        Self::of_kind(runtime, kind, features, config_fd, completion_fd)
    }

    /// The same for any protocol.
    ///
    /// # Errors
    /// As the header says.
    pub fn of_kind(
        runtime: &Runtime,
        kind: u32,
        features: u64,
        config_fd: RawFd,
        completion_fd: RawFd,
    ) -> Result<Self> {
        let config = aerostat_device_config {
            size: size_of_u32::<aerostat_device_config>(),
            flags: 0,
            features,
            config_fd,
            completion_fd,
            kind,
            reserved: 0,
        };
        let mut handle = ptr::null_mut();
        let symbols = runtime.symbols;
        call!(
            symbols,
            aerostat_device_new(runtime.handle, &raw const config, &raw mut handle)
        )?;
        Ok(Self {
            symbols,
            handle,
            ram: Mutex::new(None),
        })
    }

    /// Its state.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn state(&self) -> Result<State> {
        Ok(
            match call!(self.symbols, aerostat_device_state(self.handle))? {
                0 => State::Configuring,
                1 => State::Active,
                2 => State::Paused,
                _ => State::NeedsReset,
            },
        )
    }

    /// Gives or replaces the memory table. The old mappings are gone when this returns, unless
    /// others have them too: so a library that goes on using them is found out.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_memory(&self, ram: &GuestRam) -> Result<()> {
        let table = Table::new(ram)?;
        let handle = table.handle.cast_const();
        let mut current = self.ram.lock();
        call!(
            self.symbols,
            aerostat_device_set_memory(self.handle, handle)
        )?;
        *current = Some(ram.clone());
        Ok(())
    }

    /// The memory that it was given last.
    ///
    /// # Errors
    /// None was given.
    pub fn ram(&self) -> Result<GuestRam> {
        self.ram.lock().clone().ok_or(VmmError::Absent("memory"))
    }

    /// What may be selected.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn offered_features(&self) -> Result<u64> {
        let mut features = 0;
        let out = &raw mut features;
        call!(
            self.symbols,
            aerostat_device_offered_features(self.handle, out)
        )?;
        Ok(features)
    }

    /// FEATURES_OK.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_features(&self, features: u64) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_features(self.handle, features)
        )
        .map(drop)
    }

    /// A driver's read of the configuration space.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn read_config(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let data = into.as_mut_ptr().cast();
        call!(
            self.symbols,
            aerostat_device_read_config(self.handle, offset, data, into.len())
        )
        .map(drop)
    }

    /// A driver's write to it; true if `actual` changed.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn write_config(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let data = bytes.as_ptr().cast();
        let changed = call!(
            self.symbols,
            aerostat_device_write_config(self.handle, offset, data, bytes.len())
        )?;
        Ok(changed == 1)
    }

    /// Starts a queue.
    ///
    /// # Errors
    /// As the header says.
    pub fn start_queue(&self, index: u32, config: &aerostat_queue_config) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_start_queue(self.handle, index, config)
        )
        .map(drop)
    }

    /// Stops a queue.
    ///
    /// # Errors
    /// As the header says.
    pub fn stop_queue(&self, index: u32) -> Result<aerostat_queue_position> {
        let mut position = aerostat_queue_position {
            size: size_of_u32::<aerostat_queue_position>(),
            ..Default::default()
        };
        let out = &raw mut position;
        call!(
            self.symbols,
            aerostat_device_stop_queue(self.handle, index, out)
        )?;
        Ok(position)
    }

    /// Replaces a ring's interrupt descriptor.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_queue_call(&self, index: u32, fd: RawFd) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_queue_call(self.handle, index, fd)
        )
        .map(drop)
    }

    /// Sets the balloon's target.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_target(&self, bytes: u64) -> Result<()> {
        call!(self.symbols, aerostat_device_set_target(self.handle, bytes)).map(drop)
    }

    /// The balloon's size.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn query(&self) -> Result<aerostat_balloon> {
        let mut balloon = aerostat_balloon {
            size: size_of_u32::<aerostat_balloon>(),
            ..Default::default()
        };
        call!(
            self.symbols,
            aerostat_device_query(self.handle, &raw mut balloon)
        )?;
        Ok(balloon)
    }

    /// The guest's statistics; with a time-out it is asked for news.
    ///
    /// # Errors
    /// As the header says.
    pub fn guest_stats(&self, timeout_ms: u32) -> Result<aerostat_guest_stats> {
        let mut stats = aerostat_guest_stats {
            size: size_of_u32::<aerostat_guest_stats>(),
            ..Default::default()
        };
        let out = &raw mut stats;
        call!(
            self.symbols,
            aerostat_device_guest_stats(self.handle, timeout_ms, out)
        )?;
        Ok(stats)
    }

    /// Has the guest asked for its statistics this often; 0 ends that.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn set_stats_interval(&self, interval_ms: u32) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_stats_interval(self.handle, interval_ms)
        )
        .map(drop)
    }

    /// Lets inflated pages wait before they are discarded.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn set_write_behind(&self, limit_bytes: u64, delay_ms: u32) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_write_behind(self.handle, limit_bytes, delay_ms)
        )
        .map(drop)
    }

    /// Chooses what is done for pages that the guest takes back, `AEROSTAT_DEFLATE_*` bits.
    ///
    /// # Errors
    /// A bit is not known.
    pub fn set_deflate(&self, flags: u32) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_deflate(self.handle, flags)
        )
        .map(drop)
    }

    /// Discards what waits.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn flush(&self) -> Result<()> {
        call!(self.symbols, aerostat_device_flush(self.handle)).map(drop)
    }

    /// Lets the limit of a cgroup follow the balloon.
    ///
    /// # Errors
    /// As the header says.
    pub fn attach_cgroup(&self, path: &Path) -> Result<()> {
        // A path with a zero byte in it is that of nothing.
        let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
        call!(
            self.symbols,
            aerostat_device_attach_cgroup(self.handle, path.as_ptr())
        )
        .map(drop)
    }

    /// The account of the attached cgroup.
    ///
    /// # Errors
    /// As the header says.
    pub fn query_cgroup(&self) -> Result<aerostat_cgroup_account> {
        let mut account = aerostat_cgroup_account {
            size: size_of_u32::<aerostat_cgroup_account>(),
            ..aerostat_cgroup_account::default()
        };
        let out = &raw mut account;
        call!(self.symbols, aerostat_device_query_cgroup(self.handle, out))?;
        Ok(account)
    }

    /// Begins a round of free page hints.
    ///
    /// # Errors
    /// As the header says.
    pub fn start_hints(&self, limit_ms: u32) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_start_hints(self.handle, limit_ms)
        )
        .map(drop)
    }

    /// Takes up to `max` hints, and the round's state as `enum aerostat_hint_state` numbers it.
    ///
    /// # Errors
    /// As the header says.
    pub fn take_hints(&self, max: usize) -> Result<(Vec<aerostat_range>, u32)> {
        let mut ranges = vec![aerostat_range::default(); max];
        let mut state = 0;
        let (first, out) = (ranges.as_mut_ptr(), &raw mut state);
        let count = call!(
            self.symbols,
            aerostat_device_take_hints(self.handle, first, max, out)
        )?;
        ranges.truncate(usize::try_from(count).unwrap_or(0));
        Ok((ranges, state))
    }

    /// What happened behind entry number `since`, at most `max` entries.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn history(&self, since: u64, max: usize) -> Result<Vec<aerostat_history_entry>> {
        let mut entries = vec![aerostat_history_entry::default(); max];
        let first = entries.as_mut_ptr();
        let count = call!(
            self.symbols,
            aerostat_device_history(self.handle, since, first, max)
        )?;
        entries.truncate(usize::try_from(count).unwrap_or(0));
        Ok(entries)
    }

    /// The device as bytes.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn save(&self) -> Result<Vec<u8>> {
        let mut state = Vec::new();
        loop {
            let mut needed = 0;
            let (to, len) = (state.as_mut_ptr(), state.len());
            let (to, out): (*mut u8, _) =
                (if len == 0 { ptr::null_mut() } else { to }, &raw mut needed);
            let saved = call!(
                self.symbols,
                aerostat_device_save(self.handle, to.cast(), len, out)
            );
            match saved {
                Ok(_) if needed <= len => {
                    state.truncate(needed);
                    return Ok(state);
                }
                Err(error) if error.errno() != Some(libc::ENOBUFS) => return Err(error),
                // It may have grown since it was asked.
                _ => state.resize(needed, 0),
            }
        }
    }

    /// Takes over a saved device.
    ///
    /// # Errors
    /// As the header says.
    pub fn restore(&self, state: &[u8]) -> Result<()> {
        let data = state.as_ptr().cast();
        call!(
            self.symbols,
            aerostat_device_restore(self.handle, data, state.len())
        )
        .map(drop)
    }

    /// Where a restored ring goes on.
    ///
    /// # Errors
    /// As the header says.
    pub fn saved_position(&self, index: u32) -> Result<aerostat_queue_position> {
        let mut position = aerostat_queue_position {
            size: size_of_u32::<aerostat_queue_position>(),
            ..Default::default()
        };
        let out = &raw mut position;
        call!(
            self.symbols,
            aerostat_device_saved_position(self.handle, index, out)
        )?;
        Ok(position)
    }

    /// The books.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn counters(&self) -> Result<aerostat_counters> {
        let mut counters = empty_counters();
        let out = &raw mut counters;
        call!(self.symbols, aerostat_device_counters(self.handle, out))?;
        Ok(counters)
    }

    /// One host node's share of the books.
    ///
    /// # Errors
    /// As the header says.
    pub fn node_counters(&self, node: i32) -> Result<aerostat_counters> {
        let mut counters = empty_counters();
        let out = &raw mut counters;
        call!(
            self.symbols,
            aerostat_device_node_counters(self.handle, node, out)
        )?;
        Ok(counters)
    }

    /// Hands over elements.
    ///
    /// # Errors
    /// As the header says.
    ///
    /// # Safety
    /// What the elements' iovecs point to has to stay mapped, and writable if it is passed as such,
    /// until the completion was collected or the device was reset.
    pub unsafe fn submit(&self, elements: &[aerostat_element]) -> Result<()> {
        let (first, n) = (elements.as_ptr(), elements.len());
        call!(self.symbols, aerostat_device_submit(self.handle, first, n)).map(drop)
    }

    /// Collects completions, at most 64.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn completions(&self) -> Result<Vec<aerostat_completion>> {
        let mut completions = vec![aerostat_completion::default(); 64];
        let (first, max) = (completions.as_mut_ptr(), completions.len());
        let count = call!(
            self.symbols,
            aerostat_device_completions(self.handle, first, max)
        )?;
        completions.truncate(usize::try_from(count).unwrap_or(0));
        Ok(completions)
    }
}

fn empty_counters() -> aerostat_counters {
    aerostat_counters {
        size: size_of_u32::<aerostat_counters>(),
        ..Default::default()
    }
}
