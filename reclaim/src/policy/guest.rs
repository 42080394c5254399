//! What a guest can afford (J1, J4), and the floor it is never taken below (J2, I6).

use std::time::Duration;

use super::{
    amount::{MIB, ratio, scaled},
    config::PolicyConfig,
    distress::{self, Distress},
    state::{Counters, VmState},
    types::{Mode, VmSample},
};

/// One guest as the policy sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Guest {
    /// Memory left to it.
    pub(super) left_bytes: u64,
    /// What of it is in use and could not go without swapping in the guest.
    pub(super) used_bytes: u64,
    /// Not in use at all, as far as it said.
    pub(super) free_bytes: u64,
    /// What must be left to it.
    pub(super) floor_bytes: u64,
    /// What is on its way to the host already.
    pub(super) pending_bytes: u64,
    /// Its statistics can be relied upon.
    pub(super) informed: bool,
    /// It suffers, and from what.
    pub(super) distress: Option<Distress>,
    /// Inflation bytes a second that it was seen to reach.
    pub(super) rate_bytes: Option<u64>,
    /// What a byte of balloon is expected to bring the host, 0 to 1.
    pub(super) yields: f64,
}

impl Guest {
    /// The largest balloon that keeps the floor.
    pub(super) fn most_ballooned_bytes(&self, vm: &VmSample) -> u64 {
        let most = vm.memory_bytes.saturating_sub(self.floor_bytes);
        most.min(vm.reach_bytes.unwrap_or(most))
    }

    /// Free memory that a guest keeps for its next allocations: taking it would wake its reclaim.
    pub(super) fn free_margin_bytes(&self) -> u64 {
        8 * MIB + self.left_bytes / 32
    }

    /// It uses all it has, if only for caches, and could do with more.
    pub(super) fn hungry(&self) -> bool {
        self.informed && self.free_bytes < self.free_margin_bytes().saturating_mul(3) / 2
    }

    /// The share of its memory in use, the `f` of the idle-memory tax.
    pub(super) fn active(&self) -> f64 {
        if self.informed {
            ratio(self.used_bytes, self.left_bytes).min(1.0)
        } else {
            1.0
        }
    }
}

/// The floor that is configured: no policy and no command without override goes below it.
///
/// `memory.min` is one too: memory that the host must not reclaim is not for the balloon either.
#[must_use]
pub fn configured_floor_bytes(vm: &VmSample, config: &PolicyConfig) -> u64 {
    let configured = if vm.floor_bytes > 0 {
        vm.floor_bytes
    } else {
        scaled(vm.memory_bytes, config.least_percent / 100.0)
    };
    configured
        .max(vm.limits.min_bytes.unwrap_or(0))
        .min(vm.memory_bytes)
}

/// Looks at one guest; brings its state up to what the sample says.
pub(super) fn assess(
    vm: &VmSample,
    state: &mut VmState,
    at: Duration,
    config: &PolicyConfig,
) -> Guest {
    let left_bytes = vm.left_bytes();
    let configured = configured_floor_bytes(vm, config);
    let counters = Counters::of(&vm.guest, at);
    let distress = distress::find(vm, state, counters.as_ref(), config);
    state.observe(vm, at);

    let fresh = vm.guest.age.is_some_and(|age| age <= config.stats_limit());
    let told = vm.guest.total_bytes.zip(vm.guest.available_bytes);
    let mut guest = Guest {
        left_bytes,
        used_bytes: left_bytes,
        pending_bytes: vm.target_bytes.saturating_sub(vm.ballooned_bytes),
        rate_bytes: state.rate_bytes(),
        distress,
        ..Guest::default()
    };
    if let Some((total, available)) = told.filter(|_| fresh) {
        guest.informed = true;
        guest.used_bytes = used_bytes(left_bytes, total, available, state.reserved_bytes);
        guest.free_bytes = vm.guest.free_bytes.unwrap_or(available).min(available);
        let needed =
            scaled(guest.used_bytes, config.floor_factor).saturating_add(config.floor_margin_bytes);
        guest.floor_bytes = configured.max(needed).min(vm.memory_bytes);
        if guest.distress.is_none() && vm.ballooned_bytes > 0 && guest.floor_bytes > left_bytes {
            guest.distress = Some(Distress::BelowFloor);
        }
    } else if vm.floor_bytes > 0 {
        // Nobody knows what it needs but the operator, who has said so.
        guest.floor_bytes = configured;
    } else {
        // Nobody knows what it needs: it keeps what it has.
        let promised = vm.memory_bytes.saturating_sub(vm.target_bytes);
        guest.floor_bytes = configured.max(left_bytes.min(promised));
    }
    guest.yields = yields(vm, left_bytes);
    if let Some(counters) = counters {
        state.counters = Some(counters);
    }
    guest
}

/// Memory in use: what the guest's kernel counts, and what it took before it began to count.
///
/// `total` follows the balloon in most guests, and `left` may have moved since the guest spoke, so
/// the two are not mixed. A Linux guest that negotiated `DEFLATE_ON_OOM` does not take the balloon
/// off its total; then what is left to it is the only measure.
fn used_bytes(left: u64, total: u64, available: u64, reserved: Option<u64>) -> u64 {
    if total > left {
        left.saturating_sub(available)
    } else {
        let counted = total.saturating_sub(available);
        counted
            .saturating_add(reserved.unwrap_or(left - total))
            .min(left)
    }
}

/// What a byte of balloon brings. A guest has pages that it never touched, and they cost the host
/// nothing; its allocator hands out touched and untouched ones alike. With page sharing a free page
/// is often shared with others already, and then brings nothing (J5).
fn yields(vm: &VmSample, left_bytes: u64) -> f64 {
    let occupied = vm.current_bytes.unwrap_or(left_bytes);
    let touched = ratio(occupied, left_bytes).clamp(0.1, 1.0);
    if vm.traits.page_sharing {
        touched * 0.5
    } else {
        touched
    }
}

/// Whether the policy may grow this VM's balloon because others need memory.
pub(super) fn follows_demand(mode: Mode) -> bool {
    matches!(mode, Mode::Auto | Mode::Fluid)
}

/// A manual target that would take the guest below its floor (J2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the target leaves {} MiB to the guest, below its floor of {} MiB; \
     the largest target is {} MiB, more needs an explicit override",
    left_bytes / MIB, floor_bytes / MIB, largest_bytes / MIB
)]
pub struct FloorViolation {
    /// What the target would leave to the guest.
    pub left_bytes: u64,
    /// Its configured floor.
    pub floor_bytes: u64,
    /// The largest target that keeps the floor.
    pub largest_bytes: u64,
}

/// Checks a target that an operator gives by hand against the configured floor; `floor_override`
/// is the explicit permission to go below. Returns the target in whole pages.
///
/// # Errors
/// The target leaves less than the floor, and there is no override; or it is more than the guest's
/// memory, which nothing permits.
pub fn check_manual_target(
    vm: &VmSample,
    config: &PolicyConfig,
    target_bytes: u64,
    floor_override: bool,
) -> Result<u64, FloorViolation> {
    let floor_bytes = configured_floor_bytes(vm, config);
    let target_bytes = super::amount::whole_pages(target_bytes);
    let allowed = if floor_override {
        vm.memory_bytes
    } else {
        vm.memory_bytes - floor_bytes
    };
    if target_bytes <= allowed {
        return Ok(target_bytes);
    }
    Err(FloorViolation {
        left_bytes: vm.memory_bytes.saturating_sub(target_bytes),
        floor_bytes,
        largest_bytes: super::amount::whole_pages(vm.memory_bytes - floor_bytes),
    })
}
