//! The driver's work queue: a thread that follows configuration change interrupts, as Linux's
//! update_balloon_size_work does, and answers requests for statistics.

use super::driver::{Driver, Role};
use super::error::Result;
use super::eventfd::{EventFd, wait_any};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long Linux sleeps when it cannot allocate a page for the balloon.
const ALLOCATION_PAUSE: Duration = Duration::from_millis(200);

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Follower {
    stopping: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Starts it.
    ///
    /// # Errors
    /// There are no descriptors or threads left.
    pub fn start(driver: Arc<Mutex<Driver>>, config_event: Arc<EventFd>) -> Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let wake = Arc::new(EventFd::new()?);
        let mut events = vec![Arc::clone(&wake), config_event];
        if let Ok(queue) = driver.lock().queue(Role::Stats) {
            events.push(Arc::clone(&queue.call));
        }
        let stop = Arc::clone(&stopping);
        let thread = std::thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || {
                if let Err(error) = follow(&driver, &events, &stop) {
                    eprintln!("the guest's driver gives up: {error}");
                }
            })
            .map_err(|source| super::VmmError::Os {
                what: "cannot start a guest's thread",
                source,
            })?;
        Ok(Self {
            stopping,
            wake,
            thread: Some(thread),
        })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            // It told of its own failure.
            let _ = thread.join();
        }
    }
}

fn follow(driver: &Mutex<Driver>, events: &[Arc<EventFd>], stop: &AtomicBool) -> Result<()> {
    let stats = driver.lock().queue(Role::Stats).is_ok();
    let hints = driver.lock().queue(Role::Hints).is_ok();
    let polled: Vec<&EventFd> = events.iter().map(AsRef::as_ref).collect();
    let mut work = true;
    while !stop.load(Ordering::Acquire) {
        if !work && wait_any(&polled, Duration::from_secs(3600)).is_none() {
            continue;
        }
        for event in &polled {
            event.take();
        }
        // The lock is let go between buffers, so that the rest of the guest gets its turn.
        let mut driver = driver.lock();
        if stats {
            driver.answer_stats()?;
        }
        if hints {
            driver.answer_hints()?;
        }
        let (moved, reached) = driver.step()?;
        drop(driver);
        work = !reached;
        if moved == 0 && !reached {
            // The guest has nothing to spare: sleep, and try again.
            wait_any(&polled[..1], ALLOCATION_PAUSE);
        }
    }
    Ok(())
}
