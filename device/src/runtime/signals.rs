//! The library's threads take none of the VMM's signals.
//!
//! Threads inherit the mask of the thread that starts them, so it is set around that. Signals that
//! a fault raises stay open: blocked, they would kill the process past the VMM's handlers (SIGBUS
//! of memory with hardware errors, or of guest memory whose file was made shorter).
//!
//! A pipe without a reader cannot raise SIGPIPE in these threads either.
#![allow(unsafe_code, reason = "calls pthread_sigmask")]

use std::mem::MaybeUninit;
use std::ptr::null_mut;

const FAULTS: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// Keeps signals from the calling thread, and from those it starts, until it is dropped.
pub(crate) struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    pub(crate) fn new() -> Self {
        let mut blocked = MaybeUninit::<libc::sigset_t>::zeroed();
        let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: all pointers are to sets of this function's; sigfillset initialises the first one
        // before it is used, pthread_sigmask the second; neither fails with these arguments.
        unsafe {
            libc::sigfillset(blocked.as_mut_ptr());
            for signal in FAULTS {
                libc::sigdelset(blocked.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, blocked.as_ptr(), before.as_mut_ptr());
            Self {
                before: before.assume_init(),
            }
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set was initialised by pthread_sigmask; NULL asks for no answer.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The signals that this thread blocks, a bit each.
    fn mask() -> u64 {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    #[test]
    fn threads_started_meanwhile_take_only_signals_of_faults() {
        let before = mask();
        let blocked = Blocked::new();
        let inherited = std::thread::spawn(mask).join().unwrap();
        drop(blocked);
        let bit = |signal: libc::c_int| 1u64 << (signal - 1);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGALRM, libc::SIGCHLD] {
            assert_ne!(inherited & bit(signal), 0, "{signal}");
        }
        for signal in FAULTS {
            assert_eq!(inherited & bit(signal), 0, "{signal}");
        }
        assert_eq!(mask(), before);
    }
}
