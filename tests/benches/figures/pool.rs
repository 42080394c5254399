//! Figure: many devices on one pool. All of them at once against one after the other, and how evenly
//! the pool serves those that never stop asking.

use super::arena::{Arena, Kind};
use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::{BEFORE, Machine, Result};
use super::sample::{Samples, gib, to_f64};
use super::trace::Trace;
use aerostat_device::{Runtime, RuntimeConfig, WriteBehind};
use aerostat_tests::vmm::PAGE_BYTES;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const DEVICES: usize = 64;
/// What each guest gives: 8 MiB.
const PAGES: u64 = 2048;
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Case {
    kind: Kind,
    setting: &'static str,
    alone: Samples,
    together: Samples,
    /// The slowest device's rounds over the fastest one's.
    fairness: Samples,
}

pub(crate) fn run(bench: &Bench) -> Result<Vec<Case>> {
    let runtime = Runtime::new(&RuntimeConfig::default())?;
    let count = if bench.measures() { DEVICES } else { 4 };
    let settings = [
        ("before ack", BEFORE),
        ("write-behind", WriteBehind::RECOMMENDED),
    ];
    let kinds = [Kind::Anonymous, Kind::Memfd];
    let share = bench.share(0.08, kinds.len() * settings.len());
    let mut cases = Vec::new();
    for kind in kinds {
        for (setting, write_behind) in settings {
            bench.step(&format!(
                "pool: {count} devices, {}, {setting}",
                kind.name()
            ));
            let arenas = (0..count)
                .map(|_| Arena::new(kind, PAGES))
                .collect::<std::result::Result<Vec<_>, _>>()?;
            let machines = arenas
                .iter()
                .map(|arena| Machine::new(&runtime, arena, write_behind));
            let mut machines = machines.collect::<Result<Vec<_>>>()?;
            let mut case = Case {
                kind,
                setting,
                alone: Samples::default(),
                together: Samples::default(),
                fairness: Samples::default(),
            };
            let start = Instant::now();
            for round in 0..=bench.most_runs() {
                if round > bench.least_runs() && start.elapsed() > share / 2 {
                    break;
                }
                let mut both = [0.0; 2];
                for turn in 0..2 {
                    let together = (turn + round) % 2 == 1;
                    both[usize::from(together)] = inflate_all(&arenas, &mut machines, together)?;
                }
                if round > 0 || !bench.measures() {
                    case.alone.push(both[0]);
                    case.together.push(both[1]);
                }
            }
            let long = if bench.measures() {
                share / 8
            } else {
                Duration::from_millis(50)
            };
            for _ in 0..=bench.least_runs() {
                case.fairness.push(compete(&arenas, &mut machines, long)?);
            }
            cases.push(case);
        }
    }
    Ok(cases)
}

fn trace() -> Trace {
    let pages: Vec<u64> = (0..PAGES).collect();
    Trace::new(
        "all of it",
        PAGES,
        pages.chunks(256).map(<[u64]>::to_vec).collect(),
    )
}

/// Every guest gives all its memory; returns GiB/s until the host has all of it.
fn inflate_all(arenas: &[Arena], machines: &mut [Machine<'_>], together: bool) -> Result<f64> {
    let trace = trace();
    for (arena, machine) in arenas.iter().zip(&mut *machines) {
        arena.fill(&trace)?;
        machine.restart()?;
    }
    let arrays = machines.iter().map(|machine| machine.write_arrays(&trace));
    let arrays = arrays.collect::<Result<Vec<_>>>()?;
    let begin = Instant::now();
    for ((arena, machine), arrays) in arenas.iter().zip(&mut *machines).zip(&arrays) {
        for array in arrays {
            machine.inflate.add(&arena.ram, &[*array])?;
        }
        machine.inflate.kick(&arena.ram);
        if !together {
            finish(arena, machine, arrays.len())?;
        }
    }
    if together {
        for ((arena, machine), arrays) in arenas.iter().zip(&mut *machines).zip(&arrays) {
            finish(arena, machine, arrays.len())?;
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    for arena in arenas {
        arena.check_freed(&trace, "the pool");
    }
    Ok(gib(PAGES * PAGE_BYTES * arenas.len() as u64) / seconds)
}

fn finish(arena: &Arena, machine: &mut Machine<'_>, arrays: usize) -> Result<()> {
    for _ in 0..arrays {
        machine.inflate.wait_used(&arena.ram, PATIENCE)?;
    }
    machine.settle()
}

/// All guests give the same array and take it back, again and again, for a while; returns how many
/// rounds the slowest made for each of the fastest.
fn compete(arenas: &[Arena], machines: &mut [Machine<'_>], long: Duration) -> Result<f64> {
    let trace = trace();
    let mut states = Vec::new();
    for (arena, machine) in arenas.iter().zip(&mut *machines) {
        machine.restart()?;
        let array = machine.write_arrays(&trace)?[0];
        machine.inflate.add(&arena.ram, &[array])?;
        machine.inflate.kick(&arena.ram);
        states.push((array, true, 0u64));
    }
    let begin = Instant::now();
    while begin.elapsed() < long {
        for ((arena, machine), state) in arenas.iter().zip(&mut *machines).zip(&mut states) {
            let (array, inflating, rounds) = state;
            let ram = &arena.ram;
            let queue = if *inflating {
                &mut machine.inflate
            } else {
                &mut machine.deflate
            };
            if queue.take_used(ram).is_none() {
                continue;
            }
            *inflating = !*inflating;
            *rounds += 1;
            let queue = if *inflating {
                &mut machine.inflate
            } else {
                &mut machine.deflate
            };
            queue.add(ram, &[*array])?;
            queue.kick(ram);
        }
    }
    let rounds = states.iter().map(|(_, _, rounds)| *rounds);
    let (slowest, fastest) = (rounds.clone().min().unwrap_or(0), rounds.max().unwrap_or(0));
    for machine in machines.iter_mut() {
        machine.restart()?;
    }
    Ok(to_f64(slowest) / to_f64(fastest.max(1)))
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let both = |case: &Case| {
        let name = format!("{}, {}", case.kind.name(), case.setting);
        [
            Claim {
                figure: "64 devices, GiB/s",
                case: name.clone(),
                against: "64 x one device",
                goal: Goal::AtLeast(0.9),
                ratios: case.together.over(&case.alone),
            },
            Claim {
                figure: "64 devices, rounds",
                case: name,
                against: "slowest / fastest device",
                goal: Goal::AtLeast(0.8),
                ratios: case.fairness.clone(),
            },
        ]
    };
    cases.iter().flat_map(both).collect()
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        json!({
            "memory": case.kind.name(),
            "setting": case.setting,
            "one_by_one_gib_per_second": case.alone.values(),
            "together_gib_per_second": case.together.values(),
            "slowest_over_fastest": case.fairness.values(),
        })
    };
    json!({ "figure": "pool", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
