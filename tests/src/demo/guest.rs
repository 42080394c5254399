//! What the story needs of a guest, whatever it is made of.

use super::DemoError;

/// One look at guest, device and host. All sizes of the balloon are its own size (X1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// How large the balloon should be.
    pub target_bytes: u64,
    /// How large the guest says it is.
    pub actual_bytes: u64,
    /// How much the device has discarded since it was started.
    pub discarded_bytes: u64,
    /// How much the device has acknowledged and not yet discarded.
    pub outstanding_bytes: u64,
    /// System calls the device needed for that.
    pub discard_calls: u64,
    /// Ranges it discarded.
    pub discard_ranges: u64,
    /// Nanoseconds it spent in those calls.
    pub discard_ns: u64,
    /// What the guest occupies on the host, measured outside guest and device.
    pub host_bytes: u64,
}

/// Takes readings; used by a thread of its own.
pub trait DemoObserver: Send {
    /// Looks once.
    ///
    /// # Errors
    /// Device or host do not answer.
    fn observe(&mut self) -> Result<Reading, DemoError>;
}

/// A guest with a balloon.
pub trait DemoGuest {
    /// What it is, in a line for the user.
    fn description(&self) -> String;

    /// Makes something that takes readings of it.
    ///
    /// # Errors
    /// The device does not answer.
    fn observer(&self) -> Result<Box<dyn DemoObserver>, DemoError>;

    /// Fills this much memory with random data and remembers the checksum, which is returned.
    ///
    /// # Errors
    /// The guest fails.
    fn make_working_set(&mut self, mib: u64) -> Result<String, DemoError>;

    /// Whether that data is still what it was.
    ///
    /// # Errors
    /// The guest fails.
    fn working_set_is_intact(&mut self) -> Result<bool, DemoError>;

    /// Writes to practically all unused memory and gives it up again, so that the host really has
    /// allocated what the balloon will take. Returns how much was written.
    ///
    /// # Errors
    /// The guest fails.
    fn touch_unused_memory(&mut self) -> Result<u64, DemoError>;

    /// Writes to this much memory and gives it up again.
    ///
    /// # Errors
    /// The guest fails, for example because it has not got that much.
    fn touch_memory(&mut self, mib: u64) -> Result<(), DemoError>;

    /// Sets how large the balloon should be.
    ///
    /// # Errors
    /// The device fails.
    fn set_target(&mut self, ballooned_bytes: u64) -> Result<(), DemoError>;
}
