//! Opaque pointers: C owns them, between a `_new` and a `_destroy`.
#![allow(unsafe_code, reason = "turns C's pointers into references")]

use crate::boundary::{Outcome, Refusal, call_unit};

/// A type whose values C holds by pointer. Several threads may use one at a time.
pub(crate) trait Handle: Sized + Send + Sync {
    /// What messages call it.
    const NAME: &'static str;
}

/// The place where C wants a new handle.
#[derive(Debug)]
pub(crate) struct Slot<T: Handle>(*mut *mut T);

impl<T: Handle> Slot<T> {
    /// Checks the place and empties it, so that C finds NULL there if the call fails.
    ///
    /// # Safety
    /// `out` is NULL, or may be written until the slot is gone.
    pub(crate) unsafe fn new(out: *mut *mut T) -> Outcome<Self> {
        if out.is_null() {
            return Err(Refusal::Null("out"));
        }
        // SAFETY: not NULL, so it may be written.
        unsafe { out.write(std::ptr::null_mut()) };
        Ok(Self(out))
    }

    /// Hands `value` to C.
    pub(crate) fn fill(self, value: T) {
        // SAFETY: `new` checked the place, and its caller keeps it writable.
        unsafe { self.0.write(Box::into_raw(Box::new(value))) };
    }
}

/// The object behind a handle, or `None` for NULL.
///
/// # Safety
/// `handle` is NULL or came from [`Slot::fill`], and is not destroyed during `'a`.
pub(crate) unsafe fn get<'a, T: Handle>(handle: *const T) -> Option<&'a T> {
    // SAFETY: not NULL, so it points to a live value, which only `destroy` may take away; values
    // are shared between threads, which `Handle` requires them to support.
    unsafe { handle.as_ref() }
}

/// Refuses NULL.
pub(crate) fn required<T: Handle>(handle: Option<&T>) -> Outcome<&T> {
    handle.ok_or(Refusal::Null(T::NAME))
}

/// Destroys the object behind `*slot`, if there is one, and sets `*slot` to NULL.
///
/// # Safety
/// `slot` is NULL or may be read and written; `*slot` is NULL or came from [`Slot::fill`], and no
/// other call uses it now or later.
pub(crate) unsafe fn destroy<T: Handle>(slot: *mut *mut T) {
    // A destroy cannot fail; should the drop panic, the message says so.
    call_unit(|| {
        if slot.is_null() {
            return Ok(());
        }
        // SAFETY: not NULL, so it may be read and written.
        let handle = unsafe { slot.replace(std::ptr::null_mut()) };
        if !handle.is_null() {
            // SAFETY: the pointer came from `Box::into_raw` in `Slot::fill`, and with this call
            // nobody uses it any more.
            drop(unsafe { Box::from_raw(handle) });
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Debug)]
    struct Thing(Arc<()>);

    impl Handle for Thing {
        const NAME: &'static str = "thing";
    }

    #[test]
    fn destroy_frees_once_and_clears_the_callers_pointer() {
        let alive = Arc::new(());
        let mut thing = std::ptr::null_mut();
        // SAFETY: the slot is this function's variable.
        unsafe { Slot::new(&raw mut thing) }
            .unwrap()
            .fill(Thing(Arc::clone(&alive)));
        // SAFETY: the handle is alive.
        let thing_is_alive = Arc::strong_count(&unsafe { get(thing) }.unwrap().0) == 2;
        assert!(thing_is_alive);
        for _ in 0..2 {
            // SAFETY: alive at first, NULL the second time.
            unsafe { destroy(&raw mut thing) };
            assert!(thing.is_null());
            assert_eq!(Arc::strong_count(&alive), 1);
        }
    }

    #[test]
    fn null_is_refused_or_ignored() {
        let null = std::ptr::null_mut();
        // SAFETY: NULL is allowed in all three.
        unsafe {
            assert!(required(get::<Thing>(null)).is_err());
            assert!(Slot::<Thing>::new(std::ptr::null_mut()).is_err());
            destroy::<Thing>(std::ptr::null_mut());
        }
    }
}
