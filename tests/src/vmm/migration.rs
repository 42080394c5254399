//! Moving a guest to another device (requirement S13): what a VMM does at the end of a live migration,
//! or when it is updated under a running guest. The memory stays where it is.
//!
//! While the machine stands still its processors cannot reach the configuration space: the slot that the
//! driver looks through is locked. Its kicks wait in their eventfds, which both devices know.

use super::device::Device;
use super::error::Result;
use super::guest::{Guest, Vmm, resumed};

impl Guest {
    /// Moves the guest to a new device of `vmm`; the old one is gone afterwards.
    ///
    /// # Errors
    /// A device refuses; the guest stands still for good then.
    pub fn move_to(&mut self, vmm: &Vmm) -> Result<()> {
        let slot = self.slot();
        let mut standing_still = slot.write();
        let old = self.device();
        // A device whose ring is broken, or that is not set up, has nothing to pause.
        let running = old.pause().is_ok();
        let state = old.save()?;
        let new = self.new_device(vmm)?;
        new.restore(&state)?;
        if running {
            for (index, config) in self.wiring() {
                let position = new.saved_position(*index)?;
                new.start_queue(*index, &resumed(config, &position))?;
            }
            new.activate()?;
        }
        *standing_still = self.plug(new);
        Ok(())
    }

    /// A device like the guest's own, with its memory, and as new.
    ///
    /// # Errors
    /// The library refuses.
    pub fn new_device(&self, vmm: &Vmm) -> Result<Device> {
        let events = [self.config_event.raw(), self.completion_event.raw()];
        let [config, completion] = events;
        let device = Device::new(vmm.runtime(), self.config().offered, config, completion)?;
        self.config().settings.apply(&device)?;
        device.set_memory(self.ram())?;
        Ok(device)
    }
}
