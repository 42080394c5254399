//! Senpai as in oomd: probes every cgroup by reclaiming a little as long as it does not hurt.
//!
//! Every 6 s each VM's cgroup loses 1 % of its memory by `memory.reclaim` unless it waited for memory
//! more than 0.1 % of the time. No balloon and no guest take part: what the host's LRU takes of a
//! guest's memory has to be written to swap, page cache of the guest included.

use super::{Every, open};
use crate::policy::{
    amount::scaled,
    config::PolicyConfig,
    guest::configured_floor_bytes,
    reason::Reason,
    types::{Decision, Policy, Sample},
};

const RECLAIM: f64 = 0.01;
const PRESSURE_LIMIT_PERCENT: f64 = 0.1;

/// The rule.
#[derive(Clone, Debug)]
pub struct Senpai {
    config: PolicyConfig,
    every: Every,
}

impl Senpai {
    /// With these configured minima.
    #[must_use]
    pub fn new(config: PolicyConfig) -> Self {
        let every = Every::seconds(6);
        Self { config, every }
    }
}

impl Policy for Senpai {
    fn name(&self) -> &'static str {
        "senpai"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        if !self.every.is_due(sample.at) {
            return Vec::new();
        }
        let vms = sample.vms.iter().filter(|vm| open(vm));
        vms.filter_map(|vm| {
            let current = vm.current_bytes?;
            let pressure = vm.pressure?.some_avg10;
            let floor_bytes = configured_floor_bytes(vm, &self.config);
            if pressure >= PRESSURE_LIMIT_PERCENT || current <= floor_bytes {
                return None;
            }
            let reclaim_bytes = scaled(current, RECLAIM).min(current - floor_bytes);
            Some(Decision {
                vm: vm.id.clone(),
                target_bytes: vm.target_bytes,
                nodes: Vec::new(),
                reclaim_bytes,
                floor_bytes,
                reason: Reason::Rival {
                    rule: "senpai: reclaim, pressure",
                    percent: pressure,
                    change_bytes: -reclaim_bytes.cast_signed(),
                },
            })
        })
        .collect()
    }
}
