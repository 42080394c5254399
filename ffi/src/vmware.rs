//! VMware's balloon commands, as a guest's accesses to a port bring them.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use std::ffi::c_int;

/// The port at which a guest speaks to its hypervisor: an `in` of 32 bits from it with
/// AEROSTAT_VMWARE_MAGIC in EAX.
pub const AEROSTAT_VMWARE_PORT: u32 = 0x5670;

/// What the guest has in EAX then.
pub const AEROSTAT_VMWARE_MAGIC: u32 = 0x456c6d6f;

/// Carries out one balloon command of the guest, for a VMM that answers the port
/// AEROSTAT_VMWARE_PORT (docs/vmware-balloon.md; ffi/examples/vmware.c). The command is in the guest's
/// ECX, argument1 in EBX and argument2 in ESI; pass all 64 bits of a 64-bit guest's registers.
///
/// Put *status into EAX. Put *result into ECX if the command is 0 (START), else into EBX, all 64 bits
/// of it. A guest's nonsense is answered in *status and is no error of this call. On return the
/// command is carried out.
///
/// Returns: 0, or -ENOTSUP (the device is not of AEROSTAT_KIND_VMWARE), -EFAULT (a pointer is NULL).
///
/// Threads: any, a vCPU's too. Waits for what is in flight, and discards up to 512 pages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_vmware_command(
    device: *mut aerostat_device,
    command: u64,
    argument1: u64,
    argument2: u64,
    status: *mut u32,
    result: *mut u64,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if status.is_null() {
            return Err(Refusal::Null("status"));
        }
        if result.is_null() {
            return Err(Refusal::Null("result"));
        }
        let answer = device.vmware_command(command, [argument1, argument2])?;
        // SAFETY: neither is NULL, so both may be written (the header's rule for pointers).
        unsafe {
            status.write(answer.status);
            result.write(answer.result);
        }
        Ok(0)
    })
}
