//! What happens in the demonstration, and what must hold at its end.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{
    DemoError,
    guest::{DemoGuest, Reading},
    mib,
    options::Options,
    progress::Progress,
    recorder::{Recorder, Sample},
};

/// Share of the request that must have become free on the host.
const REQUIRED_SHARE: f64 = 0.99;

/// A guest that gets no further within this time is stuck.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long host memory must not have changed to count as settled, and how long to wait for that.
const SETTLED: Duration = Duration::from_millis(200);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the display follows the readings.
const DISPLAY_INTERVAL: Duration = Duration::from_millis(5);

/// A part of the story, for the chart.
#[derive(Clone, Debug)]
pub struct Phase {
    /// What happened.
    pub name: &'static str,
    /// When it began.
    pub start: Duration,
    /// When it ended.
    pub end: Duration,
}

/// A balloon on its way from one size to another.
#[derive(Clone, Copy, Debug)]
pub struct Movement {
    /// When the target was set.
    pub start: Duration,
    /// When the guest said that it was there.
    pub reached: Duration,
    /// The reading before.
    pub before: Reading,
    /// The reading when nothing changed any more.
    pub after: Reading,
}

impl Movement {
    /// Seconds from the request to the guest's last acknowledgement.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        (self.reached - self.start).as_secs_f64()
    }

    /// GiB/s from the request to the guest's last acknowledgement.
    #[must_use]
    pub fn gib_per_second(&self) -> f64 {
        let moved = self.after.actual_bytes.abs_diff(self.before.actual_bytes);
        mib(moved) / 1024.0 / self.seconds().max(1e-6)
    }

    /// What became free on the host.
    #[must_use]
    pub fn freed_bytes(&self) -> u64 {
        self.before.host_bytes.saturating_sub(self.after.host_bytes)
    }
}

/// Everything that was seen.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// What was requested of the guest.
    pub target_bytes: u64,
    /// Size of the data that must survive.
    pub working_set_bytes: u64,
    /// Its checksum.
    pub checksum: String,
    /// The balloon growing.
    pub inflate: Movement,
    /// Whether the data was intact then.
    pub intact_while_inflated: bool,
    /// The balloon shrinking.
    pub deflate: Movement,
    /// The reading after the guest used its memory again.
    pub used_again: Reading,
    /// Whether the data was intact at the end.
    pub intact_at_end: bool,
    /// The parts of the story.
    pub phases: Vec<Phase>,
    /// All readings.
    pub samples: Vec<Sample>,
}

impl Outcome {
    /// Share of the request that became free on the host.
    #[must_use]
    pub fn freed_share(&self) -> f64 {
        mib(self.inflate.freed_bytes()) / mib(self.target_bytes)
    }

    /// Whether enough became free.
    #[must_use]
    pub fn freed_enough(&self) -> bool {
        self.freed_share() >= REQUIRED_SHARE
    }

    /// Whether all that the demonstration is about held.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.freed_enough()
            && self.intact_while_inflated
            && self.intact_at_end
            && self.deflate.after.actual_bytes == 0
    }
}

/// Tells the story.
///
/// # Errors
/// Guest or device fail, or the guest gets stuck on the way to a target.
pub fn tell(guest: &mut dyn DemoGuest, options: &Options) -> Result<Outcome, DemoError> {
    let recorder = Recorder::start(guest.observer()?)?;
    let target_bytes = options.target_mib << 20;
    let mut phases = Phases {
        recorder: &recorder,
        list: Vec::new(),
    };

    let checksum = phases.run("write working set", || {
        say(&format!(
            "The guest writes {} MiB of data and keeps it",
            options.working_set_mib
        ));
        guest.make_working_set(options.working_set_mib)
    })?;
    let touched = phases.run("fill memory", || {
        say("It fills the rest of its memory and gives that up again");
        guest.touch_unused_memory()
    })?;
    say(&format!(
        "It has written to {:.0} MiB and occupies {:.0} MiB on the host",
        mib(touched),
        mib(recorder.next()?.reading.host_bytes)
    ));

    say(&format!(
        "Inflate: the guest is asked for {} MiB",
        options.target_mib
    ));
    let inflate = phases.run("inflate", || {
        move_balloon(guest, &recorder, "inflate", target_bytes)
    })?;
    let intact_while_inflated = phases.run("verify", || guest.working_set_is_intact())?;
    say(&format!("Its data is {}", intact(intact_while_inflated)));

    say("Deflate: the guest gets everything back");
    let deflate = phases.run("deflate", || move_balloon(guest, &recorder, "deflate", 0))?;
    phases.run("use memory again", || {
        say(&format!("It writes to {} MiB again", options.target_mib));
        guest.touch_memory(options.target_mib)
    })?;
    let used_again = recorder.next()?.reading;
    let intact_at_end = phases.run("verify", || guest.working_set_is_intact())?;
    say(&format!("Its data is {}", intact(intact_at_end)));

    let phases = phases.list;
    Ok(Outcome {
        memory_bytes: options.memory_mib << 20,
        target_bytes,
        working_set_bytes: options.working_set_mib << 20,
        checksum,
        inflate,
        intact_while_inflated,
        deflate,
        used_again,
        intact_at_end,
        phases,
        samples: recorder.finish(),
    })
}

fn say(text: &str) {
    println!("- {text}");
}

/// How the state of the working set is called.
#[must_use]
pub fn intact(yes: bool) -> &'static str {
    if yes { "intact" } else { "DAMAGED" }
}

struct Phases<'a> {
    recorder: &'a Recorder,
    list: Vec<Phase>,
}

impl Phases<'_> {
    fn run<T>(
        &mut self,
        name: &'static str,
        action: impl FnOnce() -> Result<T, DemoError>,
    ) -> Result<T, DemoError> {
        let start = self.recorder.elapsed();
        let result = action()?;
        self.list.push(Phase {
            name,
            start,
            end: self.recorder.elapsed(),
        });
        Ok(result)
    }
}

/// Sets a target and follows the guest until it is there and host memory has settled.
fn move_balloon(
    guest: &mut dyn DemoGuest,
    recorder: &Recorder,
    what: &'static str,
    target_bytes: u64,
) -> Result<Movement, DemoError> {
    recorder.set_fast(true);
    let before = recorder.next()?.reading;
    let distance = target_bytes.abs_diff(before.actual_bytes);
    let mut progress = Progress::new(what, distance);

    let start = recorder.elapsed();
    guest.set_target(target_bytes)?;
    let mut moved_at = Instant::now();
    let mut last_bytes = before.actual_bytes;
    let reached = loop {
        let sample = recorder.latest()?;
        let actual_bytes = sample.reading.actual_bytes;
        progress.show(sample.at.saturating_sub(start), &before, &sample.reading);
        if sample.at > start && actual_bytes == target_bytes {
            break sample.at;
        }
        if actual_bytes != last_bytes {
            (moved_at, last_bytes) = (Instant::now(), actual_bytes);
        }
        if moved_at.elapsed() > STALL_TIMEOUT {
            return Err(DemoError::Stalled {
                what,
                seconds: STALL_TIMEOUT.as_secs(),
                reached_mib: actual_bytes >> 20,
                target_mib: target_bytes >> 20,
            });
        }
        thread::sleep(DISPLAY_INTERVAL);
    };
    let after = settle(recorder)?;
    progress.finish(reached - start, &before, &after);
    recorder.set_fast(false);
    Ok(Movement {
        start,
        reached,
        before,
        after,
    })
}

/// Waits until the device owes nothing and host memory does not change any more.
fn settle(recorder: &Recorder) -> Result<Reading, DemoError> {
    let begin = Instant::now();
    let mut last = recorder.next()?;
    let mut since = last.at;
    loop {
        let sample = recorder.next()?;
        let quiet = sample.reading.outstanding_bytes == 0
            && sample.reading.host_bytes == last.reading.host_bytes;
        if !quiet {
            since = sample.at;
        }
        if sample.at - since >= SETTLED || begin.elapsed() >= SETTLE_TIMEOUT {
            return Ok(sample.reading);
        }
        last = sample;
    }
}
