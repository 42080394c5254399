//! What tests expect of a machine's balloon: for as long as a slow and busy machine may take.

#![expect(clippy::panic, reason = "this is how a test fails")]

use std::{fmt::Debug, time::Duration};

use super::Machine;
use crate::wait;
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The most that anything may take: emulation is slow, and the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Looks until the first value is true; returns the second one.
///
/// # Panics
/// That takes longer than [`PATIENCE`].
pub fn eventually<T: Debug>(what: &str, look: impl FnMut() -> (bool, T)) -> T {
    wait::eventually(what, PATIENCE, look)
}

/// Waits until guest and device agree on the balloon, and nothing waits to be discarded; returns the
/// device's counters.
///
/// # Panics
/// They do not, or QEMU is gone.
pub fn wait_for_balloon(machine: &mut Machine, mib: u64) -> Value {
    eventually("the balloon has its size", || {
        let counters = counters(machine);
        let settled = counters["actual-bytes"] == mib * MIB
            && counters["ballooned-bytes"] == mib * MIB
            && counters["balloon"]["pending-bytes"] == 0;
        (settled, counters)
    })
}

/// The device's counters.
///
/// # Panics
/// QEMU is gone.
pub fn counters(machine: &mut Machine) -> Value {
    machine.counters().unwrap_or_else(|error| panic!("{error}"))
}

/// Every byte is accounted for (invariant I4).
///
/// # Panics
/// One is not.
pub fn assert_balance(flow: &Value) {
    let value = |name: &str| {
        flow[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {flow}"))
    };
    assert_eq!(
        value("requested-bytes") + value("reopened-bytes"),
        [
            "discarded-bytes",
            "pending-bytes",
            "held-bytes",
            "withdrawn-bytes",
            "inhibited-bytes",
            "pinned-bytes",
            "over-target-bytes",
            "late-bytes",
            "out-of-range-bytes",
            "duplicate-bytes",
            "partial-bytes",
            "failed-bytes"
        ]
        .map(value)
        .iter()
        .sum::<u64>(),
        "{flow}"
    );
}
