//! QEMU by its monitor (QMP): stock QEMU, and libvirt hosts.
//!
//! A QMP socket serves one client at a time, so give the reclaimer one of its own:
//! `-qmp unix:/run/aerostat/NAME.qmp,server=on,wait=off`. libvirt keeps its monitor to itself; there
//! the same option goes into `<qemu:commandline>`.
//!
//! QMP counts memory *left to the guest*. QEMU does not tell the target, so the last one that was set
//! counts. Statistics are polled by QEMU itself at an interval that is set here.
//!
//! Source: QEMU's `qapi/machine.json` (balloon, query-balloon, query-memory-size-summary, query-memory-devices),
//! `docs/interop/virtio-balloon-stats.rst`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    GuestStats, Observation, StatsAge, Vm, VmError, ballooned_bytes, monitor::Monitor,
    wire::BalloonEvent,
};
use crate::policy::{Capabilities, GuestMemory};

/// How often QEMU asks the guest for statistics.
const STATS_INTERVAL_SECONDS: u64 = 2;

/// Where user-created devices are in QEMU's object tree: those with an id, and those without.
const DEVICE_FOLDERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Types of balloon devices, as far as they are common: virtio-balloon-pci, virtio-balloon-ccw,
/// virtio-balloon-device, and the devices that link this library.
const BALLOON_TYPES: [&str; 4] = [
    "child<virtio-balloon",
    "child<aerostat-balloon",
    "child<aerostat-memballoon",
    "child<aerostat-vmware-balloon",
];

/// A virtual machine of QEMU.
#[derive(Debug)]
pub struct Qemu {
    monitor: Monitor,
    balloon: String,
    stats: StatsAge,
    polling: bool,
    deflate_on_oom: bool,
    target_bytes: Option<u64>,
}

struct Memory {
    all_bytes: u64,
    of_balloon_bytes: u64,
}

#[derive(Deserialize)]
struct Member {
    name: String,
    #[serde(default, rename = "type")]
    kind: String,
}

impl Qemu {
    /// Connects, finds the balloon and switches its statistics on.
    ///
    /// # Errors
    /// Nobody is there, it is not QMP, another client holds it, or the VM has no balloon.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, VmError> {
        let mut monitor = Monitor::connect(path, timeout)?;
        let balloon = find_balloon(&mut monitor)?;
        let interval = json!({
            "path": balloon,
            "property": "guest-stats-polling-interval",
            "value": STATS_INTERVAL_SECONDS,
        });
        // A guest without statistics has a balloon all the same.
        let polling = match monitor.execute::<Value>("qom-set", Some(interval)) {
            Ok(_) => true,
            Err(VmError::Refused { .. }) => false,
            Err(error) => return Err(error),
        };
        let oom = json!({ "path": balloon, "property": "deflate-on-oom" });
        let deflate_on_oom = match monitor.execute::<Value>("qom-get", Some(oom)) {
            Ok(value) => value.as_bool().unwrap_or(false),
            Err(VmError::Refused { .. }) => false,
            Err(error) => return Err(error),
        };
        Ok(Self {
            monitor,
            balloon,
            stats: StatsAge::default(),
            polling,
            deflate_on_oom,
            target_bytes: None,
        })
    }

    /// The next change of the balloon; `None` if none came in time.
    ///
    /// # Errors
    /// See [`VmError`].
    pub fn next_event(&mut self, wait: Duration) -> Result<Option<BalloonEvent>, VmError> {
        self.monitor.next_event(wait)
    }

    /// The guest's memory, and what of it the balloon can take: of what is plugged in QEMU's balloon counts DIMMs
    /// and nothing else (`get_current_ram_size()` in `hw/virtio/virtio-balloon.c`), so no memory of virtio-mem.
    /// NVDIMMs and the like are none of the guest's memory.
    fn memory(&mut self) -> Result<Memory, VmError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Summary {
            base_memory: u64,
            #[serde(default)]
            plugged_memory: u64,
        }
        #[derive(Deserialize)]
        struct Device {
            #[serde(rename = "type")]
            kind: String,
            data: DeviceData,
        }
        #[derive(Deserialize)]
        struct DeviceData {
            #[serde(default)]
            size: u64,
        }
        let summary: Summary = self.monitor.execute("query-memory-size-summary", None)?;
        let devices: Vec<Device> = match summary.plugged_memory {
            0 => Vec::new(),
            _ => self.monitor.execute("query-memory-devices", None)?,
        };
        let plugged = |kind: &str| {
            let devices = devices.iter().filter(|device| device.kind == kind);
            devices.fold(0_u64, |sum, device| sum.saturating_add(device.data.size))
        };
        let of_balloon_bytes = summary.base_memory.saturating_add(plugged("dimm"));
        Ok(Memory {
            all_bytes: of_balloon_bytes.saturating_add(plugged("virtio-mem")),
            of_balloon_bytes,
        })
    }

    fn guest(&mut self) -> Result<GuestMemory, VmError> {
        let arguments = json!({ "path": self.balloon, "property": "guest-stats" });
        match self
            .monitor
            .execute::<SignedStats>("qom-get", Some(arguments))
        {
            Ok(stats) => Ok(self.stats.aged(&stats.positive(), Instant::now())),
            Err(VmError::Refused { .. }) => Ok(self.stats.last(Instant::now())),
            Err(error) => Err(error),
        }
    }
}

/// Statistics as QEMU writes them. What the guest did not send is the largest number in new
/// versions and -1 in others.
#[derive(Deserialize)]
struct SignedStats {
    #[serde(default)]
    stats: serde_json::Map<String, Value>,
    #[serde(default, rename = "last-update")]
    last_update: Value,
}

impl SignedStats {
    fn positive(self) -> GuestStats {
        let values = self
            .stats
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), value.as_u64()?)));
        GuestStats::new(values.collect(), self.last_update.as_u64().unwrap_or(0))
    }
}

impl Vm for Qemu {
    fn protocol(&self) -> &'static str {
        "qmp"
    }

    fn peer_pid(&self) -> Option<u32> {
        self.monitor.peer_pid()
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        #[derive(Deserialize)]
        struct Left {
            actual: i64,
        }
        #[derive(Deserialize)]
        struct Status {
            running: bool,
        }
        let memory = self.memory()?;
        let status: Status = self.monitor.execute("query-status", None)?;
        // Before its driver is up the guest has no balloon; that is not an error.
        let (ballooned_bytes, active) = match self.monitor.execute::<Left>("query-balloon", None) {
            Ok(left) => (ballooned_bytes(memory.of_balloon_bytes, left.actual), true),
            Err(VmError::Refused { .. }) => (0, false),
            Err(error) => return Err(error),
        };
        let guest = self.guest()?;
        let guest_stats = self.polling && guest.age.is_some();
        Ok(Observation {
            memory_bytes: memory.all_bytes,
            reach_bytes: (memory.of_balloon_bytes < memory.all_bytes)
                .then_some(memory.of_balloon_bytes),
            target_bytes: self.target_bytes,
            ballooned_bytes,
            running: active && status.running,
            guest,
            capabilities: Capabilities {
                guest_stats,
                deflate_on_oom: self.deflate_on_oom,
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        // QEMU refuses to leave nothing.
        let most = self.memory()?.of_balloon_bytes;
        let left = most.saturating_sub(bytes).max(1 << 20);
        self.monitor
            .execute::<Value>("balloon", Some(json!({ "value": left })))?;
        self.target_bytes = Some(bytes);
        Ok(())
    }
}

fn find_balloon(monitor: &mut Monitor) -> Result<String, VmError> {
    for folder in DEVICE_FOLDERS {
        let arguments = json!({ "path": folder });
        let members: Vec<Member> = match monitor.execute("qom-list", Some(arguments)) {
            Ok(members) => members,
            Err(VmError::Refused { .. }) => continue,
            Err(error) => return Err(error),
        };
        let is_balloon = |member: &&Member| {
            BALLOON_TYPES
                .iter()
                .any(|kind| member.kind.starts_with(kind))
        };
        if let Some(member) = members.iter().find(is_balloon) {
            return Ok(format!("{folder}/{}", member.name));
        }
    }
    Err(VmError::NoBalloon {
        path: monitor.path().to_owned(),
        option: "-device virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on",
    })
}

#[cfg(test)]
#[path = "qemu_tests.rs"]
mod tests;
