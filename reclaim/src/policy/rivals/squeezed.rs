//! squeezed, XenServer's ballooning daemon.
//!
//! All memory but a reserve is divided so that every VM has the same part of what lies between its
//! minimum and its maximum. Guests are not asked what they need, so with the same VMs the division
//! does not change.

use super::{Every, leave, open};
use crate::policy::{
    amount::{ratio, scaled},
    config::PolicyConfig,
    guest::configured_floor_bytes,
    types::{Decision, Policy, Sample, VmSample},
};

/// The part of the host that is not divided.
const RESERVE: f64 = 0.05;

/// The rule.
#[derive(Clone, Debug)]
pub struct Squeezed {
    config: PolicyConfig,
    every: Every,
}

impl Squeezed {
    /// With these configured minima.
    #[must_use]
    pub fn new(config: PolicyConfig) -> Self {
        let every = Every::seconds(10);
        Self { config, every }
    }
}

impl Policy for Squeezed {
    fn name(&self) -> &'static str {
        "squeezed"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        if !self.every.is_due(sample.at) {
            return Vec::new();
        }
        let vms: Vec<&VmSample> = sample.vms.iter().filter(|vm| open(vm)).collect();
        let minimum = |vm: &&VmSample| configured_floor_bytes(vm, &self.config);
        let minima: u64 = vms.iter().map(minimum).sum();
        let maxima: u64 = vms.iter().map(|vm| vm.memory_bytes).sum();
        // What the host uses for itself is not there to be divided.
        let occupied = vms
            .iter()
            .map(|vm| vm.current_bytes.unwrap_or_else(|| vm.left_bytes()));
        let to_divide = (sample.host.available_bytes + occupied.sum::<u64>())
            .saturating_sub(scaled(sample.host.total_bytes, RESERVE));
        let part = ratio(to_divide.saturating_sub(minima), maxima - minima).min(1.0);
        vms.iter()
            .map(|vm| {
                let minimum = minimum(vm);
                let wanted = minimum + scaled(vm.memory_bytes - minimum, part);
                leave(
                    vm,
                    &self.config,
                    wanted,
                    "squeezed: of its range",
                    part * 100.0,
                )
            })
            .collect()
    }
}
