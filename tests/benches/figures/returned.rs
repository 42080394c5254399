//! Figure: memory really back. What the host has free (not the resident set), how much of the request
//! that is, and how long after the last acknowledgement.
//!
//! Free is MemFree and what lies in the lists of free pages that each processor keeps for itself: since
//! Linux 6.7 these grow to a sixteenth of the memory, and MemFree does not tell of them for seconds.

use super::arena::{Arena, Kind};
use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::{Machine, Result, Wait};
use super::sample::{Samples, to_f64};
use super::trace::Trace;
use aerostat_device::{Runtime, RuntimeConfig, WriteBehind};
use aerostat_tests::vmm::PAGE_BYTES;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// When the memory has to be back.
const DEADLINE: Duration = Duration::from_millis(50);
/// How long to go on looking, for how late it is.
const PATIENCE: Duration = Duration::from_secs(2);
/// What has to be back.
const GOAL: f64 = 0.99;

pub(crate) struct Case {
    kind: Kind,
    trace: &'static str,
    /// The share that is free at the deadline.
    share: Samples,
    /// When the goal was reached, in milliseconds.
    after_ms: Samples,
}

pub(crate) fn run(bench: &Bench, traces: &[&Trace]) -> Result<Vec<Case>> {
    let runtime = Runtime::new(&RuntimeConfig::default())?;
    let mut cases = Vec::new();
    for kind in [Kind::Anonymous, Kind::Memfd] {
        for trace in traces {
            bench.step(&format!("memory back: {}, {}", kind.name(), trace.name));
            let arena = Arena::new(kind, trace.memory_pages)?;
            let requested = to_f64(trace.pages() * PAGE_BYTES);
            let (mut share, mut after_ms) = (Samples::default(), Samples::default());
            for round in 0..=bench.least_runs() {
                arena.fill(trace)?;
                let mut machine = Machine::new(&runtime, &arena, WriteBehind::RECOMMENDED)?;
                let arrays = machine.write_arrays(trace)?;
                let before = free_bytes()?;
                machine.inflate_one_by_one(&arrays, Wait::Interrupt, Duration::ZERO, |_| ())?;
                let end = Instant::now();
                let back =
                    || free_bytes().map(|now| to_f64(now.saturating_sub(before)) / requested);
                let mut at_deadline = 0.0;
                let mut reached = PATIENCE;
                while end.elapsed() < PATIENCE {
                    let now = back()?;
                    if end.elapsed() <= DEADLINE {
                        at_deadline = now;
                    }
                    if now >= GOAL {
                        reached = end.elapsed();
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                if round > 0 || !bench.measures() {
                    share.push(at_deadline);
                    after_ms.push(reached.as_secs_f64() * 1e3);
                }
                machine.settle()?;
            }
            cases.push(Case {
                kind,
                trace: trace.name,
                share,
                after_ms,
            });
        }
    }
    Ok(cases)
}

fn free_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let free = kib.ok_or("no MemFree in /proc/meminfo")?.parse::<u64>()? << 10;
    let zones = std::fs::read_to_string("/proc/zoneinfo")?;
    let counts = zones
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"));
    let listed: u64 = counts
        .filter_map(|count| count.trim().parse::<u64>().ok())
        .sum();
    Ok(free + listed * PAGE_BYTES)
}

pub(crate) fn print(cases: &[Case]) {
    println!(
        "Memory back on the host after the last acknowledgement (MemFree and the processors' lists)"
    );
    for case in cases {
        println!(
            "{:<15} {:<20} {:.4} of the request within 50 ms; 0.99 of it after {:.1} ms",
            case.kind.name(),
            case.trace,
            case.share.median(),
            case.after_ms.median()
        );
    }
    println!();
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let claim = |case: &Case| Claim {
        figure: "memory back within 50 ms",
        case: format!("{}, {}", case.kind.name(), case.trace),
        against: "requested",
        goal: Goal::AtLeast(GOAL),
        ratios: case.share.clone(),
    };
    cases.iter().map(claim).collect()
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        json!({
            "memory": case.kind.name(),
            "trace": case.trace,
            "share_within_50_ms": case.share.values(),
            "ms_to_0.99": case.after_ms.values(),
        })
    };
    json!({ "figure": "returned", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
