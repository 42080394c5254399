//! Live progress of a balloon on its way: bars on a terminal, plain lines elsewhere.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{guest::Reading, mib};

/// Plain lines come at every such share of the way.
const PLAIN_STEP_PERCENT: u64 = 20;

const BAR: &str = "  {prefix:22} [{bar:36}] {msg}";

/// Shows one movement.
#[derive(Debug)]
pub struct Progress {
    what: &'static str,
    distance_bytes: u64,
    display: Display,
}

#[derive(Debug)]
enum Display {
    Bars {
        acknowledged: ProgressBar,
        // The host gets memory back in an inflation only; after a deflation it gives memory again
        // when the guest uses it.
        host: Option<ProgressBar>,
    },
    Lines {
        next_percent: u64,
    },
}

impl Progress {
    /// Begins to show a movement over this distance.
    #[must_use]
    pub fn new(what: &'static str, distance_bytes: u64) -> Self {
        let display = if io::stdout().is_terminal() && io::stderr().is_terminal() {
            let all = MultiProgress::new();
            let bar = |prefix: &str| {
                let style = ProgressStyle::with_template(BAR)
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> ");
                let bar = ProgressBar::new(distance_bytes).with_style(style);
                bar.set_prefix(prefix.to_owned());
                all.add(bar)
            };
            Display::Bars {
                acknowledged: bar("guest acknowledged"),
                host: (what == "inflate").then(|| bar("freed on the host")),
            }
        } else {
            Display::Lines { next_percent: 0 }
        };
        Self {
            what,
            distance_bytes,
            display,
        }
    }

    /// Shows a reading.
    pub fn show(&mut self, elapsed: Duration, before: &Reading, now: &Reading) {
        let figures = Figures::new(elapsed, before, now);
        match &mut self.display {
            Display::Bars { acknowledged, host } => {
                acknowledged.set_position(figures.acknowledged_bytes);
                acknowledged.set_message(figures.acknowledged(self.distance_bytes));
                if let Some(host) = host {
                    host.set_position(figures.host_change_bytes);
                    host.set_message(figures.host());
                }
            }
            Display::Lines { next_percent } => {
                let percent = figures.acknowledged_bytes * 100 / self.distance_bytes.max(1);
                if percent >= *next_percent && figures.acknowledged_bytes < self.distance_bytes {
                    println!("  {}: {}", self.what, figures.line(self.distance_bytes));
                    *next_percent = (percent / PLAIN_STEP_PERCENT + 1) * PLAIN_STEP_PERCENT;
                }
            }
        }
    }

    /// Shows the end: `elapsed` is when the guest was there, `after` when all had settled.
    pub fn finish(mut self, elapsed: Duration, before: &Reading, after: &Reading) {
        let figures = Figures::new(elapsed, before, after);
        match &mut self.display {
            Display::Bars { acknowledged, host } => {
                acknowledged.set_position(figures.acknowledged_bytes);
                acknowledged.abandon_with_message(figures.acknowledged(self.distance_bytes));
                if let Some(host) = host {
                    host.set_position(figures.host_change_bytes);
                    host.abandon_with_message(figures.host());
                }
            }
            Display::Lines { .. } => {
                println!("  {}: {}", self.what, figures.line(self.distance_bytes));
            }
        }
    }
}

/// What changed since the movement began.
struct Figures {
    acknowledged_bytes: u64,
    host_change_bytes: u64,
    host_bytes: u64,
    calls: u64,
    gib_per_second: f64,
    milliseconds: u128,
}

impl Figures {
    fn new(elapsed: Duration, before: &Reading, now: &Reading) -> Self {
        let acknowledged_bytes = now.actual_bytes.abs_diff(before.actual_bytes);
        Self {
            acknowledged_bytes,
            host_change_bytes: now.host_bytes.abs_diff(before.host_bytes),
            host_bytes: now.host_bytes,
            calls: now.discard_calls.saturating_sub(before.discard_calls),
            gib_per_second: mib(acknowledged_bytes) / 1024.0 / elapsed.as_secs_f64().max(1e-3),
            milliseconds: elapsed.as_millis(),
        }
    }

    fn acknowledged(&self, distance_bytes: u64) -> String {
        format!(
            "{:.0} of {:.0} MiB, {:.2} GiB/s",
            mib(self.acknowledged_bytes),
            mib(distance_bytes),
            self.gib_per_second
        )
    }

    fn host(&self) -> String {
        format!(
            "{:.0} MiB, {} system calls",
            mib(self.host_change_bytes),
            self.calls
        )
    }

    fn line(&self, distance_bytes: u64) -> String {
        format!(
            "{:5} ms  acknowledged {:6.1} of {:.0} MiB  host memory {:6.1} MiB  {:5.2} GiB/s  \
             {} system calls",
            self.milliseconds,
            mib(self.acknowledged_bytes),
            mib(distance_bytes),
            mib(self.host_bytes),
            self.gib_per_second,
            self.calls
        )
    }
}
