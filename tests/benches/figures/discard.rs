//! Figure: how fast host memory is freed, at what cost, against the rivals.
//!
//! The time of the library ends when the host has the memory, not when the guest is acknowledged.

use super::arena::{Arena, Kind};
use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::cost::processor_time;
use super::machine::{BEFORE, Machine, Result, Wait};
use super::rivals::{self, Rival};
use super::sample::{Samples, gib, to_f64};
use super::trace::Trace;
use aerostat_device::{Runtime, WriteBehind};
use aerostat_tests::vmm::PAGE_BYTES;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Who frees the pages of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Rival(Rival),
    /// The whole device, discarding before each acknowledgement, its ring kept full.
    Before,
    /// With write-behind as recommended, its ring kept full.
    Behind,
    /// With write-behind and one array outstanding, as a stock Linux guest has.
    BehindOne,
}

impl Method {
    fn all() -> Vec<Self> {
        let rivals = Rival::ALL.into_iter().map(Self::Rival);
        rivals
            .chain([Self::Before, Self::Behind, Self::BehindOne])
            .collect()
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rival(rival) => rival.name(),
            Self::Before => "aerostat, before ack",
            Self::Behind => "aerostat, write-behind",
            Self::BehindOne => "aerostat, one array out",
        }
    }

    pub(crate) fn is_ours(self) -> bool {
        !matches!(self, Self::Rival(_))
    }
}

/// What one method did on one trace.
pub(crate) struct Series {
    pub(crate) method: Method,
    pub(crate) gib_per_second: Samples,
    pub(crate) cpu_seconds_per_gib: Samples,
    pub(crate) calls_per_gib: Samples,
}

pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) trace: &'static str,
    recorded: bool,
    coalescible: bool,
    mib: u64,
    pub(crate) series: Vec<Series>,
}

impl Case {
    pub(crate) fn of(&self, method: Method) -> &Series {
        let mut series = self.series.iter();
        series
            .find(|series| series.method == method)
            .unwrap_or(&self.series[0])
    }

    /// The rival (the kernel's limit is none) that was fastest in this case.
    fn best_rival(&self) -> &Series {
        let rivals = self.series.iter().filter(
            |series| matches!(series.method, Method::Rival(rival) if rival != Rival::Limit),
        );
        let speed = |series: &&Series| series.gib_per_second.median();
        rivals
            .max_by(|a, b| speed(a).total_cmp(&speed(b)))
            .unwrap_or(&self.series[0])
    }
}

pub(crate) fn run(bench: &Bench, traces: &[Trace]) -> Result<Vec<Case>> {
    let mut work = Vec::new();
    for kind in Kind::ALL {
        for trace in traces {
            // Frames of 2 MiB come back only as a whole: traces of small pieces tell nothing there
            // but how much a rival destroys.
            let fits = !kind.is_huge() || trace.runs().iter().all(|(_, pages)| pages % 512 == 0);
            if fits {
                work.push((kind, trace));
            }
        }
    }
    let runtime = Runtime::new(&aerostat_device::RuntimeConfig::default())?;
    let share = bench.share(0.55, work.len());
    let mut cases = Vec::new();
    for (kind, trace) in work {
        if let Some(why) = kind.missing(trace.memory_pages * PAGE_BYTES) {
            bench.note(&format!("{} is not measured: {why}", kind.name()));
            continue;
        }
        bench.step(&format!("discard: {}, {}", kind.name(), trace.name));
        cases.push(case(bench, &runtime, kind, trace, share)?);
    }
    Ok(cases)
}

fn case(
    bench: &Bench,
    runtime: &Arc<Runtime>,
    kind: Kind,
    trace: &Trace,
    share: Duration,
) -> Result<Case> {
    let arena = Arena::new(kind, trace.memory_pages)?;
    let mut machine = Machine::new(runtime, &arena, BEFORE)?;
    let arrays = machine.write_arrays(trace)?;
    let bytes = trace.pages() * PAGE_BYTES;
    let mut series: Vec<Series> = Method::all()
        .into_iter()
        .map(|method| Series {
            method,
            gib_per_second: Samples::default(),
            cpu_seconds_per_gib: Samples::default(),
            calls_per_gib: Samples::default(),
        })
        .collect();
    rivals::beside(&arena, trace, |free| {
        bench.alternate(&mut series, share, |series, counts| {
            let method = series.method;
            arena.fill(trace)?;
            let setting = match method {
                Method::Behind | Method::BehindOne => WriteBehind::RECOMMENDED,
                _ => BEFORE,
            };
            machine.device.set_write_behind(setting);
            let calls_before = machine.device.counters().discard_calls;
            let (cpu_before, begin) = (processor_time(), Instant::now());
            let mut calls = match method {
                Method::Rival(rival) => free(rival)?,
                Method::Before | Method::Behind => {
                    machine.inflate_full_ring(&arrays)?;
                    0
                }
                Method::BehindOne => {
                    let none = Duration::ZERO;
                    machine.inflate_one_by_one(&arrays, Wait::Interrupt, none, |_| ())?;
                    0
                }
            };
            if method.is_ours() {
                machine.settle()?;
            }
            let (seconds, cpu) = (begin.elapsed(), processor_time() - cpu_before);
            calls += machine.device.counters().discard_calls - calls_before;
            arena.check_freed(trace, method.name());
            if method.is_ours() {
                machine.restart()?;
            }
            if counts {
                series
                    .gib_per_second
                    .push(gib(bytes) / seconds.as_secs_f64());
                series
                    .cpu_seconds_per_gib
                    .push(cpu.as_secs_f64() / gib(bytes));
                series.calls_per_gib.push(to_f64(calls) / gib(bytes));
            }
            Ok(())
        })
    })?;
    Ok(Case {
        kind,
        trace: trace.name,
        recorded: trace.recorded,
        coalescible: trace.is_coalescible(),
        mib: bytes >> 20,
        series,
    })
}

pub(crate) fn print(cases: &[Case]) {
    println!("Discarding: GiB/s until the host has the memory, and what it costs a GiB");
    println!(
        "{:<15} {:<20} {:<24} {:>6} {:>7} {:>15} {:>8} {:>9}",
        "memory", "trace", "method", "x", "GiB/s", "lowest..highest", "CPU s", "calls"
    );
    for case in cases {
        let rival = case.of(Method::Rival(Rival::PerPage));
        for series in &case.series {
            let speed = &series.gib_per_second;
            println!(
                "{:<15} {:<20} {:<24} {:>6.2} {:>7.2} {:>7.2}..{:<6.2} {:>8.3} {:>9.0}",
                case.kind.name(),
                case.trace,
                series.method.name(),
                speed.over(&rival.gib_per_second).median(),
                speed.median(),
                speed.lowest(),
                speed.highest(),
                series.cpu_seconds_per_gib.median(),
                series.calls_per_gib.median()
            );
        }
    }
    println!("x: the median of the runs' ratios to one call a page\n");
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for case in cases {
        let name = format!("{}, {}", case.kind.name(), case.trace);
        let ours = case.of(Method::Behind);
        let per_page = case.of(Method::Rival(Rival::PerPage));
        let mut claim = |figure, against, goal, ratios| {
            claims.push(Claim {
                figure,
                case: name.clone(),
                against,
                goal,
                ratios,
            });
        };
        let speed = |other: &Series| ours.gib_per_second.over(&other.gib_per_second);
        let small = !case.kind.is_huge();
        if case.recorded && small {
            let best = case.best_rival();
            claim(
                "discard GiB/s",
                "per page",
                Goal::AtLeast(4.0),
                speed(per_page),
            );
            claim(
                "discard GiB/s",
                best.method.name(),
                Goal::AtLeast(1.5),
                speed(best),
            );
        }
        // Frames of 2 MiB are gone in a moment; there 512 page numbers a frame are the cost, see the table.
        if case.coalescible && small {
            let limit = case.of(Method::Rival(Rival::Limit));
            claim(
                "discard GiB/s",
                limit.method.name(),
                Goal::AtLeast(0.9),
                speed(limit),
            );
        }
        if case.kind == Kind::Anonymous && case.trace == "random 4K" {
            let merge = case.of(Method::Rival(Rival::SortAndMerge));
            claim(
                "discard GiB/s",
                merge.method.name(),
                Goal::AtLeast(1.5),
                speed(merge),
            );
        }
        if case.recorded && small {
            let calls = ours.calls_per_gib.over(&per_page.calls_per_gib);
            claim("discard calls a GiB", "per page", Goal::AtMost(0.05), calls);
            let cpu = ours.cpu_seconds_per_gib.over(&per_page.cpu_seconds_per_gib);
            claim("CPU seconds a GiB", "per page", Goal::AtMost(0.25), cpu);
        }
    }
    claims
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let one = |series: &Series| {
        json!({
            "method": series.method.name(),
            "gib_per_second": series.gib_per_second.values(),
            "cpu_seconds_per_gib": series.cpu_seconds_per_gib.values(),
            "discard_calls_per_gib": series.calls_per_gib.values(),
        })
    };
    let case = |case: &Case| {
        json!({
            "memory": case.kind.name(),
            "trace": case.trace,
            "recorded": case.recorded,
            "mib": case.mib,
            "methods": case.series.iter().map(one).collect::<Vec<_>>(),
        })
    };
    json!({ "figure": "discard", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
