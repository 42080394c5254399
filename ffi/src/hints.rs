//! Free page hints: what a migration need not copy.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use ::aerostat_device::HintState;
use ::aerostat_device::memory::BALLOON_PAGE_SHIFT;
use std::ffi::c_int;
use std::time::Duration;

/// Where a round of free page hints stands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_hint_state {
    /// No round is running: none was started, or the last one was finished or ran out of time.
    AEROSTAT_HINTS_IDLE = 0,
    /// The guest was asked, or is sending.
    AEROSTAT_HINTS_RUNNING = 1,
    /// The guest has told all; it waits for aerostat_device_finish_hints().
    AEROSTAT_HINTS_COMPLETE = 2,
}

impl From<HintState> for aerostat_hint_state {
    fn from(state: HintState) -> Self {
        match state {
            HintState::Idle => Self::AEROSTAT_HINTS_IDLE,
            HintState::Running => Self::AEROSTAT_HINTS_RUNNING,
            HintState::Complete => Self::AEROSTAT_HINTS_COMPLETE,
        }
    }
}

/// A range of guest memory. It has no size field and never grows, because there are many of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct aerostat_range {
    /// Guest physical address of its first byte; a multiple of 4096.
    pub gpa: u64,
    /// Its length; a multiple of 4096.
    pub len_bytes: u64,
}

/// Begins a round of free page hints (VIRTIO 1.4, 5.5.6.5; requirement S9): signals config_fd, and a
/// guest whose driver is willing tells which of its pages are free, until it has told all or the
/// round ends.
///
/// Linux keeps nearly all its free memory for the device until the round is done. End it with
/// aerostat_device_finish_hints() as soon as the hints are of no use; after limit_ms it ends by
/// itself. Hints of earlier rounds that were not taken are forgotten.
///
/// Returns: 0 and the round's number, 2 or more, in *round_id, or
/// -EINVAL (limit_ms is 0, or more than 600000),
/// -ENOTSUP (AEROSTAT_FEATURE_FREE_PAGE_HINT is not negotiated),
/// -ENOTCONN (the device is not active),
/// -EBUSY (it is paused),
/// -EALREADY (a round is not done yet),
/// -EFAULT (a pointer is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_start_hints(
    device: *mut aerostat_device,
    limit_ms: u32,
    round_id: *mut u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if round_id.is_null() {
            return Err(Refusal::Null("round_id"));
        }
        let id = device.start_hints(Duration::from_millis(limit_ms.into()))?;
        // SAFETY: not NULL, so it may be written (the header's rule for pointers).
        unsafe { round_id.write(id) };
        Ok(0)
    })
}

/// Ends the round: the guest may use its pages again, and config_fd is signalled. Hints that came can
/// still be taken.
///
/// Returns: 0, or -EPROTO (no round is running; it may have run out of time), -EFAULT (device is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_finish_hints(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.finish_hints()?;
        Ok(0)
    })
}

/// Takes up to n of the ranges that the guest told, oldest first, and an enum aerostat_hint_state.
/// Unless that is AEROSTAT_HINTS_RUNNING no more will come. With n 0 it tells the state only, and out
/// may be NULL.
///
/// A range was free at some moment of the round, and may have been written since. A migration that
/// tracks writes since before aerostat_device_start_hints() need not copy what was not written; without
/// that, hints say nothing. The library discards none of it. Up to 65536 ranges wait; more are dropped,
/// so take them now and then while the round runs.
///
/// Returns: how many ranges are in out (fewer than n: that is all for now), or -EFAULT (a pointer is
/// NULL), -EINVAL (n is more than 65536).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_take_hints(
    device: *mut aerostat_device,
    out: *mut aerostat_range,
    n: usize,
    state: *mut u32,
) -> c_int {
    const MAX: usize = 1 << 16;
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if state.is_null() {
            return Err(Refusal::Null("state"));
        }
        if out.is_null() && n > 0 {
            return Err(Refusal::Null("out"));
        }
        if n > MAX {
            return Err(Refusal::invalid("n", n as u64, "at most 65536"));
        }
        let mut ranges = Vec::new();
        let stands = device.take_hints(n, &mut ranges);
        for (index, range) in ranges.iter().enumerate() {
            let range = aerostat_range {
                gpa: range.start.0 << BALLOON_PAGE_SHIFT,
                len_bytes: range.bytes(),
            };
            // SAFETY: at most `n` ranges were taken, for which C has room (the rule for pointers).
            unsafe { out.add(index).write(range) };
        }
        // SAFETY: not NULL, so it may be written (the same rule).
        unsafe { state.write(aerostat_hint_state::from(stands) as u32) };
        Ok(c_int::try_from(ranges.len()).unwrap_or(c_int::MAX))
    })
}
