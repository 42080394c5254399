//! What a policy remembers of a VM from one sample to the next.

use std::time::Duration;

use super::{
    amount::scaled,
    config::PolicyConfig,
    types::{GuestMemory, VmSample},
};

/// Longest time until a guest that does not follow is asked again.
const LONGEST_RETRY: Duration = Duration::from_secs(300);

/// Counters of a guest and when they were taken. What it does not report stays 0 and never rises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) at: Duration,
    pub(super) swap_in_bytes: u64,
    pub(super) major_faults: u64,
    pub(super) oom_kills: u64,
    pub(super) alloc_stalls: u64,
}

impl Counters {
    /// `None` if the guest never said anything.
    pub(super) fn of(guest: &GuestMemory, at: Duration) -> Option<Self> {
        Some(Self {
            at: at.saturating_sub(guest.age?),
            swap_in_bytes: guest.swap_in_bytes.unwrap_or(0),
            major_faults: guest.major_faults.unwrap_or(0),
            oom_kills: guest.oom_kills.unwrap_or(0),
            alloc_stalls: guest.alloc_stalls.unwrap_or(0),
        })
    }
}

/// One VM's memory of the past.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct VmState {
    /// It has been in a sample before.
    pub(super) seen: bool,
    at: Duration,
    /// The target as it was left by the last decision.
    pub(super) target_bytes: u64,
    /// The balloon of the last sample.
    pub(super) ballooned_bytes: u64,
    /// Counters of the guest's last statistics.
    pub(super) counters: Option<Counters>,
    /// Memory that the guest's kernel took before it began to count.
    pub(super) reserved_bytes: Option<u64>,
    rate_bytes_per_second: Option<f64>,
    grown_at: Option<Duration>,
    shrunk_at: Option<Duration>,
    progress_at: Duration,
    stalls: u32,
    stuck_until: Option<Duration>,
    /// What it gets if it goes on suffering.
    next_give_back_bytes: u64,
}

impl VmState {
    /// Takes in what the sample says about the balloon: speed, progress, the kernel's own memory.
    pub(super) fn observe(&mut self, vm: &VmSample, at: Duration) {
        let left = vm.left_bytes();
        if !self.seen || vm.ballooned_bytes == self.ballooned_bytes {
            // The balloon stands still, so the guest's total is about the same memory as `left`.
            if let Some(total) = vm.guest.total_bytes.filter(|total| *total <= left) {
                let reserved = left - total;
                let least = self
                    .reserved_bytes
                    .map_or(reserved, |old| old.min(reserved));
                self.reserved_bytes = Some(least);
            }
        }
        if !self.seen {
            self.progress_at = at;
            return;
        }
        let towards_target = if vm.target_bytes > vm.ballooned_bytes {
            vm.ballooned_bytes > self.ballooned_bytes
        } else {
            // At the target, or deflating, which is up to the guest.
            true
        };
        if towards_target || vm.target_bytes != self.target_bytes {
            self.progress_at = at;
        }
        if vm.ballooned_bytes > self.ballooned_bytes {
            self.stalls = 0;
            self.measure_rate(vm, at);
        }
    }

    /// A balloon that reached its target says only that the guest is at least this fast.
    fn measure_rate(&mut self, vm: &VmSample, at: Duration) {
        let seconds = at.saturating_sub(self.at).as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let seen = (vm.ballooned_bytes - self.ballooned_bytes) as f64 / seconds;
        let at_target = vm.ballooned_bytes >= vm.target_bytes;
        self.rate_bytes_per_second = Some(match self.rate_bytes_per_second {
            None if at_target => return,
            None => seen,
            Some(rate) if at_target => rate.max(seen),
            Some(rate) => 0.5 * (rate + seen),
        });
        if at_target {
            // It kept up: let the next step find out how much more it can do.
            self.rate_bytes_per_second = self.rate_bytes_per_second.map(|rate| rate * 1.5);
        }
    }

    /// Inflation that the guest was seen to reach in a second.
    pub(super) fn rate_bytes(&self) -> Option<u64> {
        self.rate_bytes_per_second.map(|rate| scaled(1, rate))
    }

    /// The target is above the balloon, and the guest has not moved for so long that it never will.
    pub(super) fn stalled(&self, vm: &VmSample, at: Duration, config: &PolicyConfig) -> bool {
        vm.target_bytes > vm.ballooned_bytes
            && at.saturating_sub(self.progress_at) >= config.stall()
    }

    /// Leaves the guest alone for a while; returns how long.
    pub(super) fn give_up(&mut self, at: Duration, config: &PolicyConfig) -> Duration {
        let first = Duration::from_millis(config.stall_retry_ms);
        let pause = first
            .saturating_mul(1 << self.stalls.min(16))
            .min(LONGEST_RETRY);
        self.stalls = self.stalls.saturating_add(1);
        self.stuck_until = Some(at + pause);
        self.progress_at = at;
        pause
    }

    pub(super) fn stuck(&self, at: Duration) -> bool {
        self.stuck_until.is_some_and(|until| at < until)
    }

    /// Its balloon shrank so recently that it should not grow again.
    pub(super) fn may_not_grow(&self, at: Duration, hold: Duration) -> bool {
        self.shrunk_at.is_some_and(|when| at < when + hold)
    }

    /// Its balloon grew so recently that it should not shrink again without need.
    pub(super) fn may_not_shrink(&self, at: Duration, hold: Duration) -> bool {
        self.grown_at.is_some_and(|when| at < when + hold)
    }

    /// What a guest in distress asks for: twice as much as the last time.
    pub(super) fn next_give_back(&mut self, config: &PolicyConfig, most_bytes: u64) -> u64 {
        let ask = self.next_give_back_bytes.max(config.give_back_bytes);
        self.next_give_back_bytes = ask
            .saturating_mul(2)
            .min(most_bytes.max(config.give_back_bytes));
        ask
    }

    /// No distress: the next one starts small.
    pub(super) fn calm(&mut self) {
        self.next_give_back_bytes = 0;
    }

    /// Remembers the sample and what was decided.
    pub(super) fn settle(&mut self, vm: &VmSample, target_bytes: u64, at: Duration) {
        if target_bytes > vm.target_bytes {
            self.grown_at = Some(at);
            if vm.target_bytes <= vm.ballooned_bytes {
                self.progress_at = at;
            }
        } else if target_bytes < vm.target_bytes {
            self.shrunk_at = Some(at);
        }
        self.remember(vm, target_bytes, at);
    }

    /// Remembers the sample and the target, without a hold.
    pub(super) fn remember(&mut self, vm: &VmSample, target_bytes: u64, at: Duration) {
        self.seen = true;
        self.at = at;
        self.target_bytes = target_bytes;
        self.ballooned_bytes = vm.ballooned_bytes;
    }
}
