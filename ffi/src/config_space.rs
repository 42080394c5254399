//! The device's configuration space, which the VMM's transport reads and writes for the driver.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::features::AEROSTAT_FEATURE_HOST_RESET;
use crate::handle;
use ::aerostat_device::DeviceKind;
use std::ffi::{c_int, c_void};

/// The length of the configuration space in bytes: num_pages, actual, free_page_hint_cmd_id,
/// poison_val, each 32 bits, little-endian.
pub const AEROSTAT_CONFIG_BYTES: u32 = 16;

/// The length of the configuration space of a device that offers AEROSTAT_FEATURE_HOST_RESET:
/// reset_id and reset_ack follow, each 32 bits, little-endian.
pub const AEROSTAT_CONFIG_BYTES_HOST_RESET: u32 = 24;

/// The length of the configuration space of a device that offers AEROSTAT_FEATURE_NODE_TARGETS:
/// nodes and 16 numbers of pages follow, each 32 bits, little-endian.
pub const AEROSTAT_CONFIG_BYTES_NODE_TARGETS: u32 = 92;

/// The longest that it can be.
const SPACE: usize = AEROSTAT_CONFIG_BYTES_NODE_TARGETS as usize;
const _: () = {
    let kind = DeviceKind::VirtioBalloon;
    assert!(AEROSTAT_CONFIG_BYTES as usize == kind.config_bytes(kind.default_features()));
    let host_reset = kind.config_bytes(AEROSTAT_FEATURE_HOST_RESET);
    assert!(AEROSTAT_CONFIG_BYTES_HOST_RESET as usize == host_reset);
    assert!(SPACE == kind.config_bytes(kind.supported_features()));
};

/// Reads len bytes of the configuration space from offset on, for a driver's read (VIRTIO 1.4,
/// 5.5.4). What lies behind the end of the space reads as zero.
///
/// Returns: 0, or -EFAULT (device is NULL, or data is NULL and len is not 0).
///
/// Lifetime: data is written during the call only. It must not be memory that the guest can reach.
///
/// Threads: any, a vCPU's too. Never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_read_config(
    device: *const aerostat_device,
    offset: u64,
    data: *mut c_void,
    len: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if len == 0 {
            return Ok(0);
        }
        if data.is_null() {
            return Err(Refusal::Null("data"));
        }
        let mut space = [0; SPACE];
        let known = len.min(SPACE);
        device.read_config(offset, space.get_mut(..known).unwrap_or_default());
        // SAFETY: `data` may be written for `len` bytes (the header's rule for pointers), and
        // `space` is a local variable.
        unsafe {
            let data = data.cast::<u8>();
            data.copy_from_nonoverlapping(space.as_ptr(), known);
            data.add(known).write_bytes(0, len - known);
        }
        Ok(0)
    })
}

/// Takes a driver's write of len bytes at offset to the configuration space. Whatever the guest
/// writes is accepted: fields that are not the driver's keep their value, and attempts to change
/// them are counted as config_errors.
///
/// Returns: 0; or 1 if the guest's `actual` changed, which a VMM may want to announce (QEMU's
/// BALLOON_CHANGE); or -EFAULT (device is NULL, or data is NULL and len is not 0).
///
/// Lifetime: data is read during the call only. It must not be memory that the guest can reach.
///
/// Threads: any, a vCPU's too. Never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_write_config(
    device: *mut aerostat_device,
    offset: u64,
    data: *const c_void,
    len: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if len == 0 {
            return Ok(0);
        }
        if data.is_null() {
            return Err(Refusal::Null("data"));
        }
        // One byte more than the space has shows the device that the write was too long.
        let mut written = [0; SPACE + 1];
        let known = len.min(written.len());
        // SAFETY: `data` may be read for `len` bytes (the header's rule for pointers), and
        // `written` is a local variable.
        unsafe {
            data.cast::<u8>()
                .copy_to_nonoverlapping(written.as_mut_ptr(), known);
        }
        let changed = device.write_config(offset, written.get(..known).unwrap_or_default());
        Ok(c_int::from(changed))
    })
}
