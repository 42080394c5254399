//! Free page hints: pages that a migration need not copy.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::range::aerostat_range;
use ::aerostat_device::HintState;
use std::ffi::c_int;
use std::time::Duration;

/// The most ranges that one call hands out.
const MAX_RANGES: usize = 65536;

/// Where a round of free page hints stands.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_hint_state {
    /// There is no round, or it has ended.
    AEROSTAT_HINT_IDLE = 0,
    /// The guest was asked, or is sending hints.
    AEROSTAT_HINT_RUNNING = 1,
    /// The guest has sent all its hints, and waits for the end of the round.
    AEROSTAT_HINT_COMPLETE = 2,
}

impl From<HintState> for aerostat_hint_state {
    fn from(state: HintState) -> Self {
        match state {
            HintState::Idle => Self::AEROSTAT_HINT_IDLE,
            HintState::Running => Self::AEROSTAT_HINT_RUNNING,
            HintState::Complete => Self::AEROSTAT_HINT_COMPLETE,
        }
    }
}

/// Begins a round of free page hints and signals config_fd, which makes the guest send them (VIRTIO
/// 1.4, 5.5.6.5; requirement S9). Hints of an earlier round are forgotten.
///
/// Until the round ends, by aerostat_device_finish_hints() or after limit_ms, the guest leaves nearly
/// all its free pages to the device. Nothing is discarded.
///
/// Returns: 0, or
/// -ENOTSUP (AEROSTAT_FEATURE_FREE_PAGE_HINT is not negotiated),
/// -EALREADY (a round is running),
/// -EINVAL (limit_ms is 0 or more than 600000),
/// -ENOTCONN (the device is not active),
/// -EBUSY (it is paused),
/// -EFAULT (device is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_start_hints(
    device: *mut aerostat_device,
    limit_ms: u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.start_hints(Duration::from_millis(limit_ms.into()))?;
        Ok(0)
    })
}

/// Ends the round of hints, so that the guest may use its pages again. Hints that came can still be
/// taken.
///
/// Returns: 0, or -EPROTO (no round is running; it may have ended by itself), -ENOTSUP (the device is
/// not of AEROSTAT_KIND_VIRTIO_BALLOON), -EFAULT (device is NULL).
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

/// Takes up to max ranges of which the guest said that they are free, oldest first, and tells where
/// the round stands: no more ranges come once it is not AEROSTAT_HINT_RUNNING.
///
/// The ranges were free at some moment of the round and may have been written since. A migration may
/// leave them out if it has tracked writes since before aerostat_device_start_hints(), and sends what
/// was written.
///
/// Returns: how many ranges were stored in out, 0 if there is none; or -EFAULT (device is NULL, or out
/// is NULL and max is not 0). An enum aerostat_hint_state goes to *state, unless that is NULL.
///
/// Threads: any. Never waits. Two threads that take get different ranges.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_take_hints(
    device: *mut aerostat_device,
    out: *mut aerostat_range,
    max: usize,
    state: *mut u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if out.is_null() && max > 0 {
            return Err(Refusal::Null("out"));
        }
        let mut ranges = Vec::new();
        let stands = device.take_hints(max.min(MAX_RANGES), &mut ranges);
        for (index, range) in ranges.iter().enumerate() {
            // SAFETY: there are at most `max` ranges, for which there is room (the header's rule
            // for pointers).
            unsafe { out.add(index).write_unaligned((*range).into()) };
        }
        if !state.is_null() {
            // SAFETY: not NULL, so it may be written (the same rule).
            unsafe { state.write(aerostat_hint_state::from(stands) as u32) };
        }
        Ok(c_int::try_from(ranges.len()).unwrap_or(c_int::MAX))
    })
}
