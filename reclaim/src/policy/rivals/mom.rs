//! MOM, the Memory Overcommitment Manager of oVirt, with its default ballooning rules.
//!
//! Every 10 s. While less than 20 % of the host is free, each guest is to have free what is the same
//! share of its memory as is free on the host; otherwise 20 %. It changes by at most 5 % of its
//! present size a time. Free is what the guest has not in use at all, so caches count as used.

use super::{Every, leave, open};
use crate::policy::{
    amount::{ratio, scaled},
    config::PolicyConfig,
    types::{Decision, Policy, Sample},
};

/// Below this part of free host memory guests shrink; the part that guests keep free otherwise.
const THRESHOLD: f64 = 0.20;
const LARGEST_CHANGE: f64 = 0.05;
/// Smaller changes are not made.
const SMALLEST_CHANGE: f64 = 0.0025;

/// The rule.
#[derive(Clone, Debug)]
pub struct Mom {
    config: PolicyConfig,
    every: Every,
}

impl Mom {
    /// With these configured minima.
    #[must_use]
    pub fn new(config: PolicyConfig) -> Self {
        let every = Every::seconds(10);
        Self { config, every }
    }
}

impl Policy for Mom {
    fn name(&self) -> &'static str {
        "mom"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        if !self.every.is_due(sample.at) {
            return Vec::new();
        }
        let host_free = ratio(sample.host.available_bytes, sample.host.total_bytes);
        let shrink = host_free < THRESHOLD;
        let guest_free = if shrink { host_free } else { THRESHOLD };
        let vms = sample.vms.iter().filter(|vm| open(vm));
        vms.filter_map(|vm| {
            let now = vm.left_bytes();
            let used = now.saturating_sub(vm.guest.free_bytes?);
            let ideal = used + scaled(now, guest_free);
            let wanted = if shrink {
                scaled(now, 1.0 - LARGEST_CHANGE).max(ideal).min(now)
            } else {
                scaled(now, 1.0 + LARGEST_CHANGE).max(ideal)
            };
            let worth = wanted.abs_diff(now) >= scaled(now, SMALLEST_CHANGE);
            let rule = if shrink {
                "mom: shrink, host free"
            } else {
                "mom: grow, host free"
            };
            worth.then(|| leave(vm, &self.config, wanted, rule, host_free * 100.0))
        })
        .collect()
    }
}
