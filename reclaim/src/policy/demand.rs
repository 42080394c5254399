//! How much the host lacks (J4, A3): memory available against a watermark, and pressure.

use super::{
    amount::{ratio, scaled},
    config::PolicyConfig,
    types::{HostSample, Pressure},
};

/// The host's side of a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct HostState {
    pub(super) available_bytes: u64,
    pub(super) high_bytes: u64,
    pub(super) low_bytes: u64,
    /// What guests should give, before what is on its way is taken off.
    pub(super) demand_bytes: u64,
    /// What could be given back to guests without a shortage soon after.
    pub(super) surplus_bytes: u64,
    /// Swapping or worse is near: larger steps, holds do not count.
    pub(super) emergency: bool,
}

/// Pressure of the period that ended with the sample, in percent of time.
///
/// The averages lag by their window; the totals of two samples tell what happened between them.
pub(super) fn recent_percent(
    now: Option<&Pressure>,
    before: Option<&Pressure>,
    elapsed_seconds: f64,
) -> Recent {
    let Some(now) = now else {
        return Recent::default();
    };
    match before {
        Some(before) if elapsed_seconds > 0.0 && now.some_total_us >= before.some_total_us => {
            let percent = |now: u64, before: u64| {
                (now.saturating_sub(before) as f64 / (elapsed_seconds * 1e4)).min(100.0)
            };
            Recent {
                some: percent(now.some_total_us, before.some_total_us),
                full: percent(now.full_total_us, before.full_total_us),
            }
        }
        _ => Recent {
            some: now.some_avg10,
            full: now.full_avg10,
        },
    }
}

/// Pressure of a period, in percent of time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Recent {
    pub(super) some: f64,
    pub(super) full: f64,
}

/// `D = max(0, high - available) + g * guests * max(0, pressure / target - 1)`.
///
/// Three things the plain formula lacks:
/// - Pressure is heard only while less than twice the high watermark is available. A cgroup that is
///   throttled by its own limit, or a guest that waits for its disk, raises the host's pressure
///   although the host lacks nothing, and no balloon would help.
/// - It is bounded, since pressure says that something is wrong but not how much memory is missing.
/// - Without host swap a shortage ends in killed VMs instead of a slow host, so the watermarks are
///   half as high again.
pub(super) fn assess(
    host: &HostSample,
    pressure: Recent,
    guests_bytes: u64,
    config: &PolicyConfig,
) -> HostState {
    let caution = if host.swap_free_bytes == 0 { 1.5 } else { 1.0 };
    let high_bytes = scaled(config.high_watermark_bytes(host.total_bytes), caution);
    let low_bytes = scaled(config.low_watermark_bytes(host.total_bytes), caution);
    let available_bytes = host.available_bytes;

    let short_bytes = high_bytes.saturating_sub(available_bytes);
    let near = available_bytes < high_bytes.saturating_mul(2);
    let excess = (pressure.some / config.pressure_target_percent - 1.0).max(0.0);
    let squeezed = if near {
        let percent = (config.pressure_gain_percent * excess).min(config.pressure_limit_percent);
        scaled(guests_bytes, percent / 100.0)
    } else {
        0
    };
    let band_bytes = scaled(host.total_bytes, config.band_percent / 100.0);
    let calm = excess <= 0.0 && !host.pressure_event;
    HostState {
        available_bytes,
        high_bytes,
        low_bytes,
        demand_bytes: short_bytes.saturating_add(squeezed),
        surplus_bytes: if calm || !near {
            available_bytes.saturating_sub(high_bytes.saturating_add(band_bytes))
        } else {
            0
        },
        // All tasks waiting a tenth of the time is the beginning of thrashing (systemd-oomd and
        // oomd act between 5 and 60 %, after a longer time).
        emergency: available_bytes < low_bytes
            || near && (pressure.full > 10.0 || host.pressure_event && short_bytes > 0),
    }
}

/// What single host nodes lack although the host as a whole does not, in the order of the nodes.
pub(super) fn node_demands(host: &HostSample, config: &PolicyConfig) -> Vec<u64> {
    let nodes = host.nodes.iter();
    nodes
        .map(|node| {
            let share = ratio(node.total_bytes, host.total_bytes);
            let high_bytes = scaled(config.high_watermark_bytes(host.total_bytes), share);
            high_bytes.saturating_sub(node.available_bytes)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn host(available_bytes: u64) -> HostSample {
        HostSample {
            total_bytes: 100 * GIB,
            available_bytes,
            swap_free_bytes: GIB,
            ..HostSample::default()
        }
    }

    fn some(percent: f64) -> Recent {
        Recent {
            some: percent,
            full: 0.0,
        }
    }

    #[test]
    fn demand_is_what_lacks_to_the_high_watermark() {
        let state = assess(
            &host(5 * GIB),
            some(0.0),
            90 * GIB,
            &PolicyConfig::default(),
        );
        assert_eq!(state.demand_bytes, 3 * GIB);
        assert_eq!(state.surplus_bytes, 0);
        assert!(!state.emergency);
    }

    #[test]
    fn pressure_asks_for_more_and_never_for_less() {
        let config = PolicyConfig::default();
        let demands: Vec<u64> = [0.0, 1.0, 2.0, 4.0, 50.0]
            .map(|percent| assess(&host(7 * GIB), some(percent), 90 * GIB, &config).demand_bytes)
            .to_vec();
        assert!(demands.is_sorted(), "{demands:?}");
        assert_eq!(demands[0], demands[1]);
        assert!(demands[2] > demands[1]);
        assert!(demands[4] <= GIB + 9 * GIB);
    }

    #[test]
    fn pressure_without_shortage_is_not_heard() {
        let state = assess(
            &host(30 * GIB),
            some(60.0),
            70 * GIB,
            &PolicyConfig::default(),
        );
        assert_eq!(state.demand_bytes, 0);
        assert_eq!(state.surplus_bytes, 20 * GIB);
    }

    #[test]
    fn a_host_without_swap_is_more_cautious() {
        let mut host = host(9 * GIB);
        host.swap_free_bytes = 0;
        let state = assess(&host, some(0.0), 90 * GIB, &PolicyConfig::default());
        assert_eq!(state.demand_bytes, 3 * GIB);
    }

    #[test]
    fn between_the_watermarks_and_the_band_nothing_moves() {
        let state = assess(
            &host(9 * GIB),
            some(0.0),
            90 * GIB,
            &PolicyConfig::default(),
        );
        assert_eq!((state.demand_bytes, state.surplus_bytes), (0, 0));
    }

    #[test]
    fn totals_of_two_samples_tell_the_pressure_between_them() {
        let before = Pressure::default();
        let now = Pressure {
            some_total_us: 500_000,
            full_total_us: 100_000,
            some_avg10: 1.0,
            ..before
        };
        let recent = recent_percent(Some(&now), Some(&before), 1.0);
        assert_eq!((recent.some, recent.full), (50.0, 10.0));
        // Without an earlier sample the average has to do.
        assert_eq!(recent_percent(Some(&now), None, 0.0).some, 1.0);
    }
}
