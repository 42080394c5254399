//! What guests do, with the means of busybox.
//!
//! A *build*, all guests at the same time, does to memory what a build does:
//! - *Sources* are read through the guest's page cache, parts of them again and again.
//! - *Objects* are memory of processes: a file on a tmpfs, which cannot be reclaimed without swap;
//!   written, and read twice.
//! - *Linking* needs nearly twice as much, for a short time.
//! - *Compiling* is a loop of the shell: processor time and nothing else.
//!
//! A *peak*, one guest after the other, is memory of processes that is written with work between, read twice and
//! given up: demand that never comes from two guests at once.

use clap::ValueEnum;

/// What guests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// All build at the same time.
    Builds,
    /// One after the other needs much memory.
    Peaks,
}

/// Sources that a phase reads, of a file of 1 GiB.
const SOURCES_MIB: u64 = 96;
/// Of these, what each compilation reads again.
const HEADERS_MIB: u64 = 48;
const OBJECTS_MIB: u64 = 16;
const LINK_MIB: u64 = 28;
const COMPILATIONS: u32 = 2;
/// Rounds of the shell's loop.
const COMPUTATION: u32 = 10_000;
/// A peak grows in so many steps: within some seconds, as a program's memory does.
const PEAK_PARTS: u64 = 10;

/// The name of the sources in their directory on the host.
pub const SOURCES: &str = "sources";

/// To be run once: makes the host's directory of sources visible, and keeps the file open. This file
/// system forgets what it has cached of a file that nobody has open.
#[must_use]
pub fn prepare(directory: &str) -> String {
    format!(
        "mkdir /src && mount -t hostfs -o {directory} hostfs /src && \
         {{ sleep 1000000 </src/{SOURCES} >/dev/null 2>&1 & }}"
    )
}

/// Everything as it was before the first phase.
pub const RESET: &str = "rm -f /mem/*; sync; echo 3 >/proc/sys/vm/drop_caches";

/// Tells how many pages of files the guest has read again after it had to forget them, since it booted.
pub const REFAULTS: &str = "sed -n 's/workingset_refault_file //p' /proc/vmstat";

/// The shell command for one peak of so many MiB.
#[must_use]
pub fn peak(mib: u64) -> String {
    let mut steps = vec!["set -e".to_owned()];
    for part in 0..PEAK_PARTS {
        let (begin, end) = (mib * part / PEAK_PARTS, mib * (part + 1) / PEAK_PARTS);
        steps.push(copy(
            "/dev/zero",
            &format!("/mem/peak{part}"),
            0,
            end - begin,
        ));
        steps.push(compute());
    }
    let read = "cat /mem/peak* >/dev/null".to_owned();
    steps.extend([read.clone(), read, "rm /mem/peak*".to_owned()]);
    steps.join("; ")
}

/// Processor time and nothing else.
fn compute() -> String {
    format!("i=0; while [ $i -lt {COMPUTATION} ]; do i=$((i+1)); done")
}

fn copy(from: &str, to: &str, skip: u64, mib: u64) -> String {
    format!("dd if={from} of={to} bs=1M skip={skip} count={mib} 2>/dev/null")
}

/// The shell command for all phases of a build. Guests read different parts of the sources.
#[must_use]
pub fn build(guest: usize, repeat: u32) -> String {
    let begins_at = guest as u64 % 4 * 100;
    let sources = format!("/src/{SOURCES}");
    let mut steps = vec!["set -e".to_owned()];
    for round in 0..repeat {
        let skip = begins_at + 120 * u64::from(round) % 480;
        steps.push(copy(&sources, "/dev/null", skip, SOURCES_MIB));
        for _ in 0..COMPILATIONS {
            steps.push(copy("/dev/zero", "/mem/objects", 0, OBJECTS_MIB));
            steps.push(copy(&sources, "/dev/null", skip, HEADERS_MIB));
            steps.push(compute());
            steps.push(copy("/mem/objects", "/dev/null", 0, OBJECTS_MIB));
        }
        steps.push(copy("/dev/zero", "/mem/link", 0, LINK_MIB));
        steps.push(copy("/mem/objects", "/dev/null", 0, OBJECTS_MIB));
        steps.push(copy("/mem/link", "/dev/null", 0, LINK_MIB));
        steps.push("rm /mem/link /mem/objects".to_owned());
    }
    steps.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_stays_within_its_sources_of_a_gibibyte() {
        for guest in 0..8 {
            let script = build(guest, 5);
            let ends = script.split("skip=").skip(1).map(|rest| {
                let mut words = rest.split([' ', '=']);
                let skip: u64 = words.next().unwrap().parse().unwrap();
                let count: u64 = words.nth(1).unwrap().parse().unwrap();
                skip + count
            });
            assert!(ends.max().unwrap() <= 1024, "{script}");
        }
    }
}
