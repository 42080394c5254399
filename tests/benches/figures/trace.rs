//! In which order a guest gives its pages: arrays of page frame numbers, as they arrive.

use super::bench::Bench;
use super::machine::Result;
use aerostat_device::trace::{Kind, TraceReader};
use aerostat_tests::vmm::allocator::mix;
use std::io::BufReader;
use std::path::Path;

/// Page frame numbers in one array, as Linux sends them.
pub(crate) const ARRAY: usize = 256;

/// What a guest gives, in its order. Pages count from the first of the memory under test.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub(crate) name: &'static str,
    /// How much memory the guest has.
    pub(crate) memory_pages: u64,
    pub(crate) arrays: Vec<Vec<u64>>,
    /// The same pages, sorted and merged: first page, number of pages.
    runs: Vec<(u64, u64)>,
    /// Whether a guest gave its pages like this.
    pub(crate) recorded: bool,
}

impl Trace {
    pub(crate) fn new(name: &'static str, memory_pages: u64, arrays: Vec<Vec<u64>>) -> Self {
        let mut pages: Vec<u64> = arrays.iter().flatten().copied().collect();
        pages.sort_unstable();
        pages.dedup();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some((start, count)) if *start + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        Self {
            name,
            memory_pages,
            arrays,
            runs,
            recorded: false,
        }
    }

    /// The pages as maximal runs.
    pub(crate) fn runs(&self) -> &[(u64, u64)] {
        &self.runs
    }

    pub(crate) fn pages(&self) -> u64 {
        self.runs.iter().map(|(_, pages)| pages).sum()
    }

    /// From the first to the last page, in whole frames of 2 MiB.
    pub(crate) fn span(&self) -> (u64, u64) {
        let first = self.runs.first().map_or(0, |(start, _)| start / 512 * 512);
        let end = self.runs.last().map_or(0, |(start, pages)| start + pages);
        (
            first,
            end.next_multiple_of(512).min(self.memory_pages) - first,
        )
    }

    /// Whether sorting makes few long runs of it: 64 KiB and more on average.
    pub(crate) fn is_coalescible(&self) -> bool {
        self.pages() >= 16 * self.runs.len() as u64
    }
}

/// Traces of stock Linux guests (`aerostat-record-traces`): what they gave, as if nothing else had been
/// in their memory before the first and behind the last page.
pub(crate) fn recorded(bench: &Bench) -> Result<Vec<Trace>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/traces");
    let names = [
        ("Linux, fresh boot", "fresh-boot"),
        ("Linux, after load", "after-load"),
        ("Linux, fragmented", "fragmented"),
    ];
    let mut traces = Vec::new();
    for (name, file) in names {
        let path = directory.join(file).with_extension("trace");
        if !path.is_file() {
            bench.note(&format!(
                "{name}: {} is still to be recorded",
                path.display()
            ));
            continue;
        }
        let file = std::fs::File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut arrays: Vec<Vec<u64>> = Vec::new();
        for entry in TraceReader::new(BufReader::new(file))? {
            let entry = entry?;
            if entry.kind == Kind::Inflate {
                arrays.push(entry.pages.iter().map(|page| page.0).collect());
            }
        }
        let pages = || arrays.iter().flatten().copied();
        // Blocks of 2 MiB stay where they are in their frames.
        let first = pages().min().unwrap_or(0) / 512 * 512;
        let end = pages().max().map_or(0, |last| last + 1 - first);
        arrays.iter_mut().flatten().for_each(|page| *page -= first);
        let mut trace = Trace::new(name, end.next_multiple_of(512), arrays);
        trace.recorded = true;
        traces.push(trace);
    }
    Ok(traces)
}

/// Traces that are made: half of `memory_pages` in each.
pub(crate) fn synthetic(memory_pages: u64) -> Vec<Trace> {
    let half = memory_pages / 2;
    let arrays = |pages: Vec<u64>| pages.chunks(ARRAY).map(<[u64]>::to_vec).collect();
    let shuffled = |run: u64| -> Vec<u64> {
        let mut starts: Vec<u64> = (0..memory_pages / run).map(|index| index * run).collect();
        starts.sort_by_key(|start| mix(*start));
        starts.truncate(usize::try_from(half / run).unwrap_or(0));
        starts
            .into_iter()
            .flat_map(|start| start..start + run)
            .collect()
    };
    let shapes: [(&'static str, Vec<u64>); 6] = [
        ("sequential", (0..half).collect()),
        ("descending", (0..half).rev().collect()),
        ("random 4K", shuffled(1)),
        ("every second", (0..half).map(|index| 2 * index).collect()),
        ("64K clumps", shuffled(16)),
        ("2M blocks", shuffled(512)),
    ];
    shapes
        .into_iter()
        .map(|(name, pages)| Trace::new(name, memory_pages, arrays(pages)))
        .collect()
}
