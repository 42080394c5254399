//! crosvm by its control socket (`crosvm run --socket PATH`).
//!
//! A `SOCK_SEQPACKET` socket: one JSON message a packet, one request and one answer a connection, as
//! the `crosvm balloon` and `crosvm balloon_stats` commands do. crosvm does not tell the guest's
//! memory size; it is taken from the configuration, or else what the guest says it has plus the
//! balloon.
//!
//! Source: crosvm's `vm_control/src/balloon_tube.rs`, `base/src/sys/linux/tube.rs`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::net::SocketType;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Observation, StatsAge, Vm, VmError,
    socket::{Deadline, Socket},
};
use crate::policy::{Capabilities, GuestMemory};

/// The most accepted as one message; what is beyond is cut off by the kernel, and then is no JSON.
const MESSAGE_LIMIT_BYTES: usize = 64 << 10;

/// A virtual machine of crosvm.
#[derive(Debug)]
pub struct Crosvm {
    path: PathBuf,
    timeout: Duration,
    memory_bytes: Option<u64>,
    target_bytes: Option<u64>,
    stats: StatsAge,
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    stats: Stats,
    balloon_actual: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Stats {
    swap_in: Option<u64>,
    swap_out: Option<u64>,
    major_faults: Option<u64>,
    minor_faults: Option<u64>,
    free_memory: Option<u64>,
    total_memory: Option<u64>,
    available_memory: Option<u64>,
    disk_caches: Option<u64>,
}

impl Crosvm {
    /// Looks whether there is a VM with a balloon; `memory_bytes` is the guest's, if it is known.
    ///
    /// # Errors
    /// Nobody is there, or it is not crosvm.
    pub fn connect(
        path: &Path,
        timeout: Duration,
        memory_bytes: Option<u64>,
    ) -> Result<Self, VmError> {
        let vm = Self {
            path: path.to_owned(),
            timeout,
            memory_bytes,
            target_bytes: None,
            stats: StatsAge::default(),
        };
        vm.report()?;
        Ok(vm)
    }

    fn report(&self) -> Result<Report, VmError> {
        let answer = self.request(&json!({ "BalloonCommand": "Stats" }), "balloon stats")?;
        match answer.get("BalloonStats") {
            Some(report) => Report::deserialize(report)
                .map_err(|error| self.malformed(format!("balloon stats: {error}"))),
            None => Err(self.refused("balloon stats", &answer)),
        }
    }

    fn request(&self, request: &Value, command: &str) -> Result<Value, VmError> {
        let mut deadline = Deadline::after(self.timeout);
        let mut socket = Socket::connect(&self.path, SocketType::SEQPACKET)?;
        socket.send(request.to_string().as_bytes(), self.timeout)?;
        let mut packet = Vec::new();
        while packet.is_empty() {
            if !socket.fill(&mut packet, MESSAGE_LIMIT_BYTES, &mut deadline)? {
                return Err(VmError::Timeout {
                    path: self.path.clone(),
                    command: command.to_owned(),
                    waited: self.timeout,
                });
            }
        }
        serde_json::from_slice(&packet)
            .map_err(|error| self.malformed(format!("answer to {command}: {error}")))
    }

    fn refused(&self, command: &str, answer: &Value) -> VmError {
        VmError::Refused {
            path: self.path.clone(),
            command: command.to_owned(),
            class: "VmResponse".to_owned(),
            description: answer.to_string().chars().take(400).collect(),
        }
    }

    fn malformed(&self, detail: String) -> VmError {
        VmError::Malformed {
            path: self.path.clone(),
            detail,
        }
    }
}

impl Vm for Crosvm {
    fn protocol(&self) -> &'static str {
        "crosvm"
    }

    fn peer_pid(&self) -> Option<u32> {
        let socket = Socket::connect(&self.path, SocketType::SEQPACKET).ok()?;
        socket.peer_pid()
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        let report = self.report()?;
        let stats = &report.stats;
        let guest_stats = stats.total_memory.is_some();
        let told = stats
            .total_memory
            .unwrap_or(0)
            .saturating_add(report.balloon_actual);
        let guest = GuestMemory {
            age: None,
            total_bytes: stats.total_memory,
            free_bytes: stats.free_memory,
            available_bytes: stats.available_memory,
            caches_bytes: stats.disk_caches,
            swap_in_bytes: stats.swap_in,
            swap_out_bytes: stats.swap_out,
            major_faults: stats.major_faults,
            minor_faults: stats.minor_faults,
            ..GuestMemory::default()
        };
        let guest = if guest_stats {
            self.stats.changed(guest, Instant::now())
        } else {
            GuestMemory::default()
        };
        Ok(Observation {
            memory_bytes: self.memory_bytes.unwrap_or(told),
            reach_bytes: None,
            target_bytes: self.target_bytes,
            ballooned_bytes: report.balloon_actual,
            running: guest_stats,
            guest,
            capabilities: Capabilities {
                guest_stats,
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        let request = json!({
            "BalloonCommand": { "Adjust": { "num_bytes": bytes, "wait_for_success": false } }
        });
        let answer = self.request(&request, "balloon")?;
        if answer != json!("Ok") {
            return Err(self.refused("balloon", &answer));
        }
        self.target_bytes = Some(bytes);
        Ok(())
    }
}
