//! A guest at work: phases of computing, reading files, allocating and freeing.

use super::{
    memory::{Class, Cost, Memory},
    scenario::{GuestSpec, Phase},
};
use crate::policy::{Mode, VmId};

pub(super) const MIB: f64 = 1_048_576.0;

/// Share of a guest's memory that its kernel keeps free, and below which it reclaims caches.
const KEPT_FREE: f64 = 0.02;

/// The first part of a phase, in which its processes allocate their memory.
const RISE: f64 = 0.2;

/// How soon the guest takes back what it had put into its own swap.
const GUEST_SWAP_TOUCH: f64 = 0.1;

/// What a guest's work asks of its host in one step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asks {
    /// Memory that the host has to find.
    pub(super) new: f64,
    /// To be read from the host's swap.
    pub(super) swap_in: f64,
    /// To be read from the guest's image, or its own swap.
    pub(super) disk: f64,
}

impl Asks {
    fn add(&mut self, cost: Cost) {
        self.new += cost.new;
        self.swap_in += cost.swap_in;
    }
}

/// What a guest counts about itself.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) swap_in: f64,
    pub(super) swap_out: f64,
    pub(super) major_faults: f64,
    pub(super) alloc_stalls: f64,
    pub(super) oom_kills: u64,
}

/// One guest.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) id: VmId,
    pub(super) memory: Memory,
    pub(super) memory_bytes: f64,
    pub(super) overhead: f64,
    pub(super) target: f64,
    pub(super) counts: Counts,
    /// Configured.
    pub(super) floor_bytes: u64,
    pub(super) weight: u32,
    pub(super) mode: Mode,
    reports: bool,
    swap: f64,
    /// What of its processes' memory lies in its own swap.
    own_swapped: f64,
    starts_at: f64,
    phases: Vec<Phase>,
    rounds_left: u32,
    phase: usize,
    progress: f64,
    anon_before: f64,
    /// Time until which it waits, and whether for memory.
    pub(super) waits_until: f64,
    pub(super) waits_for_memory: bool,
    /// Pressure totals, in seconds.
    pub(super) stalled_s: f64,
    pub(super) pressure_avg10: f64,
    pub(super) finished_at: Option<f64>,
    pub(super) started_at: Option<f64>,
}

impl Guest {
    pub(super) fn new(spec: &GuestSpec, number: u32, chance: &mut fastrand::Rng) -> Self {
        let mut vary =
            |amount: f64| amount * (1.0 + spec.jitter_percent / 100.0 * (2.0 * chance.f64() - 1.0));
        let phases = spec.phases.iter().map(|phase| Phase {
            work_s: vary(phase.work_s),
            anon_mib: vary(phase.anon_mib),
            files_mib: vary(phase.files_mib),
            reads_mib: vary(phase.reads_mib),
            ..phase.clone()
        });
        let phases = phases.collect();
        let mut memory = Memory::new(spec.memory_mib * MIB);
        memory.allocate(Class::Kernel, spec.kernel_mib * MIB);
        Self {
            id: VmId::new(&format!("{}{number:04}", spec.name)),
            memory,
            memory_bytes: spec.memory_mib * MIB,
            overhead: spec.overhead_mib * MIB,
            target: 0.0,
            counts: Counts::default(),
            floor_bytes: spec.floor_mib << 20,
            weight: spec.weight,
            mode: spec.mode,
            reports: spec.reports_free_pages,
            swap: spec.swap_mib * MIB,
            own_swapped: 0.0,
            starts_at: spec.start_spread_s * chance.f64(),
            phases,
            rounds_left: spec.repeat,
            phase: 0,
            progress: 0.0,
            anon_before: 0.0,
            waits_until: 0.0,
            waits_for_memory: false,
            stalled_s: 0.0,
            pressure_avg10: 0.0,
            finished_at: None,
            started_at: None,
        }
    }

    fn present(&self) -> &Phase {
        &self.phases[self.phase]
    }

    /// It has something to do now, and does not wait.
    pub(super) fn wants_cpu(&self, now: f64) -> bool {
        self.runs(now) && now >= self.waits_until && !self.present().idle
    }

    pub(super) fn runs(&self, now: f64) -> bool {
        self.finished_at.is_none() && now >= self.starts_at
    }

    /// Memory that it can do without only by swapping.
    pub(super) fn used(&self) -> f64 {
        self.memory.bytes(Class::Kernel) + self.memory.bytes(Class::Anon)
    }

    pub(super) fn kept_free(&self) -> f64 {
        KEPT_FREE * self.memory_bytes
    }

    /// MemAvailable: free memory and most of the caches.
    pub(super) fn available(&self) -> f64 {
        let free = self.memory.bytes(Class::Free);
        (free + 0.9 * self.memory.cache() - self.kept_free()).max(0.0)
    }

    /// Part of a class that is touched in a second of work; how the host's LRU sees it.
    pub(super) fn touch_rate(&self, class: Class, now: f64) -> f64 {
        if !self.runs(now) || self.present().idle {
            return if class == Class::Kernel { 0.05 } else { 0.0 };
        }
        let phase = self.present();
        match class {
            Class::Kernel => 0.5,
            Class::Anon => phase.touch,
            Class::HotCache => phase.reads_mib / (phase.work_s * phase.files_mib.max(1.0)),
            Class::ColdCache | Class::Free => 0.0,
        }
    }

    /// Works for `seconds` of processor time. What it asks for is to be paid in waiting.
    pub(super) fn work(&mut self, seconds: f64, now: f64) -> Asks {
        self.started_at.get_or_insert(now);
        let mut asks = Asks::default();
        let phase = self.present().clone();
        let before = self.progress;
        self.progress = (before + seconds / phase.work_s).min(1.0);
        let advanced = self.progress - before;

        self.move_anon(&phase, &mut asks);
        if phase.idle {
            asks.swap_in += self.memory.touch(Class::Kernel, 0.05 * seconds);
        } else {
            self.read_files(&phase, advanced, &mut asks);
            asks.swap_in += self.memory.touch(Class::Kernel, 0.5 * seconds);
            asks.swap_in += self.memory.touch(Class::Anon, phase.touch * seconds);
            self.take_back_own_swap(seconds, &mut asks);
        }
        if self.reports {
            self.memory.report_free();
        }
        if self.progress >= 1.0 {
            self.next_phase(now);
        }
        asks
    }

    /// Memory of processes follows the phase; what does not fit goes to the guest's own swap, and
    /// when that is full the kernel kills, and the phase begins again.
    fn move_anon(&mut self, phase: &Phase, asks: &mut Asks) {
        let rise = (self.progress / RISE).min(1.0);
        let wanted = self.anon_before + rise * (phase.anon_mib * MIB - self.anon_before);
        let has = self.memory.bytes(Class::Anon) + self.own_swapped;
        if wanted < has {
            let surplus = has - wanted;
            let from_swap = surplus.min(self.own_swapped);
            self.own_swapped -= from_swap;
            self.memory.free(Class::Anon, surplus - from_swap);
            return;
        }
        let more = wanted - has;
        if more <= 0.0 {
            return;
        }
        let free = self.memory.bytes(Class::Free);
        if free < more + self.kept_free() {
            self.memory.reclaim_caches(more + self.kept_free());
        }
        let fits = more.min((self.memory.bytes(Class::Free) - 0.25 * self.kept_free()).max(0.0));
        asks.add(self.memory.allocate(Class::Anon, fits));
        let lacks = more - fits;
        if lacks > 0.0 {
            self.counts.alloc_stalls += 1.0;
            self.swap_own(lacks, asks);
        }
    }

    fn swap_own(&mut self, bytes: f64, asks: &mut Asks) {
        if self.own_swapped + bytes <= self.swap {
            self.own_swapped += bytes;
            self.counts.swap_out += bytes;
            asks.disk += bytes;
            return;
        }
        self.counts.oom_kills += 1;
        self.progress = 0.0;
        self.own_swapped = 0.0;
        self.anon_before = 0.0;
        let anon = self.memory.bytes(Class::Anon);
        self.memory.free(Class::Anon, anon);
    }

    /// What lies in its own swap is needed again: something else goes out for it, or it fits.
    fn take_back_own_swap(&mut self, seconds: f64, asks: &mut Asks) {
        let touched = self.own_swapped * (GUEST_SWAP_TOUCH * seconds).min(1.0);
        if touched <= 0.0 {
            return;
        }
        self.counts.swap_in += touched;
        self.counts.major_faults += touched / 4096.0;
        asks.disk += touched;
        let room = (self.memory.bytes(Class::Free) - self.kept_free()).max(0.0);
        let fits = touched.min(room);
        self.own_swapped -= fits;
        asks.add(self.memory.allocate(Class::Anon, fits));
        // The rest takes the place of what has to go out.
        self.counts.swap_out += touched - fits;
        asks.disk += touched - fits;
    }

    /// Reads come from the cache as far as it holds the files; the rest is read from disk and kept
    /// if there is room, in the place of what is cold.
    fn read_files(&mut self, phase: &Phase, advanced: f64, asks: &mut Asks) {
        let reads = phase.reads_mib * MIB * advanced;
        let files = phase.files_mib * MIB;
        if reads <= 0.0 || files <= 0.0 {
            return;
        }
        let hot = self.memory.bytes(Class::HotCache).min(files);
        let hit = reads * hot / files;
        let missed = reads - hit;
        asks.swap_in += self.memory.touch(Class::HotCache, hit / hot.max(1.0));
        asks.disk += missed;
        // A fifth is program text and mapped files, whose misses are major faults.
        self.counts.major_faults += 0.2 * missed / 65_536.0;
        let keep = missed.min(files - hot);
        let free = self.memory.bytes(Class::Free);
        if free < keep + self.kept_free() {
            let lost = self.memory.reclaim_caches(keep + self.kept_free());
            debug_assert!(lost >= 0.0, "caches shrink");
        }
        let room = (self.memory.bytes(Class::Free) - self.kept_free()).max(0.0);
        asks.add(self.memory.allocate(Class::HotCache, keep.min(room)));
    }

    fn next_phase(&mut self, now: f64) {
        self.anon_before = self.memory.bytes(Class::Anon) + self.own_swapped;
        self.progress = 0.0;
        self.phase += 1;
        if self.phase == self.phases.len() {
            self.phase = 0;
            self.rounds_left -= 1;
            if self.rounds_left == 0 {
                self.finished_at = Some(now);
                let anon = self.memory.bytes(Class::Anon);
                self.memory.free(Class::Anon, anon);
                self.own_swapped = 0.0;
                let hot = self.memory.bytes(Class::HotCache);
                self.memory.turn(Class::HotCache, Class::ColdCache, hot);
                return;
            }
        }
        let hot = self.memory.bytes(Class::HotCache);
        let gone = hot * (1.0 - self.present().common);
        self.memory.turn(Class::HotCache, Class::ColdCache, gone);
    }

    /// The driver follows the target, at most `bytes` in this step: it takes free memory, and makes
    /// the kernel free caches; memory of processes it does not get.
    pub(super) fn follow(&mut self, bytes: f64) {
        let change = self.target - self.memory.balloon;
        if change < 0.0 {
            self.memory.deflate((-change).min(bytes * 4.0));
            return;
        }
        let wanted = change.min(bytes);
        if wanted <= 0.0 {
            return;
        }
        let kept = 0.5 * self.kept_free();
        if self.memory.bytes(Class::Free) < wanted + kept {
            self.memory.reclaim_caches(wanted + kept);
        }
        let can = (self.memory.bytes(Class::Free) - kept).max(0.0);
        self.memory.inflate(wanted.min(can));
    }
}
