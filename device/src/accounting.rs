//! Who is told when memory leaves the guest and when it goes back: the one joint between a device and
//! whoever keeps limits outside of it. The device itself knows no cgroups.

use crate::memory::NodeId;
use std::fmt;

/// Told about a device's memory.
///
/// Called by workers and by threads of the VMM, some of which hold the device's lock: it takes no part in
/// the device, and waits for nothing but the kernel.
pub trait Accountant: Send + Sync + fmt::Debug {
    /// `bytes` on `node` have been given back to the host: the system call has succeeded.
    fn reclaimed(&self, node: Option<NodeId>, bytes: u64);

    /// `bytes` on `node` that the host has are about to go back to the guest: it is told when this has
    /// returned (I5).
    fn returning(&self, node: Option<NodeId>, bytes: u64);

    /// All that the host has is about to go back, and nothing is in the balloon any more.
    fn emptied(&self);
}
