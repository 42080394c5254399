//! The memory balloon with device ID 13: batches of commands and messages of the device, against
//! docs/memballoon.md as a model. Rings themselves are what `split`, `packed` and `elements` are about.

mod commands;

use crate::driver::Driver;
use crate::guest::{Guest, PAGE, REGIONS};
use crate::ledger::{Discards, Ledger};
use crate::script::{Address, Few, Layout, Length, Segment, interesting};
use aerostat_device::memory::Gpa;
use aerostat_device::{
    Completion, Device, DeviceConfig, DeviceKind, DeviceState, Element, IoVec, QueueConfig,
    RingConfig, Runtime, WriteBehind,
};
use arbitrary::{Arbitrary, Unstructured};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

const KIND: DeviceKind = DeviceKind::Memballoon;
const EXTRA_MEM: u64 = 1 << 0;
const RINGS: u64 = 1 << 28 | 1 << 32;
const PACKED: u64 = 1 << 34;
const FROMDEVQ: u16 = 0;
const TODEVQ: u16 = 1;
/// Regions that the guest did not boot with, a bit each, and all others.
const EXTRA: u8 = 1 << 5 | 1 << 6;
const PINNED: u8 = 1 << 4;
const MAX_STEPS: usize = 40;

#[derive(Arbitrary, Debug)]
struct Script {
    layout: u8,
    /// Pages of 16 KiB, in place of 4.
    large: bool,
    extra: bool,
    in_order: bool,
    regions: u8,
    waits: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Commands that are made available with one kick.
    Commands(Few<Command>),
    /// A buffer for the device to speak in.
    Buffer {
        len: u8,
        readable: bool,
    },
    Target(u8),
    Grant(u8),
    Inhibit(bool),
    Flush,
    Memory(u8),
    /// Whether parts that are handed to other workers are done before the next step.
    Slow(bool),
    Write(u8, u8),
    Reset,
}

#[derive(Arbitrary, Debug)]
struct Command {
    code: Code,
    addresses: Few<Where>,
    /// Where the readable part is cut into two descriptors.
    cut: u8,
    /// Bytes that are left out at its end.
    short: u8,
    /// Bytes for the answer.
    room: u8,
    indirect: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Code {
    Get,
    Give,
    Exchange,
    Other(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Where {
    Page(u8),
    /// Large pages, of which one begins at every fourth page.
    Large(u8),
    Odd(u8, u16),
    /// The page that holds the list itself, in the last command of a batch.
    List,
    Raw(u64),
}

struct Host {
    runtime: Arc<Runtime>,
    guest: Guest,
    kicks: [OwnedFd; 2],
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
/// If the device does not do what the document says.
pub fn run(bytes: &[u8]) {
    let Ok(script) = Script::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(|| Host {
            runtime: Runtime::inline().expect("a runtime"),
            guest: Guest::new(),
            kicks: [event(), event()],
        });
        host.guest.refill();
        let mut run = Run::new(host, &script);
        run.set_up();
        run.check();
        for step in script.steps.iter().take(MAX_STEPS) {
            run.step(step);
            run.settle();
            run.check();
        }
        run.end();
    });
}

/// A buffer in the fromdevq: where its writable part is, how long, and whether there is a readable one.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    at: u64,
    len: u64,
    readable: bool,
}

struct Run<'a> {
    host: &'a mut Host,
    device: Device,
    layout: Layout,
    features: u64,
    /// Pages of 4 KiB in a page.
    size: u64,
    drivers: [Driver; 2],
    ledger: Ledger,
    regions: u8,
    grant: u64,
    target: u64,
    unsaid: bool,
    buffers: VecDeque<Buffer>,
    inhibits: u32,
    waits: bool,
    slow: bool,
    /// Elements so far, and what the commands among them have to come back with: token, bytes written.
    tokens: u64,
    expected: VecDeque<(u64, u32)>,
    places: u8,
}

impl<'a> Run<'a> {
    fn new(host: &'a mut Host, script: &Script) -> Self {
        let layout =
            [Layout::Split, Layout::Packed, Layout::Elements][usize::from(script.layout) % 3];
        let bits = |set: bool, bits: u64| if set { bits } else { 0 };
        let features = RINGS
            | bits(script.large, 1 << 3)
            | bits(!script.large, 1 << 1)
            | bits(script.extra, EXTRA_MEM)
            | bits(layout == Layout::Packed, PACKED)
            | bits(script.in_order, 1 << 35);
        let config = DeviceConfig {
            kind: KIND,
            features,
            ..DeviceConfig::default()
        };
        let device = Device::new(&host.runtime, config).expect("a device");
        // With a pinned region nothing waits.
        let regions = if script.waits {
            script.regions & !PINNED
        } else {
            script.regions
        } | 1;
        let drivers = [FROMDEVQ, TODEVQ].map(|queue| Driver::new(layout, queue, 5));
        let mut run = Self {
            host,
            device,
            layout,
            features,
            size: if script.large { 4 } else { 1 },
            drivers,
            ledger: Ledger::default(),
            regions,
            grant: 0,
            target: 0,
            unsaid: false,
            buffers: VecDeque::new(),
            inhibits: 0,
            waits: script.waits,
            slow: false,
            tokens: 0,
            expected: VecDeque::new(),
            places: 0,
        };
        run.set_memory(regions);
        run.ledger.balloon = run.extra_pages();
        if run.waits {
            run.device.set_write_behind(WriteBehind {
                limit_bytes: 6 * PAGE as u64,
                delay: Duration::from_secs(3600),
            });
        }
        run
    }

    fn set_up(&mut self) {
        self.device.set_features(self.features).expect("features");
        for queue in [FROMDEVQ, TODEVQ] {
            let driver = &mut self.drivers[usize::from(queue)];
            *driver = Driver::new(self.layout, queue, 5);
            let [desc, avail, used] = driver.places().map(Gpa);
            let kick = &self.host.kicks[usize::from(queue)];
            let ring = (self.layout != Layout::Elements).then(|| RingConfig {
                desc,
                avail,
                used,
                kick: kick.try_clone().expect("a descriptor"),
                call: None,
                position: driver.start(),
            });
            if ring.is_some() {
                self.host.guest.write(desc.0, &[0; PAGE]);
            }
            let size = driver.size;
            let config = QueueConfig { size, ring };
            self.device.start_queue(queue, config).expect("a queue");
        }
        self.device.activate().expect("a device that is set up");
        self.settle();
    }

    /// The pages of the table's regions that `wanted` chooses by their bits.
    fn pages_of(&self, wanted: u8) -> BTreeSet<u64> {
        let present = REGIONS.iter().enumerate();
        let present = present.filter(|(index, _)| self.regions & wanted & 1 << index != 0);
        present
            .flat_map(|(_, spec)| spec.first..spec.first + spec.pages)
            .collect()
    }

    fn extra_pages(&self) -> BTreeSet<u64> {
        if self.features & EXTRA_MEM == 0 {
            return BTreeSet::new();
        }
        self.pages_of(EXTRA)
    }

    fn set_memory(&mut self, regions: u8) {
        let extra = if self.features & EXTRA_MEM != 0 {
            EXTRA
        } else {
            0
        };
        let table = self.host.guest.table_with(regions, extra);
        self.device
            .set_memory(table)
            .expect("a table with the rings");
        let before = self.extra_pages();
        self.regions = regions;
        let now = self.extra_pages();
        // What came is in the balloon, what went is not.
        self.ledger.balloon.extend(now.difference(&before));
        let present = self.pages_of(u8::MAX);
        self.ledger.balloon.retain(|pfn| present.contains(pfn));
        self.note_target();
    }

    /// A target that the guest's memory cuts is said again.
    fn note_target(&mut self) {
        let target = self.device.target_bytes();
        self.unsaid |= std::mem::replace(&mut self.target, target) != target;
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Commands(commands) => self.commands(&commands.0),
            Step::Buffer { len, readable } => self.buffer(u64::from(*len % 64), *readable),
            Step::Target(pages) => {
                let bytes = u64::from(*pages) * PAGE as u64;
                if self.device.set_target_bytes(bytes).is_ok() {
                    self.target = bytes;
                    self.unsaid = true;
                }
            }
            Step::Grant(pages) => {
                let bytes = u64::from(*pages % 16) * PAGE as u64;
                let allowed = self.device.set_extra_grant(bytes).is_ok();
                assert_eq!(allowed, self.features & EXTRA_MEM != 0);
                if allowed {
                    self.grant = bytes;
                    self.unsaid = true;
                }
            }
            Step::Inhibit(true) => {
                self.device.inhibit();
                // What waited was discarded before.
                self.check();
                self.inhibits += 1;
            }
            Step::Inhibit(false) => {
                assert_eq!(self.device.uninhibit().is_ok(), self.inhibits > 0);
                self.inhibits = self.inhibits.saturating_sub(1);
            }
            Step::Flush => {
                self.device.flush();
                assert_eq!(self.device.counters().balloon.pending_bytes, 0);
            }
            Step::Memory(regions) => {
                let kept = if self.waits { !PINNED } else { u8::MAX };
                self.set_memory(regions & kept | 1);
            }
            Step::Slow(slow) => self.slow = *slow,
            Step::Write(page, byte) => {
                let page = interesting(*page);
                if page >= 0x20 {
                    self.host
                        .guest
                        .write(page * PAGE as u64, &[*byte | 0x80; 8]);
                }
            }
            Step::Reset => self.reset(),
        }
        self.speak();
    }

    fn reset(&mut self) {
        self.device.reset();
        self.collect();
        assert_eq!(self.device.ballooned_bytes(), 0, "empty after a reset");
        let extra = self.extra_pages();
        let handed_out = extra.difference(&self.ledger.balloon);
        self.ledger.given.extend(handed_out);
        self.ledger.balloon = extra;
        self.buffers.clear();
        self.expected.clear();
        self.unsaid = self.target != 0 || self.grant != 0;
        self.set_up();
    }

    /// A page for the next list, behind those of the rings and of indirect tables.
    fn next_place(&mut self) -> u64 {
        self.places = self.places.wrapping_add(1);
        crate::script::buffer(self.places)
    }

    fn commands(&mut self, commands: &[Command]) {
        // Each has a page of its own, as the device reads them all at the kick.
        let commands = &commands[..commands.len().min(6)];
        for (number, command) in commands.iter().enumerate() {
            let at = self.next_place();
            let last = number + 1 == commands.len();
            let fields = self.fields(command, at, last);
            let mut bytes: Vec<u8> = fields
                .iter()
                .flat_map(|field| field.to_le_bytes())
                .collect();
            bytes.truncate(bytes.len().saturating_sub(usize::from(command.short % 10)));
            self.host.guest.write(at, &bytes);
            let room = usize::from(command.room % 20);
            let cut = usize::from(command.cut).min(bytes.len());
            let parts = [
                (at, cut, false),
                (at + cut as u64, bytes.len() - cut, false),
                (at + 0xf00, room, true),
            ];
            let parts: Vec<_> = parts.into_iter().filter(|(_, len, _)| *len > 0).collect();
            if parts.is_empty() {
                continue;
            }
            // There is one table for all of them.
            self.offer(TODEVQ, &parts, command.indirect && last);
            let mut written = 0;
            if let Some(count) = self.carry_out(&bytes, room) {
                let count = count.to_le_bytes();
                self.ledger.written.push((at + 0xf00, count.to_vec()));
                written = 8;
            }
            self.expected.push_back((self.tokens, written));
        }
        self.kick(TODEVQ);
    }

    fn fields(&self, command: &Command, list: u64, last: bool) -> Vec<u64> {
        let code = match command.code {
            Code::Get => 0,
            Code::Give => 1,
            Code::Exchange => 2,
            Code::Other(code) => code,
        };
        let page = PAGE as u64;
        // Rings and lists are not among them, but for a list that nothing needs any more.
        let free = |pfn: u64| {
            if (0x10..0x20).contains(&pfn) {
                pfn + 0x10
            } else {
                pfn
            }
        };
        let address = |place: &Where| {
            let address = match place {
                Where::Page(choice) => free(interesting(*choice)) * page,
                Where::Large(choice) => free(interesting(*choice)) / 4 * 4 * page,
                Where::Odd(choice, offset) => {
                    free(interesting(*choice)) * page + u64::from(*offset)
                }
                // One that waits to be discarded would be written to as the next list.
                Where::List if last && self.size == 1 && !self.waits => return list,
                Where::List => u64::MAX,
                Where::Raw(address) => *address,
            };
            if (0x10..0x20).contains(&(address / page)) {
                u64::MAX - address
            } else {
                address
            }
        };
        let addresses = command.addresses.0.iter().map(address);
        std::iter::once(code).chain(addresses).collect()
    }

    /// The driver leaves a buffer in the fromdevq.
    fn buffer(&mut self, len: u64, readable: bool) {
        // As many as the ring holds without a second lap over buffers that are still there.
        if len == 0 || self.buffers.len() >= 8 {
            return;
        }
        let at = 0x1f * PAGE as u64 + 0x40 * u64::from(self.places % 8);
        self.places = self.places.wrapping_add(1);
        let parts = [
            (0x1e * PAGE as u64, 8, false),
            (at, usize::try_from(len).unwrap_or(0), true),
        ];
        let parts = if readable { &parts[..] } else { &parts[1..] };
        self.offer(FROMDEVQ, parts, false);
        self.buffers.push_back(Buffer { at, len, readable });
        self.kick(FROMDEVQ);
    }

    /// The device says what it has to say, in the buffers that there are.
    fn speak(&mut self) {
        while self.unsaid
            && let Some(buffer) = self.buffers.pop_front()
        {
            if buffer.readable || buffer.len < 16 {
                continue;
            }
            self.unsaid = false;
            let value = match i64::try_from(self.target) {
                Ok(0) if self.features & EXTRA_MEM != 0 => {
                    -i64::try_from(self.grant).unwrap_or(i64::MAX)
                }
                value => value.unwrap_or(i64::MAX),
            };
            let message = [32768_u64.to_le_bytes(), value.to_le_bytes()].concat();
            self.ledger.written.push((buffer.at, message));
        }
    }

    #[allow(unsafe_code, reason = "elements are memory of this process")]
    fn offer(&mut self, queue: u16, parts: &[(u64, usize, bool)], indirect: bool) {
        self.tokens += 1;
        if self.layout != Layout::Elements {
            let segment = |(at, len, writable): &(u64, usize, bool)| Segment {
                address: Address::Raw(*at),
                length: Length::Raw(u32::try_from(*len).unwrap_or(0)),
                writable: *writable,
                odd: 0,
            };
            let segments: Vec<_> = parts.iter().map(segment).collect();
            let driver = &mut self.drivers[usize::from(queue)];
            driver.offer(&mut self.host.guest, &segments, indirect && queue == TODEVQ);
            return;
        }
        let mut element = Element {
            queue,
            token: self.tokens,
            ..Element::default()
        };
        for (at, len, writable) in parts {
            let (address, _) = self.host.guest.host(*at).expect("a page for buffers");
            // SAFETY: guest memory stays mapped, and these pages are in the first region, which is writable.
            let iov = unsafe { IoVec::new(address, *len) };
            if *writable {
                element.writable.push(iov);
            } else {
                element.readable.push(iov);
            }
        }
        self.device.submit(vec![element]).expect("an active device");
    }

    fn kick(&self, queue: u16) {
        let kick = &self.host.kicks[usize::from(queue)];
        rustix::io::write(kick, &1u64.to_ne_bytes()).expect("an eventfd");
    }

    fn settle(&mut self) {
        let turns = (0..200).take_while(|_| self.host.runtime.turn(!self.slow));
        assert!(turns.count() < 200, "a device that is never done");
        self.collect();
    }

    /// Commands come back in order, with what they were answered.
    fn collect(&mut self) {
        let mut completions = Vec::new();
        self.device.completions(usize::MAX, &mut completions);
        let commands = completions
            .iter()
            .filter(|completion| completion.queue == TODEVQ && completion.served);
        for Completion { token, written, .. } in commands {
            let expected = self.expected.pop_front();
            assert_eq!(
                expected,
                Some((*token, *written)),
                "token and bytes written"
            );
        }
        let elements = self.layout == Layout::Elements;
        assert!(
            !elements || self.expected.is_empty(),
            "commands that nobody answered"
        );
    }

    fn check(&mut self) {
        assert_eq!(self.device.state(), DeviceState::Active);
        let discards = match (self.inhibits, self.waits) {
            (0, false) => Discards::AtOnce,
            (0, true) => Discards::Later,
            _ => Discards::Never,
        };
        // The pages of the rings and of indirect tables.
        let rings = [(0x10 * PAGE as u64, 8 * PAGE as u64)];
        let Self {
            ledger,
            device,
            host,
            ..
        } = self;
        ledger.check(device, &mut host.guest, discards, &rings);
        let (ballooned, extra) = (self.ledger.balloon.len(), self.extra_pages().len());
        let size = |pages: usize| (pages * PAGE) as u64;
        assert_eq!(
            device_size(&self.device),
            [
                size(ballooned.saturating_sub(extra)),
                size(extra.saturating_sub(ballooned)),
            ]
        );
    }

    /// What was saved can be restored, and is the same balloon.
    fn end(mut self) {
        self.slow = false;
        self.settle();
        let saved = self.device.save();
        let config = DeviceConfig {
            kind: KIND,
            features: self.features,
            ..DeviceConfig::default()
        };
        let other = Device::new(&self.host.runtime, config).expect("a device");
        let extra = if self.features & EXTRA_MEM != 0 {
            EXTRA
        } else {
            0
        };
        let table = self.host.guest.table_with(self.regions, extra);
        other.set_memory(table).expect("memory");
        other.restore(&saved).expect("what a device saved");
        assert_eq!(other.ballooned_ranges(), self.device.ballooned_ranges());
        self.device.reset();
    }
}

fn device_size(device: &Device) -> [u64; 2] {
    [device.ballooned_bytes(), device.extra_bytes()]
}
