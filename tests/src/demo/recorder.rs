//! Readings over time, taken by a thread of their own so that nothing the story does disturbs them.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    DemoError,
    guest::{DemoObserver, Reading},
};

/// How often readings are taken while the balloon moves, and while it does not.
const FAST: Duration = Duration::from_millis(4);
const SLOW: Duration = Duration::from_millis(50);

/// A reading and when it was taken, from the start of the recording.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When.
    pub at: Duration,
    /// What was seen.
    pub reading: Reading,
}

/// Takes readings until it is dropped.
pub struct Recorder {
    start: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    fast: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    samples: Vec<Sample>,
    error: Option<DemoError>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Recorder {
    /// Takes a first reading and starts the thread that takes the others.
    ///
    /// # Errors
    /// The first reading fails.
    pub fn start(mut observer: Box<dyn DemoObserver>) -> Result<Self, DemoError> {
        let start = Instant::now();
        let shared = Arc::new(Shared::default());
        let first = Sample {
            at: Duration::ZERO,
            reading: observer.observe()?,
        };
        shared.lock().samples.push(first);
        let thread = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.record(observer.as_mut(), start))
        };
        Ok(Self {
            start,
            shared,
            thread: Some(thread),
        })
    }

    /// Time since the start of the recording.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The latest reading.
    ///
    /// # Errors
    /// What made the recording stop, if something did.
    pub fn latest(&self) -> Result<Sample, DemoError> {
        let mut record = self.shared.lock();
        if let Some(error) = record.error.take() {
            return Err(error);
        }
        // The first sample is there from the start.
        Ok(record.samples.last().copied().unwrap_or(Sample {
            at: Duration::ZERO,
            reading: Reading::default(),
        }))
    }

    /// Waits for a reading that is younger than this call.
    ///
    /// # Errors
    /// As [`Self::latest`].
    pub fn next(&self) -> Result<Sample, DemoError> {
        let before = self.latest()?.at;
        // The reading under way may have begun before this call, the one after it has not.
        let mut newer = 0;
        let mut last = before;
        loop {
            thread::sleep(Duration::from_millis(1));
            let sample = self.latest()?;
            if sample.at > last {
                last = sample.at;
                newer += 1;
            }
            if newer == 2 {
                return Ok(sample);
            }
        }
    }

    /// Readings come quickly while this is set.
    pub fn set_fast(&self, fast: bool) {
        self.shared.fast.store(fast, Ordering::Relaxed);
    }

    /// Stops and returns everything that was recorded.
    #[must_use]
    pub fn finish(mut self) -> Vec<Sample> {
        self.stop();
        std::mem::take(&mut self.shared.lock().samples)
    }

    fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed; the story ends either way.
            let _ = thread.join();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, observer: &mut dyn DemoObserver, start: Instant) {
        while !self.stop.load(Ordering::Relaxed) {
            match observer.observe() {
                Ok(reading) => self.lock().samples.push(Sample {
                    at: start.elapsed(),
                    reading,
                }),
                Err(error) => {
                    self.lock().error = Some(error);
                    return;
                }
            }
            let mut left = if self.fast.load(Ordering::Relaxed) {
                FAST
            } else {
                SLOW
            };
            // In small steps, so that a change of pace takes effect at once.
            while left > Duration::ZERO && !self.stop.load(Ordering::Relaxed) {
                let step = left.min(FAST);
                thread::sleep(step);
                left -= step;
                if self.fast.load(Ordering::Relaxed) {
                    break;
                }
            }
        }
    }
}
