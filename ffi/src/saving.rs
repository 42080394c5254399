//! A device as bytes, to go on in another process or on another host.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::queue::{aerostat_queue_position, queue_index};
use crate::versioned::Output;
use std::ffi::{c_int, c_void};

/// Saves a device: for live migration, a snapshot, or an update of the VMM (requirement S13). The
/// bytes are little-endian, carry a version, and are specified in docs/saved-state.md.
///
/// Allowed in every state. Save a paused device, or the guest is ahead of what was saved. Waits until
/// nothing is in flight; a held stats buffer counts as not taken. Not in the state are inhibits, the
/// books, guest statistics and their interval, and elements without a completion: those are the VMM's
/// (aerostat_device_stop_queue() hands a stats element back that the device holds).
///
/// With buf NULL and len 0 only the size is told. It may change as long as the device is not paused.
///
/// Returns: 0, with the size in *needed_bytes, or
/// -ENOBUFS (len is less than that; *needed_bytes tells it, and buf is as it was),
/// -EFAULT (device or needed_bytes is NULL, or buf is NULL and len is not 0).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_save(
    device: *mut aerostat_device,
    buf: *mut c_void,
    len: usize,
    needed_bytes: *mut usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if needed_bytes.is_null() {
            return Err(Refusal::Null("needed_bytes"));
        }
        if buf.is_null() && len > 0 {
            return Err(Refusal::Null("buf"));
        }
        let bytes = device.save();
        // SAFETY: not NULL, so it may be written (the header's rule for pointers).
        unsafe { needed_bytes.write(bytes.len()) };
        if buf.is_null() {
            return Ok(0);
        }
        if len < bytes.len() {
            return Err(Refusal::NoRoom {
                len,
                needed: bytes.len(),
            });
        }
        // SAFETY: `buf` may be written for `len` bytes (the same rule), and `bytes` is not longer.
        unsafe {
            buf.cast::<u8>()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        Ok(0)
    })
}

/// Goes on with a device that aerostat_device_save() saved: takes over features, target, configuration
/// space and balloon. The device has to be in AEROSTAT_STATE_CONFIGURING, with its memory set and no
/// queue started.
///
/// Then start the queues where aerostat_device_saved_position() says, and activate. config_fd is
/// signalled. If the saved device needed a reset, this one is in AEROSTAT_STATE_NEEDS_RESET at once. A
/// round of free page hints that was running is done. Nothing is discarded: on a new host nothing of
/// the balloon is allocated, unless the VMM copied it.
///
/// The bytes may come from anybody: they are checked in full before anything is changed.
///
/// Returns: 0, or
/// -EBADMSG (not a saved state, or damaged),
/// -EPROTONOSUPPORT (its version is not known),
/// -ENOTSUP (the guest selected features that this device does not offer),
/// -ERANGE (pages of its balloon are not in this device's memory),
/// -EALREADY (the device is active, paused or broken, or has started queues),
/// -ENOTCONN (no memory is set),
/// -EFAULT (a pointer is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_restore(
    device: *mut aerostat_device,
    buf: *const c_void,
    len: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if buf.is_null() {
            return Err(Refusal::Null("buf"));
        }
        // SAFETY: not NULL, so it may be read for `len` bytes during this call (the header's rule for
        // pointers), and nobody writes to an argument meanwhile.
        let bytes = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), len) };
        device.restore(bytes)?;
        Ok(0)
    })
}

/// Tells where a ring goes on that was started in the device that aerostat_device_restore() took over:
/// next_avail and next_used for aerostat_device_start_queue().
///
/// Returns: 0 and the position in *out, or -ENOENT (nothing was restored since the last reset, or the
/// queue was not started as a ring), -EMSGSIZE or -EFAULT (out; device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_saved_position(
    device: *const aerostat_device,
    index: u32,
    out: *mut aerostat_queue_position,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        let position = device.saved_position(queue_index(device, index)?)?;
        out.fill(&position.into());
        Ok(0)
    })
}
