//! Asking the guest for statistics at an interval (`guest-stats-polling-interval`).

use crate::vm::Vm;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long one question waits for its answer; a slow guest's comes with the next one.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A thread that asks, and the interval at which it does.
#[derive(Debug)]
pub(super) struct Polling(Arc<Interval>);

#[derive(Debug, Default)]
struct Interval {
    seconds: Mutex<u64>,
    changed: Condvar,
}

impl Polling {
    /// Starts the thread, which asks nothing until an interval is set.
    pub(super) fn start(vm: &Arc<Vm>) -> Self {
        let interval = Arc::new(Interval::default());
        let (theirs, vm_name) = (Arc::clone(&interval), vm.name.clone());
        let vm = Arc::clone(vm);
        let thread = thread::Builder::new().name("stats".to_owned());
        if let Err(error) = thread.spawn(move || theirs.run(&vm)) {
            log::error!("{vm_name}: statistics will not be polled: {error}");
        }
        Self(interval)
    }

    /// The interval in seconds; 0 is off.
    pub(super) fn seconds(&self) -> u64 {
        *self.0.seconds.lock()
    }

    /// Sets the interval, and asks at once.
    pub(super) fn set_seconds(&self, seconds: u64) {
        *self.0.seconds.lock() = seconds;
        self.0.changed.notify_all();
    }
}

impl Interval {
    fn run(&self, vm: &Vm) {
        loop {
            let mut seconds = self.seconds.lock();
            while *seconds == 0 {
                self.changed.wait(&mut seconds);
            }
            drop(seconds);
            // Nobody connected, or no answer: it is asked again, and what is shown has its date.
            if let Err(error) = vm.guest_stats(ANSWER_TIMEOUT) {
                log::debug!("{}: polling statistics: {error}", vm.name);
            }
            let mut seconds = self.seconds.lock();
            let interval = Duration::from_secs(*seconds);
            if !interval.is_zero() {
                self.changed.wait_for(&mut seconds, interval);
            }
        }
    }
}
