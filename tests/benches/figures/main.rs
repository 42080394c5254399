//! `make bench`: how close the library comes to what the kernel can do, against what others do, on
//! the same memory and the same traces, alternately in one run. Results are ratios; times belong to
//! the machine. docs/performance.md explains the figures and shows a run.
//!
//! `cargo bench -p aerostat-tests --bench figures` measures, prints tables and writes JSON and SVG to
//! `target/bench`. `-- --quick`, or BENCH_SECONDS, makes it shorter; `-- discard ring` picks figures.
//! Run as a test it looks only whether everything works and all free the same pages.

mod arena;
mod bench;
mod claim;
mod cost;
mod deflate;
mod discard;
mod interference;
mod latency;
mod machine;
mod plot;
mod pool;
mod reporting;
mod returned;
mod ring;
mod rivals;
mod sample;
mod trace;

use aerostat_tests::artifacts;
use bench::Bench;
use claim::Claim;
use machine::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use trace::Trace;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "--ring") {
        return ring::child(&arguments[1..]);
    }
    let figures = [
        "discard",
        "latency",
        "returned",
        "reporting",
        "pool",
        "ring",
        "deflate",
        "interference",
    ];
    let picked: Vec<&str> = figures
        .into_iter()
        .filter(|figure| arguments.iter().any(|argument| argument == figure))
        .collect();
    let wanted = |figure: &str| picked.is_empty() || picked.contains(&figure);

    let bench = Bench::new();
    let recorded = trace::recorded(&bench)?;
    let made = trace::synthetic(bench.memory_pages());
    // A look whether everything works needs no more than the small ones.
    let used = if bench.measures() { &recorded[..] } else { &[] };
    let traces: Vec<Trace> = used.iter().chain(&made).cloned().collect();
    let named = |name: &str| traces.iter().find(|trace| trace.name == name);
    let (mut claims, mut files): (Vec<Claim>, Vec<Value>) = (Vec::new(), Vec::new());

    if wanted("discard") {
        let cases = discard::run(&bench, &traces)?;
        discard::print(&cases);
        claims.extend(discard::claims(&cases));
        if bench.measures() {
            plot::discard(&cases, &directory()?.join("discard.svg"))?;
        }
        files.push(discard::to_json(&cases));
    }
    if wanted("latency") {
        let names = ["Linux, fresh boot", "64K clumps", "random 4K"];
        let chosen: Vec<_> = names.into_iter().filter_map(named).collect();
        let cases = latency::run(&bench, &chosen)?;
        latency::print(&cases);
        claims.extend(latency::claims(&cases));
        if bench.measures() {
            plot::latency(&cases, &directory()?.join("latency.svg"))?;
        }
        files.push(latency::to_json(&cases));
    }
    if wanted("returned") {
        let names = ["Linux, fresh boot", "sequential", "random 4K"];
        let chosen: Vec<_> = names.into_iter().filter_map(named).collect();
        let cases = returned::run(&bench, &chosen)?;
        returned::print(&cases);
        claims.extend(returned::claims(&cases));
        files.push(returned::to_json(&cases));
    }
    if wanted("reporting") {
        let cases = reporting::run(&bench)?;
        claims.extend(reporting::claims(&cases));
        files.push(reporting::to_json(&cases));
    }
    if wanted("pool") {
        let cases = pool::run(&bench)?;
        claims.extend(pool::claims(&cases));
        files.push(pool::to_json(&cases));
    }
    if wanted("ring") {
        let cases = ring::run(&bench)?;
        ring::print(&cases);
        claims.extend(ring::claims(&cases));
        files.push(ring::to_json(&cases));
    }

    if wanted("deflate") {
        let cases = deflate::run(&bench)?;
        deflate::print(&cases);
        files.push(deflate::to_json(&cases));
    }
    if wanted("interference") {
        let cases = interference::run(&bench)?;
        interference::print(&cases);
        claims.extend(interference::claims(&cases));
        files.push(interference::to_json(&cases));
    }

    claim::print(&claims);
    let measures = bench.measures();
    for note in bench.finish() {
        println!("note: {note}");
    }
    if measures {
        let directory = directory()?;
        for file in &files {
            let name = file["figure"].as_str().unwrap_or("figure");
            write(&directory.join(name).with_extension("json"), file)?;
        }
        let verdicts: Vec<Value> = claims.iter().map(Claim::to_json).collect();
        write(&directory.join("claims.json"), &json!(verdicts))?;
        println!("{}", directory.display());
    }
    Ok(())
}

/// `target/bench`.
fn directory() -> Result<PathBuf> {
    let directory = artifacts::directory().join("../bench");
    std::fs::create_dir_all(&directory)?;
    Ok(directory.canonicalize()?)
}

fn write(path: &Path, value: &Value) -> Result<()> {
    Ok(std::fs::write(path, format!("{value:#}\n"))?)
}
