//! A guest that suffers from its balloon, by its own counters.

use std::fmt;

use super::{
    amount::MIB,
    config::PolicyConfig,
    state::{Counters, VmState},
    types::VmSample,
};

/// How a guest showed that it needs memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distress {
    /// Its kernel killed a process for want of memory.
    OomKill,
    /// Its allocations waited for reclaim.
    AllocStall,
    /// It reads back what it had swapped out.
    SwapIn,
    /// It reads program text back from disk, and is short of memory.
    MajorFaults,
    /// Its driver took pages back by itself (A1).
    TookBack,
    /// What it uses has grown above what its floor leaves room for.
    BelowFloor,
}

impl fmt::Display for Distress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::OomKill => "a process was killed for want of memory",
            Self::AllocStall => "allocations wait for reclaim",
            Self::SwapIn => "it swaps in",
            Self::MajorFaults => "it reads program text again and again",
            Self::TookBack => "its driver took pages back",
            Self::BelowFloor => "it uses more than its floor leaves room for",
        })
    }
}

/// A driver that takes back less than this was only moving pages (compaction).
const TOOK_BACK_BYTES: u64 = MIB;

/// Reading less than this back in from swap says nothing: processes that were idle wake up.
const SWAP_IN_BYTES: u64 = MIB / 4;

/// Looks for distress between the last sample and this one. A guest without a balloon suffers from
/// something else, and nothing can be given back to it.
pub(super) fn find(
    vm: &VmSample,
    state: &VmState,
    counters: Option<&Counters>,
    config: &PolicyConfig,
) -> Option<Distress> {
    if took_back(vm, state) {
        return Some(Distress::TookBack);
    }
    if vm.ballooned_bytes == 0 && vm.target_bytes == 0 {
        return None;
    }
    let (now, before) = (counters?, state.counters.as_ref()?);
    let seconds = now.at.saturating_sub(before.at).as_secs_f64();
    if seconds <= 0.0 {
        return None;
    }
    if now.oom_kills > before.oom_kills {
        Some(Distress::OomKill)
    } else if now.alloc_stalls > before.alloc_stalls {
        Some(Distress::AllocStall)
    } else if now.swap_in_bytes > before.swap_in_bytes + SWAP_IN_BYTES {
        Some(Distress::SwapIn)
    } else {
        let faults = now.major_faults.saturating_sub(before.major_faults);
        // Starting a program reads its text as well: only a guest that is short thrashes.
        let short = vm.guest.available_bytes < vm.guest.total_bytes.map(|total| total / 5);
        let many = faults as f64 > config.major_faults_per_second * seconds;
        (short && many).then_some(Distress::MajorFaults)
    }
}

/// The balloon shrank although nobody had asked for it: the target has been above it ever since the
/// last sample.
fn took_back(vm: &VmSample, state: &VmState) -> bool {
    state.seen
        && vm.target_bytes == state.target_bytes
        && vm.ballooned_bytes < vm.target_bytes
        && vm.ballooned_bytes + TOOK_BACK_BYTES <= state.ballooned_bytes.min(vm.target_bytes)
}
