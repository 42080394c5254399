//! Boots a host VM for each round and gathers what comes out.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use aerostat_reclaim::{
    policy::NAMES,
    results::{self, Outcome, Runs},
};
use clap::Args;

use super::{ExperimentError, failed, inside, load::Load, plan::Plan};
use crate::host_vm::HostVmConfig;

const PATIENCE: Duration = Duration::from_secs(3600);

/// What the experiment is to do.
#[derive(Clone, Debug, Args)]
pub struct Options {
    #[command(flatten)]
    plan: Plan,
    /// Rounds, each in a fresh host VM
    #[arg(long, default_value_t = 5)]
    rounds: u64,
    /// Adds to the results that are there, instead of beginning anew
    #[arg(long)]
    resume: bool,
    /// Where results and plots go
    #[arg(long, default_value = "target/experiment")]
    out: PathBuf,
}

/// Runs the rounds, and writes a table and plots of all results.
///
/// # Errors
/// Something is not installed, or a round fails; results of earlier rounds are kept.
pub fn run(options: &Options) -> Result<(), ExperimentError> {
    let out = &options.out;
    fs::create_dir_all(out).map_err(failed("making", out))?;
    let log = out.join("runs.jsonl");
    if !options.resume {
        fs::write(&log, "").map_err(failed("writing", &log))?;
    }
    for round in 0..options.rounds {
        let mut plan = options.plan.clone();
        plan.seed = plan.seed.wrapping_add(round);
        println!(
            "round {} of {}: {}",
            round + 1,
            options.rounds,
            plan.order().join(", ")
        );
        run_round(&plan, &log)?;
    }
    let results = read(&log)?;
    let plan = &options.plan;
    let title = format!(
        "{} real guests of {} MiB on {} MiB{}",
        plan.guests,
        plan.guest_mib,
        plan.room_mib,
        match plan.load {
            Load::Builds => "",
            Load::Peaks => ", peaks in turn",
        }
    );
    let runs = results.iter().map(|runs| runs.outcomes.len()).max();
    let table = format!(
        "{title}, {} MiB of swap; {} runs; median (least to most)\n\n{}",
        plan.swap_mib,
        runs.unwrap_or(0),
        results::table(&results)
    );
    print!("\n{table}");
    let file = out.join("table.txt");
    fs::write(&file, table).map_err(failed("writing", &file))?;
    results::write(out, &title, &results)?;
    println!("plots and results are in {}", out.display());
    Ok(())
}

fn run_round(plan: &Plan, log: &Path) -> Result<(), ExperimentError> {
    let program = std::env::current_exe().map_err(failed("finding", "this program"))?;
    let mut vm = HostVmConfig::new()
        .memory_mib(plan.host_mib)
        .cpus(2)
        .swap_mib(plan.swap_mib)
        .swap_iops(plan.swap_iops)
        .carry_guests()
        .carry(&program)
        .carry(inside::program())
        .boot()?;
    println!("host VM up after {:.0} s", vm.booted_in().as_secs_f64());
    let arguments = plan.arguments();
    let mut words = vec!["inside"];
    words.extend(arguments.iter().map(String::as_str));
    let mut lines = Vec::new();
    let ran = vm.run_program(&program, &words, PATIENCE, |line| {
        match line.strip_prefix(inside::RESULT) {
            Some(result) => {
                if let Ok(runs) = serde_json::from_str::<Runs>(result) {
                    summary(&runs);
                }
                lines.push(result.to_owned());
            }
            None => println!("  {line}"),
        }
    });
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(log)
        .map_err(failed("opening", log))?;
    for line in lines {
        writeln!(file, "{line}").map_err(failed("writing", log))?;
    }
    ran?;
    Ok(())
}

fn summary(runs: &Runs) {
    for outcome in &runs.outcomes {
        println!(
            "  {:<9} {:>6.0} s, swapped out {:>8.0} pages, in {:>8.0}, pressure {:>5.1} s",
            runs.policy,
            outcome.end_s,
            outcome.swap_out_pages(),
            outcome.swap_in_pages(),
            outcome.some_s
        );
    }
}

/// All results of a log, by rule.
fn read(log: &Path) -> Result<Vec<Runs>, ExperimentError> {
    let text = fs::read_to_string(log).map_err(failed("reading", log))?;
    let mut by_rule: BTreeMap<usize, Vec<Outcome>> = BTreeMap::new();
    for line in text.lines() {
        let runs: Runs = serde_json::from_str(line)
            .map_err(|error| ExperimentError::Unexpected(format!("{}: {error}", log.display())))?;
        let place = NAMES.iter().position(|name| *name == runs.policy);
        by_rule
            .entry(place.unwrap_or(NAMES.len()))
            .or_default()
            .extend(runs.outcomes);
    }
    Ok(by_rule
        .into_iter()
        .map(|(place, outcomes)| Runs {
            policy: NAMES.get(place).unwrap_or(&"other").to_string(),
            outcomes,
        })
        .collect())
}
