//! The soak: 64 guests at work, and a VMM that does to them at random whatever a VMM may do. Nothing is
//! lost, the books balance (invariants I1, I2, I4), and when the guests are gone, so is everything that
//! was made for them: memory, descriptors, threads.
//!
//! `AEROSTAT_SOAK_SECONDS` says how long (20), `AEROSTAT_SEED` runs a sequence again; `make soak` runs half
//! an hour.

use aerostat::{
    AEROSTAT_FEATURE_FREE_PAGE_HINT, AEROSTAT_FEATURE_HOST_RESET, AEROSTAT_FEATURE_MUST_TELL_HOST,
    AEROSTAT_FEATURE_PAGE_REFUSAL,
};
use aerostat_tests::vmm::allocator::mix;
use aerostat_tests::vmm::driver::Role;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::usage::{Usage, allow_many_descriptors, resident_bytes};
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const GUESTS: u64 = 64;
const GUEST_MIB: u64 = 16;
/// Where memory is plugged in and out.
const PLUGGED: u64 = 64 * MIB;
const PLUGGED_PAGES: u64 = 256;
/// Generous: all guests share what processors there are.
const PATIENCE: Duration = Duration::from_secs(600);
/// What may stay resident beyond what was after the warm-up: pages that the allocator cannot give back.
const TOLERANCE_BYTES: u64 = 16 << 20;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0) % bound
    }
}

/// What all guests share.
struct Soak {
    /// A guest moves between them.
    vmms: [Vmm; 2],
    seed: u64,
    /// How often each thing was done.
    done: Mutex<BTreeMap<&'static str, u64>>,
    actions: AtomicU64,
    failed: AtomicBool,
}

impl Soak {
    fn note(&self, what: &'static str) {
        self.actions.fetch_add(1, Ordering::Relaxed);
        let mut done = self.done.lock().expect("a tally");
        *done.entry(what).or_default() += 1;
    }
}

/// The kinds of guests, by their place among them: a half of them with packed rings.
fn config(place: u64) -> GuestConfig {
    let backings = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];
    let backing = backings[usize::from(place % 2 == 1)];
    let mut config = GuestConfig::new(backing, GUEST_MIB);
    let standard = GuestConfig::LINUX & !AEROSTAT_FEATURE_FREE_PAGE_HINT;
    let more = match place % 8 {
        0 | 1 => AEROSTAT_FEATURE_HOST_RESET,
        2 => AEROSTAT_FEATURE_HOST_RESET | AEROSTAT_FEATURE_PAGE_REFUSAL,
        3 => AEROSTAT_FEATURE_PAGE_REFUSAL,
        5 => AEROSTAT_FEATURE_FREE_PAGE_HINT,
        _ => 0,
    };
    config.offered = standard | more;
    config.selected = config.offered;
    if place % 8 == 6 {
        config.selected &= !AEROSTAT_FEATURE_MUST_TELL_HOST;
    }
    config.elements = place % 8 == 7;
    // Where the library sees rings at all.
    config.settings.packed |= place % 16 >= 8;
    config.settings.in_order |= place % 32 >= 16;
    config
}

/// One guest of the many, and what the VMM has done to it.
struct Life<'a> {
    soak: &'a Soak,
    random: Random,
    guest: Guest,
    inhibits: u64,
    plugged: bool,
    /// Which of the VMMs it is with.
    at: usize,
}

impl Life<'_> {
    /// One thing that a VMM does.
    fn act(&mut self) -> Result<&'static str> {
        let number = self.random.below(1 << 32);
        Ok(match self.random.below(16) {
            0..=3 => {
                // The guest tries again what was refused.
                self.guest.driver().release_refused();
                self.guest
                    .device()
                    .set_target(number % (GUEST_MIB - 4) * MIB)?;
                "set a target"
            }
            4 => {
                self.guest.device().pause()?;
                self.guest.device().resume()?;
                "pause"
            }
            5 if self.inhibits < 3 => {
                self.guest.device().inhibit()?;
                self.inhibits += 1;
                "inhibit"
            }
            5 | 6 => {
                self.uninhibit()?;
                "uninhibit"
            }
            7 | 8 => {
                let limits = [0, MIB / 8, MIB, 1 << 40];
                let limit = limits[usize::from(number.to_le_bytes()[0] % 4)];
                let delay_ms = u32::from(number.to_le_bytes()[1]) % 20;
                self.guest.device().set_write_behind(limit, delay_ms)?;
                "change write-behind"
            }
            9 => {
                self.guest.device().flush()?;
                "flush"
            }
            10 => {
                self.plug()?;
                "plug memory in or out"
            }
            11 if !self.guest.config().elements => {
                self.at = 1 - self.at;
                self.guest.move_to(&self.soak.vmms[self.at])?;
                // The VMM's own settings move with it.
                for _ in 0..self.inhibits {
                    self.guest.device().inhibit()?;
                }
                "move"
            }
            12 if self.guest.config().offered & AEROSTAT_FEATURE_HOST_RESET != 0 => {
                self.guest.device().reset_balloon()?;
                "reset the balloon"
            }
            13 => {
                self.guest.stop_following();
                self.guest.restart_driver()?;
                self.guest.start_following()?;
                "reset the device"
            }
            14 => {
                // It may be busy for longer than that.
                let _ = self
                    .guest
                    .device()
                    .guest_stats(1 + u32::from(number.to_le_bytes()[0]) % 8);
                "ask for statistics"
            }
            _ => {
                let started = self.guest.device().start_hints(1000).is_ok();
                let (_, _) = self.guest.device().take_hints(16)?;
                if started {
                    "ask for hints"
                } else {
                    "look at hints"
                }
            }
        })
    }

    fn uninhibit(&mut self) -> Result<()> {
        if self.inhibits > 0 {
            self.guest.device().uninhibit()?;
            self.inhibits -= 1;
        }
        Ok(())
    }

    /// Memory comes, and its pages go into the balloon; or it goes, in the balloon or not.
    fn plug(&mut self) -> Result<()> {
        if self.plugged {
            self.guest.change_memory(None, Some(PLUGGED))?;
        } else {
            let region = RegionSpec::new(PLUGGED, PLUGGED_PAGES * PAGE_BYTES, Backing::Anonymous);
            self.guest.change_memory(Some(region), None)?;
            let first = PLUGGED / PAGE_BYTES;
            let pages: Vec<u64> = (first..first + PLUGGED_PAGES).collect();
            self.guest.driver().tell(Role::Inflate, &pages)?;
        }
        self.plugged = !self.plugged;
        Ok(())
    }

    /// Everything is undone, the guest still follows its target, and its books and contents are right.
    fn settle(&mut self) -> Result<()> {
        while self.inhibits > 0 {
            self.uninhibit()?;
        }
        if self.plugged {
            self.plug()?;
        }
        self.guest.driver().release_refused();
        self.guest.device().set_target(8 * MIB)?;
        // What the driver said before it saw that its balloon was reset is said of another balloon.
        if self.guest.config().offered & AEROSTAT_FEATURE_HOST_RESET != 0 {
            self.guest.wait_host_reset(PATIENCE)?;
        }
        self.guest.wait_actual(8 * MIB, PATIENCE)?;
        self.guest.stop_following();
        self.guest.device().flush()?;
        self.guest.settled_books()?;
        // Hints keep pages from the balloon; all others have come together by now.
        let (device, driver) = (
            self.guest.device().query()?.ballooned_bytes,
            self.guest.driver().ballooned_bytes(),
        );
        assert_eq!(
            device,
            driver,
            "the device's balloon and the driver's: {:?}, offered {:#x}",
            self.guest.device().counters()?,
            self.guest.config().offered
        );
        Ok(())
    }
}

/// Guests one after the other at one place until `end`.
fn live(soak: &Soak, place: u64, round: u64, end: Instant) -> Result<()> {
    let mut random = Random(mix(soak.seed ^ mix(place << 32 | round)));
    while Instant::now() < end {
        let at = usize::from(random.below(2) == 1);
        let mut guest = soak.vmms[at].boot(&config(place))?;
        let working_set = guest.fill_memory(512, place)?;
        guest.start_following()?;
        let mut life = Life {
            soak,
            random: Random(random.below(u64::MAX)),
            guest,
            inhibits: 0,
            plugged: false,
            at,
        };
        for _ in 0..200 {
            if Instant::now() >= end || soak.failed.load(Ordering::Relaxed) {
                break;
            }
            let what = life.act()?;
            soak.note(what);
            // So that the guest gets somewhere between two of them, sometimes.
            let nap = life.random.below(20);
            std::thread::sleep(Duration::from_millis(nap * nap / 20));
        }
        life.settle()?;
        life.guest.assert_intact(&working_set);
        soak.note("settle and leave");
    }
    Ok(())
}

/// All guests live for a while, and are gone; what the process has then.
fn round(soak: &Soak, number: u64, length: Duration, bar: &ProgressBar) -> Result<Usage> {
    let end = Instant::now() + length;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..GUESTS)
            .map(|place| {
                scope.spawn(move || {
                    let lived = live(soak, place, number, end);
                    let failed = lived.is_err() || std::thread::panicking();
                    soak.failed.fetch_or(failed, Ordering::Relaxed);
                    lived
                })
            })
            .collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            show(soak, bar);
            std::thread::sleep(Duration::from_millis(250));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("the guest's thread lives"))
    })?;
    Usage::now()
}

fn show(soak: &Soak, bar: &ProgressBar) {
    bar.set_position(bar.elapsed().as_secs());
    let resident = resident_bytes().unwrap_or(0) >> 20;
    let actions = soak.actions.load(Ordering::Relaxed);
    bar.set_message(format!("{actions} actions, {resident} MiB"));
}

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn guests_come_and_go_and_leave_nothing_behind() -> Result<()> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let fresh = clock.map_or(1, |time| u64::from(time.subsec_nanos()) ^ time.as_secs());
    let seed = number_from("AEROSTAT_SEED").unwrap_or(fresh);
    let seconds = number_from("AEROSTAT_SOAK_SECONDS").unwrap_or(20).max(2);
    println!("AEROSTAT_SEED={seed}");
    let descriptors = allow_many_descriptors();
    assert!(
        descriptors >= 4096,
        "64 guests need more than {descriptors} descriptors"
    );

    let soak = Soak {
        vmms: [Vmm::new()?, Vmm::new()?],
        seed,
        done: Mutex::default(),
        actions: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    let bar = ProgressBar::new(seconds);
    if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {msg}") {
        bar.set_style(style);
    }
    // A quarter to warm up, at most two minutes; the rest in rounds of at most three.
    let warm_up = (seconds / 4).clamp(1, 120);
    let rounds = (seconds - warm_up).div_ceil(180).max(1);
    let length = Duration::from_secs(seconds - warm_up) / u32::try_from(rounds).unwrap_or(1);
    let before = round(&soak, 0, Duration::from_secs(warm_up), &bar)?;
    let mut after = before;
    let say = |number: u64, usage: Usage| {
        let line = format!(
            "after round {number}: {} MiB resident, {} descriptors, {} threads",
            usage.resident_bytes >> 20,
            usage.descriptors,
            usage.threads
        );
        if std::io::stderr().is_terminal() {
            bar.println(line);
        } else {
            println!("{line}");
        }
    };
    say(0, before);
    for number in 1..=rounds {
        after = round(&soak, number, length, &bar)?;
        say(number, after);
    }
    bar.finish_and_clear();
    for (what, times) in soak.done.lock().expect("a tally").iter() {
        println!("{times:8} x {what}");
    }
    assert_eq!(after.descriptors, before.descriptors, "descriptors");
    assert_eq!(after.threads, before.threads, "threads");
    let grown = after.resident_bytes.saturating_sub(before.resident_bytes);
    assert!(
        grown <= TOLERANCE_BYTES,
        "{} MiB were not given back",
        grown >> 20
    );
    Ok(())
}
