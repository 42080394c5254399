//! Ways to reach a virtual machine's balloon, one module for each kind of control interface, behind
//! one trait.
//!
//! `size`, `target` and `actual` always mean the ballooned area in bytes (requirement X1). The one
//! place where the opposite convention exists, memory *left* to the guest, is QMP, and the names
//! there say so.
//!
//! Peers are trusted to be VMMs, not to work: every exchange has a deadline, everything read has a
//! bound, and what goes wrong is an error about this one machine.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::policy::{Capabilities, GuestMemory, NodeTarget};

mod cloud_hypervisor;
pub mod control;
mod crosvm;
mod error;
mod firecracker;
mod http;
mod monitor;
mod qemu;
mod socket;
mod stats;
mod wire;
mod xen;

pub use cloud_hypervisor::CloudHypervisor;
pub use control::ControlClient;
pub use crosvm::Crosvm;
pub use error::VmError;
pub use firecracker::Firecracker;
pub use qemu::Qemu;
pub use stats::StatsAge;
pub use wire::{
    BalloonEvent, DeviceState, DeviceStatus, GuestRange, GuestStats, HintState, Hints,
    HistoryEntry, NodeStatus, PageCounters,
};
pub use xen::XenDomain;

#[cfg(test)]
pub(crate) mod test_peer;

/// What one look at a VM tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// The guest's memory, balloon included.
    pub memory_bytes: u64,
    /// The largest balloon there can be, where that is less (virtio-mem in QEMU).
    pub reach_bytes: Option<u64>,
    /// What the balloon should hold, where the VMM tells; else the last one we set counts.
    pub target_bytes: Option<u64>,
    /// What the balloon holds.
    pub ballooned_bytes: u64,
    /// The guest runs, and its balloon driver with it.
    pub running: bool,
    /// What the guest says about its memory.
    pub guest: GuestMemory,
    /// What the balloon can do.
    pub capabilities: Capabilities,
}

/// A virtual machine that can be looked at and told a target. Each call returns within a small
/// multiple of the time-out it was connected with. After an error that is not
/// [`VmError::Refused`], connect again.
pub trait Vm: Send + fmt::Debug {
    /// How it is reached.
    fn protocol(&self) -> &'static str;

    /// The VMM's process, if the socket tells: where its cgroup is found.
    fn peer_pid(&self) -> Option<u32>;

    /// Looks at it.
    ///
    /// # Errors
    /// See [`VmError`].
    fn observe(&mut self) -> Result<Observation, VmError>;

    /// Sets how large the balloon should be. The guest follows in its own time.
    ///
    /// # Errors
    /// See [`VmError`].
    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError>;

    /// Sets how large the balloon should be on each node, for a balloon with
    /// [`Capabilities::per_node_targets`]; others get the sum.
    ///
    /// # Errors
    /// See [`VmError`].
    fn set_node_targets(&mut self, targets: &[NodeTarget]) -> Result<(), VmError> {
        self.set_target_bytes(targets.iter().map(|target| target.target_bytes).sum())
    }
}

/// What the balloon holds, where the VMM tells what is left. That is less than nothing if the guest
/// says of its balloon that it is larger than the memory; what it says is passed on, to be named.
fn ballooned_bytes(memory_bytes: u64, left_bytes: i64) -> u64 {
    memory_bytes.saturating_add_signed(left_bytes.saturating_neg())
}

/// The kinds of control interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The control socket of `aerostat-vhost-user`.
    Aerostat,
    /// The monitor of QEMU: stock, or with a linked Aerostat device; libvirt hosts too.
    Qmp,
    /// The HTTP socket of Cloud Hypervisor.
    CloudHypervisor,
    /// The HTTP socket of Firecracker.
    Firecracker,
    /// The control socket of crosvm.
    Crosvm,
    /// The keys of a Xen domain, in xenstore.
    Xen,
}

/// Where a VM is, and by which protocol it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The kind of its control interface.
    pub protocol: Protocol,
    /// Its socket.
    pub socket: PathBuf,
    /// The guest's memory, for a VMM that does not tell it (crosvm).
    pub memory_bytes: Option<u64>,
    /// The number of the domain (Xen).
    pub domain: Option<u32>,
}

impl Endpoint {
    /// Connects; `timeout` then bounds every exchange.
    ///
    /// # Errors
    /// Nobody is there, it does not speak the protocol, or it has no balloon.
    pub fn connect(&self, timeout: Duration) -> Result<Box<dyn Vm>, VmError> {
        let path = self.socket.as_path();
        Ok(match self.protocol {
            Protocol::Aerostat => Box::new(ControlClient::connect(path, timeout)?),
            Protocol::Qmp => Box::new(Qemu::connect(path, timeout)?),
            Protocol::CloudHypervisor => Box::new(CloudHypervisor::connect(path, timeout)?),
            Protocol::Firecracker => Box::new(Firecracker::connect(path, timeout)?),
            Protocol::Crosvm => Box::new(Crosvm::connect(path, timeout, self.memory_bytes)?),
            // The configuration was checked to have one.
            Protocol::Xen => {
                let domain = self.domain.unwrap_or_default();
                Box::new(XenDomain::connect(path, timeout, domain)?)
            }
        })
    }
}
