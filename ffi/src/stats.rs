//! What the guest tells of its memory.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::versioned::{Output, Versioned};
use ::aerostat_device::GuestStats;
use ::aerostat_device::metrics::STATS_TAGS;
use std::ffi::c_int;
use std::time::{Duration, Instant};

/// What a value of `struct aerostat_guest_stats` is about (VIRTIO 1.4, 5.5.6.4; requirement S8).
/// Counters start at the guest's boot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum aerostat_stat {
    /// Bytes swapped in.
    AEROSTAT_STAT_SWAP_IN = 0,
    /// Bytes swapped out.
    AEROSTAT_STAT_SWAP_OUT = 1,
    /// Major page faults.
    AEROSTAT_STAT_MAJFLT = 2,
    /// Minor page faults.
    AEROSTAT_STAT_MINFLT = 3,
    /// Bytes of memory that are not used at all.
    AEROSTAT_STAT_MEMFREE = 4,
    /// Bytes of memory that the guest has in total, without the balloon.
    AEROSTAT_STAT_MEMTOT = 5,
    /// Bytes that could be had without swapping.
    AEROSTAT_STAT_AVAIL = 6,
    /// Bytes of caches that could be dropped quickly.
    AEROSTAT_STAT_CACHES = 7,
    /// Successful allocations of huge pages.
    AEROSTAT_STAT_HTLB_PGALLOC = 8,
    /// Failed allocations of huge pages.
    AEROSTAT_STAT_HTLB_PGFAIL = 9,
    /// Processes killed for lack of memory.
    AEROSTAT_STAT_OOM_KILL = 10,
    /// Allocations that had to wait for reclaim.
    AEROSTAT_STAT_ALLOC_STALL = 11,
    /// Pages scanned by background reclaim.
    AEROSTAT_STAT_ASYNC_SCAN = 12,
    /// Pages scanned by direct reclaim.
    AEROSTAT_STAT_DIRECT_SCAN = 13,
    /// Pages reclaimed in the background.
    AEROSTAT_STAT_ASYNC_RECLAIM = 14,
    /// Pages reclaimed directly.
    AEROSTAT_STAT_DIRECT_RECLAIM = 15,
}

/// How many values `struct aerostat_guest_stats` has.
pub const AEROSTAT_STATS: u32 = 16;

const COUNT: usize = 16;
const _: () = assert!(COUNT == STATS_TAGS && COUNT == AEROSTAT_STATS as usize);

/// What a guest last told of its memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_guest_stats {
    /// sizeof(struct aerostat_guest_stats), set by the caller.
    pub size: u32,
    /// Which values the guest sent: bit n stands for value n.
    pub present: u32,
    /// The values, by enum aerostat_stat; 0 where the guest sent none.
    pub values: [u64; 16],
    /// How often the guest has told since the device was made. A reset forgets the values and lets
    /// this go on, so that it says nothing of whether there are any: present does.
    pub sequence: u64,
    /// How old the values are, in milliseconds; 0 as long as there are none.
    pub age_ms: u64,
    /// 0.
    pub reserved: [u64; 4],
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_guest_stats {
    const NAME: &'static str = "aerostat_guest_stats";
    const FIRST_BYTES: usize = 184;
}

const _: () = assert!(size_of::<aerostat_guest_stats>() == 184);

/// Tells what the guest last said of its memory. With a timeout it asks the guest first and waits
/// for the answer; with 0 it takes what is there, in every state, which may be nothing.
///
/// Returns: 0, or
/// -EMSGSIZE (out->size is too small), -EFAULT (a pointer is NULL),
/// and with a timeout also
/// -ENOTSUP (AEROSTAT_FEATURE_STATS_VQ is not negotiated),
/// -ENOTCONN (the device is not active),
/// -EBUSY (it is paused),
/// -ETIMEDOUT (the guest did not answer in time).
///
/// Threads: any that may wait for timeout_ms; not one that the guest needs in order to answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_guest_stats(
    device: *mut aerostat_device,
    timeout_ms: u32,
    out: *mut aerostat_guest_stats,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        let stats = device.guest_stats(Duration::from_millis(timeout_ms.into()))?;
        out.fill(&to_c(&stats, Instant::now()));
        Ok(0)
    })
}

/// Asks the guest every interval_ms for what it says of its memory, from now on; 0 ends that. The
/// answers are had from aerostat_device_guest_stats() with a timeout of 0. Allowed in every state; it
/// takes effect while the device is active with AEROSTAT_FEATURE_STATS_VQ.
///
/// Returns: 0, or -EFAULT (device is NULL).
///
/// Threads: any. Never waits for the guest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_set_stats_interval(
    device: *mut aerostat_device,
    interval_ms: u32,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let device = unsafe { handle::get(device) };
    on_device(device, |device| {
        let interval = Duration::from_millis(interval_ms.into());
        device.set_stats_interval(Some(interval));
        Ok(0)
    })
}

fn to_c(stats: &GuestStats, now: Instant) -> aerostat_guest_stats {
    let age_ms = |received| {
        let age = now.saturating_duration_since(received);
        u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
    };
    let mut present = 0;
    for (tag, value) in stats.values.iter().enumerate() {
        present |= u32::from(value.is_some()) << tag;
    }
    aerostat_guest_stats {
        size: 0,
        present,
        values: stats.values.map(Option::unwrap_or_default),
        sequence: stats.sequence,
        age_ms: stats.received.map_or(0, age_ms),
        reserved: [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_values_are_told_from_zeros() {
        let now = Instant::now();
        let mut stats = GuestStats {
            sequence: 3,
            received: Some(now),
            ..Default::default()
        };
        stats.values[aerostat_stat::AEROSTAT_STAT_SWAP_OUT as usize] = Some(0);
        stats.values[aerostat_stat::AEROSTAT_STAT_DIRECT_RECLAIM as usize] = Some(7);
        let stats = to_c(&stats, now + Duration::from_micros(4999));
        assert_eq!(stats.present, 1 << 1 | 1 << 15);
        assert_eq!((stats.values[1], stats.values[15]), (0, 7));
        assert_eq!((stats.sequence, stats.age_ms), (3, 4));
    }

    #[test]
    fn a_guest_that_never_told_has_no_values_and_no_age() {
        let stats = to_c(&GuestStats::default(), Instant::now());
        assert_eq!((stats.present, stats.sequence, stats.age_ms), (0, 0, 0));
    }
}
