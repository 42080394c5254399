//! Policies: pure functions from a sample to decisions.
//!
//! A common engine for every balloon protocol (J1): it sees how much a guest needs and how much the
//! host lacks (J4), never how the two talk. `docs/policy.md` has each rule with its inputs and its
//! evidence.
//!
//! ```text
//! host memory, pressure ─▶ demand ─┐                      ┌─▶ giving ────┐
//!                                  ├─▶ one round, in six ─┼─▶ returning ─┼─▶ floor ─▶ decisions
//! guest statistics ─▶ guest, distress┘   steps (aerostat) └─▶ fluid ─────┘
//! ```
//!
//! [`rivals`] holds rules in use elsewhere, for comparison.

mod aerostat;
pub mod amount;
mod config;
mod demand;
mod distress;
mod giving;
mod guest;
mod nodes;
mod reason;
mod returning;
pub mod rivals;
mod share;
mod state;
pub mod types;

#[cfg(test)]
mod aerostat_tests;
#[cfg(test)]
mod invariant_tests;
#[cfg(test)]
mod rival_tests;
#[cfg(test)]
mod test_world;

pub use aerostat::Aerostat;
pub use config::{PolicyConfig, PolicyConfigError};
pub use distress::Distress;
pub use guest::{FloorViolation, check_manual_target, configured_floor_bytes};
pub use reason::{Bound, Reason, Spared};
pub use types::{
    Budget, Capabilities, Decision, GuestMemory, HostNodeSample, HostSample, HypervisorTraits,
    MemoryLimits, Mode, NodeId, NodeTarget, Policy, Pressure, Sample, VmId, VmNodeSample, VmSample,
};

/// The names of all rules; the first is the one to use.
pub const NAMES: [&str; 6] = ["aerostat", "none", "mom", "proxmox", "senpai", "squeezed"];

/// The rule of this name, with these settings and no memory; `None` if there is none.
#[must_use]
pub fn by_name(name: &str, config: &PolicyConfig) -> Option<Box<dyn Policy>> {
    let config = config.clone();
    Some(match name {
        "aerostat" => Box::new(Aerostat::new(config)),
        "none" => Box::new(rivals::Nothing),
        "mom" => Box::new(rivals::Mom::new(config)),
        "proxmox" => Box::new(rivals::Proxmox::new(config)),
        "senpai" => Box::new(rivals::Senpai::new(config)),
        "squeezed" => Box::new(rivals::Squeezed::new(config)),
        _ => return None,
    })
}
