//! The simulator: hosts and guests in virtual time, under the same rules as real ones, through the
//! same samples and decisions.
//!
//! What is modelled, what is not, and how it compares with published figures is in
//! `docs/simulator.md`. It tells rules apart by orders of magnitude, not by percents.

mod guest;
mod memory;
mod scenario;
#[cfg(test)]
mod scenario_tests;
mod world;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

pub use scenario::{Scenario, ScenarioError, names};

use crate::{
    policy,
    results::{self, Outcome, ResultsError, Runs},
};

/// Arguments of `aerostatd simulate`.
#[derive(Clone, Debug, clap::Args)]
pub struct SimulateArgs {
    /// A scenario that comes with the program (builds, offset-peaks, fluid, mixed, fleet), or a TOML file
    #[arg(value_name = "SCENARIO")]
    pub scenario: String,
    /// Only these rules (may be repeated): aerostat, none, mom, proxmox, senpai, squeezed
    #[arg(long = "policy", value_name = "NAME")]
    pub policies: Vec<String>,
    /// Runs of each rule
    #[arg(long, value_name = "N")]
    pub runs: Option<u32>,
    /// Chance of the first run
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,
    /// Writes plots (SVG) and results (JSON) into this directory
    #[arg(long, value_name = "DIRECTORY")]
    pub out: Option<PathBuf>,
}

/// What can go wrong with a simulation.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The scenario cannot be used.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// There is no such rule.
    #[error("there is no rule {0:?}; there are {names}", names = policy::NAMES.join(", "))]
    UnknownPolicy(String),
    /// A result cannot be written.
    #[error(transparent)]
    Results(#[from] ResultsError),
}

/// Runs a scenario and prints a table; the body of `aerostatd simulate`.
///
/// # Errors
/// The scenario or a rule does not exist, or a result cannot be written.
pub fn run(args: SimulateArgs) -> Result<(), SimulateError> {
    let mut scenario = Scenario::load(&args.scenario)?;
    if let Some(runs) = args.runs {
        scenario.runs = runs.max(1);
    }
    if !args.policies.is_empty() {
        scenario.policies = args.policies;
    }
    let results = simulate(&scenario, args.seed)?;
    print!("{}\n{}", heading(&scenario), results::table(&results));
    if let Some(directory) = args.out {
        results::write(&directory, &scenario.title, &results)?;
        println!("plots and results are in {}", directory.display());
    }
    Ok(())
}

/// Runs a scenario under each of its rules, on all processors.
///
/// # Errors
/// A rule does not exist.
pub fn simulate(scenario: &Scenario, seed: u64) -> Result<Vec<Runs>, SimulateError> {
    let rules: Vec<&str> = if scenario.policies.is_empty() {
        policy::NAMES.to_vec()
    } else {
        scenario.policies.iter().map(String::as_str).collect()
    };
    rules
        .iter()
        .map(|rule| simulate_rule(scenario, rule, seed))
        .collect()
}

fn simulate_rule(scenario: &Scenario, rule: &str, seed: u64) -> Result<Runs, SimulateError> {
    if policy::by_name(rule, &scenario.policy).is_none() {
        return Err(SimulateError::UnknownPolicy(rule.to_owned()));
    }
    let hosts = usize::try_from(scenario.hosts.saturating_mul(scenario.runs)).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let rule = policy::by_name(rule, &scenario.policy);
            let (true, Some(mut rule)) = (number < hosts, rule) else {
                return done;
            };
            // The same chances for every rule.
            let world = world::World::new(scenario, seed.wrapping_add(number as u64));
            done.push((number, world.run(rule.as_mut())));
        }
    };
    let workers = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(hosts);
    let mut outcomes: Vec<(usize, Outcome)> = thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let joined = handles.into_iter().map(|handle| handle.join());
        joined.flatten().flatten().collect()
    });
    outcomes.sort_by_key(|(number, _)| *number);
    Ok(Runs {
        policy: rule.to_owned(),
        outcomes: outcomes.into_iter().map(|(_, outcome)| outcome).collect(),
    })
}

fn heading(scenario: &Scenario) -> String {
    let guests: u32 = scenario.guests.iter().map(|guest| guest.count).sum();
    format!(
        "{}\n{} x host of {:.0} MiB with {:.0} MiB of swap, {guests} guests each; {} runs; median \
         (least to most)\n",
        scenario.title,
        scenario.hosts,
        scenario.host.memory_mib,
        scenario.host.swap_mib,
        scenario.runs
    )
}
