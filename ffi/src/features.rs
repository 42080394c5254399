//! Feature bits, and their negotiation.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use ::aerostat_device::Device;
use std::ffi::c_int;

/// VIRTIO_BALLOON_F_MUST_TELL_HOST: the guest waits for the acknowledgement of a deflate before it
/// uses the pages again. The device may then discard after it has acknowledged an inflate.
pub const AEROSTAT_FEATURE_MUST_TELL_HOST: u64 = 1u64 << 0;

/// VIRTIO_BALLOON_F_STATS_VQ: the guest tells of its memory; see aerostat_device_guest_stats().
pub const AEROSTAT_FEATURE_STATS_VQ: u64 = 1u64 << 1;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back when it runs out of memory.
/// Offered if asked for in struct aerostat_device_config, as it lets the guest undo what the host
/// decided.
pub const AEROSTAT_FEATURE_DEFLATE_ON_OOM: u64 = 1u64 << 2;

/// VIRTIO_BALLOON_F_FREE_PAGE_HINT: the guest hints at free pages, for migration; see
/// aerostat_device_start_hints(). Offered if asked for in struct aerostat_device_config.
pub const AEROSTAT_FEATURE_FREE_PAGE_HINT: u64 = 1u64 << 3;

/// VIRTIO_BALLOON_F_PAGE_POISON: the guest tells what it fills free pages with.
pub const AEROSTAT_FEATURE_PAGE_POISON: u64 = 1u64 << 4;

/// VIRTIO_BALLOON_F_REPORTING: the guest reports free pages on its own account.
pub const AEROSTAT_FEATURE_PAGE_REPORTING: u64 = 1u64 << 5;

/// VIRTIO_F_INDIRECT_DESC: descriptors may point to tables of descriptors. Rings only.
pub const AEROSTAT_FEATURE_INDIRECT_DESC: u64 = 1u64 << 28;

/// VIRTIO_F_EVENT_IDX: kicks and interrupts are suppressed by index. Rings only.
pub const AEROSTAT_FEATURE_EVENT_IDX: u64 = 1u64 << 29;

/// VIRTIO_F_VERSION_1: the device is not a legacy one.
pub const AEROSTAT_FEATURE_VERSION_1: u64 = 1u64 << 32;

/// VIRTIO_F_RING_PACKED: queues are packed rings (VIRTIO 1.4, 2.8). Offered if asked for in
/// struct aerostat_device_config.
pub const AEROSTAT_FEATURE_RING_PACKED: u64 = 1u64 << 34;

/// VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available. Offered if
/// asked for in struct aerostat_device_config.
pub const AEROSTAT_FEATURE_IN_ORDER: u64 = 1u64 << 35;

/// The device may refuse pages that the guest puts into the balloon, and says which; a refused page
/// stays the guest's, with its contents (requirements V1, V2). Not in the standard: the wire format is
/// in docs/virtio-balloon-extensions.md. Offered if asked for in struct aerostat_device_config; stock
/// drivers do not select it, and are never refused anything (requirement V4).
pub const AEROSTAT_FEATURE_PAGE_REFUSAL: u64 = 1u64 << 50;

/// The host may give all pages of the balloon back to the guest at once, see
/// aerostat_device_reset_balloon() (requirement V3). It makes the configuration space
/// AEROSTAT_CONFIG_BYTES_HOST_RESET bytes long if it is offered. Not in the standard: the wire
/// format is in docs/virtio-balloon-extensions.md. Offered if asked for in struct
/// aerostat_device_config; stock drivers do not select it (requirement V4).
pub const AEROSTAT_FEATURE_HOST_RESET: u64 = 1u64 << 51;

/// VIRTIO_BALLOON_F_NODE_TARGETS (docs/virtio-balloon-extensions.md; requirement X2): the driver is told
/// how large the balloon should be on each node of the guest. Offered if asked for.
pub const AEROSTAT_FEATURE_NODE_TARGETS: u64 = 1u64 << 52;

/// VIRTIO_MEMBALLOON_F_NODE (docs/memballoon.md): the same for devices of kind AEROSTAT_KIND_MEMBALLOON.
/// Offered if asked for.
pub const AEROSTAT_MEMBALLOON_FEATURE_NODE: u64 = 1u64 << 50;

/// VIRTIO_MEMBALLOON_F_EXTRA_MEM: the balloon may go below zero, see AEROSTAT_REGION_EXTRA. For devices
/// of kind AEROSTAT_KIND_MEMBALLOON, as the next one. Offered if asked for.
pub const AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM: u64 = 1u64 << 0;

/// VIRTIO_MEMBALLOON_F_4K to _16G: the sizes of pages, 4 KiB for bit 1, and twice as much for each bit
/// above it. A driver selects exactly one of them.
pub const AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES: u64 = 0xfffffeu64;

/// Tells which features the guest may select from (VIRTIO 1.4, 2.2; requirement S1).
///
/// A device whose queues are all element queues may mask the bits of rings, or offer its own: the
/// library does not look at them then.
///
/// Returns: 0 and the features in *out, or -EFAULT if a pointer is NULL.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_offered_features(
    device: *const aerostat_device,
    out: *mut u64,
) -> c_int {
    // SAFETY: the handle is NULL or alive, out NULL or writable (the header's rules).
    unsafe { store(device, out, Device::offered_features) }
}

/// Tells which features were selected.
///
/// Returns: 0 and the features in *out (0 before aerostat_device_set_features()), or -EFAULT if a
/// pointer is NULL.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_features(
    device: *const aerostat_device,
    out: *mut u64,
) -> c_int {
    // SAFETY: the handle is NULL or alive, out NULL or writable (the header's rules).
    unsafe { store(device, out, Device::features) }
}

/// Takes the driver's selection of features: what a VMM calls when the driver sets FEATURES_OK
/// (VIRTIO 1.4, 3.1.1; requirement S1). If it is refused, FEATURES_OK has to stay clear.
///
/// Returns: 0, or -ENOTSUP (features that were not offered), -EINVAL (none or several of
/// AEROSTAT_MEMBALLOON_FEATURE_PAGE_SIZES, where exactly one is needed), -EALREADY (a queue is started
/// already: reset the device first), -EFAULT (device is NULL).
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_features(
    device: *mut aerostat_device,
    features: u64,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.set_features(features)?;
        Ok(0)
    })
}

/// Stores what `get` says of the device at `out`.
///
/// # Safety
/// `device` is NULL or alive, `out` is NULL or writable.
unsafe fn store(
    device: *const aerostat_device,
    out: *mut u64,
    get: impl FnOnce(&Device) -> u64,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if out.is_null() {
            return Err(Refusal::Null("out"));
        }
        // SAFETY: not NULL, so it may be written (the caller's promise).
        unsafe { out.write(get(device)) };
        Ok(0)
    })
}
