//! Structures that start with their own size, so that they may grow between versions.
//!
//! The rules are those of the kernel's extensible system calls (clone3, openat2): a caller built
//! against an older header passes a shorter structure and gets the old behaviour; one built against
//! a newer header may pass a longer structure as long as it does not ask for anything unknown here.
#![allow(unsafe_code, reason = "copies structures whose length C tells")]

use crate::boundary::{Outcome, Refusal};
use std::mem::MaybeUninit;

/// No structure will ever be longer; a larger size is a mistake, and is not read that far.
const MAX_BYTES: u32 = 4096;

/// A structure of the header that starts with `uint32_t size`.
///
/// # Safety
/// The type is `repr(C)`, its first field is a `u32`, and every pattern of bits is a value of it.
pub(crate) unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Its size in the first release that had it.
    const FIRST_BYTES: usize;
}

/// What the caller says the structure's size is, if that can be.
///
/// # Safety
/// `structure` is NULL or may be read for four bytes.
unsafe fn told_bytes<T: Versioned>(structure: *const T) -> Outcome<usize> {
    if structure.is_null() {
        return Err(Refusal::Null(T::NAME));
    }
    // SAFETY: not NULL, so four bytes may be read; they need not be aligned.
    let size = unsafe { structure.cast::<u32>().read_unaligned() };
    if size > MAX_BYTES {
        return Err(Refusal::Oversize {
            name: T::NAME,
            size,
        });
    }
    let bytes = size as usize;
    if bytes < T::FIRST_BYTES {
        return Err(Refusal::TooShort {
            name: T::NAME,
            size,
            least: T::FIRST_BYTES,
        });
    }
    Ok(bytes)
}

/// Copies a structure from C. Fields behind the end of a shorter one are zero.
///
/// # Safety
/// `from` is NULL, or may be read for as many bytes as its `size` field says (at least four).
pub(crate) unsafe fn read<T: Versioned>(from: *const T) -> Outcome<T> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { told_bytes(from) }?;
    let (known, from) = (bytes.min(size_of::<T>()), from.cast::<u8>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: `known` is within what may be read and within `value`, which is a local variable.
    unsafe { from.copy_to_nonoverlapping(value.as_mut_ptr().cast(), known) };
    for offset in known..bytes {
        // SAFETY: `offset` is below `bytes`, so it may be read.
        if unsafe { from.add(offset).read() } != 0 {
            return Err(Refusal::TooLong {
                name: T::NAME,
                known,
            });
        }
    }
    // SAFETY: all bytes are initialised, and every pattern is a value (`Versioned`).
    Ok(unsafe { value.assume_init() })
}

/// Copies an array of structures from C, each as long as the first one says.
///
/// # Safety
/// `from` is NULL, or may be read for `count` structures, each as long as its `size` field says.
pub(crate) unsafe fn read_array<T: Versioned>(from: *const T, count: usize) -> Outcome<Vec<T>> {
    // SAFETY: as the caller promises, there is at least one.
    let stride = unsafe { told_bytes(from) }?;
    let mut values = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: structure `index` starts behind `index` others, all of `stride` bytes: the
        // previous turn checked that the one before it has that size.
        let element = unsafe { from.cast::<u8>().add(index * stride) }.cast::<T>();
        // SAFETY: it may be read, as the caller promises.
        if unsafe { told_bytes(element) }? != stride {
            return Err(Refusal::invalid(
                "size of an array's element",
                index as u64,
                "the size of element 0",
            ));
        }
        // SAFETY: as above.
        values.push(unsafe { read(element) }?);
    }
    Ok(values)
}

/// A structure of C's that is to be filled.
#[derive(Debug)]
pub(crate) struct Output<T: Versioned> {
    to: *mut T,
    bytes: usize,
}

impl<T: Versioned> Output<T> {
    /// Checks the place, before any work is done for it.
    ///
    /// # Safety
    /// `to` is NULL, or may be read and written for as many bytes as its `size` field says (at
    /// least four) until the output is gone.
    pub(crate) unsafe fn new(to: *mut T) -> Outcome<Self> {
        // SAFETY: as the caller promises.
        let bytes = unsafe { told_bytes(to) }?;
        Ok(Self { to, bytes })
    }

    /// Fills in as much of `value` as there is room for, and zeroes what this version does not
    /// know. The `size` field then says how much was filled in.
    pub(crate) fn fill(self, value: &T) {
        let to = self.to.cast::<u8>();
        let filled = self.bytes.min(size_of::<T>());
        // SAFETY: both lie within what `new` was promised; `value` is the library's, so the two do
        // not overlap; the size field needs no alignment.
        unsafe {
            to.copy_from_nonoverlapping(std::ptr::from_ref(value).cast(), filled);
            to.add(filled).write_bytes(0, self.bytes - filled);
            // `filled` is at most MAX_BYTES.
            to.cast::<u32>()
                .write_unaligned(u32::try_from(filled).unwrap_or(MAX_BYTES));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Old {
        size: u32,
        one: u32,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct New {
        size: u32,
        one: u32,
        two: u64,
    }

    // SAFETY: integers only, the size first.
    unsafe impl Versioned for Old {
        const NAME: &'static str = "aerostat_test";
        const FIRST_BYTES: usize = 8;
    }

    // SAFETY: integers only, the size first.
    unsafe impl Versioned for New {
        const NAME: &'static str = "aerostat_test";
        const FIRST_BYTES: usize = 8;
    }

    fn errno<T: std::fmt::Debug>(outcome: Outcome<T>) -> i32 {
        crate::boundary::call_unit(|| outcome.map(|_| ()))
    }

    #[test]
    fn an_older_callers_structure_reads_as_zero_behind_its_end() {
        let old = Old { size: 8, one: 1 };
        // SAFETY: eight bytes may be read, and `size` says eight.
        let new: New = unsafe { read((&raw const old).cast()) }.unwrap();
        assert_eq!((new.one, new.two), (1, 0));
    }

    #[test]
    fn a_newer_callers_structure_is_taken_only_if_it_asks_for_nothing_unknown() {
        let mut new = New {
            size: 16,
            one: 1,
            two: 0,
        };
        // SAFETY: sixteen bytes may be read, and `size` says sixteen.
        let old = unsafe { read::<Old>((&raw const new).cast()) }.unwrap();
        assert_eq!(old.one, 1);
        new.two = 1 << 63;
        // SAFETY: as above.
        let outcome = unsafe { read::<Old>((&raw const new).cast()) };
        assert_eq!(errno(outcome), -libc::E2BIG);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_without_reading_on() {
        for (size, expected) in [
            (0, -libc::EMSGSIZE),
            (7, -libc::EMSGSIZE),
            (4097, -libc::E2BIG),
            (u32::MAX, -libc::E2BIG),
        ] {
            // SAFETY: refused by its size alone, which may be read.
            let outcome = unsafe { read::<Old>((&raw const size).cast()) };
            assert_eq!(errno(outcome), expected, "{size}");
        }
        // SAFETY: NULL is allowed.
        let outcome = unsafe { read::<Old>(std::ptr::null()) };
        assert_eq!(errno(outcome), -libc::EFAULT);
    }

    #[test]
    fn an_arrays_stride_is_its_callers() {
        let array = [1, 2, 3].map(|one| New {
            size: 16,
            one,
            two: 0,
        });
        // SAFETY: three structures of sixteen bytes.
        let read = unsafe { read_array::<Old>((&raw const array).cast(), 3) }.unwrap();
        assert_eq!(
            read.iter().map(|old| old.one).collect::<Vec<_>>(),
            [1, 2, 3]
        );
    }

    #[test]
    fn an_array_of_mixed_sizes_is_refused() {
        let array = [Old { size: 8, one: 1 }, Old { size: 16, one: 2 }];
        // SAFETY: the second structure's size is looked at, but not believed.
        let outcome = unsafe { read_array::<Old>((&raw const array).cast(), 2) };
        assert_eq!(errno(outcome), -libc::EINVAL);
    }

    #[test]
    fn outputs_are_cut_to_an_older_callers_size_and_zeroed_to_a_newer_ones() {
        let mut room = [0xaaaa_aaaa_u32, 1, 2, 3, 4, 5];
        let value = New {
            size: 0,
            one: 7,
            two: u64::MAX,
        };
        room[0] = 8;
        // SAFETY: `room` has 24 bytes, of which 8 are told.
        unsafe { Output::<New>::new((&raw mut room).cast()) }
            .unwrap()
            .fill(&value);
        assert_eq!(room, [8, 7, 2, 3, 4, 5]);
        room[0] = 20;
        // SAFETY: as above, with 20 told.
        unsafe { Output::<New>::new((&raw mut room).cast()) }
            .unwrap()
            .fill(&value);
        assert_eq!(room, [16, 7, u32::MAX, u32::MAX, 0, 5]);
    }
}
