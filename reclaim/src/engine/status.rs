//! What aerostatd tells about itself: one value for each thing, under one name and in one unit,
//! whatever the VM's protocol (J8).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::policy::{GuestMemory, Mode, Pressure, VmId};

/// Points of history kept for each VM (A9).
pub const HISTORY_LIMIT: usize = 256;

/// Everything at the last decision.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Decisions since then.
    pub ticks: u64,
    /// How long the last one took, all reading and deciding included.
    pub tick_us: u64,
    /// The rule that decides.
    pub policy: String,
    /// Nothing is carried out.
    pub dry_run: bool,
    /// The host.
    pub host: HostStatus,
    /// The books.
    pub ledger: LedgerStatus,
    /// The VMs, by name.
    pub vms: Vec<VmStatus>,
}

/// The host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct HostStatus {
    /// `MemTotal`.
    pub total_bytes: u64,
    /// `MemAvailable`.
    pub available_bytes: u64,
    /// What the policy wants available.
    pub high_bytes: u64,
    /// Below this it is an emergency.
    pub low_bytes: u64,
    /// Free swap.
    pub swap_free_bytes: u64,
    /// Memory pressure, if the kernel tells.
    pub pressure: Option<Pressure>,
    /// Pressure triggers that fired.
    pub pressure_events: u64,
}

/// The books (I5): budget = pool + what is promised to VMs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct LedgerStatus {
    /// Limits are kept.
    pub enabled: bool,
    /// What all VMs together may occupy.
    pub budget_bytes: u64,
    /// Promised to nobody; negative when limits from elsewhere exceed the budget.
    pub pool_bytes: i64,
    /// The books balance.
    pub balanced: bool,
}

/// Where a VM stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Not connected to yet, or not any more.
    #[default]
    Absent,
    /// It does not answer.
    Unreachable,
    /// It answers, and its guest or driver does not run.
    Idle,
    /// It answers.
    Running,
}

impl Condition {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Unreachable => "unreachable",
            Self::Idle => "idle",
            Self::Running => "running",
        }
    }
}

/// One VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmStatus {
    /// Its name.
    pub name: VmId,
    /// How it is reached.
    pub protocol: String,
    /// Its socket.
    pub socket: String,
    /// Its cgroup, if it has one of its own.
    pub cgroup: Option<String>,
    /// Where it stands.
    pub condition: Condition,
    /// How far it follows the policy.
    pub mode: Mode,
    /// Its share against the others.
    pub weight: u32,
    /// The guest's memory, balloon included.
    pub memory_bytes: u64,
    /// What the balloon should hold.
    pub target_bytes: u64,
    /// What it holds.
    pub ballooned_bytes: u64,
    /// Memory left to the guest below which no decision goes.
    pub floor_bytes: u64,
    /// What the operator asked for by hand.
    pub manual_target_bytes: Option<u64>,
    /// What it occupies on the host.
    pub current_bytes: Option<u64>,
    /// What of its memory the host has swapped out.
    pub swap_bytes: Option<u64>,
    /// What it may occupy, by the ledger.
    pub limit_bytes: Option<u64>,
    /// Memory pressure in its cgroup.
    pub pressure: Option<Pressure>,
    /// What the guest says.
    pub guest: GuestMemory,
    /// The last decision in a line: inputs, rule and outcome.
    pub reason: String,
    /// What is wrong, and what to do.
    pub trouble: Option<String>,
    /// Errors since it was first seen.
    pub errors: u64,
    /// The last changes of target and actual size, oldest first.
    pub history: VecDeque<HistoryPoint>,
}

/// A change of target or actual size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HistoryPoint {
    /// Milliseconds since the daemon started.
    pub at_ms: u64,
    /// What the balloon should hold.
    pub target_bytes: u64,
    /// What it holds.
    pub ballooned_bytes: u64,
    /// Why the target changed; empty if it did not.
    pub reason: String,
}
