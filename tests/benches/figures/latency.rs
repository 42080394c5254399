//! Figure: how long a guest waits for the acknowledgement of an array of 256 page numbers, from its
//! kick until it sees the used index move. The rival is the same device with a system call a page.

use super::arena::{Arena, Kind};
use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::{BEFORE, Machine, Result, Wait};
use super::sample::Samples;
use super::trace::Trace;
use aerostat_device::{Runtime, RuntimeConfig, WriteBehind};
use serde_json::{Value, json};
use std::time::Duration;

/// How long a Linux guest is busy between two arrays: it allocates 256 pages, of which 7 GiB take
/// 6.5 % of 4126 ms (docs/performance.md has the source).
const THINK: Duration = Duration::from_micros(37);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    PerPage,
    Before,
    Behind,
}

impl Device {
    pub(crate) const ALL: [Self; 3] = [Self::PerPage, Self::Before, Self::Behind];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PerPage => "per page, same device",
            Self::Before => "aerostat, before ack",
            Self::Behind => "aerostat, write-behind",
        }
    }
}

pub(crate) struct Series {
    pub(crate) device: Device,
    /// Of each run.
    p50: Samples,
    p99: Samples,
    /// Of all runs, in microseconds.
    pub(crate) all: Samples,
}

pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) trace: &'static str,
    pub(crate) wait: Wait,
    pub(crate) series: Vec<Series>,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        let wait = match self.wait {
            Wait::Spin => "",
            Wait::Interrupt => ", to interrupt",
        };
        format!("{}, {}{wait}", self.kind.name(), self.trace)
    }

    fn of(&self, device: Device) -> &Series {
        let mut series = self.series.iter();
        series
            .find(|series| series.device == device)
            .unwrap_or(&self.series[0])
    }
}

pub(crate) fn run(bench: &Bench, traces: &[&Trace]) -> Result<Vec<Case>> {
    let ours = Runtime::new(&RuntimeConfig::default())?;
    let rival = Runtime::one_call_a_page(&RuntimeConfig::default())?;
    let mut work = Vec::new();
    for kind in [Kind::Anonymous, Kind::Memfd] {
        for trace in traces {
            work.push((kind, *trace, Wait::Spin));
        }
        work.extend(traces.first().map(|trace| (kind, *trace, Wait::Interrupt)));
    }
    let share = bench.share(0.12, work.len());
    let mut cases = Vec::new();
    for (kind, trace, wait) in work {
        bench.step(&format!("latency: {}, {}", kind.name(), trace.name));
        let arena = Arena::new(kind, trace.memory_pages)?;
        let mut series: Vec<Series> = Device::ALL
            .into_iter()
            .map(|device| Series {
                device,
                p50: Samples::default(),
                p99: Samples::default(),
                all: Samples::default(),
            })
            .collect();
        bench.alternate(&mut series, share, |series, counts| {
            let (runtime, setting) = match series.device {
                Device::PerPage => (&rival, BEFORE),
                Device::Before => (&ours, BEFORE),
                Device::Behind => (&ours, WriteBehind::RECOMMENDED),
            };
            arena.fill(trace)?;
            let mut machine = Machine::new(runtime, &arena, setting)?;
            let arrays = machine.write_arrays(trace)?;
            let mut samples = Samples::default();
            machine.inflate_one_by_one(&arrays, wait, THINK, |latency| {
                samples.push(latency.as_secs_f64() * 1e6);
            })?;
            machine.settle()?;
            arena.check_freed(trace, series.device.name());
            if counts {
                series.p50.push(samples.quantile(0.5));
                series.p99.push(samples.quantile(0.99));
                samples
                    .values()
                    .iter()
                    .for_each(|value| series.all.push(*value));
            }
            Ok(())
        })?;
        cases.push(Case {
            kind,
            trace: trace.name,
            wait,
            series,
        });
    }
    Ok(cases)
}

pub(crate) fn print(cases: &[Case]) {
    println!("From kick to used, an array of 256 pages: microseconds");
    println!(
        "{:<42} {:<24} {:>8} {:>8} {:>8} {:>8} {:>8}",
        "memory and trace", "device", "p50", "p90", "p99", "highest", "x of p50"
    );
    for case in cases {
        let rival = case.of(Device::PerPage);
        for series in &case.series {
            println!(
                "{:<42} {:<24} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.4}",
                case.name(),
                series.device.name(),
                series.all.quantile(0.5),
                series.all.quantile(0.9),
                series.all.quantile(0.99),
                series.all.highest(),
                series.p50.over(&rival.p50).median()
            );
        }
    }
    println!();
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for case in cases.iter().filter(|case| case.wait == Wait::Spin) {
        let rival = case.of(Device::PerPage);
        for (device, goal, p50, p99) in [
            (
                Device::Before,
                0.25,
                "p50 before acknowledging",
                "p99 before acknowledging",
            ),
            (
                Device::Behind,
                0.02,
                "p50 with write-behind",
                "p99 with write-behind",
            ),
        ] {
            let ours = case.of(device);
            let pairs = [
                (p50, ours.p50.over(&rival.p50)),
                (p99, ours.p99.over(&rival.p99)),
            ];
            for (figure, ratios) in pairs {
                claims.push(Claim {
                    figure,
                    case: case.name(),
                    against: rival.device.name(),
                    goal: Goal::AtMost(goal),
                    ratios,
                });
            }
        }
    }
    claims
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let one = |series: &Series| {
        let quantiles: Vec<Value> = (0..=100u32)
            .map(|percent| json!(series.all.quantile(f64::from(percent) / 100.0)))
            .collect();
        json!({
            "device": series.device.name(),
            "p50_us": series.p50.values(),
            "p99_us": series.p99.values(),
            "percentiles_us": quantiles,
        })
    };
    let case = |case: &Case| {
        json!({
            "case": case.name(),
            "devices": case.series.iter().map(one).collect::<Vec<_>>(),
        })
    };
    json!({ "figure": "latency", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
