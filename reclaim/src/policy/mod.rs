//! Policies: pure functions from a sample to decisions.

pub mod types;

pub use types::{
    Capabilities, Decision, GuestMemory, HostNodeSample, HostSample, HypervisorTraits,
    MemoryLimits, Mode, NodeId, NodeTarget, Policy, Pressure, Sample, VmId, VmNodeSample, VmSample,
};
