//! What others do with the same pages, from what is published of them: a few lines each. Each returns how
//! many system calls it made.
#![allow(unsafe_code, reason = "system calls on guest memory")]

use super::arena::Arena;
use super::machine::Result;
use super::trace::Trace;
use aerostat_tests::vmm::PAGE_BYTES;
use std::sync::mpsc;

/// A way to free the pages of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rival {
    /// A call a page: QEMU, kvmtool, Dragonball, alioth.
    PerPage,
    /// Two calls a page where a file is behind it: Cloud Hypervisor.
    PunchAndDontneed,
    /// Neighbours in the order of the array, a call a run: crosvm.
    AdjacentRuns,
    /// Up to 2048 numbers sorted and merged, a call a run: Firecracker.
    SortAndMerge,
    /// No rival but what the kernel can do for one thread: all pages known beforehand, a call a run.
    Limit,
}

impl Rival {
    pub(crate) const ALL: [Self; 5] = [
        Self::PerPage,
        Self::PunchAndDontneed,
        Self::AdjacentRuns,
        Self::SortAndMerge,
        Self::Limit,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PerPage => "per page",
            Self::PunchAndDontneed => "punch+dontneed",
            Self::AdjacentRuns => "adjacent runs",
            Self::SortAndMerge => "sort and merge",
            Self::Limit => "kernel's limit",
        }
    }

    fn free(self, arena: &Arena, trace: &Trace) -> u64 {
        match self {
            Self::PerPage => {
                let pages = trace.arrays.iter().flatten();
                pages.map(|page| discard(arena, *page, 1)).sum()
            }
            Self::PunchAndDontneed => {
                let both = |page: &u64| {
                    let punched = arena.fd().map_or(0, |_| discard(arena, *page, 1));
                    punched + dontneed(arena, *page, 1)
                };
                trace.arrays.iter().flatten().map(both).sum()
            }
            Self::AdjacentRuns => {
                let runs = |array: &Vec<u64>| -> u64 {
                    let touching = array.chunk_by(|page, next| page + 1 == *next);
                    touching
                        .map(|run| discard(arena, run[0], run.len() as u64))
                        .sum()
                };
                trace.arrays.iter().map(runs).sum()
            }
            Self::SortAndMerge => {
                let mut numbers = Vec::with_capacity(2048);
                let mut calls = 0;
                let all: Vec<u64> = trace.arrays.iter().flatten().copied().collect();
                for batch in all.chunks(2048) {
                    numbers.clear();
                    numbers.extend_from_slice(batch);
                    numbers.sort_unstable();
                    numbers.dedup();
                    let runs = numbers.chunk_by(|page, next| page + 1 == *next);
                    calls += runs
                        .map(|run| discard(arena, run[0], run.len() as u64))
                        .sum::<u64>();
                }
                calls
            }
            Self::Limit => {
                let runs = trace.runs().iter();
                runs.map(|&(start, pages)| discard(arena, start, pages))
                    .sum()
            }
        }
    }
}

/// Calls `body` with what makes a rival free the pages of `trace`, in a thread of its own, as a VMM's main
/// loop or the library's workers are: freeing memory on the processor that has just filled it is a third faster,
/// and nobody who serves a guest is there.
pub(crate) fn beside<T>(
    arena: &Arena,
    trace: &Trace,
    body: impl FnOnce(&dyn Fn(Rival) -> Result<u64>) -> Result<T>,
) -> Result<T> {
    std::thread::scope(|scope| {
        let (ask, asked) = mpsc::channel::<Rival>();
        let (answer, answers) = mpsc::channel();
        scope.spawn(move || {
            for rival in asked {
                if answer.send(rival.free(arena, trace)).is_err() {
                    return;
                }
            }
        });
        body(&move |rival| {
            ask.send(rival)
                .map_err(|_| "the rivals' thread has ended")?;
            Ok(answers.recv()?)
        })
    })
}

/// Frees pages by one call: madvise for private memory, a punched hole for a file.
fn discard(arena: &Arena, index: u64, pages: u64) -> u64 {
    let Some(fd) = arena.fd() else {
        return dontneed(arena, index, pages);
    };
    let bytes = |pages: u64| i64::try_from(pages * PAGE_BYTES).unwrap_or(i64::MAX);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: takes no pointer.
    let result = unsafe { libc::fallocate64(fd, mode, bytes(index), bytes(pages)) };
    assert_eq!(result, 0, "a hole was refused");
    1
}

fn dontneed(arena: &Arena, index: u64, pages: u64) -> u64 {
    let len = usize::try_from(pages * PAGE_BYTES).unwrap_or(0);
    // SAFETY: the range lies inside the memory under test, whose contents nobody needs.
    let result = unsafe { libc::madvise(arena.address(index), len, libc::MADV_DONTNEED) };
    assert_eq!(result, 0, "advice was refused");
    1
}
