//! What a policy sees and what it answers: plain values, so that every policy is a pure function of
//! its sample, its configuration and the state it carries along.
//!
//! `target` and `ballooned` always mean the ballooned area in bytes (X1). What the host or the guest
//! did not tell is `None`, never zero. Times are [`Duration`]s of a monotonic clock since the engine
//! started, so a step of the wall clock is invisible here.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use super::reason::Reason;

/// A host memory node.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct NodeId(pub u32);

impl fmt::Display for NodeId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)
    }
}

/// The name by which operators know a virtual machine. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(Arc<str>);

impl VmId {
    /// The VM called `name`.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Its name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl From<&str> for VmId {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

/// How far a VM's balloon follows the policy (J3, A7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The operator's target holds; a policy never changes it, except down to keep the configured
    /// floor.
    Manual,
    /// The operator's target holds, and memory is given back when the guest is in distress.
    FloorOnly,
    /// The policy decides; an operator's target is what it returns to when memory is plentiful.
    #[default]
    Auto,
    /// As auto, and what the guest has above its floor is on loan: it moves between fluid guests
    /// in small steps by present need, whether or not the host is short (J7).
    Fluid,
}

/// What the hypervisor of a VM can do with its memory besides ballooning (J5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct HypervisorTraits {
    /// Equal pages of several guests share one page of the host (KSM).
    pub page_sharing: bool,
    /// The host can swap the guest's memory out and fault it in on demand.
    pub demand_fault_from_swap: bool,
}

/// What a VM's balloon can do, whatever its protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Capabilities {
    /// The target can be set for each node.
    pub per_node_targets: bool,
    /// The guest can grow above its boot size (J6).
    pub extra_memory: bool,
    /// The guest's driver reports statistics.
    pub guest_stats: bool,
    /// The guest may deflate by itself under memory pressure (A1).
    pub deflate_on_oom: bool,
}

/// Pressure stall information of the host or of one cgroup: the share of time in which tasks
/// waited for memory, in percent, and the total in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Pressure {
    /// At least one task waited, over the last 10 s.
    pub some_avg10: f64,
    /// At least one task waited, over the last 60 s.
    pub some_avg60: f64,
    /// At least one task waited, over the last 300 s.
    pub some_avg300: f64,
    /// All tasks waited, over the last 10 s.
    pub full_avg10: f64,
    /// All tasks waited, over the last 60 s.
    pub full_avg60: f64,
    /// All tasks waited, over the last 300 s.
    pub full_avg300: f64,
    /// Microseconds in which at least one task waited, since boot.
    pub some_total_us: u64,
    /// Microseconds in which all tasks waited, since boot.
    pub full_total_us: u64,
}

/// What a guest says about its own memory (S8). Counters only grow while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct GuestMemory {
    /// How old these values were when the sample was taken; `None` if the guest never sent any.
    pub age: Option<Duration>,
    /// Memory the guest has, the balloon taken off.
    pub total_bytes: Option<u64>,
    /// Memory not in use at all.
    pub free_bytes: Option<u64>,
    /// Memory the guest could use without swapping.
    pub available_bytes: Option<u64>,
    /// Caches of files.
    pub caches_bytes: Option<u64>,
    /// Counter: bytes swapped in.
    pub swap_in_bytes: Option<u64>,
    /// Counter: bytes swapped out.
    pub swap_out_bytes: Option<u64>,
    /// Counter: page faults that read a disk.
    pub major_faults: Option<u64>,
    /// Counter: page faults served from memory.
    pub minor_faults: Option<u64>,
    /// Counter: processes killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Counter: allocations that had to wait for reclaim.
    pub alloc_stalls: Option<u64>,
}

/// One host memory node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostNodeSample {
    /// Which.
    pub node: NodeId,
    /// Its size.
    pub total_bytes: u64,
    /// What could be used without swapping: free, and caches of files.
    pub available_bytes: u64,
}

/// The host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostSample {
    /// Its memory (`MemTotal`).
    pub total_bytes: u64,
    /// What could be used without swapping (`MemAvailable`).
    pub available_bytes: u64,
    /// Free swap space, 0 without swap.
    pub swap_free_bytes: u64,
    /// Memory pressure; `None` on a kernel without PSI.
    pub pressure: Option<Pressure>,
    /// A PSI trigger fired since the last sample: do not wait for the averages.
    pub pressure_event: bool,
    /// Its nodes; empty if they are not known.
    pub nodes: Vec<HostNodeSample>,
}

/// A VM's memory on one host node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmNodeSample {
    /// Which.
    pub node: NodeId,
    /// What the VM occupies there.
    pub current_bytes: u64,
    /// What of it the balloon holds.
    pub ballooned_bytes: u64,
    /// The target there, where [`Capabilities::per_node_targets`] holds; else 0.
    pub target_bytes: u64,
}

/// Limits of a VM's cgroup. `None` is "max" for the upper limits, and 0 for the protections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MemoryLimits {
    /// `memory.min`: never reclaimed below.
    pub min_bytes: Option<u64>,
    /// `memory.low`: reclaimed below only when nothing else is left.
    pub low_bytes: Option<u64>,
    /// `memory.high`: throttled and reclaimed above.
    pub high_bytes: Option<u64>,
    /// `memory.max`: killed above.
    pub max_bytes: Option<u64>,
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmSample {
    /// Which.
    pub id: VmId,
    /// How far it follows the policy.
    pub mode: Mode,
    /// Its share against the others, 100 for an ordinary VM.
    pub weight: u32,
    /// Memory that is always left to the guest, as configured (J2). The policy may know a higher one.
    pub floor_bytes: u64,
    /// What the operator asked for by hand, if ever.
    pub manual_target_bytes: Option<u64>,
    /// The operator said explicitly that `manual_target_bytes` may go below the floor (J2). It
    /// speaks for [`Mode::Manual`] alone.
    pub floor_override: bool,
    /// The guest's memory, balloon included (its boot size).
    pub memory_bytes: u64,
    /// The largest balloon there can be, where that is less than its memory.
    pub reach_bytes: Option<u64>,
    /// What the VM occupies on the host (`memory.current`); `None` without a cgroup of its own.
    pub current_bytes: Option<u64>,
    /// What of its memory is swapped out by the host.
    pub swap_current_bytes: Option<u64>,
    /// What the balloon holds.
    pub ballooned_bytes: u64,
    /// What it should hold: the target as the device has it.
    pub target_bytes: u64,
    /// What the guest says.
    pub guest: GuestMemory,
    /// Pressure in the VM's cgroup.
    pub pressure: Option<Pressure>,
    /// Limits of the VM's cgroup.
    pub limits: MemoryLimits,
    /// Its limit comes out of the budget.
    pub limited: bool,
    /// By host node; empty if it is not known.
    pub nodes: Vec<VmNodeSample>,
    /// What its hypervisor can do.
    pub traits: HypervisorTraits,
    /// What its balloon can do.
    pub capabilities: Capabilities,
    /// Its control interface answered for this sample. If not, the values are the last ones known,
    /// and no decision about it can be carried out.
    pub reachable: bool,
}

impl VmSample {
    /// A VM of `memory_bytes` with nothing in its balloon and defaults in everything else.
    #[must_use]
    pub fn new(id: VmId, memory_bytes: u64) -> Self {
        Self {
            id,
            mode: Mode::Auto,
            weight: 100,
            floor_bytes: 0,
            manual_target_bytes: None,
            floor_override: false,
            memory_bytes,
            reach_bytes: None,
            current_bytes: None,
            swap_current_bytes: None,
            ballooned_bytes: 0,
            target_bytes: 0,
            guest: GuestMemory::default(),
            pressure: None,
            limits: MemoryLimits::default(),
            limited: false,
            nodes: Vec::new(),
            traits: HypervisorTraits::default(),
            capabilities: Capabilities::default(),
            reachable: true,
        }
    }

    /// Memory left to the guest.
    #[must_use]
    pub fn left_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.ballooned_bytes)
    }
}

/// The budget of limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Budget {
    /// What VMs with a limit may occupy together.
    pub total_bytes: u64,
    /// What they need now, with some room to grow.
    pub needed_bytes: u64,
}

/// Everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// When, since the engine started.
    pub at: Duration,
    /// The host.
    pub host: HostSample,
    /// What VMs with a limit may occupy together; `None` where no limits are kept.
    pub budget: Option<Budget>,
    /// Every VM, in the order of their names.
    pub vms: Vec<VmSample>,
}

/// A target on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeTarget {
    /// Which node.
    pub node: NodeId,
    /// What the balloon should hold there.
    pub target_bytes: u64,
}

/// What to do with one VM. The engine turns it into steps that keep the books (I5): limits are
/// raised before a target falls, and lowered only by what has left `memory.current`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Decision {
    /// Which VM.
    pub vm: VmId,
    /// What its balloon should hold. Equal to the sample's target: nothing is sent.
    pub target_bytes: u64,
    /// The same by node, for balloons with per-node targets; their sum is `target_bytes`.
    pub nodes: Vec<NodeTarget>,
    /// Last resort: bytes to take with `memory.reclaim`, for what the balloon cannot get.
    pub reclaim_bytes: u64,
    /// Memory left to the guest below which this decision would not have gone.
    pub floor_bytes: u64,
    /// Inputs, rule and outcome; one line when it is displayed.
    pub reason: Reason,
}

/// A way to decide. The same state and sample give the same decisions: no clock, no file, no chance.
pub trait Policy: fmt::Debug + Send {
    /// Its name in configuration, plots and explanations.
    fn name(&self) -> &'static str;

    /// Decides about every VM of the sample that is to change or to be explained; VMs that are
    /// unreachable keep their target. State (holds, stalls, counters of the last sample) is kept
    /// by VM and forgotten for VMs that are no longer in the sample.
    fn decide(&mut self, sample: &Sample) -> Vec<Decision>;
}
