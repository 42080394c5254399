//! A whole device in the calling thread, driven by a script and looked at after each step.

use crate::driver::Driver;
use crate::guest::Guest;
use crate::oracle::{Oracle, Terms};
use crate::script::{Layout, Script, Segment, Step};
use aerostat_device::memory::Gpa;
use aerostat_device::{
    Counters, Device, DeviceConfig, DeviceKind, DeviceState, Element, IoVec, QueueConfig,
    QueuePosition, RingConfig, Runtime,
};
use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

const QUEUES: u16 = DeviceKind::VirtioBalloon.queues();
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
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(|| Host {
            runtime: Runtime::inline().expect("a runtime"),
            guest: Guest::new(),
            kicks: (0..QUEUES).map(|_| event()).collect(),
            call: event(),
        });
        host.guest.refill();
        Run::new(host, layout, script).play(script)
    })
}

/// A started ring.
#[derive(Clone, Copy, Debug)]
struct Started {
    from: QueuePosition,
    places: [u64; 3],
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
    /// Where the device may have written since it was last looked at.
    writes: Vec<(u64, u64)>,
    /// All rings are where drivers put them, so that none of them can feed another.
    tame: bool,
    /// Elements on their way, by token: the ranges that they report.
    elements: BTreeMap<u64, Vec<(u64, u64)>>,
    next_token: u64,
    /// Chains taken from split rings that were stopped again, and how often one was stopped.
    consumed: u64,
    stops: u64,
}

fn features(bits: u8, layout: Layout) -> u64 {
    const OPTIONAL: [u32; 8] = [1, 3, 5, 4, 29, 28, 0, 35];
    let chosen = OPTIONAL.iter().enumerate();
    let chosen = chosen.filter(|(bit, _)| bits & (1 << bit) != 0);
    let packed = if layout == Layout::Packed { 1 << 34 } else { 0 };
    chosen.fold(1 << 32 | packed, |features, (_, feature)| {
        features | 1 << feature
    })
}

impl<'a> Run<'a> {
    fn new(host: &'a mut Host, layout: Layout, script: &Script) -> Self {
        let config = DeviceConfig {
            kind: DeviceKind::VirtioBalloon,
            features: DeviceKind::VirtioBalloon.supported_features(),
            config_event: None,
            completion_event: None,
        };
        let device = Device::new(&host.runtime, config).expect("a device");
        device
            .set_memory(host.guest.table(u8::MAX, false))
            .expect("memory");
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
            terms: Terms {
                regions: u8::MAX,
                pinned: false,
                inhibited: false,
            },
            inhibits: 0,
            writes: Vec::new(),
            tame: true,
            elements: BTreeMap::new(),
            next_token: 1,
            consumed: 0,
            stops: 0,
        }
    }

    fn play(mut self, script: &Script) -> Counters {
        self.set_up(script.queues | 1);
        for step in &script.steps {
            self.step(step);
            if !self.settle() {
                break;
            }
        }
        self.end()
    }

    /// From features to DRIVER_OK.
    fn set_up(&mut self, queues: u8) {
        self.device
            .set_features(self.features)
            .expect("features that are offered");
        for queue in (0..QUEUES).filter(|queue| queues & (1 << queue) != 0) {
            self.start(queue, None);
        }
        self.device.activate().expect("a device that is set up");
    }

    fn start(&mut self, queue: u16, places: Option<[u64; 3]>) {
        let driver = &mut self.drivers[usize::from(queue)];
        let from = driver.start();
        let at = places.unwrap_or_else(|| driver.places());
        let [desc, avail, used] = at.map(Gpa);
        let ring = (self.layout != Layout::Elements).then(|| RingConfig {
            desc,
            avail,
            used,
            kick: self.host.kicks[usize::from(queue)]
                .try_clone()
                .expect("a descriptor"),
            call: Some(self.host.call.try_clone().expect("a descriptor")),
            position: from,
        });
        if self
            .device
            .start_queue(
                queue,
                QueueConfig {
                    size: driver.size,
                    ring,
                },
            )
            .is_ok()
        {
            driver.resume(from);
            // A driver clears its rings.
            if self.layout != Layout::Elements && places.is_none() {
                self.host.guest.write(at[0], &[0; 0x1000]);
            }
            self.tame &= places.is_none();
            self.started[usize::from(queue)] = Some(Started { from, places: at });
        }
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
        let taken = to.next_avail.wrapping_sub(started.from.next_avail);
        let completed = to.next_used.wrapping_sub(started.from.next_used);
        match self.layout {
            Layout::Split => {
                assert_eq!(
                    taken, completed,
                    "queue {queue}: chains taken and completed"
                );
                self.consumed += u64::from(taken);
                self.stops += 1;
            }
            Layout::Packed => assert_eq!(to.next_avail, to.next_used, "queue {queue}"),
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
                let queue = u16::from(*queue) % QUEUES;
                if self.layout == Layout::Elements {
                    self.submit(queue, &segments.0);
                } else {
                    let driver = &mut self.drivers[usize::from(queue)];
                    driver.offer(&mut self.host.guest, &segments.0, *indirect);
                }
            }
            Step::Spoil { queue, at, value } => {
                let queue = usize::from(u16::from(*queue) % QUEUES);
                let [desc, ..] = self.drivers[queue].places();
                let at = desc + u64::from(*at % 0x800) * 2;
                self.host.guest.write(at, &value.to_le_bytes());
            }
            Step::Kick(queue) => {
                let kick = &self.host.kicks[usize::from(u16::from(*queue) % QUEUES)];
                rustix::io::write(kick, &1u64.to_ne_bytes()).expect("an eventfd");
            }
            Step::ReadConfig(offset, len) => {
                self.device
                    .read_config(*offset, &mut vec![0; usize::from(*len)]);
            }
            Step::WriteConfig(offset, bytes) => {
                self.device.write_config(u64::from(*offset), &bytes.0);
            }
            Step::Target(bytes) => drop(self.device.set_target_bytes(u64::from(*bytes))),
            Step::Pause(true) => drop(self.device.pause()),
            Step::Pause(false) => drop(self.device.resume()),
            Step::Inhibit(true) => {
                self.device.inhibit();
                self.inhibits += 1;
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
        self.terms.inhibited = self.inhibits > 0;
    }

    fn set_memory(&mut self, regions: u8, pin: bool) {
        let table = self.host.guest.table(regions, pin);
        if self.device.set_memory(table).is_ok() {
            self.terms.regions = regions;
            self.terms.pinned = pin;
        }
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

    /// Hands over an element: iovecs in guest memory, as far as they are.
    #[allow(unsafe_code, reason = "elements are memory of this process")]
    fn submit(&mut self, queue: u16, segments: &[Segment]) {
        let mut element = Element {
            queue,
            token: self.next_token,
            ..Element::default()
        };
        let mut reported = Vec::new();
        for segment in segments {
            let gpa = segment.address.gpa();
            let Some((address, room)) = self.host.guest.host(gpa) else {
                continue;
            };
            let len = usize::try_from(segment.length.bytes())
                .unwrap_or(0)
                .min(room);
            // SAFETY: guest memory stays mapped; it is written to by no queue that takes elements.
            let iov = unsafe { IoVec::new(address, len) };
            if segment.writable {
                reported.push((gpa, len as u64));
                element.writable.push(iov);
            } else {
                element.readable.push(iov);
            }
        }
        if self.device.submit(vec![element]).is_ok() {
            self.elements.insert(self.next_token, reported);
            self.next_token += 1;
        }
    }

    /// Each element comes back once.
    fn collect(&mut self, max: usize) {
        let mut completions = Vec::new();
        self.device.completions(max, &mut completions);
        assert!(completions.len() <= max, "more completions than asked for");
        for completion in completions {
            let known = self.elements.remove(&completion.token);
            assert!(
                known.is_some(),
                "{completion:?} came twice, or was never submitted"
            );
            assert_eq!(completion.written, 0, "no queue of a balloon writes");
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
        let turns = (0..MAX_TURNS)
            .take_while(|_| self.host.runtime.turn())
            .count();
        let ended = turns < MAX_TURNS;
        assert!(ended || !self.tame, "a device that is never done");
        let reported: Vec<_> = self.elements.values().flatten().copied().collect();
        let Self {
            oracle,
            device,
            host,
            terms,
            writes,
            ..
        } = self;
        oracle.check(device, &mut host.guest, *terms, writes, &reported);
        self.writes.clear();
        ended
    }

    fn end(mut self) -> Counters {
        for queue in 0..QUEUES {
            self.stop(queue);
        }
        let counters = self.device.counters();
        let chains = [
            counters.inflate_chains,
            counters.deflate_chains,
            counters.report_chains,
            counters.stats_chains,
            counters.hint_chains,
        ];
        let chains: u64 = chains.iter().sum();
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
