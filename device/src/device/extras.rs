//! Optional extras: what the guest gives and takes, as a file; memory for what it takes back.

use super::Device;
use crate::discard::DeflateOptions;
use crate::error::{Error, Result};
use std::fs::File;
use std::io;

impl Device {
    /// Records from now on to `file`, or no more, in the format of [`crate::trace`]: each buffer of page
    /// numbers and each report as the guest sent it. What was recorded before is complete when this
    /// returns.
    ///
    /// # Errors
    /// A file cannot be written. A later failure ends the recording with a warning in the log, and
    /// nothing else.
    pub fn record(&self, file: Option<File>) -> io::Result<()> {
        self.shared.tape.record(file)
    }

    /// Has the host allocate, or make huge frames of, memory that the guest takes out of the balloon,
    /// before the guest is acknowledged; nothing of it while discarding is inhibited. Off by default. To be
    /// called after the first [`Self::set_memory`].
    ///
    /// # Errors
    /// There is no memory table yet.
    pub fn set_deflate(&self, options: DeflateOptions) -> Result<()> {
        let mut service = self.shared.service.lock();
        let balloon = service.balloon.as_mut();
        balloon
            .ok_or(Error::NotReady("set the memory table"))?
            .set_deflate(options);
        Ok(())
    }
}
