//! How much is measured, and what the one who waits for it sees meanwhile.

use super::machine::Result;
use super::sample::to_f64;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

/// How long a full run measures, in seconds.
const DEFAULT_SECONDS: u64 = 280;
const QUICK_SECONDS: u64 = 40;

pub(crate) struct Bench {
    /// For how long to measure; `None` only looks whether everything works.
    seconds: Option<f64>,
    bar: ProgressBar,
    steps: Cell<u64>,
    notes: RefCell<Vec<String>>,
}

impl Bench {
    /// From the arguments (`--bench` measures, `--quick` not for long) and BENCH_SECONDS.
    pub(crate) fn new() -> Self {
        let has = |wanted: &str| std::env::args().any(|argument| argument == wanted);
        let asked = std::env::var("BENCH_SECONDS")
            .ok()
            .and_then(|text| text.parse().ok());
        let seconds = match asked {
            Some(seconds) => seconds,
            None if has("--quick") => QUICK_SECONDS,
            None => DEFAULT_SECONDS,
        };
        let style = ProgressStyle::with_template("{spinner} {pos:>3} [{elapsed_precise}] {msg}");
        let bar = if stderr().is_terminal() {
            ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        } else {
            ProgressBar::hidden()
        };
        Self {
            seconds: has("--bench").then(|| to_f64(seconds)),
            bar,
            steps: Cell::new(0),
            notes: RefCell::default(),
        }
    }

    /// Whether figures count; else this is a test that everything works.
    pub(crate) fn measures(&self) -> bool {
        self.seconds.is_some()
    }

    /// The memory of guests that are made up.
    pub(crate) fn memory_pages(&self) -> u64 {
        if self.measures() { 65536 } else { 4096 }
    }

    /// The time of one of `cases` cases of a figure that has this share of the whole.
    pub(crate) fn share(&self, of_whole: f64, cases: usize) -> Duration {
        let seconds = self.seconds.unwrap_or(0.0) * of_whole / to_f64(cases.max(1) as u64);
        Duration::from_secs_f64(seconds)
    }

    /// However little time there is.
    pub(crate) fn least_runs(&self) -> usize {
        if self.measures() { 3 } else { 0 }
    }

    /// However much time there is.
    pub(crate) fn most_runs(&self) -> usize {
        if self.measures() { 15 } else { 0 }
    }

    /// Measures all of `series` in turn, round by round, for `share` of the time; `each` is told whether
    /// what it sees counts.
    pub(crate) fn alternate<T>(
        &self,
        series: &mut [T],
        share: Duration,
        mut each: impl FnMut(&mut T, bool) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        // One round more to warm up; the order turns, so that none always follows the same one.
        for round in 0..=self.most_runs() {
            if round > self.least_runs() && start.elapsed() > share {
                break;
            }
            for turn in 0..series.len() {
                let place = (turn + round) % series.len();
                each(&mut series[place], round > 0 || !self.measures())?;
            }
        }
        Ok(())
    }

    /// Says what is being measured.
    pub(crate) fn step(&self, what: &str) {
        self.steps.set(self.steps.get() + 1);
        self.bar.set_position(self.steps.get());
        self.bar.set_message(what.to_owned());
        self.bar.tick();
        if self.bar.is_hidden() {
            eprintln!("{what}");
        }
    }

    /// Remembers what the reader has to know: what could not be measured here, and why.
    pub(crate) fn note(&self, note: &str) {
        let mut notes = self.notes.borrow_mut();
        if !notes.iter().any(|known| known == note) {
            notes.push(note.to_owned());
        }
    }

    /// The end: all notes.
    pub(crate) fn finish(self) -> Vec<String> {
        self.bar.finish_and_clear();
        self.notes.into_inner()
    }
}
