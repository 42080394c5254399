//! Ways to reach a virtual machine's balloon, one module for each kind of control interface.
//!
//! `size`, `target` and `actual` always mean the ballooned area in bytes (requirement X1). The one
//! place where the opposite convention exists, memory *left* to the guest, is the pair of commands
//! that QMP tools know, and the names there say so.

pub mod control;
mod wire;

pub use control::{ControlClient, ControlError};
pub use wire::{
    BalloonEvent, DeviceState, DeviceStatus, GuestRange, GuestStats, HintState, Hints,
    HistoryEntry, NodeStatus, PageCounters,
};
