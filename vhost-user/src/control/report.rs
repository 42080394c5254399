//! What the control socket shows: numbers under the names that the documentation gives them.

use crate::features;
use crate::vm::{Snapshot, VmState};
use aerostat_device::{Counters, Flow, GuestStats};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
        "features": features::names(snapshot.features),
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
    // Taken apart in full, so that a new counter cannot be forgotten here.
    let Counters {
        balloon,
        report,
        returned_bytes,
        rejected_take_bytes,
        discard_calls,
        discard_ranges,
        discard_ns,
        inflate_chains,
        deflate_chains,
        report_chains,
        stats_chains,
        chain_errors,
        broken_rings,
        config_errors,
    } = *counters;
    let mut map = Map::new();
    flow(&mut map, "", balloon);
    flow(&mut map, "report-", report);
    for (name, value) in [
        ("returned-bytes", returned_bytes),
        ("rejected-take-bytes", rejected_take_bytes),
        ("discard-calls", discard_calls),
        ("discard-ranges", discard_ranges),
        ("discard-ns", discard_ns),
        ("inflate-chains", inflate_chains),
        ("deflate-chains", deflate_chains),
        ("report-chains", report_chains),
        ("stats-chains", stats_chains),
        ("chain-errors", chain_errors),
        ("broken-rings", broken_rings),
        ("config-errors", config_errors),
    ] {
        map.insert(name.to_owned(), value.into());
    }
    Value::Object(map)
}

fn flow(map: &mut Map<String, Value>, prefix: &str, flow: Flow) {
    let Flow {
        requested_bytes,
        discarded_bytes,
        pending_bytes,
        held_bytes,
        reopened_bytes,
        withdrawn_bytes,
        skipped_inhibited_bytes,
        skipped_out_of_range_bytes,
        skipped_duplicate_bytes,
        skipped_pinned_bytes,
        skipped_partial_bytes,
        skipped_failed_bytes,
    } = flow;
    for (name, value) in [
        ("requested-bytes", requested_bytes),
        ("discarded-bytes", discarded_bytes),
        ("pending-bytes", pending_bytes),
        ("held-bytes", held_bytes),
        ("reopened-bytes", reopened_bytes),
        ("withdrawn-bytes", withdrawn_bytes),
        ("skipped-inhibited-bytes", skipped_inhibited_bytes),
        ("skipped-out-of-range-bytes", skipped_out_of_range_bytes),
        ("skipped-duplicate-bytes", skipped_duplicate_bytes),
        ("skipped-pinned-bytes", skipped_pinned_bytes),
        ("skipped-partial-bytes", skipped_partial_bytes),
        ("skipped-failed-bytes", skipped_failed_bytes),
    ] {
        map.insert(format!("{prefix}{name}"), value.into());
    }
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

/// When the statistics came, in seconds since 1970; 0 for never.
fn last_update(stats: &GuestStats) -> u64 {
    if stats.sequence == 0 {
        return 0;
    }
    let now = clock_gettime(ClockId::Monotonic);
    let now = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    );
    let age = now.saturating_sub(Duration::from_nanos(stats.received_ns));
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(age)
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

    #[test]
    fn counters_are_flat_and_each_is_there() {
        let value = counters(&Counters::default());
        assert_eq!(value.as_object().unwrap().len(), 36);
        assert_eq!(value["report-requested-bytes"], json!(0));
    }
}
