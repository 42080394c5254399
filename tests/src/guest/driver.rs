//! The guest's balloon driver as its sysfs and procfs show it.

use super::{GuestError, Shell};

const DEVICES: &str = "/sys/bus/virtio/devices";
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_balloon";

/// What the guest's kernel counts for all its balloons (`/proc/vmstat`), in pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonPages {
    /// Pages put into a balloon since boot.
    pub inflated_pages: u64,
    /// Pages taken out of one.
    pub deflated_pages: u64,
}

impl BalloonPages {
    /// What the guest believes to be in its balloons.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.inflated_pages.saturating_sub(self.deflated_pages) * 4096
    }
}

impl Shell {
    /// Names of the devices that the driver is bound to, for example `virtio0`.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn bound_balloons(&mut self) -> Result<Vec<String>, GuestError> {
        let output = self.run(&format!(
            "cd {DRIVER} && for d in virtio*; do echo $d; done"
        ))?;
        Ok(output
            .lines()
            .filter(|name| *name != "virtio*")
            .map(str::to_owned)
            .collect())
    }

    /// Takes the driver away from a device.
    ///
    /// # Errors
    /// The guest does not answer or the device is not bound.
    pub fn unbind_balloon(&mut self, device: &str) -> Result<(), GuestError> {
        self.run(&format!("echo {device} >{DRIVER}/unbind"))
            .map(drop)
    }

    /// Gives a device to the driver.
    ///
    /// # Errors
    /// The guest does not answer or the driver refuses.
    pub fn bind_balloon(&mut self, device: &str) -> Result<(), GuestError> {
        self.run(&format!("echo {device} >{DRIVER}/bind")).map(drop)
    }

    /// The features negotiated for a device, lowest bit first.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn negotiated_features(&mut self, device: &str) -> Result<u64, GuestError> {
        let command = format!("cat {DEVICES}/{device}/features");
        let output = self.run(&command)?;
        let digits = output.trim().bytes();
        if digits.len() != 64 {
            return Err(GuestError::Answer { command, output });
        }
        Ok(digits
            .rev()
            .fold(0, |bits, digit| (bits << 1) | u64::from(digit == b'1')))
    }

    /// What the guest's kernel counted for its balloons.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn balloon_pages(&mut self) -> Result<BalloonPages, GuestError> {
        let output = self.run("grep ^balloon_ /proc/vmstat || true")?;
        let value = |name: &str| {
            let mut words = output
                .lines()
                .find(|line| line.starts_with(name))?
                .split_whitespace();
            words.nth(1)?.parse().ok()
        };
        Ok(BalloonPages {
            inflated_pages: value("balloon_inflate").unwrap_or(0),
            deflated_pages: value("balloon_deflate").unwrap_or(0),
        })
    }
}
