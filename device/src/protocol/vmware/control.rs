//! The way in: a VMM carries out a guest's access to the backdoor port by a call.

use super::{Vmware, VmwareAnswer, commands};
use crate::device::{Device, DeviceState};
use crate::error::{Error, Result};

impl Device {
    /// Carries out one command of the guest: `command` is what it put into ECX, `arguments` what it put
    /// into EBX and ESI, with all 64 bits of a 64-bit guest. The guest's numbers are never an error of the
    /// call: the answer says what was wrong with them. Returns when the command is carried out.
    ///
    /// # Errors
    /// The device does not speak this protocol.
    pub fn vmware_command(&self, command: u64, arguments: [u64; 2]) -> Result<VmwareAnswer> {
        let protocol = self.protocol::<Vmware>();
        let protocol = protocol.ok_or(Error::NotSupported("the VMware balloon protocol"))?;
        let answer = self
            .shared
            .call(|turn| commands::carry_out(protocol, command, arguments, turn));
        let inactive = || commands::inactive(command, self.state() == DeviceState::Paused);
        let answer = answer.unwrap_or_else(inactive);
        if command == commands::START {
            self.shared.count_handshake(answer.is_success());
        }
        Ok(answer)
    }
}
