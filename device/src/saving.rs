//! Saving a device and restoring it elsewhere (requirement S13).
//!
//! Saving takes the service lock, so nothing is in flight (I2): every chain that was popped is completed,
//! but for a held stats buffer, which counts as not taken yet. Restoring checks all of the untrusted bytes
//! before it changes anything, and the books balance afterwards (I4).

use crate::balloon::in_regions;
use crate::device::{Device, DeviceState, QueuePosition, refuse_others};
use crate::error::{Error, Result};
use crate::history::HistoryEvent;
use crate::memory::{BALLOON_PAGE_SHIFT, GuestMemory};
use crate::pages::ownership::Ownership;
use crate::saved_state::{self, Runs, SavedQueue, SavedState};
use crate::target::Target;

impl Device {
    /// The device as bytes, for [`Self::restore`] by another process or host. Allowed in every state; of
    /// use is what was saved while the device was paused, as the guest goes on otherwise. Waits until
    /// nothing is in flight.
    ///
    /// Inhibits, statistics and what [`Self::set_stats_interval`] set are not in it: they belong to the
    /// VMM. Neither are elements that were not served, which the VMM has to keep.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let shared = &self.shared;
        let mut service = shared.service.lock();
        if let Some(balloon) = &mut service.balloon {
            // What waits to be discarded must not outlive the device's turn as the owner.
            balloon.drain(&shared.books);
        }
        let features = service.features.unwrap_or(0);
        let held = shared.protocol.held(features, &service.queues);
        let state = SavedState {
            state: service.state,
            offered: shared.protocol.offered(),
            negotiated: service.features,
            kind: shared.protocol.kind(),
            wanted: shared.wanted.lock().clone(),
            queues: service.queues.saved(held),
            own: shared.protocol.save(),
        };
        saved_state::encode(&state, |each| {
            if let Some(balloon) = &service.balloon {
                balloon.runs(each);
            }
        })
    }

    /// Takes over what [`Self::save`] wrote: features, target, the configuration space and the balloon.
    /// The device has to be new or reset, with a memory table that has all ballooned pages.
    ///
    /// Then start the queues where [`Self::saved_position`] says, and activate; the driver notices
    /// nothing but a configuration-change interrupt. If a device was saved that needs a reset, so does
    /// this one. A round of hints that was running is done.
    ///
    /// # Errors
    /// Refuses bytes that are damaged or of another version, selected features that this device does not
    /// offer, pages that are not in memory, and devices that have started. The device is as before then.
    pub fn restore(&self, bytes: &[u8]) -> Result<()> {
        let shared = &self.shared;
        let mut service = shared.service.lock();
        service.expect_fresh()?;
        let Some(balloon) = &mut service.balloon else {
            return Err(Error::NotReady("set the memory table"));
        };
        let (saved, runs) = saved_state::decode(bytes)?;
        let protocol = &shared.protocol;
        if saved.kind != protocol.kind() {
            return Err(Error::SavedState {
                what: "a device of another protocol",
                offset: saved_state::KIND_AT,
            });
        }
        if saved.negotiated.is_none() && protocol.preselected().is_some() {
            return Err(Error::SavedState {
                what: "no features, which this protocol always has",
                offset: 0,
            });
        }
        let (selected, empty) = (saved.negotiated.unwrap_or(0), runs.is_empty());
        let needed = selected | protocol.check_saved(&saved.own, selected, empty)?;
        refuse_others(needed, protocol.offered())?;
        // What a driver or a VMM may not say is in no state that a device saved.
        let is_sound = |checked: Result<()>, what| {
            checked.map_err(|_error| Error::SavedState { what, offset: 0 })
        };
        if let Some(selected) = saved.negotiated {
            is_sound(
                protocol.check_features(selected),
                "features that do not go together",
            )?;
        }
        let target = protocol.check_target(saved.wanted.bytes());
        is_sound(target, "a target that the protocol cannot say")?;
        let ownership = own(balloon.memory(), runs)?;

        // From here on nothing can fail.
        balloon.restore(ownership, &shared.books);
        service.features = saved.negotiated;
        service.open_window(&**protocol, &shared.books);
        let position = |queue: &Option<SavedQueue>| match queue {
            Some(SavedQueue::Ring { position }) => Some(*position),
            _ => None,
        };
        service.restored = Some(saved.queues.iter().map(position).collect());
        if saved.state == DeviceState::NeedsReset {
            service.state = DeviceState::NeedsReset;
        }
        protocol.restore(&saved.own, &shared.books);
        shared.show(&service);
        // Nodes mean nothing to a device that does not offer them.
        *shared.wanted.lock() = if protocol.has_node_targets() {
            saved.wanted
        } else {
            Target::whole(saved.wanted.bytes())
        };
        shared.show_target();
        shared.record(HistoryEvent::Restored);
        drop(service);
        // Whatever the protocol has for its target: the VMM is to look at the device.
        shared.signal_config();
        shared.announce_target();
        Ok(())
    }

    /// Where the ring of a queue goes on that was started when the restored state was saved. Forgotten
    /// at the next reset.
    ///
    /// # Errors
    /// Nothing was restored, or that queue was not started as a ring.
    pub fn saved_position(&self, index: u16) -> Result<QueuePosition> {
        let service = self.shared.service.lock();
        let positions = service.restored.iter().flatten();
        let position = positions.copied().nth(usize::from(index)).flatten();
        let index = u32::from(index);
        position.ok_or(Error::NoQueue { index })
    }
}

/// The bitmaps that the runs say, if all of them are in memory that can be ballooned.
fn own(memory: &GuestMemory, runs: Runs<'_>) -> Result<Ownership> {
    let mut ownership = Ownership::new(memory);
    for run in runs {
        let run = run?;
        let mut lost = 0;
        lost += in_regions(memory, run, |index, region, part| {
            match ownership.region(index).filter(|_| !region.readonly) {
                Some(bitmap) => bitmap.insert(part, |_| ()),
                None => lost += part.pages(),
            }
        });
        if lost > 0 {
            return Err(Error::OutOfRange {
                what: "a run of ballooned pages in the saved state",
                address: run.start.0 << BALLOON_PAGE_SHIFT,
                len: run.bytes(),
            });
        }
    }
    Ok(ownership)
}
