//! What a guest does: what a build does to memory, with the means of busybox.
//!
//! - *Sources* are read from a block device, through the guest's page cache, again and again.
//! - *Objects* are memory of processes: a file on a tmpfs, which cannot be reclaimed without swap;
//!   written and read (`md5sum`), which is also what takes processor time.
//! - *Linking* needs twice as much, for a short time.

/// Sources that a phase reads, of a device of 1 GiB.
const SOURCES_MIB: u64 = 96;
/// Of these, what each compilation reads again.
const HEADERS_MIB: u64 = 48;
const OBJECTS_MIB: u64 = 16;
const LINK_MIB: u64 = 28;
const COMPILATIONS: u32 = 3;

/// To be run once: keeps the device open. A block device that nobody has open loses its cache.
pub const PREPARE: &str = "sleep 1000000 </dev/ubda >/dev/null 2>&1 &";

/// Everything as it was before the first phase.
pub const RESET: &str = "rm -f /mem/*; sync; echo 3 >/proc/sys/vm/drop_caches";

/// The shell command for all phases. Guests read different parts of their device, and begin with
/// different phases, as builds that were started one after the other do.
#[must_use]
pub fn script(guest: usize, repeat: u32) -> String {
    let begins_at = guest as u64 % 4 * 100;
    let read = |skip: u64, mib: u64| {
        format!(
            "dd if=/dev/ubda of=/dev/null bs=65536 skip={} count={} 2>/dev/null",
            skip * 16,
            mib * 16
        )
    };
    let write = |file: &str, mib: u64| {
        format!(
            "dd if=/dev/zero of=/mem/{file} bs=65536 count={} 2>/dev/null; md5sum /mem/{file} >/dev/null",
            mib * 16
        )
    };
    let mut steps = vec!["set -e".to_owned()];
    for round in 0..repeat {
        let skip = begins_at + 120 * u64::from(round) % 480;
        steps.push(read(skip, SOURCES_MIB));
        for _ in 0..COMPILATIONS {
            steps.push(write("objects", OBJECTS_MIB));
            steps.push(read(skip, HEADERS_MIB));
            steps.push("md5sum /mem/objects >/dev/null".to_owned());
        }
        steps.push(write("link", LINK_MIB));
        steps.push("md5sum /mem/link >/dev/null; rm /mem/link /mem/objects".to_owned());
    }
    steps.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_stays_within_its_device_of_a_gibibyte() {
        for guest in 0..8 {
            let script = script(guest, 5);
            let ends = script.split("skip=").skip(1).map(|rest| {
                let mut words = rest.split([' ', '=']);
                let skip: u64 = words.next().unwrap().parse().unwrap();
                let count: u64 = words.nth(1).unwrap().parse().unwrap();
                skip + count
            });
            assert!(ends.max().unwrap() <= 16 * 1024, "{script}");
        }
    }
}
