//! The demonstration's real guest: User-Mode Linux with its stock driver behind the vhost-user
//! back-end.

use std::fmt;

use aerostat_reclaim::vm::ControlClient;

use super::{
    DemoError,
    guest::{DemoGuest, DemoObserver, Reading},
    options::Options,
};
use crate::{
    backend::Backend,
    guest::{HostMemoryGauge, UmlConfig, UmlGuest, WorkingSet},
};

/// A User-Mode Linux guest, its back-end and the control of it.
pub struct UmlDemoGuest {
    // Dropped in this order: the guest goes before its device.
    guest: UmlGuest,
    working_set: Option<WorkingSet>,
    kernel: String,
    backend: Backend,
}

impl fmt::Debug for UmlDemoGuest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("UmlDemoGuest")
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

impl UmlDemoGuest {
    /// Starts the back-end and boots the guest.
    ///
    /// # Errors
    /// See [`DemoError`].
    pub fn start(options: &Options) -> Result<Self, DemoError> {
        let backend = Backend::start(&options.backend_program(), 1)?;
        // What becomes free must be the balloon's doing alone.
        let config = UmlConfig::new(options.memory_mib)
            .balloon(&backend.socket(0))
            .without_reporting();
        let mut guest = UmlGuest::boot(&config)?;
        let kernel = guest.run("uname -r")?;
        Ok(Self {
            guest,
            working_set: None,
            kernel,
            backend,
        })
    }
}

impl DemoGuest for UmlDemoGuest {
    fn description(&self) -> String {
        format!(
            "Guest: Linux {} (User-Mode Linux) with {} MiB and its stock virtio_balloon driver.\n\
             Device: aerostat-vhost-user. Host memory: blocks of the tmpfs that holds the guest's \
             memory.\n\
             Page reporting is off in the guest, so the balloon alone gives memory back. What the guest \
             never touched is touched for it, so that each page in the balloon is one to get back.\n",
            self.kernel,
            self.guest.config().memory_mib,
        )
    }

    fn observer(&self) -> Result<Box<dyn DemoObserver>, DemoError> {
        Ok(Box::new(UmlObserver {
            control: self.backend.control(0)?,
            host_memory: self.guest.host_memory_gauge(),
        }))
    }

    fn make_working_set(&mut self, mib: u64) -> Result<String, DemoError> {
        let set = self.guest.make_working_set("working-set", mib)?;
        let checksum = set.checksum().to_owned();
        self.working_set = Some(set);
        Ok(checksum)
    }

    fn working_set_is_intact(&mut self) -> Result<bool, DemoError> {
        match &self.working_set {
            Some(set) => Ok(self.guest.verify_working_set(set)?),
            None => Ok(false),
        }
    }

    fn touch_unused_memory(&mut self) -> Result<u64, DemoError> {
        let touched = self.guest.touch_unused_memory()?;
        // Pages that the guest's kernel never used are none to get back; now they are.
        self.guest.populate_host_memory()?;
        Ok(touched)
    }

    fn touch_memory(&mut self, mib: u64) -> Result<(), DemoError> {
        Ok(self.guest.touch_memory(mib)?)
    }

    fn set_target(&mut self, ballooned_bytes: u64) -> Result<(), DemoError> {
        // A connection of its own each time: events pile up in one that nobody reads.
        Ok(self.backend.control(0)?.set_target(ballooned_bytes)?)
    }
}

/// Reads the device's counters and the guest's tmpfs.
struct UmlObserver {
    control: ControlClient,
    host_memory: HostMemoryGauge,
}

impl DemoObserver for UmlObserver {
    fn observe(&mut self) -> Result<Reading, DemoError> {
        let status = self.control.query()?;
        Ok(Reading {
            target_bytes: status.target_bytes,
            actual_bytes: status.actual_bytes,
            discarded_bytes: status.counters.discarded_bytes,
            outstanding_bytes: status.counters.pending_bytes,
            discard_calls: status.counters.discard_calls,
            discard_ranges: status.counters.discard_ranges,
            discard_ns: status.counters.discard_ns,
            host_bytes: self.host_memory.read_bytes()?,
        })
    }
}
