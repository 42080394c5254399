//! How much the host lacks (J4, A3): memory available against a watermark, and pressure.

use std::time::Duration;

use super::{
    amount::{ratio, scaled},
    config::PolicyConfig,
    types::{HostSample, Pressure},
};

/// The host's side of a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct HostState {
    pub(super) available_bytes: u64,
    /// What will be available soon, if it goes on falling as it does.
    pub(super) expected_bytes: u64,
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

/// How fast available memory falls: an average that forgets in seconds.
///
/// Balloons take a period to be asked and another to fill, and guests that begin to work at the same time
/// use up a small reserve in less.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Trend {
    bytes_per_second: f64,
    /// What balloons gave back and guests may still take.
    permitted_bytes: f64,
    /// When it was looked at, what was available then, and what was in balloons.
    last: Option<(Duration, u64, u64)>,
}

impl Trend {
    /// The time in which the past loses all but a third of its weight: periods may be much shorter, as
    /// pressure begins one.
    const MEMORY_SECONDS: f64 = 1.0;
    /// A guest that has not taken by then what was given back to it was not in need of it.
    const PERMIT_SECONDS: f64 = 10.0;

    /// Takes in a sample. What balloons gave back is meant to be used, then or soon after, and is no trend. What
    /// they brought says nothing of what guests take.
    pub(super) fn observe(&mut self, at: Duration, available_bytes: u64, ballooned_bytes: u64) {
        let now = (at, available_bytes, ballooned_bytes);
        let Some((before, available, ballooned)) = self.last.replace(now) else {
            return;
        };
        let seconds = at.saturating_sub(before).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        self.permitted_bytes *= (-seconds / Self::PERMIT_SECONDS).exp();
        self.permitted_bytes += ballooned.saturating_sub(ballooned_bytes) as f64;
        let mut fall = available as f64 - available_bytes as f64;
        let expected = fall.clamp(0.0, self.permitted_bytes);
        self.permitted_bytes -= expected;
        fall -= expected;
        if ballooned_bytes > ballooned {
            fall = fall.max(0.0);
        }
        let weight = 1.0 - (-seconds / Self::MEMORY_SECONDS).exp();
        self.bytes_per_second += weight * (fall / seconds - self.bytes_per_second);
    }

    /// How much less will be available after this time.
    fn fall_bytes(&self, time: Duration) -> u64 {
        scaled(1, self.bytes_per_second.max(0.0) * time.as_secs_f64())
    }
}

/// `D = max(0, high - available) + g * guests * max(0, pressure / target - 1)`.
///
/// Three things the plain formula lacks:
/// - Available is what will be left of it when guests have answered, if it goes on falling as it does.
/// - Pressure is heard only while less than twice the high watermark is available. A cgroup that is
///   throttled by its own limit, or a guest that waits for its disk, raises the host's pressure
///   although the host lacks nothing, and no balloon would help.
/// - It is bounded, since pressure says that something is wrong but not how much memory is missing.
pub(super) fn assess(
    host: &HostSample,
    trend: &Trend,
    pressure: Recent,
    guests_bytes: u64,
    config: &PolicyConfig,
) -> HostState {
    let high_bytes = config.high_watermark_bytes(host);
    let low_bytes = config.low_watermark_bytes(host);
    let available_bytes = host.available_bytes;

    let ahead = config.look_ahead();
    let fall_bytes = trend.fall_bytes(ahead);
    let expected_bytes = available_bytes.saturating_sub(fall_bytes);
    let short_bytes = high_bytes
        .saturating_add(fall_bytes)
        .saturating_sub(available_bytes);
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
        expected_bytes,
        high_bytes,
        low_bytes,
        demand_bytes: short_bytes.saturating_add(squeezed),
        surplus_bytes: if calm || !near {
            expected_bytes.saturating_sub(high_bytes.saturating_add(band_bytes))
        } else {
            0
        },
        // All tasks waiting a tenth of the time is the beginning of thrashing (systemd-oomd and
        // oomd act between 5 and 60 %, after a longer time).
        emergency: available_bytes < low_bytes
            || near && available_bytes.saturating_sub(trend.fall_bytes(ahead / 2)) < low_bytes
            || near && (pressure.full > 10.0 || host.pressure_event && short_bytes > 0),
    }
}

/// What single host nodes lack although the host as a whole does not, in the order of the nodes.
pub(super) fn node_demands(host: &HostSample, config: &PolicyConfig) -> Vec<u64> {
    let nodes = host.nodes.iter();
    nodes
        .map(|node| {
            let share = ratio(node.total_bytes, host.total_bytes);
            let high_bytes = scaled(config.high_watermark_bytes(host), share);
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
            &Trend::default(),
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
            .map(|percent| {
                assess(
                    &host(7 * GIB),
                    &Trend::default(),
                    some(percent),
                    90 * GIB,
                    &config,
                )
                .demand_bytes
            })
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
            &Trend::default(),
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
        let state = assess(
            &host,
            &Trend::default(),
            some(0.0),
            90 * GIB,
            &PolicyConfig::default(),
        );
        assert_eq!(state.demand_bytes, 3 * GIB);
    }

    #[test]
    fn between_the_watermarks_and_the_band_nothing_moves() {
        let state = assess(
            &host(9 * GIB),
            &Trend::default(),
            some(0.0),
            90 * GIB,
            &PolicyConfig::default(),
        );
        assert_eq!((state.demand_bytes, state.surplus_bytes), (0, 0));
    }

    #[test]
    fn memory_that_falls_is_asked_for_before_it_has_fallen() {
        let config = PolicyConfig::default();
        let mut trend = Trend::default();
        let mut at = |second, available: u64| {
            trend.observe(Duration::from_secs(second), available * GIB, 0);
            assess(&host(available * GIB), &trend, some(0.0), 90 * GIB, &config)
        };
        assert_eq!(at(0, 60).demand_bytes, 0);
        // 12 GiB/s, of which an average has heard 63 %: 15 GiB in two seconds.
        assert_eq!(at(1, 48).demand_bytes, 0);
        assert_eq!(at(2, 36).demand_bytes, 0);
        let third = at(3, 24);
        assert!(third.demand_bytes > 5 * GIB, "{third:?}");
        assert!(
            third.expected_bytes < 2 * GIB && !third.emergency,
            "{third:?}"
        );
        assert!(at(4, 12).emergency, "gone within a second");
        // It stopped, and is forgotten.
        let states: Vec<_> = (5..12).map(|second| at(second, 12)).collect();
        assert!(!states[1].emergency);
        assert_eq!(states[6].demand_bytes, 0);
    }

    #[test]
    fn what_was_given_back_is_no_trend() {
        let mut trend = Trend::default();
        trend.observe(Duration::ZERO, 20 * GIB, 30 * GIB);
        trend.observe(Duration::from_secs(1), 15 * GIB, 24 * GIB);
        assert_eq!(trend.fall_bytes(Duration::from_secs(2)), 0);
        // Taken a little later than it was given back.
        trend.observe(Duration::from_secs(2), 15 * GIB, 20 * GIB);
        trend.observe(Duration::from_secs(3), 12 * GIB, 20 * GIB);
        assert_eq!(trend.fall_bytes(Duration::from_secs(2)), 0);
        // No time has passed, or the clock went back.
        trend.observe(Duration::from_secs(3), GIB, 20 * GIB);
        trend.observe(Duration::ZERO, 0, 20 * GIB);
        assert_eq!(trend.fall_bytes(Duration::from_secs(2)), 0);
    }

    #[test]
    fn what_comes_and_goes_is_no_trend() {
        let mut trend = Trend::default();
        for second in 0..40 {
            let available = if second % 2 == 0 { 20 * GIB } else { 16 * GIB };
            trend.observe(Duration::from_secs(second), available, 0);
        }
        let fall = trend.fall_bytes(Duration::from_secs(2));
        assert!(fall < 4 * GIB, "{} GiB", fall / GIB);
        trend.observe(Duration::from_secs(40), 20 * GIB, 0);
        assert_eq!(trend.fall_bytes(Duration::from_secs(2)), 0);
    }

    #[test]
    fn a_fall_far_above_the_watermark_is_no_emergency() {
        let mut trend = Trend::default();
        for (second, available) in [60, 40, 20].into_iter().enumerate() {
            trend.observe(Duration::from_secs(second as u64), available * GIB, 0);
        }
        let state = assess(
            &host(20 * GIB),
            &trend,
            some(0.0),
            80 * GIB,
            &PolicyConfig::default(),
        );
        assert!(!state.emergency && state.demand_bytes > 0, "{state:?}");
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
