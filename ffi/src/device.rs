//! The device: its making, its life cycle, its end.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Outcome, Refusal, call, call_unit, check_flags, check_reserved};
use crate::cgroup::AttachedTo;
use crate::fd;
use crate::handle::{self, Handle, Slot};
use crate::memory::aerostat_memory;
use crate::runtime::aerostat_runtime;
use crate::versioned::{self, Versioned};
use ::aerostat_device::{Device, DeviceConfig, DeviceKind, DeviceState, Sharer};
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A balloon device.
#[derive(Debug)]
pub struct aerostat_device {
    device: Device,
    /// A call panicked half-way: what it left behind must not be used.
    poisoned: AtomicBool,
    /// Behind the device: its limit is restored when nothing moves it any more.
    pub(crate) cgroup: AttachedTo,
}

impl Handle for aerostat_device {
    const NAME: &'static str = "device";
}

/// Where a device stands in its life cycle.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_state {
    /// New or reset: features, memory and queues may be set.
    AEROSTAT_STATE_CONFIGURING = 0,
    /// Serving its queues.
    AEROSTAT_STATE_ACTIVE = 1,
    /// Set up, but nothing is served until aerostat_device_resume().
    AEROSTAT_STATE_PAUSED = 2,
    /// A ring broke; nothing is served until aerostat_device_reset(). The VMM sets the status bit
    /// DEVICE_NEEDS_RESET (requirement S4).
    AEROSTAT_STATE_NEEDS_RESET = 3,
}

impl From<DeviceState> for aerostat_state {
    fn from(state: DeviceState) -> Self {
        match state {
            DeviceState::Configuring => Self::AEROSTAT_STATE_CONFIGURING,
            DeviceState::Active => Self::AEROSTAT_STATE_ACTIVE,
            DeviceState::Paused => Self::AEROSTAT_STATE_PAUSED,
            DeviceState::NeedsReset => Self::AEROSTAT_STATE_NEEDS_RESET,
        }
    }
}

/// The traditional memory balloon, virtio device ID 5.
pub const AEROSTAT_KIND_VIRTIO_BALLOON: u32 = 0;

/// The memory balloon with virtio device ID 13 (docs/memballoon.md). It has two queues, 0 fromdevq and 1
/// todevq, and no configuration space.
pub const AEROSTAT_KIND_MEMBALLOON: u32 = 1;

/// VMware's balloon commands, which stock guests speak over a port (docs/vmware-balloon.md): no virtio
/// device, no queues. Set the memory table, activate, and pass what the guest says to
/// aerostat_vmware_command(). Its features are capability bits, and the guest selects them itself.
pub const AEROSTAT_KIND_VMWARE: u32 = 2;

/// How a device is set up; see `AEROSTAT_DEVICE_CONFIG_INIT`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct aerostat_device_config {
    /// sizeof(struct aerostat_device_config).
    pub size: u32,
    /// 0; no flags are defined.
    pub flags: u32,
    /// The features to offer, AEROSTAT_FEATURE_* bits (of another kind: its own); 0 offers what the
    /// library recommends.
    pub features: u64,
    /// An eventfd signalled when the guest is to get a configuration change interrupt: the target
    /// was set, the balloon reset, or the device went to AEROSTAT_STATE_NEEDS_RESET. -1: none.
    /// Duplicated.
    pub config_fd: i32,
    /// An eventfd signalled when aerostat_device_completions() has something to collect. -1: none.
    /// Duplicated.
    pub completion_fd: i32,
    /// Which protocol the device speaks, AEROSTAT_KIND_*.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_device_config {
    const NAME: &'static str = "aerostat_device_config";
    const FIRST_BYTES: usize = 24;
}

/// Runs `body` on the device behind `handle`; a panic spoils the handle for all calls but destroy.
pub(crate) fn on_device(
    handle: Option<&aerostat_device>,
    body: impl FnOnce(&Device) -> Outcome<c_int>,
) -> c_int {
    call(|| {
        let handle = handle::required(handle)?;
        if handle.poisoned.load(Ordering::Acquire) {
            return Err(Refusal::Poisoned);
        }
        catch_unwind(AssertUnwindSafe(|| body(&handle.device))).unwrap_or_else(|payload| {
            handle.poisoned.store(true, Ordering::Release);
            resume_unwind(payload)
        })
    })
}

/// As [`on_device`], for calls that have no value to return.
fn on_device_unit(
    handle: Option<&aerostat_device>,
    body: impl FnOnce(&Device) -> Result<(), ::aerostat_device::Error>,
) -> c_int {
    on_device(handle, |device| Ok(body(device).map(|()| 0)?))
}

/// Makes a balloon device that runtime's threads serve.
///
/// Returns: 0, or
/// -EINVAL (an unknown flag or kind; no page size among the features of a memballoon),
/// -ENOTSUP (a feature that this version does not have),
/// -EBADF (config_fd or completion_fd is neither -1 nor an open eventfd),
/// -EMSGSIZE, -E2BIG (config->size),
/// -EFAULT (a pointer is NULL),
/// or what the operating system answered. On failure *out is NULL.
///
/// Lifetime: config is read during the call only, and descriptors are duplicated. Eventfds become
/// non-blocking, which they share with the caller's descriptors. The device keeps the runtime's
/// threads alive.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_new(
    runtime: *mut aerostat_runtime,
    config: *const aerostat_device_config,
    out: *mut *mut aerostat_device,
) -> c_int {
    call_unit(|| {
        // SAFETY: NULL, or writable during this call (the header's rule for pointers).
        let slot = unsafe { Slot::new(out) }?;
        // SAFETY: NULL or alive (the header's rule for handles).
        let runtime = handle::required(unsafe { handle::get(runtime) })?;
        // SAFETY: NULL, or as long as its size says (the rule for pointers).
        let config = unsafe { versioned::read(config) }?;
        check_flags("aerostat_device_config.flags", config.flags, 0)?;
        check_reserved("aerostat_device_config.reserved", config.reserved.into())?;
        let [config_event, completion_event] = fd::eventfd_pair(
            ("aerostat_device_config.config_fd", config.config_fd),
            ("aerostat_device_config.completion_fd", config.completion_fd),
        )?;
        let config = DeviceConfig {
            kind: DeviceKind::from_number(config.kind).ok_or_else(|| {
                let kind = u64::from(config.kind);
                Refusal::invalid("aerostat_device_config.kind", kind, "AEROSTAT_KIND_*")
            })?,
            features: config.features,
            config_event,
            completion_event,
            calls_shared_with: Sharer::Trusted,
        };
        slot.fill(aerostat_device {
            device: Device::new(&runtime.runtime, config)?,
            poisoned: AtomicBool::new(false),
            cgroup: AttachedTo::default(),
        });
        Ok(())
    })
}

/// Destroys a device and sets *device to NULL. NULL, and a pointer to NULL, are ignored.
///
/// Waits until nothing is in flight: afterwards the library touches neither guest memory nor
/// eventfds nor iovecs of this device. Completions that were not collected are lost.
///
/// Threads: any that the library did not start; no other thread may be using this handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_destroy(device: *mut *mut aerostat_device) {
    // SAFETY: NULL or writable, and the handle's last use (the header's rules for handles).
    unsafe { handle::destroy(device) }
}

/// Tells where a device stands in its life cycle.
///
/// Returns: an enum aerostat_state (never negative), or -EFAULT if device is NULL.
///
/// Threads: any. Never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_state(device: *const aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        Ok(aerostat_state::from(device.state()) as c_int)
    })
}

/// Gives a device its guest's memory, or replaces it. Allowed in every state.
///
/// Waits until nothing is in flight: when it returns, the old table is out of use, and what only it
/// covered may be unmapped. Running rings have to lie in the new table too. Balloon pages in
/// regions that went away are forgotten.
///
/// Returns: 0, or -EFAULT (a pointer is NULL), -ERANGE (a running ring is not in the new table),
/// -EROFS (it is in a read-only region of it), -ENOTSUP (it has extra regions, and the device has no use
/// for them): the old one stays in use.
///
/// Lifetime: the device keeps what it needs of memory, which may be destroyed at once; its mappings
/// have to stay (see aerostat_memory_new()).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_memory(
    device: *mut aerostat_device,
    memory: *const aerostat_memory,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL or alive (the same rule).
        let memory = handle::required(unsafe { handle::get(memory) })?;
        device.set_memory(Arc::clone(&memory.memory))?;
        Ok(0)
    })
}

/// Begins to serve the queues: what a VMM calls when the driver sets DRIVER_OK. Every queue is
/// looked at once, kicked or not (VIRTIO 1.4, 3.1.1; requirement S2).
///
/// Returns: 0, or
/// -ENOTCONN (features or memory are not set, or a ring broke and the device was not reset),
/// -EALREADY (it is active already),
/// -EBUSY (it is paused: aerostat_device_resume()),
/// -EFAULT (device is NULL).
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_activate(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device_unit(device, Device::activate)
}

/// Stops serving, for a stopped VM or a snapshot, and waits until nothing is in flight (invariant
/// I2). Pausing a paused device does nothing.
///
/// All submitted elements are served first, and their completions can be collected, but for buffers
/// with which the device waits until there is something to say: that of the stats queue, and those of
/// a memory balloon's queue 0. They stay with the device until aerostat_device_stop_queue() hands them
/// back. From then on guest memory is neither read nor written nor discarded. Kicks that come
/// meanwhile are served after aerostat_device_resume(); elements are refused.
///
/// Returns: 0, or -ENOTCONN (it was not activated, or needs a reset), -EFAULT (device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_pause(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device_unit(device, Device::pause)
}

/// Serves again after aerostat_device_pause().
///
/// Returns: 0, or -EPROTO (it is not paused), -EFAULT (device is NULL).
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_resume(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device_unit(device, Device::resume)
}

/// Back to AEROSTAT_STATE_CONFIGURING: what a VMM calls when the driver writes 0 to the status
/// (VIRTIO 1.4, 2.4; requirements S3 and A6).
///
/// Waits until nothing is in flight; afterwards no ring and no iovec is touched. The queues are
/// gone, no features are selected, and the balloon is empty; memory and target stay. Elements that
/// were not served come back from aerostat_device_completions() with AEROSTAT_COMPLETION_UNSERVED.
///
/// Returns: 0, or -EFAULT (device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_reset(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.reset();
        Ok(0)
    })
}

/// Forbids discarding: for device assignment that pins memory, postcopy migration, a background
/// snapshot. From its return on nothing is discarded until aerostat_device_uninhibit(); calls nest.
///
/// The guest is still acknowledged, its pages still move into and out of the balloon, and what is
/// skipped is counted as skipped_inhibited_bytes (invariant I4). Allowed in every state.
///
/// Returns: 0, or -EFAULT (device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_inhibit(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        device.inhibit();
        Ok(0)
    })
}

/// Takes back one aerostat_device_inhibit(). What was skipped meanwhile stays skipped.
///
/// Returns: 0, or -EPROTO (nothing inhibits), -EFAULT (device is NULL).
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_uninhibit(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device_unit(device, Device::uninhibit)
}

/// Gives all pages of the balloon back to the guest at once (requirement V3), which frees them
/// without telling the device page by page. Needs AEROSTAT_FEATURE_HOST_RESET, negotiated.
///
/// From the return on the balloon is empty and no page of it is ever discarded (invariant I1).
/// config_fd has been signalled, so that the guest sees the new reset_id in the configuration
/// space. Until it acknowledges, what it sends on the inflate and deflate queues is late:
/// acknowledged (refused, with AEROSTAT_FEATURE_PAGE_REFUSAL), counted in skipped_late_bytes and
/// late_take_bytes, and not looked at. host_resets_acknowledged of struct aerostat_counters tells
/// when the guest is through; a guest that never answers has lost nothing but its balloon.
///
/// The target stays, and the guest inflates towards it again once it has acknowledged: set it
/// first if it is not to. Allowed while paused, and again before the last reset was acknowledged:
/// the guest then acknowledges the newest. A reset of the device ends what is pending.
///
/// Returns: 0, or -ENOTSUP (AEROSTAT_FEATURE_HOST_RESET is not negotiated), -ENOTCONN (the device is
/// not active, or needs a reset), -EFAULT (device is NULL).
///
/// Threads: any. May wait for milliseconds, not for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_reset_balloon(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device_unit(device, Device::reset_balloon)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{aerostat_runtime_config, aerostat_runtime_destroy, aerostat_runtime_new};

    #[test]
    fn a_panic_spoils_its_device_for_all_but_destroy_and_no_other() {
        let threads = aerostat_runtime_config {
            size: 16,
            workers_per_node: 1,
            ..Default::default()
        };
        let offer = aerostat_device_config {
            size: 24,
            flags: 0,
            features: 0,
            config_fd: -1,
            completion_fd: -1,
            kind: 0,
            reserved: 0,
        };
        let mut runtime = std::ptr::null_mut();
        let [mut spoilt, mut other] = [std::ptr::null_mut(); 2];
        // SAFETY: all pointers are to this function's variables; handles are alive until destroyed.
        unsafe {
            assert_eq!(
                aerostat_runtime_new(&raw const threads, &raw mut runtime),
                0
            );
            for device in [&raw mut spoilt, &raw mut other] {
                assert_eq!(aerostat_device_new(runtime, &raw const offer, device), 0);
            }
            let device = handle::get(spoilt);
            assert_eq!(
                on_device(device, |_| panic!("a bug")),
                -libc::ENOTRECOVERABLE
            );
            assert_eq!(aerostat_device_state(spoilt), -libc::ENOTRECOVERABLE);
            assert_eq!(aerostat_device_reset(spoilt), -libc::ENOTRECOVERABLE);
            assert_eq!(aerostat_device_state(other), 0);
            aerostat_device_destroy(&raw mut spoilt);
            aerostat_device_destroy(&raw mut other);
            aerostat_runtime_destroy(&raw mut runtime);
        }
        assert!(spoilt.is_null());
    }
}
