//! Ranges of guest memory: what they are in C, and discarding them as they are.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Refusal, call};
use crate::handle;
use crate::memory::aerostat_memory;
use crate::runtime::aerostat_runtime;
use ::aerostat_device::memory::{BALLOON_PAGE_SHIFT, Gpa, PfnRange};
use std::ffi::c_int;

/// The most ranges that one call takes.
const MAX_RANGES: usize = 1 << 20;

/// A range of guest memory. This structure has a fixed length.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct aerostat_range {
    /// The guest physical address of its first byte.
    pub gpa: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
}

impl From<PfnRange> for aerostat_range {
    fn from(range: PfnRange) -> Self {
        Self {
            gpa: range.start.0 << BALLOON_PAGE_SHIFT,
            len_bytes: range.bytes(),
        }
    }
}

/// Discards ranges of guest memory, for a VMM that has a balloon device of its own: range mode.
/// There are no rings, no device and no books; what the guest may use is the VMM's to know. Ranges
/// may come in any order and overlap; all that are given in one call are put together first, so
/// many in a call are faster than many calls.
///
/// *results, unless results is NULL, has an answer for each range: 0 if all of its memory is free,
/// or why it is not:
/// -EINVAL (it is empty, or does not consist of pages of 4096 bytes),
/// -EFAULT (a part is in no region of memory), -EROFS (in a read-only one), -EBUSY (in a pinned
/// one): none of it was discarded;
/// -EAGAIN (it cuts a huge page of which the rest was not given in this call): the rest of it was;
/// -EIO (the kernel refused a part of it, or of ranges that touch it): what of it is free is not
/// known.
///
/// Returns: how many ranges are free, or -EINVAL (more than 1048576 ranges), -EFAULT (runtime or
/// memory is NULL, or ranges is NULL and n_ranges is not 0).
///
/// Lifetime: the arrays are used during the call only.
///
/// Threads: any, several at once. Returns when all is done; workers of the runtime help with much.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_runtime_discard(
    runtime: *const aerostat_runtime,
    memory: *const aerostat_memory,
    ranges: *const aerostat_range,
    n_ranges: usize,
    results: *mut c_int,
) -> c_int {
    call(|| {
        // SAFETY: NULL or alive (the header's rule for handles).
        let runtime = handle::required(unsafe { handle::get(runtime) })?;
        // SAFETY: the same.
        let memory = handle::required(unsafe { handle::get(memory) })?;
        if n_ranges > MAX_RANGES {
            return Err(Refusal::invalid(
                "n_ranges",
                n_ranges as u64,
                "at most 1048576",
            ));
        }
        if ranges.is_null() && n_ranges > 0 {
            return Err(Refusal::Null("ranges"));
        }
        let ranges: Vec<(Gpa, u64)> = (0..n_ranges)
            .map(|index| {
                // SAFETY: not NULL, so it may be read for `n_ranges` ranges (the header's rule for pointers).
                let range = unsafe { ranges.add(index).read_unaligned() };
                (Gpa(range.gpa), range.len_bytes)
            })
            .collect();
        let mut free = 0;
        for (index, answer) in runtime
            .runtime
            .discard_ranges(&memory.memory, &ranges)
            .into_iter()
            .enumerate()
        {
            free += c_int::from(answer.is_ok());
            if !results.is_null() {
                let result = answer.map_or_else(|reason| -reason.errno(), |()| 0);
                // SAFETY: there are as many answers as ranges, for which there is room (the same rule).
                unsafe { results.add(index).write_unaligned(result) };
            }
        }
        Ok(free)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::aerostat_device::memory::Pfn;

    #[test]
    fn ranges_are_told_in_bytes() {
        let range = aerostat_range::from(PfnRange::new(Pfn(3), 2));
        assert_eq!((range.gpa, range.len_bytes), (3 << 12, 2 << 12));
    }
}
