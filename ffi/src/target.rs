//! How large the balloon should be, and how large it is.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::device::{aerostat_device, aerostat_state, on_device};
use crate::handle;
use crate::versioned::{Output, Versioned};
use std::ffi::c_int;

/// A balloon's size and state. All sizes are of the ballooned area (requirement X1), never of the
/// memory that is left to the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_balloon {
    /// sizeof(struct aerostat_balloon), set by the caller.
    pub size: u32,
    /// An enum aerostat_state.
    pub state: u32,
    /// Bytes that the balloon should hold.
    pub target_bytes: u64,
    /// Bytes that the guest says it holds (its `actual`). It may stay below the target for as long
    /// as the guest likes (requirement A1).
    pub actual_bytes: u64,
    /// Bytes that it holds by the device's own count of distinct pages. The count is up to date when
    /// the guest of a ring is told; it may follow a moment after the completion of an element.
    pub ballooned_bytes: u64,
    /// Bytes of guest memory: the sum of the table's regions; 0 without a table.
    pub memory_bytes: u64,
    /// Bytes that the guest has beyond what it booted with: a balloon of less than nothing
    /// (AEROSTAT_REGION_EXTRA). If this is not 0, ballooned_bytes is.
    pub extra_bytes: u64,
    /// How many bytes it may have so, see aerostat_device_set_extra_grant().
    pub extra_grant_bytes: u64,
    /// 0.
    pub reserved: [u64; 2],
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_balloon {
    const NAME: &'static str = "aerostat_balloon";
    const FIRST_BYTES: usize = 72;
}

const _: () = assert!(size_of::<aerostat_balloon>() == 72);

/// Sets how many bytes the balloon should hold, rounded down to 4096, and lets the guest hear of it:
/// virtio-balloon by signalling config_fd, memballoon by a MIN_BALLOON message, VMware's protocol when
/// the guest asks next.
///
/// It does so too if the target is unchanged: a guest that deflated because it ran out of memory
/// tries again only when told again (requirement S11). Allowed in every state; the target survives
/// a reset. The guest follows at its own pace, and as far as it can (requirements A1, A2).
///
/// Returns: 0, or -EINVAL (more than the guest's memory, or more than the protocol can say: 16 TiB with
/// virtio-balloon), -EFAULT (device is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_target(
    device: *mut aerostat_device,
    target_bytes: u64,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.set_target_bytes(target_bytes)?;
        Ok(0)
    })
}

/// Lets the guest have up to bytes more than it booted with, out of regions that are
/// AEROSTAT_REGION_EXTRA, and lets it hear of that (requirements J6, R2, R7). What it has already it
/// keeps. The grant is the ledger's promise: raise the guest's limit before the grant. 0 at first; it
/// survives a reset.
///
/// Returns: 0, or -ENOTSUP (the device does not offer AEROSTAT_MEMBALLOON_FEATURE_EXTRA_MEM), -EFAULT
/// (device is NULL).
///
/// Threads: any. Waits until nothing is in flight.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_extra_grant(
    device: *mut aerostat_device,
    bytes: u64,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.set_extra_grant(bytes)?;
        Ok(0)
    })
}

/// Tells a balloon's size and state.
///
/// Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
///
/// Threads: any. Never waits. The values are each current, but not all of one instant.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_query(
    device: *const aerostat_device,
    out: *mut aerostat_balloon,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        out.fill(&aerostat_balloon {
            size: 0,
            state: aerostat_state::from(device.state()) as u32,
            target_bytes: device.target_bytes(),
            actual_bytes: device.actual_bytes(),
            ballooned_bytes: device.ballooned_bytes(),
            memory_bytes: device.memory_bytes(),
            extra_bytes: device.extra_bytes(),
            extra_grant_bytes: device.extra_grant_bytes(),
            reserved: [0; 2],
        });
        Ok(0)
    })
}
