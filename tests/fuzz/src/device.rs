//! A whole device in the calling thread, driven by a script and looked at after each step.

mod messages;
mod moving;

use crate::driver::Driver;
use crate::guest::{Guest, PAGE};
use crate::oracle::{Oracle, Terms};
use crate::script::{Layout, Pace, Script, Step};
use aerostat_device::memory::Gpa;
use aerostat_device::{
    Counters, Device, DeviceConfig, DeviceKind, DeviceState, QueueConfig, QueuePosition,
    RingConfig, Runtime, WriteBehind,
};
use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

const KIND: DeviceKind = DeviceKind::VirtioBalloon;
const QUEUES: u16 = KIND.queues();
/// The pinned region's bit.
const PINNED_REGION: u8 = 1 << 4;
/// Turns after which a device that still has work is one that never ends. A script makes at most a few
/// hundred chains available.
const MAX_TURNS: usize = 1000;

/// What is made once a thread: mappings and descriptors are dear.
struct Host {
    runtime: Arc<Runtime>,
    guest: Guest,
    kicks: Vec<OwnedFd>,
    call: OwnedFd,
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

/// Runs one script.
///
/// # Panics
/// If an oracle is violated.
pub fn run(bytes: &[u8], layout: Layout) {
    let Ok(script) = Script::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    play(&script, layout);
}

/// Plays a script; returns the books as they are in the end.
///
/// # Panics
/// If an oracle is violated.
pub fn play(script: &Script, layout: Layout) -> Counters {
    with_host(|host| {
        let mut run = Run::new(host, layout, script);
        run.set_up(script.queues | 1);
        run.play(script)
    })
}

/// Plays a script on a device that begins with `saved`, which anybody may have written.
///
/// # Panics
/// If an oracle is violated.
pub fn play_saved(saved: &[u8], script: &Script, layout: Layout) {
    with_host(|host| {
        let mut run = Run::new(host, layout, script);
        let fresh = run.device.save();
        if run.device.restore(saved).is_err() {
            assert_eq!(
                run.device.save(),
                fresh,
                "refused, and changed all the same"
            );
            run.set_up(script.queues | 1);
        } else {
            run.go_on();
        }
        run.play(script);
    });
}

fn with_host<T>(play: impl FnOnce(&mut Host) -> T) -> T {
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(|| Host {
            runtime: Runtime::inline().expect("a runtime"),
            guest: Guest::new(),
            kicks: (0..QUEUES).map(|_| event()).collect(),
            call: event(),
        });
        host.guest.refill();
        play(host)
    })
}

/// A started ring.
#[derive(Clone, Copy, Debug)]
struct Started {
    from: QueuePosition,
    places: [u64; 3],
    /// It began where a driver or a device left off, not where somebody made up.
    honest: bool,
}

struct Run<'a> {
    host: &'a mut Host,
    layout: Layout,
    features: u64,
    device: Device,
    drivers: Vec<Driver>,
    started: Vec<Option<Started>>,
    oracle: Oracle,
    terms: Terms,
    inhibits: u32,
    /// Regions in the table, a bit each.
    regions: u8,
    write_behind: WriteBehind,
    pace: Pace,
    /// The driver numbers its queues without gaps.
    dense: bool,
    /// Messages of the driver so far: each has a page for its buffers.
    messages: u8,
    /// Where the device may have written since it was last looked at.
    writes: Vec<(u64, u64)>,
    /// All rings are where drivers put them, so that none of them can feed another.
    tame: bool,
    /// Elements on their way, by token: the ranges that they report.
    elements: BTreeMap<u64, Vec<(u64, u64)>>,
    next_token: u64,
    /// Chains that this device took from split rings that were stopped again.
    consumed: u64,
}

impl Host {
    /// A device with memory, before anything is negotiated.
    fn device(&self, regions: u8, pinned: bool, write_behind: WriteBehind) -> Device {
        let config = DeviceConfig {
            kind: KIND,
            features: KIND.supported_features(),
            ..DeviceConfig::default()
        };
        let device = Device::new(&self.runtime, config).expect("a device");
        let table = self.guest.table(regions, pinned);
        device.set_memory(table).expect("memory");
        device.set_write_behind(write_behind);
        device
    }
}

/// Settings of write-behind: off, at a few pages, at some more, at the end only, at once.
fn write_behind(choice: u8) -> WriteBehind {
    const FOREVER: Duration = Duration::from_secs(3600);
    let (pages, delay) = [
        (0, FOREVER),
        (3, FOREVER),
        (16, FOREVER),
        (1 << 30, FOREVER),
        (1 << 30, Duration::ZERO),
    ][usize::from(choice) % 5];
    WriteBehind {
        limit_bytes: pages * PAGE as u64,
        delay,
    }
}

fn features(bits: u16, layout: Layout) -> u64 {
    const OPTIONAL: [u32; 12] = [1, 3, 5, 4, 29, 28, 0, 35, 50, 51, 2, 52];
    let chosen = OPTIONAL.iter().enumerate();
    let chosen = chosen.filter(|(bit, _)| bits & (1 << bit) != 0);
    let packed = if layout == Layout::Packed { 1 << 34 } else { 0 };
    chosen.fold(1 << 32 | packed, |features, (_, feature)| {
        features | 1 << feature
    })
}

impl<'a> Run<'a> {
    fn new(host: &'a mut Host, layout: Layout, script: &Script) -> Self {
        let write_behind = write_behind(script.write_behind);
        let device = host.device(script.regions, false, write_behind);
        let sizes = script.sizes.iter();
        let drivers = (0..).zip(sizes);
        let drivers = drivers
            .map(|(queue, size)| Driver::new(layout, queue, *size))
            .collect();
        let oracle = Oracle::new(&device);
        Self {
            host,
            layout,
            features: features(script.features, layout),
            device,
            drivers,
            started: vec![None; usize::from(QUEUES)],
            oracle,
            terms: Terms::default(),
            inhibits: 0,
            regions: script.regions,
            write_behind,
            pace: Pace::All,
            dense: script.queues & 0x20 != 0,
            messages: 0,
            writes: Vec::new(),
            tame: true,
            elements: BTreeMap::new(),
            next_token: 1,
            consumed: 0,
        }
    }

    fn play(mut self, script: &Script) -> Counters {
        for step in &script.steps {
            let before = self.terms;
            self.step(step);
            // What the step itself did, it did on the old terms.
            self.look(Terms {
                broken: self.terms.broken,
                window: before.window || self.terms.window,
                ..before
            });
            if !self.settle() {
                break;
            }
        }
        self.end()
    }

    /// From features to DRIVER_OK.
    fn set_up(&mut self, queues: u8) {
        // A forged state may have had others.
        self.lay_out_for(self.features);
        self.device
            .set_features(self.features)
            .expect("features that are offered");
        let queues = if self.dense {
            self.dense_queues()
        } else {
            queues
        };
        for queue in (0..QUEUES).filter(|queue| queues & (1 << queue) != 0) {
            self.start(queue, None);
        }
        self.device.activate().expect("a device that is set up");
        self.note_terms();
    }

    /// Rings have the layout that the features say.
    fn lay_out_for(&mut self, features: u64) {
        if self.layout == Layout::Elements {
            return;
        }
        let packed = features & 1 << 34 != 0;
        self.layout = if packed {
            Layout::Packed
        } else {
            Layout::Split
        };
        for driver in &mut self.drivers {
            driver.change_layout(self.layout);
        }
    }

    fn start(&mut self, queue: u16, places: Option<[u64; 3]>) {
        let driver = &self.drivers[usize::from(queue)];
        let (from, own) = (driver.start(), driver.places());
        let at = places.unwrap_or(own);
        if self.start_at(queue, at, from) {
            let driver = &mut self.drivers[usize::from(queue)];
            driver.resume(from);
            // A driver clears its rings.
            if self.layout != Layout::Elements && places.is_none() {
                self.host.guest.write(at[0], &[0; 0x1000]);
            }
            self.tame &= places.is_none();
            self.started[usize::from(queue)] = Some(Started {
                from,
                places: at,
                honest: true,
            });
        }
    }

    /// Starts a queue where the device is to begin; whether that is possible.
    fn start_at(&mut self, queue: u16, places: [u64; 3], position: QueuePosition) -> bool {
        let [desc, avail, used] = places.map(Gpa);
        let kick = &self.host.kicks[usize::from(queue)];
        let ring = (self.layout != Layout::Elements).then(|| RingConfig {
            desc,
            avail,
            used,
            kick: kick.try_clone().expect("a descriptor"),
            call: Some(self.host.call.try_clone().expect("a descriptor")),
            position,
        });
        let size = self.drivers[usize::from(queue)].size;
        let config = QueueConfig { size, ring };
        self.device.start_queue(queue, config).is_ok()
    }

    /// Stops a queue: each chain that was taken was completed (I2).
    fn stop(&mut self, queue: u16) {
        self.note_writes();
        let Ok(to) = self.device.stop_queue(queue) else {
            assert!(
                self.started[usize::from(queue)].is_none(),
                "a started queue stops"
            );
            return;
        };
        let started = self.started[usize::from(queue)].take();
        let started = started.expect("only a queue that was started stops");
        self.account(queue, started, to);
    }

    /// Each chain that was taken was completed (I2).
    fn account(&mut self, queue: u16, started: Started, to: QueuePosition) {
        let taken = to.next_avail.wrapping_sub(started.from.next_avail);
        let completed = to.next_used.wrapping_sub(started.from.next_used);
        match self.layout {
            Layout::Split => {
                assert_eq!(
                    taken, completed,
                    "queue {queue}: chains taken and completed"
                );
                self.consumed += u64::from(taken);
            }
            Layout::Packed if started.honest => {
                assert_eq!(to.next_avail, to.next_used, "queue {queue}");
            }
            Layout::Packed => {}
            Layout::Elements => assert_eq!(to, QueuePosition::SPLIT_START),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Poke(address, bytes) => self.host.guest.write(address.gpa(), &bytes.0),
            Step::List { buffer, pages } => {
                let bytes: Vec<u8> = pages.0.iter().flat_map(|page| page.to_le_bytes()).collect();
                self.host
                    .guest
                    .write(crate::script::buffer(*buffer), &bytes);
            }
            Step::Offer {
                queue,
                segments,
                indirect,
            } => {
                self.offer(u16::from(*queue) % QUEUES, &segments.0, *indirect);
            }
            Step::Tell {
                deflate,
                pages,
                answer,
                indirect,
            } => self.tell(*deflate, pages, *answer, *indirect),
            Step::Report(runs, indirect) => self.report(&runs.0, *indirect),
            Step::Statistics(records) => self.send_statistics(&records.0),
            Step::Hint(hint) => self.send_hint(*hint),
            Step::Spoil { queue, at, value } => {
                let queue = usize::from(u16::from(*queue) % QUEUES);
                let [desc, ..] = self.drivers[queue].places();
                let at = desc + u64::from(*at % 0x800) * 2;
                self.host.guest.write(at, &value.to_le_bytes());
            }
            Step::Kick(queue) => self.kick(u16::from(*queue) % QUEUES),
            Step::ReadConfig(offset, len) => {
                self.device
                    .read_config(*offset, &mut vec![0; usize::from(*len)]);
            }
            Step::WriteConfig(offset, bytes) => {
                self.device.write_config(u64::from(*offset), &bytes.0);
            }
            Step::Target(pages) => {
                let bytes = u64::from(*pages) * PAGE as u64;
                drop(self.device.set_target_bytes(bytes));
            }
            Step::WriteBehind(choice) => {
                self.write_behind = write_behind(*choice);
                self.device.set_write_behind(self.write_behind);
                self.assert_drained();
            }
            Step::Flush => {
                self.device.flush();
                self.assert_drained();
            }
            Step::ResetBalloon => {
                let negotiated = self.device.features() & 1 << 51 != 0;
                let state = self.device.state();
                let runs = matches!(state, DeviceState::Active | DeviceState::Paused);
                assert_eq!(self.device.reset_balloon().is_ok(), negotiated && runs);
            }
            Step::AcknowledgeReset => {
                let mut id = [0; 4];
                self.device.read_config(16, &mut id);
                self.device.write_config(20, &id);
                assert!(!self.device.reset_pending() || self.device.features() & 1 << 51 == 0);
            }
            Step::Move { edits, seal } => self.relocate(&edits.0, *seal),
            Step::Pace(pace) => self.pace = *pace,
            Step::Pause(true) => {
                if self.device.pause().is_ok() {
                    self.assert_drained();
                }
            }
            Step::Pause(false) => drop(self.device.resume()),
            Step::Inhibit(true) => {
                self.device.inhibit();
                self.inhibits += 1;
                self.assert_drained();
            }
            Step::Inhibit(false) => {
                assert_eq!(self.device.uninhibit().is_ok(), self.inhibits > 0);
                self.inhibits = self.inhibits.saturating_sub(1);
            }
            Step::Reset(again) => {
                self.reset();
                if *again {
                    self.set_up(0x1f);
                }
            }
            Step::Stop(queue) => self.stop(u16::from(*queue) % QUEUES),
            Step::Start(queue) => self.start(u16::from(*queue) % QUEUES, None),
            Step::StartAt(queue, places) => {
                let places = places.map(crate::script::Address::gpa);
                self.start(u16::from(*queue) % QUEUES, Some(places));
            }
            Step::Memory(regions, pin) => self.set_memory(*regions, *pin),
            Step::AskStats => drop(self.device.guest_stats(Duration::from_nanos(1))),
            Step::Hints(action) => self.hints(*action),
            Step::Call(queue, some) => {
                let call = some.then(|| self.host.call.try_clone().expect("a descriptor"));
                let _ = self.device.set_queue_call(u16::from(*queue) % QUEUES, call);
            }
            Step::Collect(max) => self.collect(usize::from(*max)),
        }
        self.note_terms();
    }

    fn set_memory(&mut self, regions: u8, pin: bool) {
        let table = self.host.guest.table(regions, pin);
        if self.device.set_memory(table).is_ok() {
            self.regions = regions;
            self.terms.pinned = pin;
        }
    }

    fn note_terms(&mut self) {
        let features = self.device.features();
        let negotiated = |bit: u32| features & 1 << bit != 0;
        let pinned = self.terms.pinned || self.regions & PINNED_REGION != 0;
        self.terms.inhibited = self.inhibits > 0;
        self.terms.window = self.write_behind.limit_bytes > 0 && negotiated(0) && !pinned;
        self.terms.told = negotiated(0);
        self.terms.answers = negotiated(50);
    }

    /// Waits for no alarm and no worker: what was acknowledged is discarded (I2).
    fn assert_drained(&self) {
        assert_eq!(self.device.counters().balloon.pending_bytes, 0, "drained");
    }

    fn kick(&self, queue: u16) {
        let kick = &self.host.kicks[usize::from(queue)];
        rustix::io::write(kick, &1u64.to_ne_bytes()).expect("an eventfd");
    }

    fn hints(&mut self, action: u8) {
        match action % 3 {
            0 => drop(self.device.start_hints(Duration::from_secs(600))),
            1 => drop(self.device.finish_hints()),
            _ => {
                let mut ranges = Vec::new();
                self.device.take_hints(16, &mut ranges);
                for range in ranges {
                    assert!(range.start < range.end, "an empty hint");
                    assert!(
                        self.host.guest.exists(range),
                        "a hint outside memory: {range:?}"
                    );
                }
            }
        }
    }

    fn reset(&mut self) {
        for queue in 0..QUEUES {
            if self.device.state() != DeviceState::NeedsReset && queue % 2 == 0 {
                // Some are stopped first, some by the reset itself.
                self.stop(queue);
            }
        }
        self.note_writes();
        self.device.reset();
        self.started.fill(None);
        self.tame = true;
        self.terms.broken = false;
        assert_eq!(self.device.ballooned_bytes(), 0, "empty after a reset");
        assert_eq!(self.device.state(), DeviceState::Configuring);
        self.collect(usize::MAX);
        assert!(
            self.elements.is_empty(),
            "elements are lost: {:?}",
            self.elements
        );
    }

    /// Notes where the started rings let the device write.
    fn note_writes(&mut self) {
        for (started, driver) in self.started.iter().zip(&self.drivers) {
            if let Some(started) = started {
                let areas = Driver::device_writes(self.layout, driver.size, started.places);
                self.writes.extend(areas);
            }
        }
    }

    /// Has the device do all that it wants to do, and looks at the result; false if a ring feeds itself.
    fn settle(&mut self) -> bool {
        self.note_writes();
        let parts = self.pace == Pace::All;
        let most = if self.pace == Pace::Nothing {
            0
        } else {
            MAX_TURNS
        };
        let turns = (0..most)
            .take_while(|_| self.host.runtime.turn(parts))
            .count();
        let ended = turns < MAX_TURNS;
        assert!(ended || !self.tame, "a device that is never done");
        self.look(self.terms);
        self.writes.clear();
        ended
    }

    fn look(&mut self, terms: Terms) {
        self.note_writes();
        let mapped: Vec<_> = self.elements.values().flatten().copied().collect();
        let Self {
            oracle,
            device,
            host,
            writes,
            ..
        } = self;
        oracle.check(device, &mut host.guest, terms, writes, &mapped);
    }

    fn end(mut self) -> Counters {
        self.pace = Pace::All;
        for queue in 0..QUEUES {
            self.stop(queue);
        }
        let counters = self.device.counters();
        let chains = all_chains(&counters);
        assert!(counters.chain_errors <= chains, "{counters:?}");
        if self.layout == Layout::Split {
            assert!(
                self.consumed <= chains,
                "chains that were taken and not counted"
            );
        }
        self.reset();
        self.settle();
        counters
    }
}

fn all_chains(counters: &Counters) -> u64 {
    let chains = [
        counters.inflate_chains,
        counters.deflate_chains,
        counters.report_chains,
        counters.stats_chains,
        counters.hint_chains,
    ];
    chains.iter().sum()
}
