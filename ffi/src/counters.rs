//! The device's books.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::memory::node;
use crate::versioned::{Output, Versioned};
use ::aerostat_device::{Counters, Flow};
use std::ffi::c_int;

/// What became of the bytes of one kind of request (invariant I4). Values only grow, but for
/// pending_bytes and held_bytes. At every instant requested_bytes + reopened_bytes equals
/// discarded_bytes + pending_bytes + held_bytes + withdrawn_bytes + all of skipped_*_bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_flow {
    /// Bytes that the guest handed over: 4096 for each page frame number, whatever became of it.
    pub requested_bytes: u64,
    /// Bytes that a successful system call freed on the host.
    pub discarded_bytes: u64,
    /// Bytes that were acknowledged to the guest and are still to be discarded (write-behind).
    pub pending_bytes: u64,
    /// Bytes in incomplete huge frames; they are discarded when the frame is complete.
    pub held_bytes: u64,
    /// Bytes of discarded huge frames that count as held again since a part was taken back.
    pub reopened_bytes: u64,
    /// Bytes that were taken back while they were pending or held.
    pub withdrawn_bytes: u64,
    /// Not discarded for the VMM's sake: aerostat_device_inhibit() was in force, or the rest of a long
    /// report was left because a call waited for the device to stand still.
    pub skipped_inhibited_bytes: u64,
    /// Not discarded: outside guest memory, in a hole, or in a read-only region.
    pub skipped_out_of_range_bytes: u64,
    /// Not discarded: in the balloon already, or twice in one batch.
    pub skipped_duplicate_bytes: u64,
    /// Not discarded: the region is AEROSTAT_REGION_PINNED.
    pub skipped_pinned_bytes: u64,
    /// Not discarded: reported pages that cover a part of a huge frame only, or are poisoned; and pages
    /// of the balloon of a driver without MUST_TELL_HOST that do not come with the rest of their frame.
    pub skipped_partial_bytes: u64,
    /// Not discarded: the system call failed.
    pub skipped_failed_bytes: u64,
    /// Refused: the balloon would have grown beyond its target (AEROSTAT_FEATURE_PAGE_REFUSAL).
    pub skipped_over_target_bytes: u64,
    /// Not taken: sent before the guest acknowledged an aerostat_device_reset_balloon().
    pub skipped_late_bytes: u64,
    /// 0.
    pub reserved: [u64; 2],
}

/// All counters of a device, or one host node's share of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_counters {
    /// sizeof(struct aerostat_counters), set by the caller.
    pub size: u32,
    /// 0.
    pub reserved0: u32,
    /// Pages that the guest put into the balloon.
    pub balloon: aerostat_flow,
    /// Pages that it reported as free, which stay its own.
    pub report: aerostat_flow,
    /// Bytes taken out of the balloon again.
    pub returned_bytes: u64,
    /// Bytes that the guest wanted out of the balloon and that were not in it, or beyond what it may
    /// have (aerostat_device_set_extra_grant()).
    pub rejected_take_bytes: u64,
    /// System calls made to discard.
    pub discard_calls: u64,
    /// Ranges of memory passed to those calls.
    pub discard_ranges: u64,
    /// Time spent in those calls, summed over threads, in nanoseconds.
    pub discard_ns: u64,
    /// Buffers completed on the inflate queue, or commands that gave pages.
    pub inflate_chains: u64,
    /// Buffers completed on the deflate queue, or commands that took pages.
    pub deflate_chains: u64,
    /// Buffers completed on the reporting queue.
    pub report_chains: u64,
    /// Buffers read on the stats queue.
    pub stats_chains: u64,
    /// Buffers that were malformed, or whose content makes no sense; completed all the same.
    pub chain_errors: u64,
    /// Rings that broke so badly that the device needs a reset.
    pub broken_rings: u64,
    /// Writes to fields of the configuration space that are not the driver's.
    pub config_errors: u64,
    /// Buffers completed on the queue of free page hints.
    pub hint_chains: u64,
    /// Of balloon.skipped_*_bytes, those that the guest was told are refused: the pages stayed its own
    /// (AEROSTAT_FEATURE_PAGE_REFUSAL). No term of the balance, as the reasons' counters have them.
    pub refused_bytes: u64,
    /// Bytes that the guest wanted out of the balloon before it acknowledged an
    /// aerostat_device_reset_balloon(), through which it had them already.
    pub late_take_bytes: u64,
    /// Calls of aerostat_device_reset_balloon() that succeeded.
    pub host_resets: u64,
    /// Those that are over: the guest acknowledged it or a later one, or it reset the device. Equal to
    /// host_resets when the guest has nothing left to acknowledge.
    pub host_resets_acknowledged: u64,
    /// Bytes that were in the balloon at a call of aerostat_device_reset_balloon().
    pub host_reset_bytes: u64,
    /// Times that a driver began to speak the protocol: selections of features, or START commands of
    /// VMware's protocol, that were accepted (requirement J10).
    pub handshakes: u64,
    /// The same, refused.
    pub handshakes_failed: u64,
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_counters {
    const NAME: &'static str = "aerostat_counters";
    const FIRST_BYTES: usize = 424;
}

const _: () = assert!(size_of::<aerostat_counters>() == 424);

/// Reads a device's books as of one instant. They survive a reset.
///
/// Returns: 0, or -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_counters(
    device: *const aerostat_device,
    out: *mut aerostat_counters,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        out.fill(&to_c(&device.counters()));
        Ok(0)
    })
}

/// Reads one host NUMA node's share of a device's books; -1 is memory whose node is not known,
/// which what belongs to no memory (buffers, errors) is booked with. The shares of all nodes and of
/// -1 add up to aerostat_device_counters().
///
/// Returns: 0, or -ENXIO (the host has no such node), -EINVAL (node is less than -1), -EMSGSIZE
/// (out->size is too small), -EFAULT (a pointer is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_node_counters(
    device: *const aerostat_device,
    node: i32,
    out: *mut aerostat_counters,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        out.fill(&to_c(&device.node_counters(self::node(node)?)?));
        Ok(0)
    })
}

/// Taking the device's structures apart in full keeps a new counter from being forgotten here.
fn to_c(counters: &Counters) -> aerostat_counters {
    let Counters {
        balloon,
        report,
        returned_bytes,
        rejected_take_bytes,
        discard_calls,
        discard_ranges,
        discard_ns,
        inflate_chains,
        deflate_chains,
        report_chains,
        stats_chains,
        hint_chains,
        chain_errors,
        broken_rings,
        handshakes,
        handshakes_failed,
        config_errors,
        refused_bytes,
        late_take_bytes,
        host_resets,
        host_resets_acknowledged,
        host_reset_bytes,
    } = *counters;
    aerostat_counters {
        size: 0,
        reserved0: 0,
        balloon: flow(balloon),
        report: flow(report),
        returned_bytes,
        rejected_take_bytes,
        discard_calls,
        discard_ranges,
        discard_ns,
        inflate_chains,
        deflate_chains,
        report_chains,
        stats_chains,
        chain_errors,
        broken_rings,
        config_errors,
        hint_chains,
        refused_bytes,
        late_take_bytes,
        host_resets,
        host_resets_acknowledged,
        host_reset_bytes,
        handshakes,
        handshakes_failed,
    }
}

fn flow(flow: Flow) -> aerostat_flow {
    let Flow {
        requested_bytes,
        discarded_bytes,
        pending_bytes,
        held_bytes,
        reopened_bytes,
        withdrawn_bytes,
        skipped_inhibited_bytes,
        skipped_out_of_range_bytes,
        skipped_duplicate_bytes,
        skipped_pinned_bytes,
        skipped_partial_bytes,
        skipped_failed_bytes,
        skipped_over_target_bytes,
        skipped_late_bytes,
    } = flow;
    aerostat_flow {
        requested_bytes,
        discarded_bytes,
        pending_bytes,
        held_bytes,
        reopened_bytes,
        withdrawn_bytes,
        skipped_inhibited_bytes,
        skipped_out_of_range_bytes,
        skipped_duplicate_bytes,
        skipped_pinned_bytes,
        skipped_partial_bytes,
        skipped_failed_bytes,
        skipped_over_target_bytes,
        skipped_late_bytes,
        reserved: [0; 2],
    }
}
