//! The lock of a device's service, and whether somebody waits for it.
//!
//! A worker discards under this lock, so that who has it knows that nothing is in flight. Work that may be
//! left (`Balloon::report`) is, as soon as somebody waits.

use super::Service;
use crate::sync::{Mutex, MutexGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How many threads wait for a device to stand still.
#[derive(Debug, Default)]
pub(crate) struct Waiting(AtomicU32);

impl Waiting {
    /// Whether there is one. It is a hint: nothing is wrong if the answer comes late.
    pub(crate) fn is_anybody(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// One more.
    pub(crate) fn come(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn go(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A service behind its lock.
#[derive(Debug)]
pub(crate) struct ServiceLock {
    service: Mutex<Service>,
    waiting: Arc<Waiting>,
}

impl ServiceLock {
    pub(crate) fn new(service: Service) -> Self {
        Self {
            service: Mutex::new(service),
            waiting: Arc::default(),
        }
    }

    /// Who waits.
    pub(crate) fn waiting(&self) -> &Arc<Waiting> {
        &self.waiting
    }

    /// Waits until nothing is in flight, and keeps it so.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Service> {
        self.service.try_lock().unwrap_or_else(|| {
            self.waiting.come();
            let service = self.service.lock();
            self.waiting.go();
            service
        })
    }
}
