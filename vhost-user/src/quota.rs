//! How much of what peers do is worth a line in the log: neither a guest nor its front-end must be able to fill
//! it, be it in one session or by connecting again and again.

use log::Level;
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// More than a virtual machine that is started and stopped all day has to say in a [`PERIOD`].
const MAX_LINES: u32 = 100;
/// Then lines count anew: a process serves a virtual machine for months.
const PERIOD: Duration = Duration::from_secs(3600);

/// What is left of the lines for one kind of things.
#[derive(Debug)]
pub(crate) struct LogQuota(Mutex<Period>);

#[derive(Debug)]
struct Period {
    begun: Instant,
    lines: u32,
}

impl LogQuota {
    /// All of it.
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Period {
            begun: Instant::now(),
            lines: 0,
        }))
    }

    /// The level at which one more thing is told of: `level`, or that of debugging when there were too many.
    pub(crate) fn level(&self, level: Level) -> Level {
        self.level_at(level, Instant::now())
    }

    fn level_at(&self, level: Level, now: Instant) -> Level {
        let mut period = self.0.lock();
        if now.duration_since(period.begun) >= PERIOD {
            *period = Period {
                begun: now,
                lines: 0,
            };
        }
        period.lines = period.lines.saturating_add(1);
        match period.lines {
            0..=MAX_LINES => level,
            _ => Level::Debug,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_goes_on_at_the_level_of_debugging_until_the_period_ends() {
        let quota = LogQuota::new();
        let begun = quota.0.lock().begun;
        for now in [begun, begun + PERIOD] {
            for _ in 0..MAX_LINES {
                assert_eq!(quota.level_at(Level::Warn, now), Level::Warn);
            }
            assert_eq!(quota.level_at(Level::Warn, now), Level::Debug);
        }
    }
}
