//! Figure: the options of a deflate, what they cost the guest that waits for it and what they save it
//! when it touches the pages. No rival and no promise: numbers to choose by.

use super::arena::{Arena, Kind};
use super::bench::Bench;
use super::machine::{BEFORE, Machine, Result};
use super::sample::Samples;
use super::trace::Trace;
use aerostat_device::{DeflateOptions, Runtime, RuntimeConfig};
use aerostat_tests::vmm::MIB;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

const OPTIONS: [(&str, DeflateOptions); 3] = [
    (
        "off",
        DeflateOptions {
            prefault: false,
            rebuild: false,
        },
    ),
    (
        "prefault",
        DeflateOptions {
            prefault: true,
            rebuild: false,
        },
    ),
    (
        "prefault, rebuild",
        DeflateOptions {
            prefault: true,
            rebuild: true,
        },
    ),
];

pub(crate) struct Case {
    kind: Kind,
    options: &'static str,
    /// Milliseconds a GiB until the guest is acknowledged, and until it has touched all pages.
    wait: Samples,
    touch: Samples,
}

pub(crate) fn run(bench: &Bench) -> Result<Vec<Case>> {
    let runtime = Runtime::new(&RuntimeConfig::default())?;
    let pages = if bench.measures() { 16384 } else { 1024 };
    let mut cases = Vec::new();
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::AnonymousHuge] {
        if kind.missing(pages * 4096).is_some() {
            continue;
        }
        bench.step(&format!("deflate options: {}", kind.name()));
        let arena = Arena::new(kind, pages)?;
        let all: Vec<u64> = (0..pages).collect();
        let trace = Trace::new(
            "all of it",
            pages,
            all.chunks(256).map(<[u64]>::to_vec).collect(),
        );
        let mut machine = Machine::new(&runtime, &arena, BEFORE)?;
        let arrays = machine.write_arrays(&trace)?;
        let mut series = OPTIONS.map(|(name, _)| Case {
            kind,
            options: name,
            wait: Samples::default(),
            touch: Samples::default(),
        });
        for round in 0..=bench.least_runs() {
            for (case, (_, options)) in series.iter_mut().zip(OPTIONS) {
                arena.fill(&trace)?;
                machine.inflate_full_ring(&arrays)?;
                machine.device.set_deflate(options);
                let begin = Instant::now();
                for array in &arrays {
                    machine.deflate.exchange(&arena.ram, &[*array], PATIENCE)?;
                }
                let wait = begin.elapsed();
                let begin = Instant::now();
                (0..pages).for_each(|page| arena.ram.touch(Arena::first_pfn() + page));
                let touch = begin.elapsed();
                let a_gib = |time: Duration| {
                    time.as_secs_f64() * 1e3 * super::sample::to_f64(1024 * MIB)
                        / super::sample::to_f64(pages * 4096)
                };
                if round > 0 || !bench.measures() {
                    case.wait.push(a_gib(wait));
                    case.touch.push(a_gib(touch));
                }
            }
        }
        cases.extend(series);
    }
    Ok(cases)
}

pub(crate) fn print(cases: &[Case]) {
    println!("Deflating with options, ms a GiB: the guest waits, then touches all pages");
    for case in cases {
        println!(
            "{:<15} {:<18} waits {:>7.0}  touches {:>7.0}  in all {:>7.0}",
            case.kind.name(),
            case.options,
            case.wait.median(),
            case.touch.median(),
            case.wait.median() + case.touch.median()
        );
    }
    println!();
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        json!({
            "memory": case.kind.name(),
            "options": case.options,
            "wait_ms_per_gib": case.wait.values(),
            "touch_ms_per_gib": case.touch.values(),
        })
    };
    json!({ "figure": "deflate", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
