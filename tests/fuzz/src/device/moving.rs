//! The guest goes on with another device: what one saves another restores, at any moment (S13), and bytes
//! that somebody has changed are refused without a trace, or are a device like any other.

use super::{QUEUES, Run, Started, all_chains};
use crate::saved;
use crate::script::Layout;
use aerostat_device::{DeviceState, QueuePosition};

impl Run<'_> {
    /// The guest moves, at whatever moment this is: what the device saves is restored elsewhere (S13).
    pub(super) fn relocate(&mut self, edits: &[(u16, u8)], seal: bool) {
        self.note_writes();
        let saved = self.device.save();
        self.assert_drained();
        let (before, state) = (self.seen_by_driver(), self.device.state());
        let chains = all_chains(&self.device.counters());
        assert_eq!(self.device.save(), saved, "saving changes nothing");
        self.look(self.terms);
        // What the VMM has to keep: elements that were not served.
        self.device.reset();
        self.collect(usize::MAX);
        assert!(self.elements.is_empty(), "lost: {:?}", self.elements);
        let (regions, pinned) = (self.regions, self.terms.pinned);
        let device = self.host.device(regions, pinned, self.write_behind);
        (0..self.inhibits).for_each(|_| device.inhibit());
        let fresh = device.save();
        let tampered = saved::tampered(&saved, edits, seal);
        let forged = tampered != saved && device.restore(&tampered).is_ok();
        if !forged {
            assert_eq!(device.save(), fresh, "refused, and changed all the same");
            device.restore(&saved).expect("what was just saved");
        }
        self.device = device;
        if !forged {
            assert_eq!(self.seen_by_driver(), before, "what the driver sees");
        }
        let started = std::mem::replace(&mut self.started, vec![None; usize::from(QUEUES)]);
        if forged {
            self.consumed = 0;
            return self.go_on();
        }
        self.oracle.go_on_with(&self.device, &self.host.guest);
        self.terms.broken = state == DeviceState::NeedsReset;
        for (queue, started) in (0..).zip(started) {
            let Some(started) = started else { continue };
            let from = if self.layout == Layout::Elements {
                QueuePosition::SPLIT_START
            } else {
                let position = self.device.saved_position(queue);
                position.expect("a queue that was started")
            };
            self.account(queue, started, from);
            if !self.terms.broken {
                let starts = self.start_at(queue, started.places, from);
                assert!(starts, "queue {queue} cannot go on");
                self.started[usize::from(queue)] = Some(Started { from, ..started });
            }
        }
        assert!(self.consumed <= chains || self.layout == Layout::Packed);
        self.consumed = 0;
        if matches!(state, DeviceState::Active | DeviceState::Paused) {
            self.device.activate().expect("a restored device");
        }
        if state == DeviceState::Paused {
            self.device.pause().expect("an active device");
        }
    }

    /// Goes on with a device that took over what anybody may have written.
    pub(super) fn go_on(&mut self) {
        self.oracle.go_on_with(&self.device, &self.host.guest);
        self.terms.broken = self.device.state() == DeviceState::NeedsReset;
        self.lay_out_for(self.device.features());
        for queue in 0..QUEUES {
            let Ok(from) = self.device.saved_position(queue) else {
                continue;
            };
            let driver = &mut self.drivers[usize::from(queue)];
            driver.resume(from);
            let places = driver.places();
            if self.layout != Layout::Elements {
                self.drivers[usize::from(queue)].lay_out(&mut self.host.guest, from);
            }
            if self.start_at(queue, places, from) {
                self.started[usize::from(queue)] = Some(Started {
                    from,
                    places,
                    honest: false,
                });
            }
        }
        if self.device.activate().is_err() && !self.terms.broken {
            self.set_up(0x1f);
        }
        self.note_terms();
    }

    /// State, features, target, balloon and configuration space, but for the round of hints.
    fn seen_by_driver(&self) -> (DeviceState, u64, u64, Vec<(u64, u64)>, [u8; 24]) {
        let mut space = [0; 24];
        self.device.read_config(0, &mut space);
        space[8..12].fill(0);
        let state = match self.device.state() {
            DeviceState::NeedsReset => DeviceState::NeedsReset,
            _ => DeviceState::Configuring,
        };
        let ranges = self.device.ballooned_ranges();
        let ranges = ranges.iter().map(|range| (range.start.0, range.end.0));
        (
            state,
            self.device.features(),
            self.device.target_bytes(),
            ranges.collect(),
            space,
        )
    }
}
