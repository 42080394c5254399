//! The message that goes with a negative return value, one per thread.
#![allow(unsafe_code, reason = "exports a symbol to C")]

use std::cell::RefCell;
use std::ffi::{CString, c_char};

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// Keeps `message` for the calling thread.
pub(crate) fn set(message: String) {
    let mut bytes = message.into_bytes();
    bytes.retain(|byte| *byte != 0);
    let message = CString::new(bytes).unwrap_or_default();
    // While the thread is being torn down there is nobody left to read it.
    let _ = MESSAGE.try_with(|place| place.replace(message));
}

/// Explains the calling thread's last failed call in one English sentence.
///
/// Returns: never NULL; an empty string if no call of this thread has failed yet. Calls that
/// succeed leave the message as it is.
///
/// Lifetime: the string belongs to the library and stays valid until this thread's next call into
/// the library, or its end. Copy it to keep it.
///
/// Threads: any; each thread has its own message.
#[unsafe(no_mangle)]
pub extern "C" fn aerostat_last_error() -> *const c_char {
    MESSAGE
        .try_with(|place| place.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the pointer is a C string that lives until this thread's next call.
        let message = unsafe { CStr::from_ptr(aerostat_last_error()) };
        message.to_str().unwrap().to_owned()
    }

    #[test]
    fn each_thread_has_its_own_message() {
        set("here".into());
        std::thread::spawn(|| {
            assert_eq!(message(), "");
            set("there".into());
        })
        .join()
        .unwrap();
        assert_eq!(message(), "here");
    }

    #[test]
    fn zero_bytes_in_a_message_do_not_cut_it() {
        set("a\0b".into());
        assert_eq!(message(), "ab");
    }
}
