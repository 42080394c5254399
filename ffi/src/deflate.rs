//! What is done for pages that the guest takes back.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::check_flags;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use ::aerostat_device::DeflateOptions;
use std::ffi::c_int;

/// The host allocates the pages of a deflate before it is acknowledged, by one call a run, instead of by
/// a fault for each page when the guest touches it. Needs Linux 5.14.
pub const AEROSTAT_DEFLATE_PREFAULT: u32 = 1u32 << 0;

/// The host makes huge frames of 2 MiB again of those that have no page in the balloon any more, before
/// the deflate is acknowledged. For memory that may be in transparent huge pages. Needs Linux 6.1.
pub const AEROSTAT_DEFLATE_REBUILD: u32 = 1u32 << 1;

/// Chooses what is done for pages that the guest takes out of the balloon, AEROSTAT_DEFLATE_* bits; 0
/// (the default) leaves all to the guest's own page faults. Either makes the guest wait longer for the
/// acknowledgement and run faster afterwards: docs/performance.md has what was measured.
///
/// Best effort: what the host cannot do or has no memory for is left out. Nothing is done for pinned
/// regions, nor while discarding is inhibited (aerostat_device_inhibit()). The setting survives a reset
/// and a new memory table.
///
/// Returns: 0, or -EINVAL (an unknown flag), -EFAULT (device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_deflate(
    device: *mut aerostat_device,
    flags: u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        let known = AEROSTAT_DEFLATE_PREFAULT | AEROSTAT_DEFLATE_REBUILD;
        check_flags("aerostat_device_set_deflate() flags", flags, known)?;
        device.set_deflate(DeflateOptions {
            prefault: flags & AEROSTAT_DEFLATE_PREFAULT != 0,
            rebuild: flags & AEROSTAT_DEFLATE_REBUILD != 0,
        });
        Ok(0)
    })
}
