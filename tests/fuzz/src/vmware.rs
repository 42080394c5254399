//! VMware's balloon commands: any command with any arguments, against docs/vmware-balloon.md as a model.

use crate::guest::{Guest, PAGE, REGIONS};
use crate::ledger::{Discards, Ledger};
use crate::script::{Few, interesting};
use aerostat_device::{
    Device, DeviceConfig, DeviceKind, DeviceState, Runtime, VmwareAnswer, WriteBehind,
};
use arbitrary::{Arbitrary, Unstructured};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const KIND: DeviceKind = DeviceKind::Vmware;
const BASIC: u64 = 1 << 1;
const BATCHED: u64 = 1 << 2;
const BATCHED_2M: u64 = 1 << 3;
const PINNED: u8 = 1 << 4;
const ROM: u8 = 1 << 3;
const MAX_STEPS: usize = 60;

const CMD_INVALID: u32 = 1;
const PPN_INVALID: u32 = 2;
const PPN_LOCKED: u32 = 3;
const PPN_UNLOCKED: u32 = 4;
const PPN_PINNED: u32 = 5;
const PPN_NOTNEEDED: u32 = 6;
const RESET: u32 = 7;
const BUSY: u32 = 8;
const CAPABILITIES: u32 = 0x0300_0000;

#[derive(Arbitrary, Debug)]
struct Script {
    offered: u8,
    regions: u8,
    waits: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// As a driver says it: one of the numbers, and the capabilities of real drivers.
    Start(u8),
    /// LOCK or UNLOCK of one page.
    One(bool, u8),
    /// A batch of so many entries, one more or less, or none of it.
    Batch {
        unlock: bool,
        large: bool,
        page: u8,
        entries: Few<(u8, u16)>,
        miscount: u8,
    },
    /// Anything.
    Raw(u64, [u64; 2]),
    Target(u8),
    ResetBalloon,
    Inhibit(bool),
    Flush,
    Memory(u8),
    Pause(bool),
    Slow(bool),
    Write(u8, u8),
    Reset,
}

thread_local! {
    static HOST: RefCell<Option<(Arc<Runtime>, Guest)>> = const { RefCell::new(None) };
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
        let new = || (Runtime::inline().expect("a runtime"), Guest::new());
        let (runtime, guest) = host.get_or_insert_with(new);
        guest.refill();
        let mut run = Run::new(runtime, guest, &script);
        for step in script.steps.iter().take(MAX_STEPS) {
            run.step(step);
            run.settle();
        }
        run.end();
    });
}

struct Run<'a> {
    runtime: &'a Arc<Runtime>,
    guest: &'a mut Guest,
    device: Device,
    offered: u64,
    ledger: Ledger,
    regions: u8,
    waits: bool,
    slow: bool,
    started: bool,
    pending_reset: bool,
    paused: bool,
    capabilities: u64,
    target: u64,
    inhibits: u32,
}

impl<'a> Run<'a> {
    fn new(runtime: &'a Arc<Runtime>, guest: &'a mut Guest, script: &Script) -> Self {
        let offered = u64::from(script.offered) & KIND.supported_features() | BASIC;
        let device = device(runtime, offered);
        // With a pinned region nothing waits.
        let kept = if script.waits { !PINNED } else { u8::MAX };
        let regions = script.regions & kept | 1;
        device
            .set_memory(guest.table(regions, false))
            .expect("memory");
        if script.waits {
            device.set_write_behind(WriteBehind {
                limit_bytes: 6 * PAGE as u64,
                delay: Duration::from_secs(3600),
            });
        }
        device.activate().expect("a device that is set up");
        Self {
            runtime,
            guest,
            device,
            offered,
            ledger: Ledger::default(),
            regions,
            waits: script.waits,
            slow: false,
            started: false,
            pending_reset: false,
            paused: false,
            capabilities: 0,
            target: 0,
            inhibits: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Start(choice) => {
                let all = BASIC | BATCHED | BATCHED_2M | 1 << 5;
                let choices = [all, BASIC, BASIC | BATCHED, 0, 1 << 4, all | 1 << 4 | 1];
                self.command(0, [choices[usize::from(*choice) % choices.len()], 0]);
            }
            Step::One(unlock, page) => {
                self.command(2 + u64::from(*unlock), [interesting(*page), 1]);
            }
            Step::Batch {
                unlock,
                large,
                page,
                entries,
                miscount,
            } => {
                let page = interesting(*page);
                let entry = |(page, low): &(u8, u16)| {
                    (interesting(*page) << 12 | u64::from(*low) & 0xfff).to_le_bytes()
                };
                let bytes: Vec<u8> = entries.0.iter().flat_map(entry).collect();
                self.guest.write(page * PAGE as u64, &bytes);
                let count = entries.0.len() as u64;
                let counts = [count, count, count, 0, 512, 513, count + 1, u64::MAX];
                let code = 6 + u64::from(*unlock) + 2 * u64::from(*large);
                self.command(code, [page, counts[usize::from(*miscount) % counts.len()]]);
            }
            Step::Raw(command, arguments) => self.command(*command, *arguments),
            Step::Target(pages) => {
                let bytes = u64::from(*pages) * PAGE as u64;
                if self.device.set_target_bytes(bytes).is_ok() {
                    self.target = u64::from(*pages);
                }
            }
            Step::ResetBalloon => {
                self.device.reset_balloon().expect("every guest knows it");
                self.ledger.balloon.clear();
                self.started = false;
                self.pending_reset = true;
            }
            Step::Inhibit(true) => {
                self.device.inhibit();
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
                self.regions = regions & kept | 1;
                let table = self.guest.table(self.regions, false);
                self.device.set_memory(table).expect("any table");
                let present = self.memory(u8::MAX);
                self.ledger.balloon.retain(|pfn| present.contains(pfn));
                self.target = self.device.target_bytes() / PAGE as u64;
            }
            Step::Pause(true) => {
                self.device
                    .pause()
                    .expect("an active device, or a paused one");
                self.paused = true;
            }
            Step::Pause(false) => {
                assert_eq!(self.device.resume().is_ok(), self.paused);
                self.paused = false;
            }
            Step::Slow(slow) => self.slow = *slow,
            Step::Write(page, byte) => {
                let at = interesting(*page) * PAGE as u64;
                self.guest.write(at, &[*byte | 0x80; 8]);
            }
            Step::Reset => {
                self.device.reset();
                self.ledger.balloon.clear();
                (self.started, self.pending_reset, self.paused) = (false, false, false);
                self.capabilities = 0;
                let before = self
                    .device
                    .vmware_command(0, [BASIC, 0])
                    .expect("an answer");
                assert_eq!(before.status, BUSY, "not active yet");
                let before = self.device.vmware_command(1, [0, 0]).expect("an answer");
                assert_eq!(before.status, RESET, "not active yet");
                self.device.activate().expect("a device that is set up");
            }
        }
    }

    /// The pages of the table's regions that `wanted` chooses by their bits.
    fn memory(&self, wanted: u8) -> BTreeSet<u64> {
        let present = REGIONS.iter().enumerate();
        let present = present.filter(|(index, _)| self.regions & wanted & 1 << index != 0);
        present
            .flat_map(|(_, spec)| spec.first..spec.first + spec.pages)
            .collect()
    }

    fn command(&mut self, command: u64, arguments: [u64; 2]) {
        // What the device reads has to be what the guest wrote, and nothing that is discarded meanwhile.
        self.settle();
        let expected = self.answer(command, arguments);
        let seen = self.device.vmware_command(command, arguments);
        assert_eq!(seen.ok(), Some(expected), "{command} {arguments:x?}");
    }

    /// What the document says that a command does, and is answered.
    fn answer(&mut self, command: u64, [first, second]: [u64; 2]) -> VmwareAnswer {
        let answer = |status, result| VmwareAnswer { status, result };
        if self.paused {
            return answer(BUSY, 0);
        }
        if command == 0 {
            self.ledger.balloon.clear();
            (self.started, self.capabilities) = (false, 0);
            if first != 0 && first & BASIC == 0 {
                return answer(CMD_INVALID, 0);
            }
            (self.started, self.pending_reset) = (true, false);
            self.capabilities = first & self.offered;
            return match first & !BASIC {
                0 => answer(0, 0),
                _ => answer(CAPABILITIES, self.capabilities),
            };
        }
        let needed = match command {
            1 | 4 => 0,
            2 | 3 => BASIC,
            6 | 7 => BATCHED,
            8 | 9 => BATCHED_2M,
            _ => return answer(CMD_INVALID, 0),
        };
        if !self.started {
            return answer(RESET, 0);
        }
        if self.capabilities & needed != needed {
            return answer(CMD_INVALID, 0);
        }
        let status = match command {
            2 | 3 => self.page(command == 2, first),
            6..=9 => self.batch(command.is_multiple_of(2), command >= 8, first, second),
            _ => 0,
        };
        let target = if command == 4 { 0 } else { self.target };
        answer(status, target)
    }

    fn page(&mut self, lock: bool, pfn: u64) -> u32 {
        if !self.memory(!ROM).contains(&pfn) {
            return PPN_INVALID;
        }
        let held = self.ledger.balloon.contains(&pfn);
        match (lock, held) {
            (true, true) => PPN_LOCKED,
            (true, false) if self.inhibits > 0 => BUSY,
            (true, false) if self.memory(PINNED).contains(&pfn) => PPN_PINNED,
            (true, false) if self.ledger.balloon.len() as u64 >= self.target => PPN_NOTNEEDED,
            (true, false) => {
                self.ledger.give(pfn);
                0
            }
            (false, false) => PPN_UNLOCKED,
            (false, true) => {
                self.ledger.balloon.remove(&pfn);
                0
            }
        }
    }

    fn batch(&mut self, lock: bool, large: bool, page: u64, count: u64) -> u32 {
        if !(1..=512).contains(&count) {
            return CMD_INVALID;
        }
        if !self.memory(!ROM).contains(&page) {
            return PPN_INVALID;
        }
        let index = self
            .guest
            .index_of(page * PAGE as u64)
            .expect("a page of the guest");
        let bytes = self.guest.page(index);
        let entries = bytes
            .chunks(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap_or_default()) >> 12);
        let entries: Vec<u64> = entries.take(usize::try_from(count).unwrap_or(0)).collect();
        let mut answers = Vec::new();
        for entry in entries {
            // No region here has room for 2 MiB.
            let status = if large {
                PPN_INVALID
            } else {
                self.page(lock, entry)
            };
            answers.extend((entry << 12 | u64::from(status)).to_le_bytes());
        }
        self.ledger.written.push((page * PAGE as u64, answers));
        0
    }

    fn settle(&mut self) {
        let turns = (0..200).take_while(|_| self.runtime.turn(!self.slow));
        assert!(turns.count() < 200, "a device that is never done");
        self.check();
    }

    fn check(&mut self) {
        let state = if self.paused {
            DeviceState::Paused
        } else {
            DeviceState::Active
        };
        assert_eq!(self.device.state(), state);
        assert_eq!(self.device.reset_pending(), self.pending_reset);
        let discards = match (self.inhibits, self.waits) {
            (0, false) => Discards::AtOnce,
            (0, true) => Discards::Later,
            _ => Discards::Never,
        };
        self.ledger.check(&self.device, self.guest, discards, &[]);
    }

    /// What was saved can be restored, and is the same balloon and the same session.
    fn end(mut self) {
        self.slow = false;
        self.settle();
        let other = device(self.runtime, self.offered);
        let table = self.guest.table(self.regions, false);
        other.set_memory(table).expect("memory");
        other
            .restore(&self.device.save())
            .expect("what a device saved");
        assert_eq!(other.ballooned_ranges(), self.device.ballooned_ranges());
        assert_eq!(other.reset_pending(), self.pending_reset);
        other.activate().expect("a restored device");
        if !self.started {
            let late = other.vmware_command(1, [0, 0]).expect("an answer");
            assert_eq!(late.status, RESET);
        }
    }
}

fn device(runtime: &Arc<Runtime>, offered: u64) -> Device {
    let config = DeviceConfig {
        kind: KIND,
        features: offered,
        ..DeviceConfig::default()
    };
    Device::new(runtime, config).expect("a device")
}
