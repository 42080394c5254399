//! Log messages, passed to the VMM if it wants them.
#![allow(unsafe_code, reason = "exports a symbol to C and calls back into C")]

use crate::boundary::{Refusal, call_unit};
use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::RwLock;
use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::Once;

/// How much a log message matters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_log_level {
    /// Nothing is logged.
    AEROSTAT_LOG_OFF = 0,
    /// Something failed that the guest or the host will notice.
    AEROSTAT_LOG_ERROR = 1,
    /// Something is odd, or works with less effect than it should.
    AEROSTAT_LOG_WARN = 2,
    /// What an operator wants to know: life cycle, capabilities found.
    AEROSTAT_LOG_INFO = 3,
    /// What a developer of a VMM wants to know.
    AEROSTAT_LOG_DEBUG = 4,
    /// Everything.
    AEROSTAT_LOG_TRACE = 5,
}

/// Takes one log message: the user pointer of aerostat_set_log(), an enum aerostat_log_level, and
/// one line of text without a line end, which is valid during the call only.
///
/// It is called from the library's threads as well as from threads that call the library, several
/// at a time. It must not block, and must not call aerostat_set_log(); it may call anything else that
/// never waits. Messages that the library has for it meanwhile, on the same thread, are dropped.
pub type aerostat_log_callback =
    Option<unsafe extern "C" fn(user: *mut c_void, level: c_int, message: *const c_char)>;

/// Sends the library's log messages of the whole process to callback, up to level. NULL, or
/// AEROSTAT_LOG_OFF, ends that. Without this call nothing is logged.
///
/// Returns: 0, or -EINVAL (level is no enum aerostat_log_level), -EDEADLK (called from a log
/// callback), -EALREADY (in a Rust program that has installed a logger of its own).
///
/// Lifetime: the former callback and its user pointer are out of use when this returns.
///
/// Threads: any, except from within a callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_set_log(
    callback: aerostat_log_callback,
    user: *mut c_void,
    level: c_int,
) -> c_int {
    call_unit(|| {
        if CALLING.get() {
            return Err(Refusal::InsideCallback("aerostat_set_log()"));
        }
        let filter = level_filter(level).ok_or_else(|| {
            Refusal::invalid(
                "level",
                u64::from(level.unsigned_abs()),
                "an enum aerostat_log_level",
            )
        })?;
        install()?;
        let filter = callback.map_or(LevelFilter::Off, |_| filter);
        // Waits for callbacks that are running, so that the former one is out of use on return.
        *SINK.target.write() = callback.map(|callback| Target { callback, user });
        log::set_max_level(filter);
        Ok(())
    })
}

/// Where messages go.
#[derive(Debug)]
struct Target {
    callback: unsafe extern "C" fn(*mut c_void, c_int, *const c_char),
    user: *mut c_void,
}

// SAFETY: the pointer is only passed back to the callback, which by its contract is called from
// several threads.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

struct Sink {
    target: RwLock<Option<Target>>,
}

static SINK: Sink = Sink {
    target: RwLock::new(None),
};

thread_local! {
    /// The thread is inside the callback.
    static CALLING: Cell<bool> = const { Cell::new(false) };
}

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) || CALLING.get() {
            return;
        }
        let mut text = record.args().to_string().replace('\n', " ").into_bytes();
        text.retain(|byte| *byte != 0);
        let text = CString::new(text).unwrap_or_default();
        let target = self.target.read();
        if let Some(target) = &*target {
            CALLING.set(true);
            // SAFETY: the caller of aerostat_set_log keeps both usable until it replaces them, for
            // which it waits for the lock held here; the text lives until the end of this block.
            unsafe { (target.callback)(target.user, level_number(record.level()), text.as_ptr()) };
            CALLING.set(false);
        }
    }

    fn flush(&self) {}
}

/// Makes the sink the process's logger, once.
fn install() -> Result<(), Refusal> {
    static INSTALL: Once = Once::new();
    static INSTALLED: RwLock<bool> = RwLock::new(false);
    INSTALL.call_once(|| *INSTALLED.write() = log::set_logger(&SINK).is_ok());
    match *INSTALLED.read() {
        true => Ok(()),
        false => Err(::aerostat_device::Error::AlreadyStarted("another logger").into()),
    }
}

fn level_filter(level: c_int) -> Option<LevelFilter> {
    LevelFilter::iter().nth(usize::try_from(level).ok()?)
}

fn level_number(level: Level) -> c_int {
    match level {
        Level::Error => aerostat_log_level::AEROSTAT_LOG_ERROR as c_int,
        Level::Warn => aerostat_log_level::AEROSTAT_LOG_WARN as c_int,
        Level::Info => aerostat_log_level::AEROSTAT_LOG_INFO as c_int,
        Level::Debug => aerostat_log_level::AEROSTAT_LOG_DEBUG as c_int,
        Level::Trace => aerostat_log_level::AEROSTAT_LOG_TRACE as c_int,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI32, Ordering};

    static INSIDE: AtomicI32 = AtomicI32::new(0);

    unsafe extern "C" fn record(user: *mut c_void, level: c_int, _message: *const c_char) {
        // SAFETY: the test passes a pointer to its counter.
        unsafe { &*user.cast::<AtomicI32>() }.fetch_add(level, Ordering::Relaxed);
        // A callback that logs, or sets the log, must neither loop nor hang.
        log::error!("from within");
        // SAFETY: refused before anything is used.
        let refused = unsafe { aerostat_set_log(None, std::ptr::null_mut(), 0) };
        INSIDE.store(refused, Ordering::Relaxed);
    }

    /// One test, because the logger is the process's.
    #[test]
    fn messages_up_to_the_level_reach_the_callback_until_it_is_taken_away() {
        let sum = AtomicI32::new(0);
        let user = std::ptr::from_ref(&sum).cast_mut().cast();
        // SAFETY: the counter outlives the callback, which is taken away below.
        unsafe {
            assert_eq!(aerostat_set_log(Some(record), user, 6), -libc::EINVAL);
            assert_eq!(aerostat_set_log(Some(record), user, -1), -libc::EINVAL);
            assert_eq!(aerostat_set_log(Some(record), user, 2), 0);
        }
        log::error!("counted as 1");
        log::warn!("counted as 2");
        log::info!("not counted");
        assert_eq!(sum.load(Ordering::Relaxed), 3);
        assert_eq!(INSIDE.load(Ordering::Relaxed), -libc::EDEADLK);
        // SAFETY: no callback is passed.
        assert_eq!(unsafe { aerostat_set_log(None, user, 5) }, 0);
        log::error!("not counted");
        assert_eq!(sum.load(Ordering::Relaxed), 3);
    }
}
