//! A descriptor chain: what the device may read, what it may write, and what is wrong with it.

use crate::memory::{Gpa, GuestMemory, HostSlice, IoVec};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Segment {
    /// Guest memory, as a ring names it. Not checked: reading finds out.
    Guest { gpa: Gpa, len: u32 },
    /// Memory of this process, as a VMM that popped the chain names it.
    Host(IoVec),
}

impl Segment {
    /// The length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Guest { len, .. } => u64::from(*len),
            Self::Host(iov) => iov.len() as u64,
        }
    }

    /// Copies from `offset` on; returns how many bytes could be had before the segment, or the
    /// guest's memory, ended.
    fn read(&self, memory: &GuestMemory, offset: u64, buffer: &mut [u8]) -> usize {
        match self {
            Self::Host(iov) => iov
                .slice()
                .read(usize::try_from(offset).unwrap_or(usize::MAX), buffer),
            Self::Guest { gpa, len } => {
                let Some(start) = gpa.0.checked_add(offset) else {
                    return 0;
                };
                let wanted = u64::from(*len)
                    .saturating_sub(offset)
                    .min(buffer.len() as u64);
                memory
                    .slice_prefix(Gpa(start), wanted)
                    .map_or(0, |slice| slice.read(0, buffer))
            }
        }
    }
}

impl Segment {
    /// The memory from `offset` on, as far as it is contiguous and may be written; `None` where it may
    /// not. What a VMM hands over as writable is; a region that is read-only to the guest may not even
    /// be mapped for writing.
    fn writable<'a>(&'a self, memory: &'a GuestMemory, offset: u64) -> Option<HostSlice<'a>> {
        let left = self.len().checked_sub(offset).filter(|left| *left > 0)?;
        match self {
            Self::Host(iov) => (offset == 0).then(|| iov.slice()),
            Self::Guest { gpa, .. } => {
                let start = Gpa(gpa.0.checked_add(offset)?);
                let (_, region) = memory.find(start)?;
                (!region.readonly).then(|| memory.slice_prefix(start, left))?
            }
        }
    }
}

/// A chain as it was popped. One value is reused for all chains of a queue.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// What names the chain when it is completed: a ring's head, or an element's token.
    pub(crate) token: u64,
    /// Device-readable buffers, in order.
    pub(crate) readable: Vec<Segment>,
    /// Device-writable buffers, in order.
    pub(crate) writable: Vec<Segment>,
    /// Whether its directions or lengths are against the rules (2.7.4.2): readable behind writable,
    /// or more than 4 GiB in all.
    pub(crate) malformed: bool,
}

/// The most bytes a chain may describe (virtio 2.7.5).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

impl Chain {
    pub(crate) fn clear(&mut self) {
        self.token = 0;
        self.readable.clear();
        self.writable.clear();
        self.malformed = false;
    }

    /// Appends a buffer in the order of the chain.
    pub(crate) fn push(&mut self, segment: Segment, writable: bool) {
        if writable {
            self.writable.push(segment);
        } else {
            self.malformed |= !self.writable.is_empty();
            self.readable.push(segment);
        }
    }

    /// Checks what only the whole chain shows.
    pub(crate) fn finish(&mut self) {
        self.malformed |= self.readable_bytes() + self.writable_bytes() > MAX_CHAIN_BYTES;
    }

    /// How many buffers it has, which is what walking it cost.
    pub(crate) fn buffers(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    pub(crate) fn readable_bytes(&self) -> u64 {
        self.readable.iter().map(Segment::len).sum()
    }

    pub(crate) fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(Segment::len).sum()
    }

    /// Feeds the readable bytes to `each` in pieces of up to 4 KiB, each byte fetched once, values
    /// that straddle descriptors joined up. Returns false if a part was not in guest memory; what
    /// came before it has been fed.
    pub(crate) fn read(&self, memory: &GuestMemory, mut each: impl FnMut(&[u8])) -> bool {
        let mut buffer = [0u8; 4096];
        let mut filled = 0;
        for segment in &self.readable {
            let mut offset = 0;
            while offset < segment.len() {
                let free = buffer.get_mut(filled..).unwrap_or_default();
                let count = segment.read(memory, offset, free);
                if count == 0 {
                    each(buffer.get(..filled).unwrap_or_default());
                    return false;
                }
                offset += count as u64;
                filled += count;
                if filled == buffer.len() {
                    each(&buffer);
                    filled = 0;
                }
            }
        }
        each(buffer.get(..filled).unwrap_or_default());
        true
    }
}

impl Chain {
    /// How many bytes of the writable part can be written, from its start to the first that cannot;
    /// not more than `wanted`, so that the work has a bound.
    pub(crate) fn room(&self, memory: &GuestMemory, wanted: usize) -> usize {
        self.fill(memory, wanted, |_, _| ())
    }

    /// Writes `bytes` to the start of the writable part; returns how many there was room for.
    pub(crate) fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> usize {
        self.fill(memory, bytes.len(), |slice, done| {
            slice.write(0, bytes.get(done..).unwrap_or_default());
        })
    }

    /// Calls `each` with memory to write to, and how much came before it.
    fn fill<'a>(
        &'a self,
        memory: &'a GuestMemory,
        wanted: usize,
        mut each: impl FnMut(HostSlice<'a>, usize),
    ) -> usize {
        let mut done = 0;
        for segment in &self.writable {
            let mut offset = 0;
            while offset < segment.len() && done < wanted {
                let Some(slice) = segment.writable(memory, offset) else {
                    return done;
                };
                each(slice, done);
                offset += slice.len() as u64;
                done = (done + slice.len()).min(wanted);
            }
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::{heap_memory, heap_memory_with};

    fn guest(gpa: u64, len: u32) -> Segment {
        Segment::Guest { gpa: Gpa(gpa), len }
    }

    fn collect(chain: &Chain, memory: &GuestMemory) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        let whole = chain.read(memory, |piece| bytes.extend_from_slice(piece));
        (bytes, whole)
    }

    #[test]
    fn reading_joins_descriptors_and_regions_that_touch() {
        let memory = heap_memory(&[(0, 0x1000), (0x1000, 0x3000)]);
        for gpa in 0..0x4000u64 {
            let byte = u8::try_from(gpa % 251).unwrap();
            memory.slice_prefix(Gpa(gpa), 1).unwrap().write(0, &[byte]);
        }
        let mut chain = Chain::default();
        chain.push(guest(0xffd, 6), false);
        chain.push(guest(3, 0), false);
        chain.push(guest(0x10, 0x2000), false);
        chain.finish();
        let (bytes, whole) = collect(&chain, &memory);
        assert!(whole && !chain.malformed);
        let expected = (0xffd..0x1003)
            .chain(0x10..0x2010)
            .map(|gpa| (gpa % 251) as u8);
        assert_eq!(bytes, expected.collect::<Vec<_>>());
    }

    #[test]
    fn reading_stops_where_guest_memory_ends() {
        let memory = heap_memory(&[(0, 0x1000)]);
        let mut chain = Chain::default();
        chain.push(guest(0xff8, 16), false);
        chain.push(guest(u64::MAX - 3, 16), false);
        assert_eq!(collect(&chain, &memory), (vec![0; 8], false));
    }

    #[test]
    fn readable_behind_writable_and_over_four_gib_are_malformed() {
        let mut chain = Chain::default();
        chain.push(guest(0, 8), true);
        chain.push(guest(0, 8), false);
        assert!(chain.malformed);
        chain.clear();
        chain.push(guest(0, u32::MAX), true);
        chain.finish();
        assert!(!chain.malformed);
        chain.push(guest(0, 2), true);
        chain.finish();
        assert!(chain.malformed);
    }

    #[test]
    fn writing_joins_descriptors_and_stops_where_memory_does() {
        let memory = heap_memory(&[(0, 0x1000), (0x1000, 0x1000)]);
        let mut chain = Chain::default();
        chain.push(guest(0, 8), false);
        chain.push(guest(0xffe, 4), true);
        chain.push(guest(0, 0), true);
        chain.push(guest(0x1ffe, 9), true);
        assert_eq!(chain.room(&memory, 5), 5);
        assert_eq!(chain.room(&memory, 100), 6);
        assert_eq!(chain.write(&memory, &[1, 2, 3, 4, 5]), 5);
        let mut bytes = [0; 4];
        memory
            .slice_prefix(Gpa(0xffe), 2)
            .unwrap()
            .read(0, &mut bytes);
        memory
            .slice_prefix(Gpa(0x1000), 3)
            .unwrap()
            .read(0, &mut bytes[2..]);
        assert_eq!(bytes, [1, 2, 3, 4]);
        memory
            .slice_prefix(Gpa(0x1ffe), 2)
            .unwrap()
            .read(0, &mut bytes);
        assert_eq!(bytes[..2], [5, 0]);
    }

    #[test]
    fn readonly_regions_are_not_written() {
        let memory = heap_memory_with(&[(0, 0x1000), (0x1000, 0x1000)], |region| {
            region.readonly = region.gpa.0 != 0;
        });
        let mut chain = Chain::default();
        chain.push(guest(0xffc, 8), true);
        assert_eq!(chain.room(&memory, 8), 4);
        assert_eq!(chain.write(&memory, &[7; 8]), 4);
        let mut bytes = [1; 4];
        memory
            .slice_prefix(Gpa(0x1000), 4)
            .unwrap()
            .read(0, &mut bytes);
        assert_eq!(bytes, [0; 4]);
    }
}
