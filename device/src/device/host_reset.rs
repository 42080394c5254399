//! The host gives all ballooned pages back to the guest at once (requirement V3). How the guest hears of
//! it, and acknowledges it, is the protocol's.
//!
//! Invariant I1: the balloon is emptied under the service lock, so nothing is in flight, and what comes
//! in afterwards is late until the driver has acknowledged the reset: it is not looked at, let alone
//! discarded. A driver acknowledges when none of its buffers is with the device, so what it sent before
//! cannot be taken for what it sends afterwards.

use super::{Device, DeviceState};
use crate::balloon::bump;
use crate::error::{Error, Result};
use crate::history::HistoryEvent;

impl Device {
    /// Gives all pages of the balloon back to the guest, which frees them without telling the device
    /// one by one (V3). From the return on the balloon is empty, and until the driver acknowledges,
    /// what it sends is late: acknowledged, counted, not taken. The target stays; set it first if the
    /// guest is not to inflate again. Waits until nothing is in flight, but not for the guest:
    /// [`crate::Counters::host_resets_acknowledged`] tells of it. Allowed while paused, and again
    /// before the last reset is acknowledged.
    ///
    /// # Errors
    /// The driver has to understand it (HOST_RESET, where features are negotiated), and the device to be
    /// active or paused.
    pub fn reset_balloon(&self) -> Result<()> {
        let mut service = self.shared.service.lock();
        match service.state {
            DeviceState::Configuring => return Err(Error::NotReady("activate the device")),
            DeviceState::NeedsReset => return Err(Error::NotReady("reset the device")),
            DeviceState::Active | DeviceState::Paused => {}
        }
        let (features, _) = service.ready()?;
        self.shared.protocol.check_host_reset(features)?;
        if let Some(balloon) = &mut service.balloon {
            balloon.reset_by_host(&self.shared.books);
        }
        // Before the id is shown, as it may be acknowledged at once: asked is never below acknowledged.
        self.shared
            .books
            .enter(|entry| bump(&mut entry.device().host_resets, 1));
        self.shared.protocol.ask_for_host_reset();
        self.shared.show(&service);
        self.shared.record(HistoryEvent::BalloonReset);
        drop(service);
        self.shared.announce_target();
        Ok(())
    }

    /// Whether the driver has not acknowledged the last [`Self::reset_balloon`].
    #[must_use]
    pub fn reset_pending(&self) -> bool {
        self.shared.protocol.host_reset_pending()
    }
}
