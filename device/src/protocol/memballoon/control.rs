//! What a VMM can ask of this protocol alone: memory beyond what the guest booted with.

use super::Memballoon;
use crate::device::Device;
use crate::error::{Error, Result};

impl Device {
    /// Lets the guest have up to `bytes` more than it booted with, out of regions that are marked as
    /// extra, and lets it hear of that. What it has already it keeps; it is the host's ledger that has to
    /// cover the grant (I5). Waits until nothing is in flight.
    ///
    /// # Errors
    /// The device has to offer EXTRA_MEM.
    pub fn set_extra_grant(&self, bytes: u64) -> Result<()> {
        let protocol = self.protocol::<Memballoon>();
        let protocol = protocol.filter(|_| self.shared.protocol.has_extra_memory());
        let protocol = protocol.ok_or(Error::NotSupported("EXTRA_MEM"))?;
        let mut service = self.shared.service.lock();
        protocol.minimum.set_extra_grant(bytes);
        service.extra_grant_bytes = bytes;
        if let Some(balloon) = &mut service.balloon {
            balloon.set_extra_grant(bytes);
        }
        drop(service);
        self.shared.announce_target();
        Ok(())
    }

    /// The last [`Self::set_extra_grant`].
    #[must_use]
    pub fn extra_grant_bytes(&self) -> u64 {
        self.protocol::<Memballoon>()
            .map_or(0, |protocol| protocol.minimum.extra_grant_bytes())
    }
}
