//! What a policy can be told. Every value has a default with a reason; docs/policy.md has the
//! evidence.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    amount::{MIB, scaled},
    types::HostSample,
};

/// Settings of the policy, the `[policy]` table of `aerostatd`'s configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PolicyConfig {
    /// Which rule decides; see [`super::NAMES`].
    pub name: String,

    /// Host memory to keep available, in percent of all. Below it guests are asked to give.
    pub high_percent: f64,
    /// The same in bytes; takes the place of the percentage.
    pub high_bytes: Option<u64>,
    /// Emergency below this, in percent of host memory. What lies between low and high is the
    /// reserve from which a guest in distress is served at once.
    pub low_percent: f64,
    /// The same in bytes; takes the place of the percentage.
    pub low_bytes: Option<u64>,
    /// Available memory beyond high and this, in percent of all, is surplus and goes back.
    pub band_percent: f64,

    /// Available memory counts as what is left of it after this time, if it goes on falling as it does: about
    /// the time from a decision to memory that is back. 0: as it is.
    pub look_ahead_ms: u64,

    /// Host pressure that is nothing to worry about, in percent of time (PSI "some").
    pub pressure_target_percent: f64,
    /// How much of the guests' memory is asked for at twice the target pressure, in percent, at
    /// three times twice as much, and so on.
    pub pressure_gain_percent: f64,
    /// Pressure never asks for more than this at a time, in percent of the guests' memory.
    pub pressure_limit_percent: f64,

    /// A guest keeps this many times what it has in use.
    pub floor_factor: f64,
    /// And this much on top.
    pub floor_margin_bytes: u64,
    /// A guest for which no floor is configured keeps this, in percent of its memory.
    pub least_percent: f64,
    /// Statistics of a guest that are older than this say nothing.
    pub stats_limit_ms: u64,

    /// Idle memory is taxed: 0 spares it like memory in use, 99 takes nearly nothing else.
    pub idle_tax_percent: f64,

    /// A balloon grows by at most this share of the guest's memory in one step.
    pub step_percent: f64,
    /// And by at most this.
    pub step_bytes: u64,
    /// The share in an emergency, where the bound in bytes does not hold.
    pub emergency_step_percent: f64,

    /// A guest in distress gets back this much at first; twice as much each further step.
    pub give_back_bytes: u64,
    /// A guest in distress always gets this, even if the reserve is used up.
    pub least_give_back_bytes: u64,
    /// Major faults a second that, in a guest short of memory, count as distress.
    pub major_faults_per_second: f64,

    /// After a change in one direction the other one waits this long. Distress never waits.
    pub hold_ms: u64,
    /// A guest that does not follow its target for this long has its balloon accepted as it is.
    pub stall_ms: u64,
    /// It is asked again after this, and later each time it does not follow, up to 5 minutes.
    pub stall_retry_ms: u64,

    /// Memory moves between fluid guests in steps of at most this.
    pub fluid_step_bytes: u64,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            name: "aerostat".to_owned(),
            high_percent: 8.0,
            high_bytes: None,
            low_percent: 3.0,
            low_bytes: None,
            band_percent: 2.0,
            look_ahead_ms: 2_000,
            pressure_target_percent: 1.0,
            pressure_gain_percent: 1.0,
            pressure_limit_percent: 10.0,
            floor_factor: 1.2,
            floor_margin_bytes: 16 * MIB,
            least_percent: 25.0,
            stats_limit_ms: 10_000,
            idle_tax_percent: 75.0,
            step_percent: 5.0,
            step_bytes: 256 * MIB,
            emergency_step_percent: 20.0,
            give_back_bytes: 16 * MIB,
            least_give_back_bytes: 4 * MIB,
            major_faults_per_second: 20.0,
            hold_ms: 10_000,
            stall_ms: 5_000,
            stall_retry_ms: 10_000,
            fluid_step_bytes: 32 * MIB,
        }
    }
}

/// A setting that makes no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{key} = {value}: {advice}")]
pub struct PolicyConfigError {
    /// Its key in the configuration.
    pub key: &'static str,
    /// What it is set to.
    pub value: String,
    /// What to set it to.
    pub advice: &'static str,
}

impl PolicyConfig {
    /// Checks that the settings make sense together.
    ///
    /// # Errors
    /// One does not; the error names its key.
    pub fn validate(&self) -> Result<(), PolicyConfigError> {
        let percentages = [
            ("high-percent", self.high_percent, 90.0),
            ("low-percent", self.low_percent, 90.0),
            ("band-percent", self.band_percent, 90.0),
            ("pressure-gain-percent", self.pressure_gain_percent, 100.0),
            ("pressure-limit-percent", self.pressure_limit_percent, 100.0),
            ("least-percent", self.least_percent, 100.0),
            ("idle-tax-percent", self.idle_tax_percent, 99.0),
            ("step-percent", self.step_percent, 100.0),
            ("emergency-step-percent", self.emergency_step_percent, 100.0),
        ];
        for (key, value, most) in percentages {
            if !(0.0..=most).contains(&value) {
                let advice = if most < 99.0 {
                    "between 0 and 90"
                } else if most < 100.0 {
                    "between 0 and 99"
                } else {
                    "between 0 and 100"
                };
                return Err(wrong(key, value, advice));
            }
        }
        if !super::NAMES.contains(&self.name.as_str()) {
            return Err(PolicyConfigError {
                key: "name",
                value: format!("{:?}", self.name),
                advice: "there is no such rule; \"aerostat\" is the one to use",
            });
        }
        if self.low_bytes.is_none()
            && self.high_bytes.is_none()
            && self.low_percent > self.high_percent
        {
            return Err(wrong(
                "low-percent",
                self.low_percent,
                "at most high-percent",
            ));
        }
        if let (Some(low), Some(high)) = (self.low_bytes, self.high_bytes)
            && low > high
        {
            return Err(wrong("low-bytes", low as f64, "at most high-bytes"));
        }
        if !(self.floor_factor >= 1.0 && self.floor_factor <= 100.0) {
            return Err(wrong(
                "floor-factor",
                self.floor_factor,
                "between 1 and 100",
            ));
        }
        if !(self.pressure_target_percent > 0.0 && self.pressure_target_percent <= 100.0) {
            let key = "pressure-target-percent";
            return Err(wrong(
                key,
                self.pressure_target_percent,
                "above 0, at most 100",
            ));
        }
        if !(0.0..=f64::MAX).contains(&self.major_faults_per_second) {
            let key = "major-faults-per-second";
            return Err(wrong(key, self.major_faults_per_second, "0 or more"));
        }
        Ok(())
    }

    /// Host memory to keep available.
    #[must_use]
    pub fn high_watermark_bytes(&self, host: &HostSample) -> u64 {
        let high_bytes = self
            .high_bytes
            .unwrap_or_else(|| scaled(host.total_bytes, self.high_percent / 100.0));
        scaled(high_bytes, caution(host)).max(self.low_watermark_bytes(host))
    }

    /// Below this it is an emergency.
    #[must_use]
    pub fn low_watermark_bytes(&self, host: &HostSample) -> u64 {
        let low_bytes = self
            .low_bytes
            .unwrap_or_else(|| scaled(host.total_bytes, self.low_percent / 100.0));
        scaled(low_bytes, caution(host))
    }

    /// How much an idle page counts against one in use: ESX's k = 1 / (1 - tau).
    pub(super) fn idle_cost(&self) -> f64 {
        1.0 / (1.0 - (self.idle_tax_percent / 100.0).clamp(0.0, 0.99))
    }

    pub(super) fn hold(&self) -> Duration {
        Duration::from_millis(self.hold_ms)
    }

    pub(super) fn look_ahead(&self) -> Duration {
        Duration::from_millis(self.look_ahead_ms)
    }

    pub(super) fn stall(&self) -> Duration {
        Duration::from_millis(self.stall_ms)
    }

    pub(super) fn stats_limit(&self) -> Duration {
        Duration::from_millis(self.stats_limit_ms)
    }
}

/// Without host swap a shortage ends in killed VMs instead of a slow host, so the watermarks are half as high
/// again.
fn caution(host: &HostSample) -> f64 {
    if host.swap_free_bytes == 0 { 1.5 } else { 1.0 }
}

fn wrong(key: &'static str, value: f64, advice: &'static str) -> PolicyConfigError {
    PolicyConfigError {
        key,
        value: value.to_string(),
        advice,
    }
}
