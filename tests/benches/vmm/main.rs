//! `make bench-vmm`: one QEMU program, one guest kernel and its stock driver, two devices: QEMU's own
//! virtio-balloon and this library's. Both by turns, so that what else the machine does hits both.
//!
//! Under emulation the guest's own work bounds an inflation, so its processor time is taken off the wall
//! time: what is left is the time for which the guest waited for its device.
//!
//! `--only memballoon` measures the memory balloon alone (`memballoon`), `--only balloon` all but that.

mod chart;
mod memballoon;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use aerostat_tests::qemu::{Backing, Balloon, Machine, MachineConfig, MachinePrerequisites};
use clap::{Parser, ValueEnum};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Compares QEMU's own balloon with this library's.
#[derive(Debug, Parser)]
struct Options {
    /// Machines of each kind, for each backing.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// What is behind the guests' memory; all of them if none is named.
    #[arg(long, value_enum)]
    backing: Vec<Memory>,
    /// Memory of a guest.
    #[arg(long, default_value_t = 1536)]
    memory_mib: u64,
    /// What it is asked for.
    #[arg(long, default_value_t = 1024)]
    target_mib: u64,
    /// `balloon` or `memballoon`: only that part.
    #[arg(long)]
    only: Option<String>,
    /// Where results go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Cargo passes this.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is behind a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    Anonymous,
    Memfd,
}

impl Memory {
    fn backing(self) -> Backing {
        match self {
            Self::Anonymous => Backing::Anonymous,
            Self::Memfd => Backing::Memfd,
        }
    }
}

/// How often the balloon's size is looked at, which costs the main loop some microseconds each time. QEMU
/// tells of it by itself once a second only.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A whole inflation may take this long.
const PATIENCE: Duration = Duration::from_secs(180);

/// A shell's loop takes about a second for this under emulation.
const LOOP_TURNS: u32 = 60_000;

/// What one run yields, by name; all of it is better if smaller, but for memory.
type Figures = BTreeMap<&'static str, f64>;

/// The rows of the table.
const ROWS: [(&str, &str); 10] = [
    (
        "inflate wait",
        "inflate: wall time less the guest's own, s/GiB",
    ),
    ("inflate wall", "inflate: wall time, s/GiB"),
    ("inflate cpu", "inflate: CPU of QEMU's other threads, s/GiB"),
    (
        "deflate wait",
        "deflate: wall time less the guest's own, s/GiB",
    ),
    ("deflate wall", "deflate: wall time, s/GiB"),
    ("deflate cpu", "deflate: CPU of QEMU's other threads, s/GiB"),
    ("loop alone", "a loop in the guest alone, s"),
    ("loop inflating", "the same while inflating, s"),
    ("slow-down", "how much longer it takes then"),
    ("memory left", "host memory not freed, share of the target"),
];

fn main() -> Result<()> {
    let options = Options::parse();
    let parts = MachinePrerequisites::find()?;
    let wanted = |part: &str| options.only.as_deref().is_none_or(|only| only == part);
    if wanted("memballoon") {
        let samples = memballoon::measure(&parts, &options)?;
        write_memballoon(&options, &samples)?;
    }
    if !wanted("balloon") {
        return Ok(());
    }
    let mut all = Vec::new();
    let chosen = match options.backing.as_slice() {
        [] => Memory::value_variants(),
        chosen => chosen,
    };
    for backing in chosen.iter().map(|memory| memory.backing()) {
        let mut runs: BTreeMap<&str, Vec<Figures>> = BTreeMap::new();
        for round in 1..=options.rounds {
            for (name, balloon) in [("virtio", Balloon::Virtio), ("aerostat", Balloon::Aerostat)] {
                eprintln!("{backing:?}, round {round} of {}: {name}", options.rounds);
                runs.entry(name)
                    .or_default()
                    .push(run(&parts, &options, backing, balloon)?);
            }
        }
        print_table(backing, &runs);
        all.push((backing, runs));
    }
    write_results(&options, &all)
}

/// Boots a guest, and measures.
fn run(
    parts: &MachinePrerequisites,
    options: &Options,
    backing: Backing,
    balloon: Balloon,
) -> Result<Figures> {
    let config = MachineConfig::new(options.memory_mib, balloon)
        .backing(backing)
        .cpus(2);
    let mut machine = Machine::start(parts, &config)?;
    let gib = options.target_mib as f64 / 1024.0;
    let mut figures = Figures::new();

    machine.touch_unused_memory()?;
    let before = machine.host_memory_bytes()?;
    let inflated = change(&mut machine, options.target_mib)?;
    figures.insert("inflate wait", inflated.wait / gib);
    figures.insert("inflate wall", inflated.wall / gib);
    figures.insert("inflate cpu", inflated.others / gib);
    // What is discarded behind the acknowledgement is so within milliseconds.
    std::thread::sleep(Duration::from_millis(50));
    let freed = before.saturating_sub(machine.host_memory_bytes()?);
    figures.insert(
        "memory left",
        1.0 - (freed as f64 / (options.target_mib << 20) as f64).min(1.0),
    );
    let deflated = change(&mut machine, 0)?;
    figures.insert("deflate wait", deflated.wait / gib);
    figures.insert("deflate wall", deflated.wall / gib);
    figures.insert("deflate cpu", deflated.others / gib);

    // A loop on one processor of the guest, while the balloon is inflated on the other one.
    machine.touch_unused_memory()?;
    let turns =
        format!("taskset 2 sh -c 'i=0; while [ $i -lt {LOOP_TURNS} ]; do i=$((i+1)); done'");
    let begin = Instant::now();
    machine.run_within(&turns, PATIENCE)?;
    let alone = begin.elapsed().as_secs_f64();
    figures.insert("loop alone", alone);
    machine.set_target_mib(options.target_mib)?;
    let begin = Instant::now();
    machine.run_within(&turns, PATIENCE)?;
    let inflating = begin.elapsed().as_secs_f64();
    figures.insert("loop inflating", inflating);
    figures.insert("slow-down", inflating / alone);
    Ok(figures)
}

/// Times in seconds.
struct Change {
    wall: f64,
    wait: f64,
    others: f64,
}

/// Sets a target and waits until it is reached.
fn change(machine: &mut Machine, target_mib: u64) -> Result<Change> {
    let before = machine.thread_times()?;
    let begin = Instant::now();
    machine.set_target_mib(target_mib)?;
    while machine.actual_mib()? != target_mib {
        if begin.elapsed() > PATIENCE {
            return Err(format!("the balloon is not {target_mib} MiB after {PATIENCE:?}").into());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let wall = begin.elapsed().as_secs_f64();
    let after = machine.thread_times()?;
    let spent = |wanted: &dyn Fn(&str) -> bool| -> f64 {
        after
            .iter()
            .filter(|(name, _)| wanted(name))
            .map(|(name, time)| time.saturating_sub(before.get(name).copied().unwrap_or_default()))
            .sum::<Duration>()
            .as_secs_f64()
    };
    let guest = |name: &str| name.starts_with("CPU ");
    // The monitor is what looks here.
    let others = |name: &str| !guest(name) && !name.starts_with("IO mon");
    Ok(Change {
        wall,
        wait: (wall - spent(&guest)).max(0.0),
        others: spent(&others),
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        _ if values.is_empty() => f64::NAN,
        1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn of(runs: &[Figures], name: &str) -> Vec<f64> {
    runs.iter()
        .filter_map(|run| run.get(name).copied())
        .collect()
}

fn print_table(backing: Backing, runs: &BTreeMap<&str, Vec<Figures>>) {
    println!(
        "\n{backing:?} memory: median of {} runs each (smallest to largest)",
        runs["virtio"].len()
    );
    println!("| figure | virtio-balloon | aerostat-balloon | ratio |\n|---|---|---|---|");
    for (name, title) in ROWS {
        let cell = |kind: &str| {
            let mut values = of(&runs[kind], name);
            let middle = median(&mut values);
            let (low, high) = (values[0], values[values.len() - 1]);
            (middle, format!("{middle:.3} ({low:.3} to {high:.3})"))
        };
        let ((theirs, left), (ours, right)) = (cell("virtio"), cell("aerostat"));
        println!("| {title} | {left} | {right} | {:.2} |", ours / theirs);
    }
}

fn write_results(options: &Options, all: &[(Backing, BTreeMap<&str, Vec<Figures>>)]) -> Result<()> {
    fs::create_dir_all(&options.out)?;
    let results: Vec<_> = all
        .iter()
        .map(|(backing, runs)| json!({"backing": format!("{backing:?}"), "runs": runs}))
        .collect();
    let text = json!({
        "memory_mib": options.memory_mib,
        "target_mib": options.target_mib,
        "figures": ROWS.iter().map(|(name, title)| json!({"name": name, "title": title})).collect::<Vec<_>>(),
        "results": results,
    });
    let file = options.out.join("vmm.json");
    fs::write(&file, serde_json::to_string_pretty(&text)?)?;
    let chart = options.out.join("vmm.svg");
    fs::write(&chart, chart::draw(&bars(all)))?;
    println!("\n{} and {}", file.display(), chart.display());
    Ok(())
}

/// The samples of [`memballoon`], as they are.
fn write_memballoon(options: &Options, all: &[(&str, memballoon::Samples)]) -> Result<()> {
    fs::create_dir_all(&options.out)?;
    let of = |samples: &memballoon::Samples| -> Vec<_> {
        let each = samples.iter();
        each.map(|((kind, row), values)| json!({"kind": kind, "row": row, "seconds": values}))
            .collect()
    };
    let settings = all.iter();
    let text = json!({
        "memory_mib": options.memory_mib,
        "target_mib": options.target_mib,
        "results": settings.map(|(setting, samples)| json!({"kernel": setting, "samples": of(samples)})).collect::<Vec<_>>(),
    });
    let file = options.out.join("memballoon.json");
    fs::write(&file, serde_json::to_string_pretty(&text)?)?;
    println!("\n{}", file.display());
    Ok(())
}

/// What this library's device takes of what QEMU's own does.
fn bars(all: &[(Backing, BTreeMap<&str, Vec<Figures>>)]) -> Vec<chart::Bar> {
    let mut bars = Vec::new();
    for (backing, runs) in all {
        for (name, title) in ROWS
            .iter()
            .filter(|(name, _)| !name.starts_with("loop") && *name != "memory left")
        {
            let theirs = median(&mut of(&runs["virtio"], name));
            let ours = median(&mut of(&runs["aerostat"], name));
            bars.push(chart::Bar {
                title: format!("{backing:?}, {title}"),
                theirs,
                ours,
            });
        }
    }
    bars
}
