//! What happened with a balloon.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::Refusal;
use crate::device::{aerostat_device, on_device};
use crate::handle;
use ::aerostat_device::HistoryEntry;
use std::ffi::c_int;

/// What an entry of the history tells of.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_history_event {
    /// aerostat_device_set_target(), maybe with the same target.
    AEROSTAT_HISTORY_TARGET_SET = 1,
    /// The driver wrote how much it holds.
    AEROSTAT_HISTORY_ACTUAL_WRITTEN = 2,
    /// The device was reset.
    AEROSTAT_HISTORY_RESET = 3,
    /// aerostat_device_inhibit().
    AEROSTAT_HISTORY_INHIBITED = 4,
    /// aerostat_device_uninhibit().
    AEROSTAT_HISTORY_UNINHIBITED = 5,
    /// A ring broke: AEROSTAT_STATE_NEEDS_RESET.
    AEROSTAT_HISTORY_NEEDS_RESET = 6,
    /// aerostat_device_restore().
    AEROSTAT_HISTORY_RESTORED = 7,
    /// aerostat_device_reset_balloon().
    AEROSTAT_HISTORY_BALLOON_RESET = 8,
}

/// A balloon at the moment of a change. This structure has a fixed length.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct aerostat_history_entry {
    /// Its number: 1 for the first, always growing. Missing numbers were dropped, or were values of
    /// `actual` that another one followed within 100 ms.
    pub sequence: u64,
    /// When it happened: CLOCK_MONOTONIC in nanoseconds.
    pub monotonic_ns: u64,
    /// Bytes that the balloon should hold.
    pub target_bytes: u64,
    /// Bytes that the driver says it holds.
    pub actual_bytes: u64,
    /// Bytes that it holds by the device's own count.
    pub ballooned_bytes: u64,
    /// An enum aerostat_history_event; later versions may have more.
    pub event: u32,
    /// 0.
    pub reserved: u32,
}

const _: () = assert!(size_of::<aerostat_history_entry>() == 48);

/// Tells what happened with the balloon behind entry number since (0: all there is), oldest first
/// (requirement A9). Up to 1024 entries are kept; the oldest are dropped, which their numbers show. To
/// follow, pass the last entry's sequence the next time.
///
/// Returns: how many entries were stored in out, or -EFAULT (device is NULL, or out is NULL and max is
/// not 0).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_history(
    device: *const aerostat_device,
    since: u64,
    out: *mut aerostat_history_entry,
    max: usize,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        if out.is_null() && max > 0 {
            return Err(Refusal::Null("out"));
        }
        let entries = device.history(since, max);
        for (index, entry) in entries.iter().enumerate() {
            // SAFETY: there are at most `max` entries, for which there is room (the header's rule
            // for pointers).
            unsafe { out.add(index).write_unaligned(to_c(entry)) };
        }
        // The device keeps far fewer.
        Ok(c_int::try_from(entries.len()).unwrap_or(c_int::MAX))
    })
}

fn to_c(entry: &HistoryEntry) -> aerostat_history_entry {
    aerostat_history_entry {
        sequence: entry.sequence,
        monotonic_ns: entry.monotonic_ns,
        target_bytes: entry.target_bytes,
        actual_bytes: entry.actual_bytes,
        ballooned_bytes: entry.ballooned_bytes,
        event: entry.event as u32,
        reserved: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::aerostat_device::HistoryEvent;

    #[test]
    fn events_have_the_same_numbers_on_both_sides() {
        use aerostat_history_event as c;
        let pairs = [
            (HistoryEvent::TargetSet, c::AEROSTAT_HISTORY_TARGET_SET),
            (
                HistoryEvent::ActualWritten,
                c::AEROSTAT_HISTORY_ACTUAL_WRITTEN,
            ),
            (HistoryEvent::Reset, c::AEROSTAT_HISTORY_RESET),
            (HistoryEvent::Inhibited, c::AEROSTAT_HISTORY_INHIBITED),
            (HistoryEvent::Uninhibited, c::AEROSTAT_HISTORY_UNINHIBITED),
            (HistoryEvent::NeedsReset, c::AEROSTAT_HISTORY_NEEDS_RESET),
            (HistoryEvent::Restored, c::AEROSTAT_HISTORY_RESTORED),
            (
                HistoryEvent::BalloonReset,
                c::AEROSTAT_HISTORY_BALLOON_RESET,
            ),
        ];
        for (ours, theirs) in pairs {
            assert_eq!(ours as u32, theirs as u32);
        }
    }
}
