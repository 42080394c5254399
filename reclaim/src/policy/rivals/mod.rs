//! Rules that are in use elsewhere, written from their published behaviour for comparison: in the
//! simulator and in the experiment. They see the same samples through the same trait.
//!
//! Each is as its authors describe it, with its own constants and its own period, and gets no help
//! from the rules around `super::aerostat`: no dynamic floor, no holds, no reserve. What a VM is
//! configured with is their minimum, as it would be in their own configuration.

mod mom;
mod proxmox;
mod senpai;
mod squeezed;

use std::time::Duration;

pub use mom::Mom;
pub use proxmox::Proxmox;
pub use senpai::Senpai;
pub use squeezed::Squeezed;

use super::{
    amount::whole_pages,
    config::PolicyConfig,
    guest::{configured_floor_bytes, follows_demand},
    reason::Reason,
    types::{Decision, Policy, Sample, VmSample},
};

/// Leaves every balloon as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

impl Policy for Nothing {
    fn name(&self) -> &'static str {
        "none"
    }

    fn decide(&mut self, _sample: &Sample) -> Vec<Decision> {
        Vec::new()
    }
}

/// Acts once in a period, however often it is asked.
#[derive(Clone, Copy, Debug)]
struct Every {
    period: Duration,
    last: Option<Duration>,
}

impl Every {
    fn seconds(seconds: u64) -> Self {
        Self {
            period: Duration::from_secs(seconds),
            last: None,
        }
    }

    fn is_due(&mut self, at: Duration) -> bool {
        let due = self.last.is_none_or(|last| at >= last + self.period);
        if due {
            self.last = Some(at);
        }
        due
    }
}

/// VMs that a rule may change at all.
fn open(vm: &VmSample) -> bool {
    vm.reachable && follows_demand(vm.mode)
}

/// Leaves `left_bytes` to the guest: no less than its configured minimum, no more than all.
fn leave(
    vm: &VmSample,
    config: &PolicyConfig,
    left_bytes: u64,
    rule: &'static str,
    percent: f64,
) -> Decision {
    let floor_bytes = configured_floor_bytes(vm, config);
    let left = left_bytes.clamp(floor_bytes, vm.memory_bytes);
    let before = vm.memory_bytes.saturating_sub(vm.target_bytes);
    Decision {
        vm: vm.id.clone(),
        target_bytes: whole_pages(vm.memory_bytes - left),
        nodes: Vec::new(),
        reclaim_bytes: 0,
        floor_bytes,
        reason: Reason::Rival {
            rule,
            percent,
            change_bytes: left.cast_signed().wrapping_sub(before.cast_signed()),
        },
    }
}
