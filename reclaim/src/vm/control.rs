//! Client of the control socket of `aerostat-vhost-user` (docs/control-socket.md).
//!
//! ```no_run
//! use std::{path::Path, time::Duration};
//! use aerostat_reclaim::vm::ControlClient;
//!
//! let mut vm = ControlClient::connect(Path::new("/run/vm1.sock"), Duration::from_secs(2))?;
//! vm.set_target(256 << 20)?;
//! println!("{} bytes are in the balloon", vm.query()?.ballooned_bytes);
//! # Ok::<(), aerostat_reclaim::vm::VmError>(())
//! ```

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Observation, StatsAge, Vm, VmError,
    monitor::Monitor,
    wire::{BalloonEvent, DeviceState, DeviceStatus, GuestStats, Hints, HistoryEntry},
};
use crate::policy::Capabilities;

/// A connection to one device's control socket. The conversation rules are those of QMP: a command
/// without an answer in time breaks it off, and one connects again.
#[derive(Debug)]
pub struct ControlClient {
    monitor: Monitor,
    stats: StatsAge,
}

impl ControlClient {
    /// Connects and completes the greeting; `timeout` then bounds every command.
    ///
    /// # Errors
    /// The socket does not exist, nobody listens, or the peer does not speak the dialect.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        Ok(Self {
            monitor: Monitor::connect(path, timeout)?,
            stats: StatsAge::default(),
        })
    }

    /// The socket this client is connected to.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.monitor.path()
    }

    /// Memory left to the guest, as QMP tools ask for it.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn query_balloon_left_bytes(&mut self) -> Result<u64, VmError> {
        #[derive(Deserialize)]
        struct Left {
            actual: u64,
        }
        self.monitor
            .execute::<Left>("query-balloon", None)
            .map(|left| left.actual)
    }

    /// Sets the target by the memory to be left to the guest, as QMP tools do.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn balloon_leave_bytes(&mut self, left_bytes: u64) -> Result<(), VmError> {
        self.monitor
            .execute::<Value>("balloon", Some(json!({ "value": left_bytes })))
            .map(drop)
    }

    /// Sets how large the balloon should be.
    ///
    /// The device accepts the target at once; the guest follows in its own time.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn set_target(&mut self, ballooned_bytes: u64) -> Result<(), VmError> {
        let arguments = json!({ "bytes": ballooned_bytes });
        self.monitor
            .execute::<Value>("aerostat-set-target", Some(arguments))
            .map(drop)
    }

    /// The device's state, sizes and counters.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn query(&mut self) -> Result<DeviceStatus, VmError> {
        self.monitor.execute("aerostat-query", None)
    }

    /// Asks the guest for fresh statistics and waits for them up to `wait`.
    ///
    /// # Errors
    /// See [`VmError`]; in particular the device refuses if the guest's driver does not answer.
    pub fn guest_stats(&mut self, wait: Duration) -> Result<GuestStats, VmError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let arguments = json!({ "timeout-ms": wait_ms });
        let patience = wait.saturating_add(self.monitor.timeout());
        self.monitor
            .execute_within("aerostat-guest-stats", Some(arguments), patience)
    }

    /// Begins a round of free page hints, which ends by itself after `limit`. Returns its id.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn start_hints(&mut self, limit: Duration) -> Result<u32, VmError> {
        #[derive(Deserialize)]
        struct Started {
            id: u32,
        }
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let arguments = json!({ "limit-ms": limit_ms });
        self.monitor
            .execute::<Started>("aerostat-hints-start", Some(arguments))
            .map(|started| started.id)
    }

    /// Takes hints that came, as many as one answer holds.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn take_hints(&mut self) -> Result<Hints, VmError> {
        self.monitor.execute("aerostat-hints-take", None)
    }

    /// Ends the round of hints.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn finish_hints(&mut self) -> Result<(), VmError> {
        self.monitor
            .execute::<Value>("aerostat-hints-finish", None)
            .map(drop)
    }

    /// What happened with the balloon behind entry number `since`.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn history(&mut self, since: u64) -> Result<Vec<HistoryEntry>, VmError> {
        #[derive(Deserialize)]
        struct Page {
            entries: Vec<HistoryEntry>,
        }
        let arguments = json!({ "since": since });
        self.monitor
            .execute::<Page>("aerostat-history", Some(arguments))
            .map(|page| page.entries)
    }

    /// The next event, kept or new; `None` if none came in time.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn next_event(&mut self, wait: Duration) -> Result<Option<BalloonEvent>, VmError> {
        self.monitor.next_event(wait)
    }
}

impl Vm for ControlClient {
    fn protocol(&self) -> &'static str {
        "aerostat"
    }

    fn peer_pid(&self) -> Option<u32> {
        // The back-end's process, which maps the guest's memory but is not its VMM.
        None
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        let status = self.query()?;
        let active = status.state == DeviceState::Active;
        // Half of the time for one command: a guest that does not answer is not an error.
        let guest = match self.guest_stats(self.monitor.timeout() / 2) {
            Ok(stats) => self.stats.aged(&stats, Instant::now()),
            Err(VmError::Refused { .. }) => self.stats.last(Instant::now()),
            Err(error) => return Err(error),
        };
        let has = |name: &str| status.feature_names.iter().any(|known| known == name);
        Ok(Observation {
            memory_bytes: status.memory_bytes,
            reach_bytes: None,
            target_bytes: Some(status.target_bytes),
            // After a restart of the back-end the driver's own figure is the truth.
            ballooned_bytes: status.ballooned_bytes.max(status.actual_bytes),
            running: active,
            guest,
            capabilities: Capabilities {
                guest_stats: has("stats-vq"),
                deflate_on_oom: has("deflate-on-oom"),
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        self.set_target(bytes)
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
