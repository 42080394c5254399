//! The scenarios that come with the program: the shape of published figures, and what the
//! requirements ask of a rule.

use std::fs;

use super::*;
use crate::policy::Mode;

fn run_scenario(name: &str, policies: &[&str], runs: u32) -> Vec<Runs> {
    let mut scenario = Scenario::load(name).unwrap();
    scenario.runs = runs;
    scenario.policies = policies.iter().map(|name| (*name).to_owned()).collect();
    simulate(&scenario, 1).unwrap()
}

fn swap_out(runs: &Runs) -> f64 {
    runs.spread(Outcome::swap_out_pages).median
}

#[test]
fn every_scenario_that_comes_with_the_program_can_be_read() {
    for name in names() {
        Scenario::load(name).unwrap();
    }
}

#[test]
fn a_mistake_in_a_scenario_is_named_with_its_line() {
    let text = "title = \"x\"\nlimit-s = 1.0\nlimit-x = 2\n";
    let error = Scenario::parse("x", text).unwrap_err();
    let ScenarioError::Parse { source, .. } = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("limit-x"), "{source}");
    assert!(source.to_string().contains("line 3"), "{source}");
}

/// A10: without a rule, the model's swap traffic and run time are in the published range's order of
/// magnitude, and hold for chances that nothing was fitted to.
#[test]
fn a10_without_ballooning_the_host_swaps_as_much_as_was_published() {
    let [off] = run_scenario("builds", &["none"], 3).try_into().unwrap();
    let out = swap_out(&off);
    let back = off.spread(Outcome::swap_in_pages).median;
    let time = off.spread(|outcome| outcome.end_s).median;
    assert!((500_000.0..5_000_000.0).contains(&out), "{out} pages out");
    assert!((150_000.0..3_000_000.0).contains(&back), "{back} pages in");
    assert!((350.0..1200.0).contains(&time), "{time} s");
}

#[test]
fn a10_with_the_rule_swap_out_is_a_hundredth() {
    let [off, on] = run_scenario("builds", &["none", "aerostat"], 3)
        .try_into()
        .unwrap();
    assert!(
        swap_out(&on) * 100.0 <= swap_out(&off),
        "{} of {}",
        swap_out(&on),
        swap_out(&off)
    );
    let time = |runs: &Runs| runs.spread(|outcome| outcome.runtime_s(0.5));
    assert!(
        time(&on).most < time(&off).least,
        "{:?} {:?}",
        time(&on),
        time(&off)
    );
    assert_eq!(
        on.outcomes
            .iter()
            .map(|outcome| outcome.oom_kills)
            .sum::<u64>(),
        0
    );
}

#[test]
fn two_guests_with_offset_peaks_share_memory_that_would_not_hold_both() {
    let [off, on] = run_scenario("offset-peaks", &["none", "aerostat"], 3)
        .try_into()
        .unwrap();
    assert!(
        swap_out(&on) * 20.0 <= swap_out(&off),
        "{} of {}",
        swap_out(&on),
        swap_out(&off)
    );
    for outcome in &on.outcomes {
        assert_eq!((outcome.oom_kills, outcome.unfinished), (0, 0));
    }
    let time = |runs: &Runs| runs.spread(|outcome| outcome.end_s).median;
    assert!(time(&on) <= time(&off), "{} {}", time(&on), time(&off));
}

/// J7: the same guests once with their memory on loan, once without.
#[test]
fn j7_memory_on_loan_saves_reads_and_costs_nobody_anything() {
    let mut scenario = Scenario::load("fluid").unwrap();
    scenario.policies = vec!["aerostat".to_owned()];
    let [fluid] = simulate(&scenario, 1).unwrap().try_into().unwrap();
    for guest in &mut scenario.guests {
        guest.mode = Mode::Auto;
    }
    let [auto] = simulate(&scenario, 1).unwrap().try_into().unwrap();

    let read = |runs: &Runs| runs.spread(|outcome| outcome.image_bytes).median;
    let time = |runs: &Runs| runs.spread(|outcome| outcome.end_s).median;
    let kills = |runs: &Runs| runs.spread(|outcome| outcome.oom_kills as f64).most;
    assert!(
        read(&fluid) < 0.95 * read(&auto),
        "{} {}",
        read(&fluid),
        read(&auto)
    );
    assert!(
        time(&fluid) <= 1.01 * time(&auto),
        "{} {}",
        time(&fluid),
        time(&auto)
    );
    assert_eq!((kills(&fluid), kills(&auto)), (0.0, 0.0));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let results = run_scenario("offset-peaks", &["aerostat"], 1);
        serde_json::to_string(&results).unwrap()
    };
    assert_eq!(run(), run());
}

#[test]
fn results_are_a_table_and_three_plots() {
    let directory = tempfile::tempdir().unwrap();
    let scenario = Scenario::load("offset-peaks").unwrap();
    let runs = run_scenario("offset-peaks", &["none", "aerostat"], 1);

    results::write(directory.path(), &scenario.title, &runs).unwrap();

    for name in ["swap.svg", "runtime.svg", "memory.svg"] {
        let text = fs::read_to_string(directory.path().join(name)).unwrap();
        assert!(
            text.contains("</svg>") && text.contains("aerostat"),
            "{name}"
        );
    }
    let table = heading(&scenario) + &results::table(&runs);
    assert!(
        table.lines().any(|line| line.starts_with("aerostat ")),
        "{table}"
    );
}

/// Prints what `aerostatd simulate` prints: `cargo test -p aerostat-reclaim shown -- --ignored --nocapture`.
#[test]
#[ignore = "for reading, not for checking"]
fn all_rules_are_shown_on_the_small_scenarios() {
    for name in ["builds", "offset-peaks", "mixed"] {
        let scenario = Scenario::load(name).unwrap();
        let runs = simulate(&scenario, 1).unwrap();
        println!("{}\n{}", heading(&scenario), results::table(&runs));
    }
}
