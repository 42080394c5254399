//! loom's threads behind the calls of `parking_lot`, `crossbeam_channel` and `std::time` that are used here.

use loom::sync::atomic::{AtomicU32, Ordering};
use std::cell::Cell;
use std::ops::{Add, Deref, DerefMut};
use std::time::Duration;

loom::lazy_static! {
    /// What all steps touch, so that loom takes them for accesses to one and the same thing.
    static ref OUTSIDE: AtomicU32 = AtomicU32::new(0);
}

/// See the function of that name that is used otherwise.
pub(crate) fn step() {
    OUTSIDE.fetch_add(1, Ordering::SeqCst);
}

thread_local! {
    /// The threads of a model are coroutines of one thread.
    static CLOCK: Cell<u64> = const { Cell::new(0) };
}

/// A clock that goes on by 30 us whenever somebody looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        CLOCK.set(CLOCK.get() + 1);
        Self(Duration::from_micros(30 * CLOCK.get()))
    }

    pub(crate) fn elapsed(&self) -> Duration {
        Self::now().0 - self.0
    }

    /// Each run of a model begins at the same time: it has to go on as before if threads do.
    #[cfg(test)]
    pub(crate) fn start_again() {
        CLOCK.set(0);
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0 + later)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

/// `None` only inside [`Condvar::wait`].
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(self.0.lock().ok())
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok().map(|guard| MutexGuard(Some(guard)))
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_deref().expect("a lock that is held")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_deref_mut().expect("a lock that is held")
    }
}

/// One reader at a time will do.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T>(Mutex<T>);

impl<T> RwLock<T> {
    pub(crate) fn read(&self) -> MutexGuard<'_, T> {
        self.0.lock()
    }

    pub(crate) fn write(&self) -> MutexGuard<'_, T> {
        self.0.lock()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Condvar(loom::sync::Condvar);

/// No deadline is ever over in a model.
pub(crate) struct Never;

impl Never {
    pub(crate) fn timed_out(&self) -> bool {
        false
    }
}

impl Condvar {
    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if let Some(held) = guard.0.take() {
            guard.0 = self.0.wait(held).ok();
        }
    }

    pub(crate) fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        _at: std::time::Instant,
    ) -> Never {
        self.wait(guard);
        Never
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// Channels that nobody waits at: who would, looks again when other threads have gone on.
pub(crate) mod channel {
    use super::Mutex;
    pub(crate) use crossbeam_channel::TryRecvError;
    use std::collections::VecDeque;
    use std::fmt;
    use std::sync::Arc;

    struct Shared<T> {
        values: VecDeque<T>,
        senders: usize,
    }

    pub(crate) struct Sender<T>(Arc<Mutex<Shared<T>>>);

    pub(crate) struct Receiver<T>(Arc<Mutex<Shared<T>>>);

    impl<T> fmt::Debug for Sender<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.pad("Sender")
        }
    }

    impl<T> fmt::Debug for Receiver<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.pad("Receiver")
        }
    }

    pub(crate) fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let values = VecDeque::new();
        let shared = Arc::new(Mutex::new(Shared { values, senders: 1 }));
        (Sender(Arc::clone(&shared)), Receiver(shared))
    }

    /// Used for the end of the channel alone, which needs no bound.
    pub(crate) fn bounded<T>(_values: usize) -> (Sender<T>, Receiver<T>) {
        unbounded()
    }

    impl<T> Sender<T> {
        #[expect(clippy::unnecessary_wraps, reason = "as the real one")]
        pub(crate) fn send(&self, value: T) -> Result<(), T> {
            self.0.lock().values.push_back(value);
            Ok(())
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.lock().senders += 1;
            Self(Arc::clone(&self.0))
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.lock().senders -= 1;
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
            let mut shared = self.0.lock();
            match shared.values.pop_front() {
                Some(value) => Ok(value),
                None if shared.senders > 0 => Err(TryRecvError::Empty),
                None => Err(TryRecvError::Disconnected),
            }
        }

        pub(crate) fn try_iter(&self) -> impl Iterator<Item = T> {
            std::iter::from_fn(|| self.try_recv().ok())
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.lock().values.is_empty()
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Self(Arc::clone(&self.0))
        }
    }
}
