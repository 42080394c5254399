//! A balloon of crosvm's shape with Aerostat behind it: the device stays the VMM's, the discarding does not.
//!
//! crosvm reads a chain of the inflate queue into ranges of guest memory, neighbours put together in the order
//! in which the guest names them, and has each removed by a call of its own. [`RangeSink`] takes the place of
//! that last step: it gets all ranges at once, sorts them, and answers for each.
//!
//! Run it with `cargo run -p aerostat-ffi --example crosvm`.
#![allow(unsafe_code, reason = "maps a guest")]

use aerostat_device::discard::NotDiscarded;
use aerostat_device::memory::{Gpa, GuestNode};
use aerostat_device::{GuestMemory, Region, Runtime, RuntimeConfig};
use memmap2::MmapMut;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::linux::fs::MetadataExt;
use std::sync::Arc;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const PAGE: u64 = 4096;

/// An address as the guest sees it, as VMMs in Rust have it.
#[derive(Clone, Copy, Debug)]
struct GuestAddress(u64);

/// Where the ranges of a guest go.
struct RangeSink {
    runtime: Arc<Runtime>,
    memory: Arc<GuestMemory>,
}

impl RangeSink {
    /// A sink for the memory that `guest` is, which begins at `start` for the guest.
    fn new(guest: &Guest, start: GuestAddress) -> Fallible<Self> {
        let region = Region {
            gpa: Gpa(start.0),
            len_bytes: guest.mapping.len() as u64,
            hva: guest.mapping.as_ptr() as usize,
            fd: Some(Arc::new(OwnedFd::from(guest.file.try_clone()?))),
            fd_offset_bytes: 0,
            page_size_bytes: PAGE,
            frame_bytes: 0,
            shared: true,
            readonly: false,
            pinned: false,
            extra: false,
            guest_node: GuestNode(0),
            node: None,
        };
        // SAFETY: the guest outlives the sink (see `main`), and nothing in this process holds a reference
        // into its memory.
        let memory = unsafe { GuestMemory::new(vec![region]) }?;
        let runtime = Runtime::new(&RuntimeConfig::default())?;
        Ok(Self { runtime, memory })
    }

    /// Takes what a chain named. A range that cannot be discarded hinders no other.
    fn remove_ranges(&self, ranges: &[(GuestAddress, u64)]) -> Vec<Result<(), NotDiscarded>> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(start, len)| (Gpa(start.0), len))
            .collect();
        self.runtime.discard_ranges(&self.memory, &ranges)
    }
}

/// Guest memory in a file without a name.
struct Guest {
    file: File,
    mapping: MmapMut,
}

impl Guest {
    fn new(bytes: u64) -> Fallible<Self> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("guest", flags)?);
        file.set_len(bytes)?;
        // SAFETY: the file is this process's own, and is not truncated.
        let mut mapping = unsafe { MmapMut::map_mut(&file) }?;
        mapping.fill(1);
        Ok(Self { file, mapping })
    }

    /// What the host has in use for it.
    fn host_bytes(&self) -> Fallible<u64> {
        Ok(self.file.metadata()?.st_blocks() * 512)
    }
}

/// The page numbers of a chain as ranges, as far as neighbours follow each other.
fn ranges_of(pages: impl IntoIterator<Item = u32>) -> Vec<(GuestAddress, u64)> {
    let mut ranges: Vec<(GuestAddress, u64)> = Vec::new();
    for page in pages {
        let address = u64::from(page) * PAGE;
        match ranges.last_mut() {
            Some((start, len)) if start.0 + *len == address => *len += PAGE,
            _ => ranges.push((GuestAddress(address), PAGE)),
        }
    }
    ranges
}

/// What came of two chains: ranges, those that were refused, and bytes that the host has back.
fn inflate() -> Fallible<(usize, usize, u64)> {
    let guest = Guest::new(64 << 20)?;
    let sink = RangeSink::new(&guest, GuestAddress(0))?;
    let before = guest.host_bytes()?;
    // Descending, as Linux often gives pages; and one page that the guest does not have.
    let first = ranges_of((0..256).rev());
    let second = ranges_of((1024..1280).chain([1 << 20]));
    let (mut ranges, mut refused) = (0, 0);
    for chain in [first, second] {
        ranges += chain.len();
        for (range, answer) in chain.iter().zip(sink.remove_ranges(&chain)) {
            if let Err(reason) = answer {
                refused += 1;
                println!("{:#x}, {} bytes: {reason}", range.0.0, range.1);
            }
        }
    }
    Ok((ranges, refused, before - guest.host_bytes()?))
}

fn main() -> Fallible<()> {
    let (ranges, refused, freed) = inflate()?;
    println!(
        "{ranges} ranges, {refused} refused, {} KiB back on the host",
        freed / 1024
    );
    Ok(())
}

#[test]
fn both_chains_are_freed_and_the_bad_range_is_refused() {
    assert_eq!(inflate().unwrap(), (258, 1, 512 * PAGE));
}
