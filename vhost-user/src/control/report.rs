//! What the control socket shows: numbers under the names that the documentation gives them.

use crate::books::named;
use crate::features;
use crate::vm::{Snapshot, VmState};
use aerostat_device::memory::{BALLOON_PAGE_BYTES, PfnRange};
use aerostat_device::{Counters, GuestStats, HintState, HistoryEntry, HistoryEvent};
use serde_json::{Map, Value, json};
use std::time::{SystemTime, UNIX_EPOCH};

/// Names of the statistics by tag, as QEMU words them (S8).
const STATS: [&str; 16] = [
    "stat-swap-in",
    "stat-swap-out",
    "stat-major-faults",
    "stat-minor-faults",
    "stat-free-memory",
    "stat-total-memory",
    "stat-available-memory",
    "stat-disk-caches",
    "stat-htlb-pgalloc",
    "stat-htlb-pgfail",
    "stat-oom-kills",
    "stat-alloc-stalls",
    "stat-async-scans",
    "stat-direct-scans",
    "stat-async-reclaims",
    "stat-direct-reclaims",
];

/// The answer to `aerostat-query`.
pub(super) fn query(snapshot: &Snapshot) -> Value {
    let nodes: Vec<_> = snapshot
        .books
        .nodes
        .iter()
        .map(|(id, books)| json!({ "node": id.map(|id| id.0), "counters": counters(books) }))
        .collect();
    json!({
        "state": state(snapshot.state),
        "memory-bytes": snapshot.memory_bytes,
        "target-bytes": snapshot.target_bytes,
        "actual-bytes": snapshot.actual_bytes,
        "ballooned-bytes": snapshot.ballooned_bytes,
        "inhibits": snapshot.inhibits,
        "features": snapshot.features,
        "feature-names": features::names(snapshot.features),
        "counters": counters(&snapshot.books.total),
        "nodes": nodes,
    })
}

fn state(state: VmState) -> &'static str {
    match state {
        VmState::Disconnected => "disconnected",
        VmState::Configured => "configured",
        VmState::Active => "active",
        VmState::Paused => "paused",
        VmState::NeedsReset => "needs-reset",
    }
}

fn counters(counters: &Counters) -> Value {
    named(counters)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect::<Map<_, _>>()
        .into()
}

/// Statistics as QEMU's `guest-stats` property shows them: what the guest did not send is -1.
pub(super) fn guest_stats_qemu(stats: &GuestStats) -> Value {
    stats_value(stats, |value| {
        Some(value.map_or(Value::from(-1), Value::from))
    })
}

/// Statistics, only those that the guest sent.
pub(super) fn guest_stats(stats: &GuestStats) -> Value {
    stats_value(stats, |value| value.map(Value::from))
}

fn stats_value(stats: &GuestStats, show: impl Fn(Option<u64>) -> Option<Value>) -> Value {
    let map: Map<_, _> = STATS
        .iter()
        .zip(stats.values)
        .filter_map(|(name, value)| Some(((*name).to_owned(), show(value)?)))
        .collect();
    json!({ "stats": map, "last-update": last_update(stats) })
}

/// The answer to `aerostat-hints-take`.
pub(super) fn hints(ranges: &[PfnRange], state: HintState) -> Value {
    let state = match state {
        HintState::Idle => "idle",
        HintState::Running => "running",
        HintState::Complete => "complete",
    };
    let range = |range: &PfnRange| {
        let gpa = range.start.0 * BALLOON_PAGE_BYTES;
        json!({ "gpa": gpa, "len-bytes": range.bytes() })
    };
    json!({ "state": state, "ranges": ranges.iter().map(range).collect::<Vec<_>>() })
}

/// The answer to `aerostat-history`.
pub(super) fn history(entries: &[HistoryEntry]) -> Value {
    let entry = |entry: &HistoryEntry| {
        json!({
            "sequence": entry.sequence,
            "monotonic-ns": entry.monotonic_ns,
            "event": event(entry.event),
            "target-bytes": entry.target_bytes,
            "actual-bytes": entry.actual_bytes,
            "ballooned-bytes": entry.ballooned_bytes,
        })
    };
    json!({ "entries": entries.iter().map(entry).collect::<Vec<_>>() })
}

fn event(event: HistoryEvent) -> &'static str {
    match event {
        HistoryEvent::TargetSet => "target-set",
        HistoryEvent::ActualWritten => "actual-written",
        HistoryEvent::Reset => "reset",
        HistoryEvent::Inhibited => "inhibited",
        HistoryEvent::Uninhibited => "uninhibited",
        HistoryEvent::NeedsReset => "needs-reset",
        HistoryEvent::Restored => "restored",
        HistoryEvent::BalloonReset => "balloon-reset",
        _ => "other",
    }
}

/// When the statistics came, in seconds since 1970; 0 for never.
fn last_update(stats: &GuestStats) -> u64 {
    let Some(received) = stats.received else {
        return 0;
    };
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(received.elapsed())
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_statistics_are_minus_one_for_qemu_and_absent_otherwise() {
        let mut stats = GuestStats::default();
        stats.values[4] = Some(u64::MAX);
        let qemu = guest_stats_qemu(&stats);
        assert_eq!(qemu["stats"]["stat-free-memory"], json!(u64::MAX));
        assert_eq!(qemu["stats"]["stat-swap-in"], json!(-1));
        assert_eq!(qemu["last-update"], json!(0));
        let native = guest_stats(&stats);
        assert_eq!(native["stats"], json!({ "stat-free-memory": u64::MAX }));
    }
}
