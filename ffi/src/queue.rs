//! A device's queues: rings that the library serves, or elements that the VMM pops.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Outcome, check_flags, check_reserved};
use crate::device::{aerostat_device, on_device};
use crate::fd;
use crate::handle;
use crate::versioned::{self, Output, Versioned};
use ::aerostat_device::memory::Gpa;
use ::aerostat_device::{Device, Error, QueueConfig, QueuePosition, RingConfig};
use std::ffi::c_int;

/// The VMM pops this queue's elements itself and passes them to aerostat_device_submit(). The
/// fields of rings are not looked at.
pub const AEROSTAT_QUEUE_ELEMENT: u32 = 1u32 << 0;

/// Where a new packed ring starts, for next_avail and next_used: slot 0, wrap counter 1.
pub const AEROSTAT_QUEUE_PACKED_START: u16 = 1u16 << 15;

/// One queue to start; see `AEROSTAT_QUEUE_CONFIG_INIT`.
///
/// Queues are numbered as the driver numbers them: 0 inflate, 1 deflate, and then those of the
/// negotiated features, either densely as Linux does it or at the fixed numbers 2 stats, 3 hinting,
/// 4 reporting of the standard. Which it is the device finds out from what was started.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct aerostat_queue_config {
    /// sizeof(struct aerostat_queue_config).
    pub size: u32,
    /// AEROSTAT_QUEUE_* bits.
    pub flags: u32,
    /// Number of descriptors, up to 32768: a power of two, unless AEROSTAT_FEATURE_RING_PACKED is
    /// negotiated. Not looked at for element queues.
    pub queue_size: u16,
    /// Where to go on in the available ring: as aerostat_device_stop_queue() returned it; for a new
    /// ring 0, or AEROSTAT_QUEUE_PACKED_START.
    pub next_avail: u16,
    /// Where to go on in the used ring: likewise.
    pub next_used: u16,
    /// 0.
    pub reserved: u16,
    /// The eventfd on which the guest's kicks arrive (an ioeventfd). Duplicated.
    pub kick_fd: i32,
    /// The eventfd to signal for an interrupt (an irqfd); -1 for a guest that polls. Duplicated.
    pub call_fd: i32,
    /// Guest physical address of the descriptors; a multiple of 16.
    pub desc_gpa: u64,
    /// Guest physical address of the available ring, a multiple of 2; of a packed ring's driver event
    /// suppression structure, a multiple of 4.
    pub avail_gpa: u64,
    /// Guest physical address of the used ring, or of a packed ring's device event suppression
    /// structure; a multiple of 4.
    pub used_gpa: u64,
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_queue_config {
    const NAME: &'static str = "aerostat_queue_config";
    const FIRST_BYTES: usize = 48;
}

/// How far a ring has been served: for a split ring the indices, which run through all 16 bits; for
/// a packed ring slots in bits 0 to 14, and the wrap counter in bit 15.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_queue_position {
    /// sizeof(struct aerostat_queue_position), set by the caller.
    pub size: u32,
    /// The next entry of the available ring to be served.
    pub next_avail: u16,
    /// The next entry of the used ring to be written.
    pub next_used: u16,
    /// 0.
    pub reserved: [u64; 3],
}

impl From<QueuePosition> for aerostat_queue_position {
    fn from(position: QueuePosition) -> Self {
        Self {
            next_avail: position.next_avail,
            next_used: position.next_used,
            ..Self::default()
        }
    }
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_queue_position {
    const NAME: &'static str = "aerostat_queue_position";
    const FIRST_BYTES: usize = 32;
}

const _: () = assert!(size_of::<aerostat_queue_config>() == 48);
const _: () = assert!(size_of::<aerostat_queue_position>() == 32);

/// Starts a queue: before aerostat_device_activate(), or while the device is active or paused.
///
/// aerostat_device_set_features() and aerostat_device_set_memory() come first (VIRTIO 1.4, 2.7 split
/// and 2.8 packed virtqueues).
///
/// Returns: 0, or
/// -ENOENT (the kind of device has no such queue),
/// -EALREADY (the queue is started),
/// -EINVAL (an unknown flag, a queue_size that is not allowed, or a position outside the ring),
/// -EADDRNOTAVAIL (an address is not aligned),
/// -ERANGE (a ring is not inside one memory region),
/// -EROFS (what the device writes to of a ring is in an AEROSTAT_REGION_READONLY region),
/// -EBADF (kick_fd is no open eventfd, or call_fd neither -1 nor one),
/// -ENOTCONN (features or memory are not set, or the device needs a reset),
/// -EMSGSIZE, -E2BIG (config->size),
/// -EFAULT (a pointer is NULL).
///
/// Lifetime: config is read during the call only, and descriptors are duplicated. Eventfds become
/// non-blocking, which they share with the caller's descriptors.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_start_queue(
    device: *mut aerostat_device,
    index: u32,
    config: *const aerostat_queue_config,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let config = unsafe { versioned::read(config) }?;
        check_flags(
            "aerostat_queue_config.flags",
            config.flags,
            AEROSTAT_QUEUE_ELEMENT,
        )?;
        check_reserved("aerostat_queue_config.reserved", config.reserved.into())?;
        let index = queue_index(device, index)?;
        let ring = match config.flags & AEROSTAT_QUEUE_ELEMENT {
            0 => Some(ring(&config)?),
            _ => None,
        };
        device.start_queue(
            index,
            QueueConfig {
                size: config.queue_size,
                ring,
            },
        )?;
        Ok(0)
    })
}

/// Stops a queue after what is in flight on it, and tells how far it was served. The queue can be
/// started again there, by this process or another one. A held stats buffer goes back into its ring;
/// elements that were not served complete with AEROSTAT_COMPLETION_UNSERVED.
///
/// Returns: 0 and the position in *out (zeros for an element queue), or -ENOENT (the kind of device
/// has no such queue, or it is not started), -EMSGSIZE or -EFAULT (out; device is NULL).
///
/// Threads: any; may wait for milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_stop_queue(
    device: *mut aerostat_device,
    index: u32,
    out: *mut aerostat_queue_position,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        let position = device.stop_queue(queue_index(device, index)?)?;
        out.fill(&position.into());
        Ok(0)
    })
}

/// Replaces the eventfd that interrupts are signalled on, while the queue runs. The new one is
/// signalled once, in case that the old one swallowed an interrupt.
///
/// Returns: 0, or -ENOENT (the kind of device has no such queue, or no ring is started there),
/// -EBADF (call_fd is neither -1 nor an open eventfd), -EFAULT (device is NULL).
///
/// Lifetime: call_fd is duplicated. Eventfds become non-blocking, which they share with the caller's
/// descriptors.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_queue_call(
    device: *mut aerostat_device,
    index: u32,
    call_fd: i32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        let call = fd::optional_eventfd("call_fd", call_fd)?;
        device.set_queue_call(queue_index(device, index)?, call)?;
        Ok(0)
    })
}

/// Refuses indices that no queue of the device has.
pub(crate) fn queue_index(device: &Device, index: u32) -> Outcome<u16> {
    match u16::try_from(index) {
        Ok(index) if index < device.kind().queues() => Ok(index),
        _ => Err(Error::NoQueue { index }.into()),
    }
}

fn ring(config: &aerostat_queue_config) -> Outcome<RingConfig> {
    const KICK: &str = "aerostat_queue_config.kick_fd";
    const CALL: &str = "aerostat_queue_config.call_fd";
    let [kick, call] = fd::eventfd_pair((KICK, config.kick_fd), (CALL, config.call_fd))?;
    Ok(RingConfig {
        desc: Gpa(config.desc_gpa),
        avail: Gpa(config.avail_gpa),
        used: Gpa(config.used_gpa),
        kick: fd::required(KICK, kick)?,
        call,
        position: QueuePosition {
            next_avail: config.next_avail,
            next_used: config.next_used,
        },
    })
}
