//! How fast host memory is freed: the library against a system call a page, on the same memory and
//! the same trace, alternately in one run. Results are ratios; times belong to the machine.
//!
//! `cargo bench -p aerostat-tests --bench discard` prints a table and writes
//! `target/bench/discard.json`. Run as a test it looks only whether all methods free the same.
//!
//! Every run begins with all pages written, and ends with a look from outside at what is free:
//! blocks of the memfd, or the resident set of the mapping.

mod methods;
mod trace;

use aerostat_tests::artifacts;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use methods::{Direct, Method};
use serde_json::{Value, json};
use std::time::Instant;
use trace::Shape;

/// Where the memory under test begins, and where the arrays are put, in guest memory.
const UNDER_TEST: u64 = 1 << 30;
const ARRAYS: u64 = 4 * MIB;

/// What one method did on one trace.
struct Series {
    method: Method,
    gib_per_second: Vec<f64>,
    calls_per_gib: f64,
}

struct Case {
    backing: &'static str,
    shape: Shape,
    series: Vec<Series>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let measure = std::env::args().any(|argument| argument == "--bench");
    let (mib, runs) = if measure { (256, 9) } else { (32, 1) };
    let backings = [
        ("anonymous", Backing::Anonymous),
        ("memfd", Backing::Memfd { offset_bytes: 0 }),
    ];
    let mut cases = Vec::new();
    for (backing, kind) in backings {
        for shape in Shape::ALL {
            eprintln!(
                "{backing}, {}: {runs} runs of {} MiB",
                shape.name(),
                mib / 2
            );
            let series = run_case(kind, shape, mib, runs)?;
            cases.push(Case {
                backing,
                shape,
                series,
            });
        }
    }
    print(&cases, runs);
    if measure {
        let directory = artifacts::directory().join("../bench");
        std::fs::create_dir_all(&directory)?;
        let file = directory.join("discard.json");
        std::fs::write(&file, format!("{:#}\n", to_json(&cases, mib / 2)))?;
        println!("\n{}", file.canonicalize()?.display());
    }
    Ok(())
}

fn boot(vmm: &Vmm, backing: Backing, mib: u64) -> Result<Guest> {
    let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
    let high = RegionSpec::new(UNDER_TEST, mib * MIB, backing);
    vmm.boot(&GuestConfig::with_regions(vec![low, high]))
}

fn run_case(backing: Backing, shape: Shape, mib: u64, runs: usize) -> Result<Vec<Series>> {
    let vmm = Vmm::new()?;
    let mut guest = boot(&vmm, backing, mib)?;
    let (first, pages) = (UNDER_TEST / PAGE_BYTES, mib * MIB / PAGE_BYTES);
    let arrays = shape.arrays(first, pages);
    let buffers = methods::write_arrays(&guest, ARRAYS, &arrays);
    let bytes = pages / 2 * PAGE_BYTES;
    let direct = Direct::new(&guest, UNDER_TEST)?;
    let mut series: Vec<Series> = Method::ALL
        .into_iter()
        .map(|method| Series {
            method,
            gib_per_second: Vec::new(),
            calls_per_gib: 0.0,
        })
        .collect();
    // One run more to warm up; the order turns, so that none always follows the same one.
    for run in 0..=runs {
        for turn in 0..series.len() {
            let place = (turn + run) % series.len();
            let Some(series) = series.get_mut(place) else {
                continue;
            };
            (first..first + pages).for_each(|pfn| guest.ram().touch(pfn));
            let full = guest.ram().allocated_bytes_at(UNDER_TEST)?;
            let before = guest.books()?;

            let start = Instant::now();
            let calls = match series.method {
                Method::PerPage => direct.per_page(&arrays),
                Method::Planner => direct.planner(&arrays),
                Method::OneOutstanding => methods::one_outstanding(&guest, &buffers).map(|()| 0)?,
                Method::RingFull => methods::ring_full(&guest, &buffers).map(|()| 0)?,
            };
            let seconds = start.elapsed().as_secs_f64();

            let books = guest.settled_books()?;
            let freed = full - guest.ram().allocated_bytes_at(UNDER_TEST)?;
            assert_eq!(
                freed,
                bytes,
                "{} freed something else",
                series.method.name()
            );
            let calls = calls + books.discard_calls - before.discard_calls;
            // The balloon is empty again for the next one.
            guest.restart_driver()?;
            if run > 0 {
                series.gib_per_second.push(gib(bytes) / seconds);
                series.calls_per_gib = to_f64(calls) / gib(bytes);
            }
        }
    }
    Ok(series)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn to_f64(number: u64) -> f64 {
    number as f64
}

fn gib(bytes: u64) -> f64 {
    to_f64(bytes) / to_f64(1 << 30)
}

/// Lowest, median, highest.
fn summary(samples: &[f64]) -> (f64, f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    (at(0), at(sorted.len() / 2), at(sorted.len().max(1) - 1))
}

fn rival(case: &Case) -> f64 {
    let mut series = case.series.iter();
    let rival = series.find(|series| series.method == Method::PerPage);
    rival.map_or(f64::NAN, |series| summary(&series.gib_per_second).1)
}

fn print(cases: &[Case], runs: usize) {
    println!("Discarding, median of {runs} runs; x is the ratio to the rival's median");
    println!(
        "{:<10} {:<11} {:<20} {:>6} {:>8} {:>17} {:>11}",
        "memory", "trace", "method", "x", "GiB/s", "lowest..highest", "calls/GiB"
    );
    for case in cases {
        for series in &case.series {
            let (low, median, high) = summary(&series.gib_per_second);
            println!(
                "{:<10} {:<11} {:<20} {:>6.2} {:>8.2} {:>8.2}..{:<7.2} {:>11.0}",
                case.backing,
                case.shape.name(),
                series.method.name(),
                median / rival(case),
                median,
                low,
                high,
                series.calls_per_gib
            );
        }
    }
}

fn to_json(cases: &[Case], mib: u64) -> Value {
    let series = |case: &Case| -> Vec<Value> {
        let one = |series: &Series| {
            let (low, median, high) = summary(&series.gib_per_second);
            json!({
                "method": series.method.name(),
                "ratio_to_rival": median / rival(case),
                "median_gib_per_s": median,
                "lowest_gib_per_s": low,
                "highest_gib_per_s": high,
                "samples_gib_per_s": series.gib_per_second,
                "calls_per_gib": series.calls_per_gib,
            })
        };
        case.series.iter().map(one).collect()
    };
    let cases: Vec<Value> = cases
        .iter()
        .map(|case| {
            json!({
                "memory": case.backing,
                "trace": case.shape.name(),
                "mib_freed": mib,
                "methods": series(case),
            })
        })
        .collect();
    json!({ "figure": "discard", "cases": cases })
}
