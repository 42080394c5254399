//! The device's books as the C ABI shows them, and whether they balance (invariant I4).

use aerostat::{aerostat_counters, aerostat_flow};

/// What a flow says about bytes that were not discarded, by reason.
#[must_use]
pub fn skipped(flow: &aerostat_flow) -> u64 {
    [
        flow.skipped_inhibited_bytes,
        flow.skipped_out_of_range_bytes,
        flow.skipped_duplicate_bytes,
        flow.skipped_pinned_bytes,
        flow.skipped_partial_bytes,
        flow.skipped_failed_bytes,
        flow.skipped_over_target_bytes,
        flow.skipped_late_bytes,
    ]
    .iter()
    .sum()
}

/// Whether every requested byte is accounted for exactly once.
#[must_use]
pub fn balances(flow: &aerostat_flow) -> bool {
    flow.requested_bytes + flow.reopened_bytes
        == flow.discarded_bytes
            + flow.pending_bytes
            + flow.held_bytes
            + flow.withdrawn_bytes
            + skipped(flow)
}

/// Fails, with all of the books, unless they balance.
///
/// # Panics
/// If they do not.
#[track_caller]
pub fn assert_balanced(counters: &aerostat_counters) {
    assert!(balances(&counters.balloon), "balloon: {counters:#?}");
    assert!(balances(&counters.report), "reports: {counters:#?}");
    assert_eq!(counters.report.held_bytes, 0, "reports are never held");
    let skipped = skipped(&counters.balloon);
    assert!(counters.refused_bytes <= skipped, "refused: {counters:#?}");
    let acknowledged = counters.host_resets_acknowledged;
    assert!(acknowledged <= counters.host_resets, "{counters:#?}");
}

/// Bytes that the guest gave and that were new to the balloon.
#[must_use]
pub fn accepted(flow: &aerostat_flow) -> u64 {
    flow.requested_bytes - flow.skipped_out_of_range_bytes - flow.skipped_duplicate_bytes
}
