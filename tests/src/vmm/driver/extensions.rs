//! What a driver does with PAGE_REFUSAL, HOST_RESET and NODE_TARGETS (docs/virtio-balloon-extensions.md;
//! requirements V2, V3, X2): it puts refused pages aside until the target is reached, frees all of the
//! balloon at once when the host resets it, and follows a target for each node.

use super::super::error::Result;
use super::super::vring::{Piece, Used};
use super::{Driver, MAX_PFNS, PAGE_BYTES, Role};
use aerostat::{
    AEROSTAT_FEATURE_HOST_RESET, AEROSTAT_FEATURE_NODE_TARGETS, AEROSTAT_FEATURE_PAGE_REFUSAL,
};
use std::collections::BTreeSet;

/// Where `reset_id` is in the configuration space.
pub const CONFIG_RESET_ID: u64 = 16;
/// Where `reset_ack` is.
pub const CONFIG_RESET_ACK: u64 = 20;

/// Where `nodes` is, with a target for each behind it.
pub(super) const CONFIG_NODES: u64 = 24;

/// The pages of `list` that a bitmap of which the device wrote `written` bytes refuses.
#[must_use]
pub fn refused_of(list: &[u64], bitmap: &[u8], written: u32) -> Vec<u64> {
    let known = bitmap
        .get(..usize::try_from(written).unwrap_or(usize::MAX))
        .unwrap_or(bitmap);
    let is_refused = |place: usize| {
        let byte = known.get(place / 8);
        byte.is_some_and(|byte| byte & (1 << (place % 8)) != 0)
    };
    let places = list.iter().enumerate();
    places
        .filter_map(|(place, pfn)| is_refused(place).then_some(*pfn))
        .collect()
}

impl Driver {
    /// What was negotiated for the queues that follow.
    pub fn set_features(&mut self, features: u64) {
        self.features = features;
    }

    /// Pages that the device has refused and that are put aside.
    #[must_use]
    pub fn refused(&self) -> &[u64] {
        &self.refused
    }

    /// Whether the device may refuse pages.
    #[must_use]
    pub fn has_refusal(&self) -> bool {
        self.features & AEROSTAT_FEATURE_PAGE_REFUSAL != 0
    }

    /// Room for the answer to up to 1024 pages: behind the statistics.
    #[must_use]
    pub fn answer(&self, pages: usize) -> Piece {
        Piece {
            gpa: self.buffers + PAGE_BYTES + PAGE_BYTES / 2,
            len: u32::try_from(pages.div_ceil(8)).unwrap_or(0),
            writable: true,
        }
    }

    /// Offers pages as they are, at most 1024, and waits; returns those that were refused. The driver's
    /// own books do not change.
    ///
    /// # Errors
    /// They are not acknowledged.
    pub fn offer(&mut self, pfns: &[u64]) -> Result<(Used, Vec<u64>)> {
        let (list, answer) = (self.write_pfns(pfns), self.answer(pfns.len()));
        // What the device does not write means nothing.
        self.ram.write(answer.gpa, &[0xff; 128]);
        let used = self.exchange(Role::Inflate, &[list, answer])?;
        let mut bitmap = [0; 128];
        self.ram.read(answer.gpa, &mut bitmap);
        Ok((used, refused_of(pfns, &bitmap, used.written)))
    }

    /// Puts pages into the balloon, but for those that are refused: they are put aside.
    ///
    /// # Errors
    /// They are not acknowledged.
    pub(super) fn give_or_put_aside(&mut self, pfns: &[u64]) -> Result<()> {
        let (_, refused) = self.offer(pfns)?;
        let taken = pfns.iter().filter(|pfn| !refused.contains(pfn));
        self.balloon.extend(taken);
        self.refused.extend(refused);
        Ok(())
    }

    /// The target of each node, in pages; none where it is for the driver to choose the nodes.
    ///
    /// # Errors
    /// The device cannot be read.
    pub fn node_targets(&self) -> Result<Vec<usize>> {
        if self.features & AEROSTAT_FEATURE_NODE_TARGETS == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = [0; 68];
        self.device.read().read_config(CONFIG_NODES, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<4>();
        let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
        let count = usize::try_from(words.next().unwrap_or(0)).unwrap_or(0);
        let targets = words.take(count);
        Ok(targets
            .map(|pages| usize::try_from(pages).unwrap_or(usize::MAX))
            .collect())
    }

    /// Moves each node towards its target by a buffer's worth, with pages of that node alone. Returns how
    /// many pages were moved, and whether all targets are reached. Pages come out of the balloon first: one
    /// that is as large as all targets together takes no more.
    ///
    /// # Errors
    /// The device does not answer.
    pub(super) fn step_nodes(&mut self, targets: &[usize]) -> Result<(usize, bool)> {
        let nodes: BTreeSet<u32> = self.ram.specs().map(|spec| spec.guest_node).collect();
        let (mut moved, mut reached) = (0, true);
        let mut gives = Vec::new();
        for node in nodes {
            let index = usize::try_from(node).unwrap_or(usize::MAX);
            let target = targets.get(index).copied().unwrap_or(0);
            let is_here = |pfn: &u64| self.ram.node_of(*pfn) == Some(node);
            let held: Vec<u64> = self.balloon.iter().copied().filter(is_here).collect();
            let missing = target.saturating_sub(held.len()).min(MAX_PFNS);
            let spare = held.len().saturating_sub(target).min(MAX_PFNS);
            let wanted: Vec<u64> = self
                .allocator
                .unused()
                .filter(is_here)
                .take(missing)
                .collect();
            self.take(held.get(..spare).unwrap_or_default())?;
            moved += spare;
            reached &= held.len() + wanted.len() - spare == target;
            gives.push(wanted);
        }
        if moved > 0 {
            return Ok((moved, reached && gives.iter().all(Vec::is_empty)));
        }
        for wanted in gives {
            self.give(&wanted)?;
            moved += wanted.len();
        }
        Ok((moved, reached))
    }

    /// Lets refused pages go: the guest may use them as any other.
    pub fn release_refused(&mut self) {
        let pages = std::mem::take(&mut self.refused);
        self.allocator.release(pages);
    }

    /// `reset_id` and `reset_ack`.
    ///
    /// # Errors
    /// The device cannot be read.
    pub fn reset_fields(&self) -> Result<(u32, u32)> {
        let (mut id, mut ack) = ([0; 4], [0; 4]);
        self.device.read().read_config(CONFIG_RESET_ID, &mut id)?;
        self.device.read().read_config(CONFIG_RESET_ACK, &mut ack)?;
        Ok((u32::from_le_bytes(id), u32::from_le_bytes(ack)))
    }

    /// Writes `reset_ack`.
    ///
    /// # Errors
    /// The device cannot be written.
    pub fn acknowledge_reset(&self, id: u32) -> Result<()> {
        let bytes = id.to_le_bytes();
        self.device
            .read()
            .write_config(CONFIG_RESET_ACK, &bytes)
            .map(drop)
    }

    /// Does what the host's reset asks for, if there is one: frees all of the balloon without telling,
    /// says so, and acknowledges. No buffer may be with the device. Returns the pages.
    ///
    /// # Errors
    /// The device cannot be read or written.
    pub fn follow_host_reset(&mut self) -> Result<Option<Vec<u64>>> {
        if self.features & AEROSTAT_FEATURE_HOST_RESET == 0 {
            return Ok(None);
        }
        let (id, ack) = self.reset_fields()?;
        if id == ack {
            return Ok(None);
        }
        let pages = std::mem::take(&mut self.balloon);
        self.allocator.release(pages.iter().copied());
        self.update_actual()?;
        self.acknowledge_reset(id)?;
        Ok(Some(pages))
    }
}
