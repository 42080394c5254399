//! What happened with a balloon (requirement A9): the last changes of target and `actual`, and what else
//! explains them.
//!
//! It is kept beside the service, so that neither recording nor reading waits for a batch. A guest may
//! write `actual` in a loop: the ring is bounded (I3), and of values that follow each other closely only
//! the last is kept, so that a large inflation, or a hostile guest, does not push everything else out.

use crate::runtime::monotonic_ns;
use crate::service::Shared;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries kept: 48 KiB a device. At the pace at which values of `actual` are kept apart it covers at
/// least 100 seconds of a guest that writes all the time.
const MAX_ENTRIES: usize = 1024;
/// `actual` is kept once in this time while nothing else happens: stock Linux writes it for each MiB.
const ACTUAL_INTERVAL_NS: u64 = 100_000_000;

/// What changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum HistoryEvent {
    /// The VMM set a target, maybe the same one again.
    TargetSet = 1,
    /// The driver wrote `actual`; or, where the protocol has no such field, the balloon has another size.
    ActualWritten = 2,
    /// The device was reset.
    Reset = 3,
    /// Discarding was forbidden, or forbidden once more.
    Inhibited = 4,
    /// One inhibit was taken back.
    Uninhibited = 5,
    /// A ring broke.
    NeedsReset = 6,
    /// A saved state was taken over.
    Restored = 7,
    /// The host gave the whole balloon back.
    BalloonReset = 8,
}

/// The balloon at the moment of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryEntry {
    /// Its number: 1 for the first, always growing. Numbers that are missing were dropped, or were
    /// values of `actual` with a later one close behind.
    pub sequence: u64,
    /// When it happened: `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic_ns: u64,
    /// What changed.
    pub event: HistoryEvent,
    /// Bytes that the balloon should hold.
    pub target_bytes: u64,
    /// Bytes that the driver says it holds.
    pub actual_bytes: u64,
    /// Bytes that it holds by the ownership bitmap.
    pub ballooned_bytes: u64,
}

/// The history of a balloon, which may outlive its devices ([`crate::Device::with_history`]).
#[derive(Debug, Default)]
pub struct History {
    ring: Mutex<Ring>,
    breaks: AtomicU64,
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<HistoryEntry>,
    last: u64,
}

impl History {
    /// An empty history.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes in `entry`, which gets its number here.
    pub(crate) fn record(&self, mut entry: HistoryEntry) {
        let mut ring = self.ring.lock();
        ring.last += 1;
        entry.sequence = ring.last;
        let mut newest = ring.entries.iter().rev();
        if let (Some(last), Some(before)) = (newest.next(), newest.next())
            && [last.event, before.event, entry.event] == [HistoryEvent::ActualWritten; 3]
            && entry.monotonic_ns.saturating_sub(before.monotonic_ns) < ACTUAL_INTERVAL_NS
        {
            ring.entries.pop_back();
        }
        if ring.entries.len() == MAX_ENTRIES {
            ring.entries.pop_front();
        }
        ring.entries.push_back(entry);
    }

    /// Counts that a queue broke; returns how many did before.
    pub(crate) fn count_break(&self) -> u64 {
        self.breaks.fetch_add(1, Ordering::Relaxed)
    }

    /// The entries behind number `since`, oldest first, at most `max` of them.
    #[must_use]
    pub fn since(&self, since: u64, max: usize) -> Vec<HistoryEntry> {
        let ring = self.ring.lock();
        let first = ring
            .entries
            .partition_point(|entry| entry.sequence <= since);
        ring.entries.iter().skip(first).take(max).copied().collect()
    }
}

impl Shared {
    /// Enters that something happened, as of now.
    pub(crate) fn record(&self, event: HistoryEvent) {
        self.history.record(HistoryEntry {
            sequence: 0,
            monotonic_ns: monotonic_ns(),
            event,
            target_bytes: self.target_bytes.load(Ordering::Acquire),
            actual_bytes: self.actual_bytes(),
            ballooned_bytes: self.ballooned_bytes.load(Ordering::Acquire),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(event: HistoryEvent, monotonic_ns: u64, actual_bytes: u64) -> HistoryEntry {
        HistoryEntry {
            sequence: 0,
            monotonic_ns,
            event,
            target_bytes: 0,
            actual_bytes,
            ballooned_bytes: 0,
        }
    }

    const MS: u64 = 1_000_000;

    #[test]
    fn readers_go_on_where_they_were() {
        let history = History::new();
        for at in 0..5 {
            history.record(entry(HistoryEvent::TargetSet, at, 0));
        }
        let numbers = |since, max| -> Vec<u64> {
            let page = history.since(since, max);
            page.iter().map(|entry| entry.sequence).collect()
        };
        assert_eq!(numbers(0, 2), [1, 2]);
        assert_eq!(numbers(2, 9), [3, 4, 5]);
        assert_eq!(numbers(5, 9), [0; 0]);
        assert_eq!(numbers(u64::MAX, 9), [0; 0]);
    }

    #[test]
    fn a_guest_that_writes_in_a_loop_fills_no_memory_and_hides_nothing() {
        let history = History::new();
        history.record(entry(HistoryEvent::TargetSet, 0, 0));
        // A million values in ten seconds.
        for at in 0..1_000_000 {
            history.record(entry(HistoryEvent::ActualWritten, at * 10_000, at));
        }
        let entries = history.since(0, usize::MAX);
        assert!(entries.len() < 250, "{}", entries.len());
        assert_eq!(entries[0].event, HistoryEvent::TargetSet);
        assert_eq!(
            entries
                .last()
                .map(|last| (last.sequence, last.actual_bytes)),
            Some((1_000_001, 999_999))
        );
        // And one that takes its time, or does something else in between.
        for at in 0..5000 {
            history.record(entry(HistoryEvent::ActualWritten, 20_000 * MS + at, at));
            history.record(entry(HistoryEvent::Reset, 20_000 * MS + at, 0));
        }
        assert_eq!(history.since(0, usize::MAX).len(), MAX_ENTRIES);
    }

    #[test]
    fn the_first_and_the_last_of_many_values_are_kept() {
        let history = History::new();
        for at in [0, 10, 20, 90, 250, 260] {
            history.record(entry(HistoryEvent::ActualWritten, at * MS, at));
        }
        let kept: Vec<_> = history
            .since(0, 9)
            .iter()
            .map(|e| (e.sequence, e.actual_bytes))
            .collect();
        assert_eq!(kept, [(1, 0), (4, 90), (5, 250), (6, 260)]);
        // A reader that had seen number 3 before number 4 took its place misses nothing.
        assert_eq!(history.since(3, 1)[0].actual_bytes, 90);
    }
}
