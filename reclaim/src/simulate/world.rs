//! One host in virtual time: processors and a disk that guests share, memory, an LRU that swaps, and
//! a rule that is asked every period, through the same samples as on a real host.

use std::time::Duration;

use super::{
    guest::{Asks, Guest, MIB},
    memory::{CLASSES, Class},
    scenario::{HostSpec, Scenario},
};
use crate::policy::{
    Capabilities, Decision, GuestMemory, HostSample, HypervisorTraits, MemoryLimits, Policy,
    Pressure, Sample, VmSample, amount::scaled,
};
use crate::results::{Outcome, Point};

/// Length of a step.
const STEP_S: f64 = 0.1;

/// Below the first share of free memory the host swaps in the background until the second is free;
/// below half of the first, who allocates waits for it. As Linux's watermarks on a large zone.
const HOST_LOW: f64 = 0.015;
const HOST_HIGH: f64 = 0.02;

/// Time in seconds over which the host's LRU tells hot memory from cold: how long pages take through
/// its lists.
const LRU_MEMORY_S: f64 = 30.0;

/// A stock driver was seen to inflate 1 to 2 GiB/s; a busy guest reaches half of the lower figure.
const INFLATE_BYTES_PER_S: f64 = 512.0 * MIB;

pub(super) struct World<'a> {
    spec: &'a HostSpec,
    scenario: &'a Scenario,
    guests: Vec<Guest>,
    now: f64,
    /// When the disk will have done what it was given.
    disk_free_at: f64,
    some_s: f64,
    full_s: f64,
    some_avg10: f64,
    full_avg10: f64,
    pub(super) outcome: Outcome,
    directions: Vec<i8>,
}

impl<'a> World<'a> {
    pub(super) fn new(scenario: &'a Scenario, seed: u64) -> Self {
        let mut chance = fastrand::Rng::with_seed(seed);
        let mut guests = Vec::new();
        for spec in &scenario.guests {
            for number in 0..spec.count {
                guests.push(Guest::new(spec, number, &mut chance));
            }
        }
        guests.sort_by(|left, right| left.id.cmp(&right.id));
        let directions = vec![0; guests.len()];
        Self {
            spec: &scenario.host,
            scenario,
            guests,
            now: 0.0,
            disk_free_at: 0.0,
            some_s: 0.0,
            full_s: 0.0,
            some_avg10: 0.0,
            full_avg10: 0.0,
            outcome: Outcome::default(),
            directions,
        }
    }

    /// Runs until all guests have finished, or the scenario's limit.
    pub(super) fn run(mut self, policy: &mut dyn Policy) -> Outcome {
        let mut next_decision = 0.0;
        let mut next_point = 0.0;
        while self.now < self.scenario.limit_s {
            if self.now >= next_decision {
                let sample = self.sample();
                let decisions = policy.decide(&sample);
                self.act(&decisions);
                next_decision += self.scenario.period_s;
            }
            if self.now >= next_point {
                self.note();
                next_point += (self.scenario.limit_s / 400.0).max(1.0);
            }
            self.step();
            if self.guests.iter().all(|guest| guest.finished_at.is_some()) {
                break;
            }
        }
        self.finish()
    }

    fn resident(&self) -> f64 {
        let guests = self
            .guests
            .iter()
            .map(|guest| guest.memory.resident() + guest.overhead);
        guests.sum::<f64>() + self.spec.own_mib * MIB
    }

    fn swapped(&self) -> f64 {
        self.guests.iter().map(|guest| guest.memory.swapped()).sum()
    }

    fn free(&self) -> f64 {
        self.spec.memory_mib * MIB - self.resident()
    }

    fn step(&mut self) {
        let now = self.now;
        let wanting = self
            .guests
            .iter()
            .filter(|guest| guest.wants_cpu(now))
            .count();
        let share = (self.spec.cores / wanting.max(1) as f64).min(1.0);
        let (mut running, mut stalled) = (0_u32, 0_u32);
        for index in 0..self.guests.len() {
            let guest = &mut self.guests[index];
            guest.follow(INFLATE_BYTES_PER_S * STEP_S);
            if !guest.runs(now) {
                continue;
            }
            running += 1;
            let waits = now < guest.waits_until;
            let for_memory = waits && guest.waits_for_memory;
            if for_memory {
                stalled += 1;
                guest.stalled_s += STEP_S;
            }
            decay(
                &mut guest.pressure_avg10,
                if for_memory { 100.0 } else { 0.0 },
            );
            if guest.used() > guest.memory.left() - 0.25 * guest.kept_free() {
                self.outcome.below_floor_s += STEP_S;
            }
            if !waits {
                let idle = !guest.wants_cpu(now);
                let seconds = if idle { STEP_S } else { STEP_S * share };
                let asks = guest.work(seconds, now);
                self.pay(index, asks);
            }
        }
        let (some, full) = (stalled > 0, stalled > 0 && stalled == running);
        self.some_s += if some { STEP_S } else { 0.0 };
        self.full_s += if full { STEP_S } else { 0.0 };
        decay(&mut self.some_avg10, if some { 100.0 } else { 0.0 });
        decay(&mut self.full_avg10, if full { 100.0 } else { 0.0 });
        self.reclaim_in_background();
        self.now += STEP_S;
    }

    /// A guest waits for what it asked: its image, the host's swap, and memory when there is none.
    fn pay(&mut self, index: usize, asks: Asks) {
        let mut for_memory = 0.0;
        if asks.new + asks.swap_in > 0.0 {
            let all = self.spec.memory_mib * MIB;
            let missing = asks.new + asks.swap_in + 0.5 * HOST_LOW * all - self.free();
            if missing > 0.0 {
                let written = self.swap_out(missing.min(asks.new + asks.swap_in + 0.01 * all));
                for_memory += self.disk(written, self.spec.disk_mib_per_s);
            }
        }
        if asks.swap_in > 0.0 {
            self.outcome.swap_in_bytes += asks.swap_in;
            for_memory += self.disk(asks.swap_in, self.spec.swap_in_mib_per_s);
        }
        self.outcome.image_bytes += asks.disk;
        let for_disk = if asks.disk > 0.0 {
            self.disk(asks.disk, self.spec.disk_mib_per_s)
        } else {
            0.0
        };
        let guest = &mut self.guests[index];
        let wait = for_memory + for_disk;
        if wait > 0.0 {
            // The disk serves all in turn, so waits for several requests overlap.
            guest.waits_until = self.now + for_memory.max(for_disk);
            guest.waits_for_memory = for_memory > for_disk;
        }
    }

    /// Gives the disk something to do; returns how long it takes until it has done it.
    fn disk(&mut self, bytes: f64, mib_per_s: f64) -> f64 {
        let begins = self.disk_free_at.max(self.now);
        self.disk_free_at = begins + bytes / (mib_per_s * MIB);
        self.disk_free_at - self.now
    }

    fn reclaim_in_background(&mut self) {
        let all = self.spec.memory_mib * MIB;
        let free = self.free();
        // As fast as the disk writes, and not before it has done what it has.
        if free < HOST_LOW * all && self.disk_free_at < self.now + 1.0 {
            let most = self.spec.disk_mib_per_s * MIB * STEP_S;
            let written = self.swap_out((HOST_HIGH * all - free).min(most));
            self.disk(written, self.spec.disk_mib_per_s);
        }
    }

    /// The host's LRU takes memory of all guests, the colder the more, and hits some that is hot.
    fn swap_out(&mut self, bytes: f64) -> f64 {
        let room = (self.spec.swap_mib * MIB - self.swapped()).max(0.0);
        let bytes = bytes.min(room);
        let all: Vec<usize> = (0..self.guests.len()).collect();
        let written = self.evict(&all, bytes);
        self.outcome.swap_out_bytes += written;
        written
    }

    fn evict(&mut self, among: &[usize], bytes: f64) -> f64 {
        let now = self.now;
        let weight = |guest: &Guest, class: Class| {
            let rate = guest.touch_rate(class, now);
            guest.memory.part(class).resident / (1.0 + (rate * LRU_MEMORY_S).powi(2))
        };
        let mut left = bytes;
        // A class that is exhausted leaves its part to the others: a few passes suffice.
        for _ in 0..4 {
            let sum: f64 = among
                .iter()
                .flat_map(|index| CLASSES.map(|class| weight(&self.guests[*index], class)))
                .sum();
            if left < 4096.0 || sum <= 0.0 {
                break;
            }
            let wanted = left;
            for index in among {
                for class in CLASSES {
                    let guest = &mut self.guests[*index];
                    let part = wanted * weight(guest, class) / sum;
                    left -= guest.memory.swap_out(class, part);
                }
            }
        }
        bytes - left
    }

    fn sample(&self) -> Sample {
        let all = self.spec.memory_mib * MIB;
        Sample {
            at: Duration::from_secs_f64(self.now),
            budget: None,
            host: HostSample {
                total_bytes: scaled(1, all),
                available_bytes: scaled(1, self.free()),
                swap_free_bytes: scaled(1, self.spec.swap_mib * MIB - self.swapped()),
                pressure: Some(Pressure {
                    some_avg10: self.some_avg10,
                    full_avg10: self.full_avg10,
                    some_total_us: scaled(1, self.some_s * 1e6),
                    full_total_us: scaled(1, self.full_s * 1e6),
                    ..Pressure::default()
                }),
                ..HostSample::default()
            },
            vms: self.guests.iter().map(vm_sample).collect(),
        }
    }

    fn act(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            let Ok(index) = self
                .guests
                .binary_search_by(|guest| guest.id.cmp(&decision.vm))
            else {
                continue;
            };
            let guest = &mut self.guests[index];
            let target = decision.target_bytes as f64;
            if (target - guest.target).abs() >= MIB {
                let direction = if target > guest.target { 1 } else { -1 };
                if self.directions[index] != 0 && self.directions[index] != direction {
                    self.outcome.turns += 1;
                }
                self.directions[index] = direction;
            }
            guest.target = target;
            if decision.reclaim_bytes > 0 {
                let room = (self.spec.swap_mib * MIB - self.swapped()).max(0.0);
                let bytes = (decision.reclaim_bytes as f64).min(room);
                let written = self.evict(&[index], bytes);
                self.outcome.swap_out_bytes += written;
                self.disk(written, self.spec.disk_mib_per_s);
            }
        }
    }

    fn note(&mut self) {
        let sum = |value: fn(&Guest) -> f64| self.guests.iter().map(value).sum::<f64>();
        let point = Point {
            at_s: self.now,
            free_mib: self.free() / MIB,
            used_mib: sum(Guest::used) / MIB,
            balloon_mib: sum(|guest| guest.memory.balloon) / MIB,
            swapped_mib: self.swapped() / MIB,
        };
        self.outcome.points.push(point);
    }

    fn finish(mut self) -> Outcome {
        self.note();
        let now = self.now;
        for guest in &self.guests {
            let started = guest.started_at.unwrap_or(0.0);
            let ended = guest.finished_at.unwrap_or(now);
            self.outcome.runtimes_s.push(ended - started);
            self.outcome.unfinished += u32::from(guest.finished_at.is_none());
            self.outcome.oom_kills += guest.counts.oom_kills;
            self.outcome.guest_swap_bytes += guest.counts.swap_in + guest.counts.swap_out;
        }
        self.outcome.some_s = self.some_s;
        self.outcome.full_s = self.full_s;
        self.outcome.end_s = now;
        self.outcome
    }
}

/// An average over about ten seconds.
fn decay(average: &mut f64, value: f64) {
    *average += (value - *average) * (STEP_S / 10.0);
}

fn vm_sample(guest: &Guest) -> VmSample {
    let memory = &guest.memory;
    let bytes = |amount: f64| scaled(1, amount);
    VmSample {
        mode: guest.mode,
        weight: guest.weight,
        floor_bytes: guest.floor_bytes,
        current_bytes: Some(bytes(memory.resident() + guest.overhead)),
        swap_current_bytes: Some(bytes(memory.swapped())),
        ballooned_bytes: bytes(memory.balloon),
        target_bytes: bytes(guest.target),
        guest: GuestMemory {
            age: Some(Duration::ZERO),
            total_bytes: Some(bytes(memory.left())),
            free_bytes: Some(bytes(memory.bytes(Class::Free))),
            available_bytes: Some(bytes(guest.available())),
            caches_bytes: Some(bytes(memory.cache())),
            swap_in_bytes: Some(bytes(guest.counts.swap_in)),
            swap_out_bytes: Some(bytes(guest.counts.swap_out)),
            major_faults: Some(bytes(guest.counts.major_faults)),
            minor_faults: None,
            oom_kills: Some(guest.counts.oom_kills),
            alloc_stalls: Some(bytes(guest.counts.alloc_stalls)),
        },
        pressure: Some(Pressure {
            some_avg10: guest.pressure_avg10,
            full_avg10: guest.pressure_avg10,
            some_total_us: bytes(guest.stalled_s * 1e6),
            full_total_us: bytes(guest.stalled_s * 1e6),
            ..Pressure::default()
        }),
        limits: MemoryLimits::default(),
        traits: HypervisorTraits {
            page_sharing: false,
            demand_fault_from_swap: true,
        },
        capabilities: Capabilities {
            guest_stats: true,
            ..Capabilities::default()
        },
        ..VmSample::new(guest.id.clone(), bytes(guest.memory_bytes))
    }
}
