//! What came of a run, and of several.

use serde::{Deserialize, Serialize};

/// One moment, for the plots.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Point {
    /// When.
    pub at_s: f64,
    /// Free memory of the host.
    pub free_mib: f64,
    /// What guests use, caches aside.
    pub used_mib: f64,
    /// What is in balloons.
    pub balloon_mib: f64,
    /// What the host has swapped out.
    pub swapped_mib: f64,
}

/// One run of one host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// Read from the host's swap.
    pub swap_in_bytes: f64,
    /// Written to the host's swap.
    pub swap_out_bytes: f64,
    /// Read from guests' images and their own swap.
    pub image_bytes: f64,
    /// To and from the guests' own swap.
    pub guest_swap_bytes: f64,
    /// How long each guest took.
    pub runtimes_s: Vec<f64>,
    /// Guests that had not finished at the limit.
    pub unfinished: u32,
    /// Guest seconds with less memory left than was in use.
    pub below_floor_s: f64,
    /// Processes killed in guests.
    pub oom_kills: u64,
    /// Changes of direction of all targets.
    pub turns: u32,
    /// Time in which at least one guest waited for the host's memory.
    pub some_s: f64,
    /// Time in which all did.
    pub full_s: f64,
    /// When it ended.
    pub end_s: f64,
    /// How it went.
    pub points: Vec<Point>,
}

/// Median, least and most of several runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of these values; zeros if there are none.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self {
            median: quantile(&values, 0.5),
            least: values.first().copied().unwrap_or(0.0),
            most: values.last().copied().unwrap_or(0.0),
        }
    }
}

/// The value below which this part of the sorted values lies.
#[must_use]
pub(super) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let index = crate::policy::amount::scaled(1, (last as f64 * part).round());
    let index = usize::try_from(index).unwrap_or(last);
    sorted.get(index).copied().unwrap_or(0.0)
}

/// All runs of one rule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Runs {
    /// The rule.
    pub policy: String,
    /// Each run of each host.
    pub outcomes: Vec<Outcome>,
}

impl Runs {
    /// Spread of a figure over the runs.
    #[must_use]
    pub fn spread(&self, figure: impl Fn(&Outcome) -> f64) -> Spread {
        Spread::of(self.outcomes.iter().map(figure))
    }
}

impl Outcome {
    /// Pages of 4 KiB written to swap.
    #[must_use]
    pub fn swap_out_pages(&self) -> f64 {
        self.swap_out_bytes / 4096.0
    }

    /// Pages of 4 KiB read from swap.
    #[must_use]
    pub fn swap_in_pages(&self) -> f64 {
        self.swap_in_bytes / 4096.0
    }

    /// A part of the guests' run times.
    #[must_use]
    pub fn runtime_s(&self, part: f64) -> f64 {
        let mut times = self.runtimes_s.clone();
        times.sort_by(f64::total_cmp);
        quantile(&times, part)
    }
}
