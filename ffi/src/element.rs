//! Elements: buffers that a VMM popped from its own virtqueue.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Outcome, Refusal, check_flags};
use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::queue::queue_index;
use ::aerostat_device::{Device, Element, Error, IoVec};
use libc::iovec;
use std::ffi::c_int;

/// The element was not served: the device was reset, its queue was stopped, or the queue is not
/// started as an element queue. Nothing was written to it. Unpop it, or drop it.
pub const AEROSTAT_COMPLETION_UNSERVED: u16 = 1u16 << 0;

/// Serve the element on the thread that submits it, unless a worker is with the device: no other
/// thread has to be woken, and its completion can be collected when aerostat_device_submit()
/// returns. That takes as long as serving does: microseconds for an inflate with write-behind
/// (aerostat_device_set_write_behind()), else the time of its system calls.
pub const AEROSTAT_ELEMENT_HERE: u32 = 1u32 << 0;

/// The most iovecs that one part of an element may have: as many as the largest queue has
/// descriptors, each of which may cross memory regions.
const MAX_IOVECS: usize = 65536;

/// The most elements that one call takes.
const MAX_ELEMENTS: usize = 65536;

/// A buffer that the VMM popped from its own virtqueue (QEMU: a VirtQueueElement). This structure
/// has a fixed length and grows by its flags.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct aerostat_element {
    /// Returned with the completion; otherwise not looked at.
    pub token: u64,
    /// What the device may read (QEMU: out_sg). NULL if n_readable is 0.
    pub readable: *const iovec,
    /// What the device may write (QEMU: in_sg); on the reporting queue, the reported pages. NULL if
    /// n_writable is 0.
    pub writable: *const iovec,
    /// How many iovecs readable has.
    pub n_readable: u32,
    /// How many iovecs writable has.
    pub n_writable: u32,
    /// The queue that it was popped from.
    pub queue: u32,
    /// AEROSTAT_ELEMENT_* bits.
    pub flags: u32,
}

/// An element that the device is done with. This structure has a fixed length and grows by its
/// flags.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_completion {
    /// The element's token.
    pub token: u64,
    /// Bytes written to the element, for its used length (QEMU: virtqueue_push()).
    pub written_bytes: u32,
    /// The queue to push it to.
    pub queue: u16,
    /// AEROSTAT_COMPLETION_* bits; a caller ignores those that it does not know.
    pub flags: u16,
}

const _: () = assert!(size_of::<aerostat_element>() == 40);
const _: () = assert!(size_of::<aerostat_completion>() == 16);

/// Hands over n elements of queues that were started with AEROSTAT_QUEUE_ELEMENT. All of them are
/// taken, or none.
///
/// Each element is completed exactly once (invariant I2), after its pages were discarded where the
/// guest may count on it: those of one queue in the order in which they were submitted, those of
/// different queues in any order. The buffer of the stats queue is held until
/// aerostat_device_guest_stats() asks for news (requirement S8), those of a memory balloon's queue 0
/// until there is a minimum to tell (R7).
///
/// Returns: 0, or
/// -EAGAIN (too many elements wait: collect completions first),
/// -ENOENT (no queue has such a number),
/// -EINVAL (an unknown flag, or more than 65536 elements or iovecs),
/// -ENOTCONN (the device is not active),
/// -EBUSY (it is paused),
/// -EFAULT (a pointer is NULL whose count is not 0, or that of an iovec whose length is not 0),
/// -ERANGE (an iovec reaches behind the address space).
///
/// Lifetime: elements, and its arrays of iovecs, are read during the call only. What the iovecs
/// point to has to stay mapped until the completion was collected or the device was reset. Iovecs
/// outside the memory table are allowed for what the device reads or writes; reported pages have to
/// be in it, else their element counts as a chain error.
///
/// Threads: any. Does not wait for the elements, unless all of them have AEROSTAT_ELEMENT_HERE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_submit(
    device: *mut aerostat_device,
    elements: *const aerostat_element,
    n: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if n == 0 {
            return Ok(0);
        }
        if elements.is_null() {
            return Err(Refusal::Null("elements"));
        }
        if n > MAX_ELEMENTS {
            return Err(Refusal::invalid("n", n as u64, "at most 65536"));
        }
        let mut here = true;
        let elements = (0..n)
            .map(|index| {
                // SAFETY: index is below n, so the element may be read (the header's rule for
                // pointers).
                let from = unsafe { elements.add(index).read_unaligned() };
                here &= from.flags & AEROSTAT_ELEMENT_HERE != 0;
                // SAFETY: the arrays that it points to may be read (the same rule); what the iovecs
                // point to stays mapped until the completion (this function's contract).
                unsafe { element(device, &from) }
            })
            .collect::<Outcome<Vec<Element>>>()?;
        if here {
            device.submit_and_serve(elements)?;
        } else {
            device.submit(elements)?;
        }
        Ok(0)
    })
}

/// Collects up to max completions, in the order in which the elements were finished.
///
/// Read completion_fd first and collect afterwards until fewer than max come back: so no wake-up is
/// lost.
///
/// Returns: how many were stored in out, 0 if there is none, or -EFAULT (device is NULL, or out is
/// NULL and max is not 0).
///
/// Threads: any. Never waits. Two threads that collect get different completions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_completions(
    device: *mut aerostat_device,
    out: *mut aerostat_completion,
    max: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if max == 0 {
            return Ok(0);
        }
        if out.is_null() {
            return Err(Refusal::Null("out"));
        }
        let mut completions = Vec::new();
        device.completions(max.min(MAX_ELEMENTS), &mut completions);
        for (index, completion) in completions.iter().enumerate() {
            let completion = aerostat_completion {
                token: completion.token,
                written_bytes: completion.written,
                queue: completion.queue,
                flags: if completion.served {
                    0
                } else {
                    AEROSTAT_COMPLETION_UNSERVED
                },
            };
            // SAFETY: `completions` has at most `max` entries, for which there is room (the
            // header's rule for pointers).
            unsafe { out.add(index).write_unaligned(completion) };
        }
        Ok(c_int::try_from(completions.len()).unwrap_or(c_int::MAX))
    })
}

/// Copies an element and its arrays.
///
/// # Safety
/// `readable` and `writable` are NULL, or may be read for as many iovecs as their counts say. What
/// the iovecs point to stays mapped until the element's completion was collected, or a reset.
unsafe fn element(device: &Device, from: &aerostat_element) -> Outcome<Element> {
    check_flags("aerostat_element.flags", from.flags, AEROSTAT_ELEMENT_HERE)?;
    let queue = queue_index(device, from.queue)?;
    // SAFETY: as the caller promises.
    let (readable, writable) = unsafe {
        (
            iovecs("aerostat_element.readable", from.readable, from.n_readable)?,
            iovecs("aerostat_element.writable", from.writable, from.n_writable)?,
        )
    };
    Ok(Element {
        queue,
        token: from.token,
        readable,
        writable,
    })
}

/// Copies an array of iovecs.
///
/// # Safety
/// `from` is NULL, or may be read for `count` iovecs. What they point to stays mapped until the
/// element's completion was collected, or a reset.
unsafe fn iovecs(what: &'static str, from: *const iovec, count: u32) -> Outcome<Vec<IoVec>> {
    let count = count as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    if from.is_null() {
        return Err(Refusal::Null(what));
    }
    if count > MAX_IOVECS {
        return Err(Refusal::invalid(what, count as u64, "at most 65536 iovecs"));
    }
    (0..count)
        .map(|index| {
            // SAFETY: index is below count, as the caller promises it may be read.
            let iovec = unsafe { from.add(index).read_unaligned() };
            let (address, len) = (iovec.iov_base as usize, iovec.iov_len);
            if address == 0 && len != 0 {
                return Err(Refusal::Null("an iovec's iov_base"));
            }
            if address.checked_add(len).is_none() {
                return Err(Refusal::Device(Error::OutOfRange {
                    what: "an iovec",
                    address: address as u64,
                    len: len as u64,
                }));
            }
            // SAFETY: the memory stays mapped until the element is completed (as the caller promises).
            Ok(unsafe { IoVec::new(address, len) })
        })
        .collect()
}
