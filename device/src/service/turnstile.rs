//! Who serves a device: at most one worker at a time, and never nobody while there is work.
//!
//! Whoever has work notes it, then tries to take the device; it is already taken most of the time, and
//! then whoever has it looks for new work after giving it back. That this loses no work and lets no two
//! workers in depends on the order of these few steps; loom plays them through (`models` below,
//! `make loom`).
//!
//! Both sides change `taken` by an exchange, never by a plain store, so one of the two exchanges sees
//! the other: either the giver sees the note, or the noter finds the device free. No order of all
//! memory accesses (`SeqCst`) is needed for that.

use crate::sync::{AtomicBool, AtomicU32, Ordering};

/// Work of a device, a bit each, and whether somebody sees to it.
#[derive(Debug)]
pub(crate) struct Turnstile {
    /// What was noted and not looked at since.
    noted: AtomicU32,
    /// Whether a worker has the device, or it is on its way to one.
    taken: AtomicBool,
}

impl Turnstile {
    /// Nothing to do, and nobody there.
    pub(crate) fn new() -> Self {
        Self {
            noted: AtomicU32::new(0),
            taken: AtomicBool::new(false),
        }
    }

    /// Notes work; true if the caller has to bring the device to a worker.
    pub(crate) fn note(&self, work: u32) -> bool {
        self.noted.fetch_or(work, Ordering::AcqRel);
        self.take()
    }

    /// All that was noted, which is the caller's to do now.
    pub(crate) fn collect(&self) -> u32 {
        self.noted.swap(0, Ordering::AcqRel)
    }

    /// What was noted and not collected yet.
    pub(crate) fn noted(&self) -> u32 {
        self.noted.load(Ordering::Acquire)
    }

    /// Forgets what was noted but for `work`: it is of no interest any more.
    pub(crate) fn forget_all_but(&self, work: u32) {
        self.noted.fetch_and(work, Ordering::AcqRel);
    }

    /// The end of a turn, with `more` left to do. True if the caller has to come again, because of that
    /// or of what came meanwhile.
    pub(crate) fn leave(&self, more: u32) -> bool {
        self.noted.fetch_or(more, Ordering::AcqRel);
        self.release();
        // Work that was noted since the turn began found the device taken and went away.
        self.noted.load(Ordering::Acquire) != 0 && self.take()
    }

    /// Gives the device back without a look at what is left.
    pub(crate) fn release(&self) {
        self.taken.swap(false, Ordering::AcqRel);
    }

    fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_forgotten_is_still_to_be_done() {
        let turnstile = Turnstile::new();
        assert!(turnstile.note(0b110), "the first has to bring the device");
        turnstile.forget_all_but(0b100);
        assert!(!turnstile.note(0), "it is on its way");
        assert_eq!(turnstile.collect(), 0b100);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    /// A device: what was done is behind no lock, so that loom objects if two workers get in.
    struct Device {
        turnstile: Turnstile,
        done: UnsafeCell<u32>,
    }

    impl Device {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                turnstile: Turnstile::new(),
                done: UnsafeCell::new(0),
            })
        }

        /// What a worker does with a device that it was brought. A queue that is done the first time
        /// has more, once.
        #[allow(unsafe_code, reason = "loom's cell hands out a pointer")]
        fn serve(&self, more_once: u32) {
            let mut more_once = more_once;
            loop {
                let work = self.turnstile.collect();
                // SAFETY: the turnstile lets one worker in, and loom checks that it does.
                self.done.with_mut(|done| unsafe { *done |= work });
                let more = work & std::mem::take(&mut more_once);
                if !self.turnstile.leave(more) {
                    return;
                }
            }
        }

        fn kick(&self, work: u32) {
            if self.turnstile.note(work) {
                self.serve(work);
            }
        }

        #[allow(unsafe_code, reason = "loom's cell hands out a pointer")]
        fn done(&self) -> u32 {
            assert_eq!(self.turnstile.collect(), 0, "work was left lying");
            assert!(self.turnstile.take(), "the device was not given back");
            // SAFETY: all threads are gone; the turnstile was just taken.
            self.done.with(|done| unsafe { *done })
        }
    }

    fn model(body: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(body);
    }

    #[test]
    fn no_kick_is_lost_and_no_two_workers_meet() {
        model(|| {
            let device = Device::new();
            let kick = |work| {
                let device = Arc::clone(&device);
                thread::spawn(move || device.kick(work))
            };
            let threads = [kick(1), kick(2)];
            device.kick(4);
            for thread in threads {
                thread.join().unwrap();
            }
            assert_eq!(device.done(), 7);
        });
    }
}
