//! Guest statistics and their age, measured without the wall clock.

use std::time::Instant;

use super::GuestStats;
use crate::policy::GuestMemory;

/// Remembers when statistics last changed. VMMs stamp them with the time of day, which may jump;
/// what counts here is when a new stamp was first seen.
#[derive(Debug, Default)]
pub struct StatsAge {
    stamp: Option<u64>,
    seen: Option<Instant>,
    last: GuestMemory,
}

impl StatsAge {
    /// The statistics as a sample has them, with their age.
    pub fn aged(&mut self, stats: &GuestStats, now: Instant) -> GuestMemory {
        let stamp = stats.last_update_unix_seconds();
        if stamp == 0 {
            return GuestMemory::default();
        }
        let memory = guest_memory(stats);
        self.keep(memory, stamp, now)
    }

    /// The same for peers without a stamp: values that differ in any way are new.
    pub fn changed(&mut self, memory: GuestMemory, now: Instant) -> GuestMemory {
        let stamp = self.stamp.unwrap_or(0) + u64::from(self.last != memory);
        self.keep(memory, stamp, now)
    }

    /// What was known last, older by now.
    #[must_use]
    pub fn last(&self, now: Instant) -> GuestMemory {
        GuestMemory {
            age: self.seen.map(|seen| now.saturating_duration_since(seen)),
            ..self.last
        }
    }

    fn keep(&mut self, memory: GuestMemory, stamp: u64, now: Instant) -> GuestMemory {
        if self.stamp != Some(stamp) {
            self.stamp = Some(stamp);
            self.seen = Some(now);
        }
        self.last = memory;
        self.last(now)
    }
}

fn guest_memory(stats: &GuestStats) -> GuestMemory {
    GuestMemory {
        age: None,
        total_bytes: stats.total_memory_bytes(),
        free_bytes: stats.free_memory_bytes(),
        available_bytes: stats.available_memory_bytes(),
        caches_bytes: stats.get("stat-disk-caches"),
        swap_in_bytes: stats.get("stat-swap-in"),
        swap_out_bytes: stats.get("stat-swap-out"),
        major_faults: stats.get("stat-major-faults"),
        minor_faults: stats.get("stat-minor-faults"),
        oom_kills: stats.get("stat-oom-kills"),
        alloc_stalls: stats.get("stat-alloc-stalls"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn stats(stamp: u64) -> GuestStats {
        let text = format!(r#"{{"stats":{{"stat-free-memory":5}},"last-update":{stamp}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_jump_of_the_wall_clock_changes_no_age() {
        let mut age = StatsAge::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);

        // The guest's host was set back by a year, and forward again.
        assert_eq!(
            age.aged(&stats(1_800_000_000), start).age,
            Some(Duration::ZERO)
        );
        assert_eq!(
            age.aged(&stats(1_800_000_000), after(7)).age,
            Some(Duration::from_secs(7))
        );
        assert_eq!(
            age.aged(&stats(1_768_000_000), after(8)).age,
            Some(Duration::ZERO)
        );
        assert_eq!(
            age.aged(&stats(1_800_000_009), after(9)).age,
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn a_guest_that_never_answered_has_no_statistics() {
        let mut age = StatsAge::default();
        assert_eq!(age.aged(&stats(0), Instant::now()), GuestMemory::default());
    }
}
