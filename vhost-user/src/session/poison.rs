//! What a driver writes to `poison_val` before the device can take it.
//!
//! Specification: virtio 1.4, "Page Poison" of the traditional balloon: it is written between FEATURES_OK and
//! DRIVER_OK. QEMU's generic vhost-user device passes the write on at once, but the features only at
//! DRIVER_OK, and of a reset it may say nothing: the write comes to a device that knows no features yet, or
//! still has the last driver's. Lost, it would have pages discarded in which the guest expects its poison
//! (requirement S10).
//!
//! So what comes while no ring runs is kept. The device gets it when the first ring starts, if it begins then with
//! PAGE_POISON; in any case it is forgotten: it is no later driver's.
//!
//! A driver with PAGE_POISON always writes the value. Where none came, it went to a back-end that was there
//! before, and may be anything: nothing that is reported is discarded until the driver begins again.

use super::Session;
use crate::features::PAGE_POISON;
use aerostat_device::{DeviceKind, DeviceState};

/// Where `poison_val` is in the configuration space.
const OFFSET: u32 = 12;
/// What stands for a value that nobody knows.
const UNKNOWN: [u8; 4] = [0xff; 4];

/// `poison_val` in `data`, which is at `offset` of the configuration space, if all of it is there: the standard
/// has drivers access a field as a whole.
fn field(offset: u32, data: &mut [u8]) -> Option<&mut [u8; 4]> {
    let at = usize::try_from(OFFSET.checked_sub(offset)?).ok()?;
    data.get_mut(at..)?.first_chunk_mut()
}

impl Session<'_> {
    /// Keeps the value that is written, if it may be that of a driver which does not run yet. What the device
    /// has goes in its place, as that is never refused.
    pub(super) fn keep_poison(&mut self, offset: u32, data: &mut [u8]) {
        let running = self.rings.iter().any(|ring| ring.started);
        if running || self.device().kind() != DeviceKind::VirtioBalloon {
            return;
        }
        if let Some(field) = field(offset, data) {
            self.poison = Some(*field);
            self.device().read_config(OFFSET.into(), field);
        }
    }

    /// Shows the value that is kept: front-ends write back all that they have read.
    pub(super) fn show_poison(&self, offset: u32, data: &mut [u8]) {
        if let (Some(value), Some(field)) = (self.poison, field(offset, data)) {
            *field = value;
        }
    }

    /// Gives the value that is kept to a device that is about to begin, and has the driver's features.
    pub(super) fn give_poison(&mut self) {
        if self.rings.iter().any(|ring| ring.started) {
            return;
        }
        let value = self.poison.unwrap_or(UNKNOWN);
        let device = self.device();
        if device.kind() == DeviceKind::VirtioBalloon
            && device.state() == DeviceState::Configuring
            && device.features() & PAGE_POISON != 0
        {
            device.write_config(OFFSET.into(), &value);
        }
    }
}
