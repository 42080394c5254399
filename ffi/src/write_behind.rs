//! When inflated pages are discarded.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::device::{aerostat_device, on_device};
use crate::handle;
use ::aerostat_device::WriteBehind;
use std::ffi::c_int;
use std::time::Duration;

/// Lets inflated pages wait before they are discarded, so that many go at once: until limit_bytes wait,
/// until the first of them has waited delay_ms, or until the target is reached with more than the last
/// time: a guest cannot have each of its buffers flushed by itself. A guest that inflates
/// is acknowledged at once, as long as no more than twice limit_bytes wait. 128 MiB and 10 ms suit stock
/// guests; limit_bytes 0 (the default) discards before each acknowledgement.
///
/// It takes effect while AEROSTAT_FEATURE_MUST_TELL_HOST is negotiated: then a guest does not use pages
/// of the balloon before their deflate is acknowledged (requirement S7). Pages that wait count as
/// pending_bytes (invariant I4). They are discarded before aerostat_device_pause(), _inhibit(),
/// _set_memory(), _stop_queue() and this call return, and not at all if the guest takes them back or
/// the device is reset. The setting survives a reset.
///
/// Returns: 0, or -EFAULT (device is NULL).
///
/// Threads: any. Waits until what waited is discarded, which takes some milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_write_behind(
    device: *mut aerostat_device,
    limit_bytes: u64,
    delay_ms: u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        let delay = Duration::from_millis(delay_ms.into());
        device.set_write_behind(WriteBehind { limit_bytes, delay });
        Ok(0)
    })
}

/// Discards what waits (aerostat_device_set_write_behind()) now: when the host needs memory at once.
///
/// Returns: 0, or -EFAULT (device is NULL).
///
/// Threads: any. Waits until it is discarded, which takes some milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_flush(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.flush();
        Ok(0)
    })
}
