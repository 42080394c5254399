//! The balloon on each node of the guest.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::versioned::{Output, Versioned};
use ::aerostat_device::MAX_TARGET_NODES;
use ::aerostat_device::memory::GuestNode;
use std::ffi::c_int;

/// The nodes of a guest that can have a target of their own are those below this number.
pub const AEROSTAT_TARGET_NODES: u32 = 16;

const _: () = assert!(AEROSTAT_TARGET_NODES as usize == MAX_TARGET_NODES);

/// What target_bytes of struct aerostat_node_balloon is where the guest chooses the nodes.
pub const AEROSTAT_NO_TARGET: u64 = u64::MAX;

/// The balloon on one node of the guest. All sizes are of the ballooned area.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_node_balloon {
    /// sizeof(struct aerostat_node_balloon), set by the caller.
    pub size: u32,
    /// 0.
    pub reserved: u32,
    /// Bytes that the balloon should hold of this node; AEROSTAT_NO_TARGET where the target is one for
    /// the whole balloon, and for nodes from AEROSTAT_TARGET_NODES on.
    pub target_bytes: u64,
    /// Bytes that it holds, by the device's own count of distinct pages. Pages are on the node that
    /// their region was said to be on, so this is known of every driver.
    pub ballooned_bytes: u64,
    /// Bytes of the guest's memory on this node.
    pub memory_bytes: u64,
    /// 0.
    pub reserved2: [u64; 4],
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_node_balloon {
    const NAME: &'static str = "aerostat_node_balloon";
    const FIRST_BYTES: usize = 64;
}

const _: () = assert!(size_of::<aerostat_node_balloon>() == 64);

/// Sets how many bytes the balloon should hold of each node of the guest, in the order of the nodes,
/// each rounded down to 4096, and of other nodes nothing; lets the guest hear of it as
/// aerostat_device_set_target() does (requirement X2). The target of the whole balloon is the sum, and
/// that is what a driver hears that did not select the feature. The next aerostat_device_set_target()
/// leaves the nodes to the guest again.
///
/// The guest's nodes are those of aerostat_memory_region.guest_node. Like any target these are upper
/// bounds; a driver does not make up for one node with pages of another.
///
/// Returns: 0, or -ENOTSUP (the device offers neither AEROSTAT_FEATURE_NODE_TARGETS nor
/// AEROSTAT_MEMBALLOON_FEATURE_NODE), -EINVAL (no node or more than AEROSTAT_TARGET_NODES, more than the
/// memory of a node, or more than the protocol can say), -EFAULT (a pointer is NULL).
///
/// Lifetime: target_bytes is read during the call only.
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_node_targets(
    device: *mut aerostat_device,
    target_bytes: *const u64,
    n_nodes: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if target_bytes.is_null() {
            return Err(Refusal::Null("target_bytes"));
        }
        if n_nodes == 0 || n_nodes > MAX_TARGET_NODES {
            return Err(Refusal::invalid("n_nodes", n_nodes as u64, "1 to 16"));
        }
        let mut targets = [0; MAX_TARGET_NODES];
        // SAFETY: not NULL, so it may be read for `n_nodes` elements (the header's rule for pointers),
        // which are no more than the local array has.
        unsafe { target_bytes.copy_to_nonoverlapping(targets.as_mut_ptr(), n_nodes) };
        device.set_node_targets(targets.get(..n_nodes).unwrap_or_default())?;
        Ok(0)
    })
}

/// Tells the balloon's size on one node of the guest: all zeros, but for the target, if the guest has no
/// memory there.
///
/// Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
///
/// Threads: any. Waits until nothing is in flight, and counts the pages of the node.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_query_node(
    device: *const aerostat_device,
    node: u32,
    out: *mut aerostat_node_balloon,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        let balloon = device.node_balloon(GuestNode(node));
        out.fill(&aerostat_node_balloon {
            size: 0,
            reserved: 0,
            target_bytes: balloon.target_bytes.unwrap_or(AEROSTAT_NO_TARGET),
            ballooned_bytes: balloon.ballooned_bytes,
            memory_bytes: balloon.memory_bytes,
            reserved2: [0; 4],
        });
        Ok(0)
    })
}
