//! Figure: free page reporting, in chains of 32 ranges of 4 MiB as Linux sends them, against one call
//! over the same memory.

use super::arena::{Arena, Kind, UNDER_TEST};
use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::{BEFORE, Machine, Result};
use super::rivals::{self, Rival};
use super::sample::{Samples, gib};
use super::trace::Trace;
use aerostat_device::{Runtime, RuntimeConfig};
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::{MIB, PAGE_BYTES};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const RANGE_PAGES: u64 = 4 * MIB / PAGE_BYTES;
const RANGES: u64 = 32;

pub(crate) struct Case {
    kind: Kind,
    limit: Samples,
    device: Samples,
}

pub(crate) fn run(bench: &Bench) -> Result<Vec<Case>> {
    let runtime = Runtime::new(&RuntimeConfig::default())?;
    let pages = if bench.measures() {
        RANGES * RANGE_PAGES
    } else {
        4 * RANGE_PAGES
    };
    let kinds = [
        Kind::Anonymous,
        Kind::Memfd,
        Kind::AnonymousHuge,
        Kind::MemfdHuge,
    ];
    let share = bench.share(0.04, kinds.len());
    let mut cases = Vec::new();
    for kind in kinds {
        if let Some(why) = kind.missing(pages * PAGE_BYTES) {
            bench.note(&format!("{} is not measured: {why}", kind.name()));
            continue;
        }
        bench.step(&format!("reporting: {}", kind.name()));
        let arena = Arena::new(kind, pages)?;
        let whole = Trace::new("all of it", pages, vec![(0..pages).collect()]);
        let mut machine = Machine::new(&runtime, &arena, BEFORE)?;
        let chain: Vec<Piece> = (0..pages / RANGE_PAGES)
            .map(|index| Piece {
                gpa: UNDER_TEST + index * RANGE_PAGES * PAGE_BYTES,
                len: u32::try_from(RANGE_PAGES * PAGE_BYTES).unwrap_or(0),
                writable: true,
            })
            .collect();
        let (mut limit, mut device) = (Samples::default(), Samples::default());
        rivals::beside(&arena, &whole, |free| {
            let start = Instant::now();
            for round in 0..=bench.most_runs() {
                if round > bench.least_runs() && start.elapsed() > share {
                    break;
                }
                let mut both = [0.0; 2];
                for turn in 0..2 {
                    let ours = (turn + round) % 2 == 1;
                    arena.fill(&whole)?;
                    let begin = Instant::now();
                    if ours {
                        let patience = Duration::from_secs(30);
                        machine.reporting.exchange(&arena.ram, &chain, patience)?;
                    } else {
                        free(Rival::Limit)?;
                    }
                    both[usize::from(ours)] = gib(arena.bytes()) / begin.elapsed().as_secs_f64();
                    arena.check_freed(&whole, "reporting");
                }
                if round > 0 || !bench.measures() {
                    limit.push(both[0]);
                    device.push(both[1]);
                }
            }
            Ok(())
        })?;
        cases.push(Case {
            kind,
            limit,
            device,
        });
    }
    Ok(cases)
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let claim = |case: &Case| Claim {
        figure: "reporting GiB/s, 32 x 4 MiB",
        case: case.kind.name().to_owned(),
        against: Rival::Limit.name(),
        goal: Goal::AtLeast(0.9),
        ratios: case.device.over(&case.limit),
    };
    cases.iter().map(claim).collect()
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        json!({
            "memory": case.kind.name(),
            "limit_gib_per_second": case.limit.values(),
            "device_gib_per_second": case.device.values(),
        })
    };
    json!({ "figure": "reporting", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
