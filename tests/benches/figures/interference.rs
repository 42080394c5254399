//! Figure: what a real guest (User-Mode Linux, its own driver) feels while it is inflated and deflated:
//! how much longer a fixed piece of work takes, for each GiB that moves. The rival is the same back-end
//! with a system call a page before each acknowledgement.

use super::bench::Bench;
use super::claim::{Claim, Goal};
use super::machine::Result;
use super::sample::{Samples, gib};
use aerostat_reclaim::vm::ControlClient;
use aerostat_tests::artifacts;
use aerostat_tests::backend::Backend;
use aerostat_tests::guest::{Prerequisites, UmlConfig, UmlGuest};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

const MEMORY_MIB: u64 = 384;
const TARGET: u64 = 192 << 20;
/// How often the target is reached and given back while the guest works.
const CYCLES: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(60);

/// Pieces of work that take some four seconds: longer than the balloon moves, also with a call a page, as only
/// what moves while the work is done can slow it down.
const WORK: [(&str, &str); 2] = [
    (
        "fixed work",
        "i=0; while [ $i -lt 1300000 ]; do i=$((i+1)); done",
    ),
    (
        "memory bandwidth",
        "i=0; while [ $i -lt 200 ]; do cat /keep/block >/dev/null; i=$((i+1)); done",
    ),
];

/// A guest and its back-end; the guest goes first.
struct Machine {
    guest: UmlGuest,
    backend: Backend,
}

impl Machine {
    fn start(program: &Path, options: &'static [&'static str]) -> Result<Self> {
        let backend = Backend::start_with(program, 1, options)?;
        let config = UmlConfig::new(MEMORY_MIB)
            .balloon(&backend.socket(0))
            .without_reporting();
        let mut guest = UmlGuest::boot(&config)?;
        guest.run("dd if=/dev/zero of=/keep/block bs=1M count=32 2>/dev/null")?;
        Ok(Self { guest, backend })
    }

    /// How long the work takes; meanwhile the balloon moves, or rests.
    fn work(&mut self, work: &str, moves: bool) -> Result<Duration> {
        let mover = moves
            .then(|| self.backend.control(0))
            .transpose()?
            .map(|control| std::thread::spawn(move || cycles(control).map_err(|e| e.to_string())));
        let begin = Instant::now();
        self.guest.run_within(work, PATIENCE)?;
        let took = begin.elapsed();
        if let Some(mover) = mover {
            let moved = mover
                .join()
                .map_err(|_| "the balloon's thread panicked")??;
            if moved > took {
                return Err(
                    format!("the balloon moved for {moved:?}, the work took {took:?}").into(),
                );
            }
        }
        Ok(took)
    }
}

/// Fills and empties the balloon; returns how long that took.
fn cycles(mut control: ControlClient) -> Result<Duration> {
    let start = Instant::now();
    for target in (0..2 * CYCLES).map(|step| if step % 2 == 0 { TARGET } else { 0 }) {
        control.set_target(target)?;
        let begin = Instant::now();
        while control.query()?.actual_bytes != target {
            if begin.elapsed() > PATIENCE {
                return Err("the guest does not follow its target".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(start.elapsed())
}

pub(crate) struct Case {
    work: &'static str,
    /// Seconds that the work takes with the balloon at rest.
    rest: Samples,
    /// Seconds more for each GiB that moves: rival, ours.
    more: [Samples; 2],
}

pub(crate) fn run(bench: &Bench) -> Result<Vec<Case>> {
    let rival = artifacts::directory().join("aerostat-vhost-user-rival");
    if !bench.measures() {
        return Ok(Vec::new());
    }
    if let Err(missing) = Prerequisites::find() {
        bench.note(&format!("interference is not measured: {missing}"));
        return Ok(Vec::new());
    }
    if !rival.is_file() {
        bench.note(
            "interference is not measured: build the rival with \
             cargo build --release -p aerostat-vhost-user --features bench",
        );
        return Ok(Vec::new());
    }
    bench.step("interference: booting two guests");
    let mut machines = [
        Machine::start(&rival, &["--write-behind", "0"])?,
        Machine::start(&artifacts::vhost_user_backend(), &[])?,
    ];
    let moved = gib(2 * CYCLES * TARGET);
    let mut cases = Vec::new();
    for (name, work) in WORK {
        bench.step(&format!("interference: {name}"));
        let mut case = Case {
            work: name,
            rest: Samples::default(),
            more: [const { None }; 2].map(|_: Option<()>| Samples::default()),
        };
        for round in 0..=bench.least_runs() {
            for turn in 0..2 {
                let place = (turn + round) % 2;
                let machine = &mut machines[place];
                let rest = machine.work(work, false)?.as_secs_f64();
                let moving = machine.work(work, true)?.as_secs_f64();
                if round > 0 {
                    case.rest.push(rest);
                    case.more[place].push((moving - rest).max(1e-4) / moved);
                }
            }
        }
        cases.push(case);
    }
    Ok(cases)
}

pub(crate) fn print(cases: &[Case]) {
    for case in cases {
        let [rival, ours] = &case.more;
        println!(
            "Interference, {}: {:.2} s at rest; each GiB that moves makes it {:.3} s longer \
             ({:.3}..{:.3}), with a call a page {:.3} s ({:.3}..{:.3})",
            case.work,
            case.rest.median(),
            ours.median(),
            ours.lowest(),
            ours.highest(),
            rival.median(),
            rival.lowest(),
            rival.highest()
        );
    }
    println!();
}

pub(crate) fn claims(cases: &[Case]) -> Vec<Claim> {
    let claim = |case: &Case| Claim {
        figure: "guest's slow-down a GiB",
        case: case.work.to_owned(),
        against: "per page, same back-end",
        goal: Goal::AtMost(1.0),
        ratios: case.more[1].over(&case.more[0]),
    };
    cases.iter().map(claim).collect()
}

pub(crate) fn to_json(cases: &[Case]) -> Value {
    let case = |case: &Case| {
        json!({
            "work": case.work,
            "seconds_at_rest": case.rest.values(),
            "more_per_gib_rival": case.more[0].values(),
            "more_per_gib_ours": case.more[1].values(),
        })
    };
    json!({ "figure": "interference", "cases": cases.iter().map(case).collect::<Vec<_>>() })
}
