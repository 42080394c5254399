//! Optional extras: what the guest gives and takes, as a file; memory for what it takes back.

use super::Device;
use crate::discard::DeflateOptions;
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
    /// before the guest is acknowledged; nothing of it while discarding is inhibited. Off by default; may be
    /// changed at any time.
    pub fn set_deflate(&self, options: DeflateOptions) {
        let mut service = self.shared.service.lock();
        service.deflate = options;
        if let Some(balloon) = &mut service.balloon {
            balloon.set_deflate(options);
        }
    }
}
