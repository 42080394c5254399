//! Firecracker by its API socket.
//!
//! `PATCH /balloon` sets the target in MiB. `GET /balloon/statistics` tells target, size and what the
//! guest says, provided that statistics were switched on before boot
//! (`stats_polling_interval_s` of `PUT /balloon` not 0); without them the size is not known, and the
//! target is taken for it.
//!
//! Source: `src/firecracker/swagger/firecracker.yaml`, `docs/ballooning.md`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::json;

use super::{Observation, StatsAge, Vm, VmError, http::HttpSocket};
use crate::policy::{Capabilities, GuestMemory};

const MIB: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;

/// A virtual machine of Firecracker.
#[derive(Debug)]
pub struct Firecracker {
    http: HttpSocket,
    stats: StatsAge,
}

#[derive(Deserialize)]
struct Balloon {
    amount_mib: u64,
    #[serde(default)]
    deflate_on_oom: bool,
    #[serde(default)]
    stats_polling_interval_s: u64,
}

#[derive(Deserialize)]
struct Statistics {
    target_pages: u64,
    actual_pages: u64,
    swap_in: Option<u64>,
    swap_out: Option<u64>,
    major_faults: Option<u64>,
    minor_faults: Option<u64>,
    free_memory: Option<u64>,
    total_memory: Option<u64>,
    available_memory: Option<u64>,
    disk_caches: Option<u64>,
    oom_kill: Option<u64>,
    alloc_stall: Option<u64>,
}

impl Firecracker {
    /// Looks whether there is a VM with a balloon.
    ///
    /// # Errors
    /// Nobody is there, it is not Firecracker, or the VM has no balloon.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        let vm = Self {
            http: HttpSocket::new(path, timeout),
            stats: StatsAge::default(),
        };
        vm.balloon()?;
        Ok(vm)
    }

    fn balloon(&self) -> Result<Balloon, VmError> {
        match self.http.get("/balloon") {
            Err(VmError::Refused { class, .. }) if class == "400" => Err(VmError::NoBalloon {
                path: self.http.path().to_owned(),
                option: "PUT /balloon {\"amount_mib\": 0, \"deflate_on_oom\": true, \
                         \"stats_polling_interval_s\": 1} before InstanceStart",
            }),
            balloon => balloon,
        }
    }
}

impl Vm for Firecracker {
    fn protocol(&self) -> &'static str {
        "firecracker"
    }

    fn peer_pid(&self) -> Option<u32> {
        self.http.peer_pid()
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        #[derive(Deserialize)]
        struct Machine {
            mem_size_mib: u64,
        }
        #[derive(Deserialize)]
        struct Instance {
            state: String,
        }
        let machine: Machine = self.http.get("/machine-config")?;
        let instance: Instance = self.http.get("/")?;
        let balloon = self.balloon()?;
        let mut target_bytes = balloon.amount_mib.saturating_mul(MIB);
        let mut ballooned_bytes = target_bytes;
        let mut guest = GuestMemory::default();
        let guest_stats = balloon.stats_polling_interval_s > 0;
        if guest_stats {
            let stats: Statistics = self.http.get("/balloon/statistics")?;
            target_bytes = stats.target_pages.saturating_mul(PAGE_BYTES);
            ballooned_bytes = stats.actual_pages.saturating_mul(PAGE_BYTES);
            if stats.total_memory.is_some() {
                guest = self.stats.changed(stats.guest(), Instant::now());
            }
        }
        Ok(Observation {
            memory_bytes: machine.mem_size_mib.saturating_mul(MIB),
            reach_bytes: None,
            target_bytes: Some(target_bytes),
            ballooned_bytes,
            running: instance.state == "Running",
            guest,
            capabilities: Capabilities {
                guest_stats,
                deflate_on_oom: balloon.deflate_on_oom,
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        let body = json!({ "amount_mib": bytes / MIB });
        self.http.send("PATCH", "/balloon", &body)
    }
}

impl Statistics {
    fn guest(&self) -> GuestMemory {
        GuestMemory {
            age: None,
            total_bytes: self.total_memory,
            free_bytes: self.free_memory,
            available_bytes: self.available_memory,
            caches_bytes: self.disk_caches,
            swap_in_bytes: self.swap_in,
            swap_out_bytes: self.swap_out,
            major_faults: self.major_faults,
            minor_faults: self.minor_faults,
            oom_kills: self.oom_kill,
            alloc_stalls: self.alloc_stall,
        }
    }
}
