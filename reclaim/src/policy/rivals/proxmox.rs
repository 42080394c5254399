//! Proxmox VE's automatic allocation.
//!
//! Every 10 s. The goal is 80 % of the host's memory in use. Memory above the VMs' minima is divided
//! by their shares; each VM changes by at most 100 MiB. Growing, only VMs that are short get more. What
//! guests have in use plays no other part, and a VM at its minimum cannot ask back while the host is
//! above its goal.

use super::{Every, leave, open};
use crate::policy::{
    amount::{MIB, ratio, scaled},
    config::PolicyConfig,
    guest::configured_floor_bytes,
    share::{Claim, divide},
    types::{Decision, Policy, Sample, VmSample},
};

const GOAL: f64 = 0.80;
const LARGEST_CHANGE_BYTES: u64 = 100 * MIB;
const SMALLEST_GOAL_BYTES: u64 = 10 * MIB;

/// The rule.
#[derive(Clone, Debug)]
pub struct Proxmox {
    config: PolicyConfig,
    every: Every,
}

impl Proxmox {
    /// With these configured minima.
    #[must_use]
    pub fn new(config: PolicyConfig) -> Self {
        let every = Every::seconds(10);
        Self { config, every }
    }
}

impl Policy for Proxmox {
    fn name(&self) -> &'static str {
        "proxmox"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        if !self.every.is_due(sample.at) {
            return Vec::new();
        }
        let total = sample.host.total_bytes;
        let used = total.saturating_sub(sample.host.available_bytes);
        let goal = scaled(total, GOAL);
        let vms: Vec<&VmSample> = sample.vms.iter().filter(|vm| open(vm)).collect();
        let percent = ratio(used, total) * 100.0;
        if used.abs_diff(goal) < SMALLEST_GOAL_BYTES {
            return Vec::new();
        }
        if used > goal {
            let claims: Vec<Claim> = vms.iter().map(|vm| self.above_minimum(vm)).collect();
            let parts = divide(used - goal, &claims);
            let less = |(vm, part): (&&VmSample, u64)| {
                let wanted = vm.left_bytes() - part;
                (part > 0)
                    .then(|| leave(vm, &self.config, wanted, "proxmox: shrink, used", percent))
            };
            return vms.iter().zip(parts).filter_map(less).collect();
        }
        let claims: Vec<Claim> = vms.iter().map(|vm| growth(vm)).collect();
        let parts = divide(goal - used, &claims);
        let more = |(vm, part): (&&VmSample, u64)| {
            let wanted = vm.left_bytes() + part;
            (part > 0).then(|| leave(vm, &self.config, wanted, "proxmox: grow, used", percent))
        };
        vms.iter().zip(parts).filter_map(more).collect()
    }
}

impl Proxmox {
    /// A larger share means to lose less.
    fn above_minimum(&self, vm: &VmSample) -> Claim {
        let above = vm
            .left_bytes()
            .saturating_sub(configured_floor_bytes(vm, &self.config));
        Claim {
            limit_bytes: above.min(LARGEST_CHANGE_BYTES),
            weight: 1.0 / f64::from(vm.weight.max(1)),
        }
    }
}

fn growth(vm: &VmSample) -> Claim {
    // Guests with plenty of free memory get no more.
    let free = vm.guest.free_bytes.unwrap_or(0);
    let short = free < vm.left_bytes() / 4;
    let below = if short { vm.ballooned_bytes } else { 0 };
    Claim {
        limit_bytes: below.min(LARGEST_CHANGE_BYTES),
        weight: f64::from(vm.weight),
    }
}
