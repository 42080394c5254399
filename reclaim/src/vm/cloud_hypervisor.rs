//! Cloud Hypervisor by its API socket (`--api-socket`).
//!
//! `vm.info` tells memory, target (`config.balloon.size`) and what is left (`memory_actual_size`);
//! `vm.resize` with `desired_balloon` sets the target. The guest's statistics are not to be had: the
//! device has no statistics queue.
//!
//! Source: `vmm/src/api/openapi/cloud-hypervisor.yaml`.

use std::{path::Path, time::Duration};

use serde::Deserialize;
use serde_json::json;

use super::{Observation, Vm, VmError, ballooned_bytes, http::HttpSocket};
use crate::policy::{Capabilities, GuestMemory};

/// A virtual machine of Cloud Hypervisor.
#[derive(Debug)]
pub struct CloudHypervisor {
    http: HttpSocket,
}

#[derive(Deserialize)]
struct Info {
    config: Config,
    state: String,
    #[serde(default)]
    memory_actual_size: u64,
}

#[derive(Deserialize)]
struct Config {
    memory: Memory,
    balloon: Option<Balloon>,
}

#[derive(Deserialize)]
struct Memory {
    #[serde(default)]
    size: u64,
    #[serde(default)]
    hotplugged_size: Option<u64>,
    #[serde(default)]
    zones: Option<Vec<Memory>>,
}

impl Memory {
    fn bytes(&self) -> u64 {
        let zones = self.zones.iter().flatten().map(Self::bytes);
        zones
            .chain(self.hotplugged_size)
            .fold(self.size, u64::saturating_add)
    }
}

#[derive(Deserialize)]
struct Balloon {
    #[serde(default)]
    size: u64,
    #[serde(default)]
    deflate_on_oom: bool,
}

impl CloudHypervisor {
    /// Looks whether there is a VM with a balloon.
    ///
    /// # Errors
    /// Nobody is there, it is not Cloud Hypervisor, or the VM has no balloon.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        let vm = Self {
            http: HttpSocket::new(path, timeout),
        };
        vm.info()?;
        Ok(vm)
    }

    fn info(&self) -> Result<(Info, Balloon), VmError> {
        let mut info: Info = self.http.get("/api/v1/vm.info")?;
        match info.config.balloon.take() {
            Some(balloon) => Ok((info, balloon)),
            None => Err(VmError::NoBalloon {
                path: self.http.path().to_owned(),
                option: "--balloon size=0,deflate_on_oom=on,free_page_reporting=on",
            }),
        }
    }
}

impl Vm for CloudHypervisor {
    fn protocol(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn peer_pid(&self) -> Option<u32> {
        self.http.peer_pid()
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        let (info, balloon) = self.info()?;
        let memory_bytes = info.config.memory.bytes();
        Ok(Observation {
            memory_bytes,
            reach_bytes: None,
            target_bytes: Some(balloon.size),
            // A difference that wraps around below zero.
            ballooned_bytes: ballooned_bytes(memory_bytes, info.memory_actual_size.cast_signed()),
            running: info.state == "Running",
            guest: GuestMemory::default(),
            capabilities: Capabilities {
                deflate_on_oom: balloon.deflate_on_oom,
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        let body = json!({ "desired_balloon": bytes });
        self.http.send("PUT", "/api/v1/vm.resize", &body)
    }
}
