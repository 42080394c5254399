//! Samples for tests, and a closed loop of guests that follow at once.

use std::time::Duration;

use super::*;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;

/// A guest of this size, all touched, that uses `used` and has `free`; the rest are caches.
pub(super) fn guest(name: &str, memory: u64, used: u64, free: u64) -> VmSample {
    let mut vm = VmSample::new(VmId::new(name), memory * MIB);
    vm.current_bytes = Some(memory * MIB);
    vm.traits.demand_fault_from_swap = true;
    vm.guest = GuestMemory {
        age: Some(Duration::ZERO),
        total_bytes: Some(memory * MIB),
        available_bytes: Some((memory - used) * MIB),
        free_bytes: Some(free * MIB),
        swap_in_bytes: Some(0),
        major_faults: Some(0),
        oom_kills: Some(0),
        alloc_stalls: Some(0),
        ..GuestMemory::default()
    };
    vm
}

/// A host of 32 GiB with swap.
pub(super) fn sample(available_bytes: u64, vms: Vec<VmSample>) -> Sample {
    Sample {
        at: Duration::ZERO,
        budget: None,
        host: HostSample {
            total_bytes: 32 * GIB,
            available_bytes,
            swap_free_bytes: 16 * GIB,
            pressure: Some(Pressure::default()),
            ..HostSample::default()
        },
        vms,
    }
}

impl VmSample {
    /// Puts this many MiB into the balloon: free memory first, then caches.
    pub(super) fn set_balloon(&mut self, ballooned: u64) {
        self.set_balloon_bytes(ballooned * MIB);
    }

    fn set_balloon_bytes(&mut self, ballooned_bytes: u64) {
        let before = self.left_bytes();
        self.target_bytes = ballooned_bytes;
        self.ballooned_bytes = ballooned_bytes;
        let left = self.left_bytes();
        let guest = &mut self.guest;
        let used = before.saturating_sub(guest.available_bytes.unwrap_or(0));
        let available = left.saturating_sub(used);
        guest.total_bytes = Some(left);
        guest.available_bytes = Some(available);
        let free = guest.free_bytes.unwrap_or(0) + left.saturating_sub(before);
        let taken = before.saturating_sub(left);
        guest.free_bytes = Some(free.saturating_sub(taken).min(available));
        self.current_bytes = Some(left);
    }
}

/// A host whose guests follow each decision within the second.
pub(super) struct World {
    pub(super) sample: Sample,
    pub(super) directions: Vec<Vec<bool>>,
}

impl World {
    pub(super) fn new(total_bytes: u64, vms: Vec<VmSample>) -> Self {
        let directions = vec![Vec::new(); vms.len()];
        let mut sample = sample(0, vms);
        sample.host.total_bytes = total_bytes;
        Self { sample, directions }
    }

    pub(super) fn step(&mut self, policy: &mut dyn Policy) -> Vec<Decision> {
        let occupied = self
            .sample
            .vms
            .iter()
            .map(|vm| vm.current_bytes.unwrap_or(0));
        let available = self.sample.host.total_bytes.saturating_sub(occupied.sum());
        self.sample.host.available_bytes = available;
        let decisions = policy.decide(&self.sample);
        for decision in &decisions {
            let index = self
                .sample
                .vms
                .iter()
                .position(|vm| vm.id == decision.vm)
                .unwrap();
            let vm = &mut self.sample.vms[index];
            if decision.target_bytes != vm.target_bytes {
                self.directions[index].push(decision.target_bytes > vm.target_bytes);
            }
            vm.set_balloon_bytes(decision.target_bytes);
        }
        self.sample.at += Duration::from_secs(1);
        decisions
    }
}
