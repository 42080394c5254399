//! Results as a table.

use std::fmt::Write as _;

use super::outcome::{Runs, Spread};

/// One line for each rule: median, and least to most over the runs.
#[must_use]
pub fn table(results: &[Runs]) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:<10} {:>28} {:>28} {:>22} {:>8} {:>8} {:>8} {:>9} {:>7} {:>6} {:>6}",
        "rule",
        "swapped out, pages",
        "swapped in, pages",
        "run time, s",
        "p99, s",
        "some, s",
        "full, s",
        "read, MiB",
        "floor,s",
        "kills",
        "turns"
    );
    for runs in results {
        let unfinished: u32 = runs.outcomes.iter().map(|outcome| outcome.unfinished).sum();
        let floor = runs.spread(|outcome| outcome.below_floor_s).most;
        let kills: u64 = runs.outcomes.iter().map(|outcome| outcome.oom_kills).sum();
        let _ = writeln!(
            text,
            "{:<10} {:>28} {:>28} {:>22} {:>8.0} {:>8.1} {:>8.1} {:>9.0} {floor:>7.1} {kills:>6} {:>6.0}{}",
            runs.policy,
            shown(runs.spread(|outcome| outcome.swap_out_pages())),
            shown(runs.spread(|outcome| outcome.swap_in_pages())),
            shown(runs.spread(|outcome| outcome.runtime_s(0.5))),
            runs.spread(|outcome| outcome.runtime_s(0.99)).median,
            runs.spread(|outcome| outcome.some_s).median,
            runs.spread(|outcome| outcome.full_s).median,
            runs.spread(|outcome| outcome.image_bytes / f64::from(1 << 20))
                .median,
            runs.spread(|outcome| f64::from(outcome.turns)).median,
            if unfinished > 0 {
                format!("  {unfinished} unfinished")
            } else {
                String::new()
            }
        );
    }
    let _ = writeln!(
        text,
        "\nsome, full: at least one guest, all guests waited for the host's memory. read: by guests, \
         of their\nown disks. floor: guest seconds with less memory left than was in use, in the worst run. \
         kills:\nprocesses killed in guests. turns: targets that changed direction."
    );
    text
}

fn shown(spread: Spread) -> String {
    let Spread {
        median,
        least,
        most,
    } = spread;
    format!("{median:.0} ({least:.0} to {most:.0})")
}
