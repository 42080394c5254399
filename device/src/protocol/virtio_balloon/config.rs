//! The configuration space (5.5.4): 16 little-endian bytes, legacy or not, and more if HOST_RESET or
//! NODE_TARGETS is offered (docs/virtio-balloon-extensions.md; requirements V3, X2).
//!
//! Reading and writing never wait for a queue: a VMM does both from its vCPU threads.

use super::Features;
use crate::memory::BALLOON_PAGE_SHIFT;
use crate::protocol::contract::Written;
use crate::target::{MAX_TARGET_NODES, Target};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Its length: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`, all le32.
const CONFIG_BYTES: usize = 16;
/// The same where HOST_RESET is offered: `reset_id` and `reset_ack` follow.
const HOST_RESET_CONFIG_BYTES: usize = 24;

/// The same where NODE_TARGETS is offered: `nodes` and `node_num_pages` follow, whether HOST_RESET is
/// offered or not.
const NODE_CONFIG_BYTES: usize = HOST_RESET_CONFIG_BYTES + 4 * (1 + MAX_TARGET_NODES);

/// Its length where `offered` are.
pub(crate) const fn config_bytes(offered: u64) -> usize {
    if offered & Features::NODE_TARGETS.bits() != 0 {
        NODE_CONFIG_BYTES
    } else if offered & Features::HOST_RESET.bits() != 0 {
        HOST_RESET_CONFIG_BYTES
    } else {
        CONFIG_BYTES
    }
}

const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const HINT_CMD_ID: usize = 8;
const POISON_VAL: usize = 12;
const RESET_ID: usize = 16;
const RESET_ACK: usize = 20;
const NODES: usize = 24;

/// `nodes` and `node_num_pages`.
type NodeFields = [u32; 1 + MAX_TARGET_NODES];

/// Where host resets stand.
#[derive(Debug, Default)]
struct HostReset {
    id: u32,
    ack: u32,
    /// How many were asked for since the last one that was acknowledged.
    open: u64,
}

/// The fields as host values.
#[derive(Debug, Default)]
pub(crate) struct ConfigSpace {
    /// The space has the fields of all that is offered, whatever will be negotiated.
    offered: u64,
    host_reset: Mutex<HostReset>,
    /// Whether `reset_ack` differs from `reset_id`; changes under the lock above.
    reset_pending: AtomicBool,
    num_pages: AtomicU32,
    node_targets: Mutex<NodeFields>,
    actual: AtomicU32,
    hint_cmd_id: AtomicU32,
    poison_val: AtomicU32,
}

/// The fields that a saved device takes along (requirement S13); the id of hints is its board's, the target the
/// device's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SavedConfig {
    pub(crate) actual: u32,
    pub(crate) poison_val: u32,
    /// The last host reset, and the last one that the driver acknowledged (requirement V3).
    pub(crate) reset_id: u32,
    pub(crate) reset_ack: u32,
}

impl ConfigSpace {
    /// The space of a device that offers `features`.
    pub(crate) fn new(features: Features) -> Self {
        Self {
            offered: features.bits(),
            ..Self::default()
        }
    }

    /// Its length.
    fn len(&self) -> usize {
        config_bytes(self.offered)
    }

    fn has(&self, feature: Features) -> bool {
        self.offered & feature.bits() != 0
    }

    /// Shows a new `reset_id`, which is pending until the driver writes it to `reset_ack`.
    pub(crate) fn ask_for_reset(&self) {
        let mut reset = self.host_reset.lock();
        // Never the one that was acknowledged last, even after all ids were used.
        reset.id = reset.id.wrapping_add(1);
        if reset.id == reset.ack {
            reset.id = reset.id.wrapping_add(1);
        }
        reset.open += 1;
        self.reset_pending.store(true, Ordering::Release);
    }

    /// Whether the driver has not acknowledged the last host reset.
    pub(crate) fn reset_pending(&self) -> bool {
        self.reset_pending.load(Ordering::Acquire)
    }

    /// Takes what the driver wrote over `reset_ack`. The bytes may come one by one, so any value is
    /// kept while a reset is pending; without one there is nothing to acknowledge.
    fn write_reset_ack(&self, overlay: impl Fn(u32) -> u32, written: &mut Written) {
        let mut reset = self.host_reset.lock();
        let new = overlay(reset.ack);
        if reset.ack == reset.id {
            written.refused |= new != reset.ack;
            return;
        }
        reset.ack = new;
        if new == reset.id {
            written.acknowledged_resets = std::mem::take(&mut reset.open);
            self.reset_pending.store(false, Ordering::Release);
        }
    }

    pub(crate) fn num_pages(&self) -> u32 {
        self.num_pages.load(Ordering::Acquire)
    }

    pub(crate) fn set_target(&self, target: &Target) {
        let pages = |bytes: u64| u32::try_from(bytes >> BALLOON_PAGE_SHIFT).unwrap_or(u32::MAX);
        self.num_pages
            .store(pages(target.bytes()), Ordering::Release);
        if self.has(Features::NODE_TARGETS) {
            let count = u32::try_from(target.nodes().len()).unwrap_or(0);
            let nodes = target.nodes().iter().map(|bytes| pages(*bytes));
            let mut fields = NodeFields::default();
            for (field, value) in fields.iter_mut().zip(std::iter::once(count).chain(nodes)) {
                *field = value;
            }
            *self.node_targets.lock() = fields;
        }
    }

    pub(crate) fn actual(&self) -> u32 {
        self.actual.load(Ordering::Acquire)
    }

    pub(crate) fn set_hint_cmd_id(&self, id: u32) {
        self.hint_cmd_id.store(id, Ordering::Release);
    }

    pub(crate) fn poison_val(&self) -> u32 {
        self.poison_val.load(Ordering::Acquire)
    }

    /// A new driver starts with an empty balloon; the target is the host's and stays. So does
    /// `reset_id`, but nothing is pending any more: returns how many host resets ended this way.
    pub(crate) fn reset(&self) -> u64 {
        self.actual.store(0, Ordering::Release);
        self.poison_val.store(0, Ordering::Release);
        let mut reset = self.host_reset.lock();
        reset.ack = reset.id;
        self.reset_pending.store(false, Ordering::Release);
        std::mem::take(&mut reset.open)
    }

    /// Takes over a saved device's fields. Returns whether a host reset is pending.
    pub(crate) fn restore(&self, saved: SavedConfig) -> bool {
        self.actual.store(saved.actual, Ordering::Release);
        self.poison_val.store(saved.poison_val, Ordering::Release);
        let mut reset = self.host_reset.lock();
        let pending = saved.reset_id != saved.reset_ack;
        *reset = HostReset {
            id: saved.reset_id,
            ack: saved.reset_ack,
            open: u64::from(pending),
        };
        self.reset_pending.store(pending, Ordering::Release);
        pending
    }

    /// The fields as they are saved.
    pub(crate) fn save(&self) -> SavedConfig {
        let reset = self.host_reset.lock();
        SavedConfig {
            actual: self.actual(),
            poison_val: self.poison_val(),
            reset_id: reset.id,
            reset_ack: reset.ack,
        }
    }

    fn bytes(&self) -> [u8; NODE_CONFIG_BYTES] {
        let mut bytes = [0; NODE_CONFIG_BYTES];
        let reset = self.host_reset.lock();
        let nodes = *self.node_targets.lock();
        // What belongs to features that are not offered is zero, as is whatever lies behind the end.
        let fields = [
            (RESET_ID, reset.id),
            (RESET_ACK, reset.ack),
            (NUM_PAGES, self.num_pages()),
            (ACTUAL, self.actual()),
            (HINT_CMD_ID, self.hint_cmd_id.load(Ordering::Acquire)),
            (POISON_VAL, self.poison_val()),
        ];
        let fields = fields.into_iter().chain((NODES..).step_by(4).zip(nodes));
        for (offset, value) in fields {
            for (byte, of_value) in bytes.iter_mut().skip(offset).zip(value.to_le_bytes()) {
                *byte = of_value;
            }
        }
        bytes
    }

    /// Reads from `offset` on; bytes behind the end are zero.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let source = bytes.iter().skip(start).chain(std::iter::repeat(&0));
        for (byte, value) in data.iter_mut().zip(source) {
            *byte = *value;
        }
    }

    /// A driver's write of any length. `active` says that the driver has set DRIVER_OK, after which
    /// `poison_val` is fixed (5.5.6.6). Front ends may write back the whole space, so writing a
    /// field's own value is never refused.
    pub(crate) fn write(
        &self,
        offset: u64,
        data: &[u8],
        features: Features,
        active: bool,
    ) -> Written {
        let mut written = Written::default();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(data.len());
        written.refused |= end > self.len() && !data.is_empty();
        let overlay = |at: usize, old: u32| {
            let mut bytes = old.to_le_bytes();
            for (index, byte) in bytes.iter_mut().enumerate() {
                if let Some(new) = (at + index).checked_sub(start).and_then(|i| data.get(i)) {
                    *byte = *new;
                }
            }
            u32::from_le_bytes(bytes)
        };
        let old = self.actual();
        let new = overlay(ACTUAL, old);
        if new != old {
            self.actual.store(new, Ordering::Release);
            written.actual_changed = true;
        }
        let old = self.poison_val();
        let new = overlay(POISON_VAL, old);
        if new != old {
            if features.contains(Features::PAGE_POISON) && !active {
                self.poison_val.store(new, Ordering::Release);
            } else {
                written.refused = true;
            }
        }
        for (at, own) in [
            (NUM_PAGES, &self.num_pages),
            (HINT_CMD_ID, &self.hint_cmd_id),
        ] {
            let old = own.load(Ordering::Acquire);
            written.refused |= overlay(at, old) != old;
        }
        if self.has(Features::NODE_TARGETS) {
            let nodes = *self.node_targets.lock();
            let mut fields = (NODES..).step_by(4).zip(nodes);
            written.refused |= fields.any(|(at, own)| overlay(at, own) != own);
        }
        if self.has(Features::HOST_RESET) {
            let (id, ack) = {
                let reset = self.host_reset.lock();
                (reset.id, reset.ack)
            };
            written.refused |= overlay(RESET_ID, id) != id;
            if features.contains(Features::HOST_RESET) {
                self.write_reset_ack(|old| overlay(RESET_ACK, old), &mut written);
            } else {
                written.refused |= overlay(RESET_ACK, ack) != ack;
            }
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_end_may_write_the_whole_space_back() {
        let config = ConfigSpace::default();
        config.set_target(&Target::whole(1000 << 12));
        let mut space = [0; CONFIG_BYTES];
        config.read(0, &mut space);
        space[4..8].copy_from_slice(&77u32.to_le_bytes());
        let written = config.write(0, &space, Features::all(), true);
        assert_eq!(
            written,
            Written {
                actual_changed: true,
                ..Written::default()
            }
        );
        assert_eq!((config.num_pages(), config.actual()), (1000, 77));
    }

    #[test]
    fn num_pages_is_the_devices_and_poison_val_is_fixed_once_active() {
        let config = ConfigSpace::default();
        config.set_target(&Target::whole(5 << 12));
        assert!(config.write(0, &[9], Features::all(), false).refused);
        assert!(
            config
                .write(12, &[1, 2, 3, 4], Features::empty(), false)
                .refused
        );
        assert!(
            !config
                .write(12, &[1, 2, 3, 4], Features::all(), false)
                .refused
        );
        assert!(config.write(12, &[0], Features::all(), true).refused);
        assert_eq!((config.num_pages(), config.poison_val()), (5, 0x0403_0201));
    }

    #[test]
    fn partial_and_oversize_accesses_stay_inside() {
        let config = ConfigSpace::default();
        assert!(config.write(5, &[1], Features::all(), true).actual_changed);
        assert_eq!(config.actual(), 0x100);
        assert!(
            config
                .write(u64::MAX, &[1, 2], Features::all(), true)
                .refused
        );
        assert!(config.write(15, &[0, 1], Features::all(), true).refused);
        let mut data = [0xff; 8];
        config.read(12, &mut data);
        assert_eq!(data, [0; 8]);
        config.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }

    fn reset_fields(config: &ConfigSpace) -> (u32, u32) {
        let mut bytes = [0; 8];
        config.read(RESET_ID as u64, &mut bytes);
        let (id, ack) = bytes.split_at(4);
        let field = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        (field(id), field(ack))
    }

    fn acknowledge(config: &ConfigSpace, id: u32) -> Written {
        let at = RESET_ACK as u64;
        config.write(at, &id.to_le_bytes(), Features::all(), true)
    }

    #[test]
    fn a_host_reset_is_pending_until_its_own_id_is_written() {
        let config = ConfigSpace::new(Features::HOST_RESET);
        assert!(!config.reset_pending());
        config.ask_for_reset();
        assert_eq!(reset_fields(&config), (1, 0));
        for wrong in [0, 7, u32::MAX] {
            assert_eq!(acknowledge(&config, wrong), Written::default());
            assert!(config.reset_pending());
        }
        assert_eq!(acknowledge(&config, 1).acknowledged_resets, 1);
        assert!(!config.reset_pending());
        // Nothing is pending: an acknowledgement, of whatever, is not the driver's to write.
        assert!(acknowledge(&config, 2).refused);
        assert_eq!(acknowledge(&config, 1), Written::default());
        assert_eq!(reset_fields(&config), (1, 1));
    }

    #[test]
    fn the_newest_id_acknowledges_earlier_ones_too() {
        let config = ConfigSpace::new(Features::HOST_RESET);
        config.ask_for_reset();
        config.ask_for_reset();
        assert_eq!(acknowledge(&config, 1).acknowledged_resets, 0);
        assert!(config.reset_pending());
        assert_eq!(acknowledge(&config, 2).acknowledged_resets, 2);
    }

    #[test]
    fn an_acknowledgement_may_come_byte_by_byte() {
        let config = ConfigSpace::new(Features::HOST_RESET);
        (0..0x203).for_each(|_| config.ask_for_reset());
        for (at, byte) in (RESET_ACK as u64..).zip(0x203u32.to_le_bytes()) {
            assert!(!config.write(at, &[byte], Features::all(), true).refused);
        }
        assert!(!config.reset_pending());
    }

    #[test]
    fn a_new_driver_has_nothing_to_acknowledge_and_ids_go_on() {
        let config = ConfigSpace::new(Features::HOST_RESET);
        config.ask_for_reset();
        assert_eq!(config.reset(), 1);
        assert!(!config.reset_pending());
        assert_eq!(reset_fields(&config), (1, 1));
        config.ask_for_reset();
        assert_eq!(reset_fields(&config), (2, 1));
    }

    #[test]
    fn an_id_is_never_the_one_acknowledged_last() {
        let config = ConfigSpace::new(Features::HOST_RESET);
        config.host_reset.lock().id = u32::MAX;
        config.ask_for_reset();
        assert_eq!(reset_fields(&config), (1, 0), "0 would look acknowledged");
    }

    #[test]
    fn without_the_feature_there_are_no_such_fields() {
        let config = ConfigSpace::new(Features::DEFAULT);
        let written = config.write(RESET_ACK as u64, &[1], Features::all(), true);
        assert!(written.refused);
        assert_eq!(reset_fields(&config), (0, 0));
        // Offered, but not selected: readable, and nobody's to write.
        let config = ConfigSpace::new(Features::all());
        let negotiated = Features::DEFAULT;
        assert!(
            config
                .write(RESET_ACK as u64, &[1], negotiated, true)
                .refused
        );
        assert!(
            !config
                .write(RESET_ACK as u64, &[0; 4], negotiated, true)
                .refused
        );
        assert_eq!(reset_fields(&config), (0, 0));
    }

    /// An earlier driver acknowledged a reset, and this one does not know the feature: what it reads
    /// there it may write back.
    #[test]
    fn a_driver_without_the_feature_may_write_back_what_an_earlier_one_acknowledged() {
        let config = ConfigSpace::new(Features::all());
        config.ask_for_reset();
        assert_eq!(acknowledge(&config, 1).acknowledged_resets, 1);
        config.reset();
        let mut space = [0; NODE_CONFIG_BYTES];
        config.read(0, &mut space);
        let written = config.write(0, &space, Features::DEFAULT, true);
        assert_eq!(written, Written::default());
    }

    #[test]
    fn targets_of_nodes_are_read_and_nobody_elses_to_write() {
        let config = ConfigSpace::new(Features::NODE_TARGETS);
        config.set_target(&Target::by_node(&[7 << 12, 0, 9 << 12]).unwrap());
        let read = |at: usize| {
            let mut bytes = [0; 4];
            config.read(at as u64, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        assert_eq!(read(NUM_PAGES), 16);
        assert_eq!([24, 28, 32, 36, 40, 88].map(read), [3, 7, 0, 9, 0, 0]);
        assert_eq!([RESET_ID, RESET_ACK].map(read), [0, 0], "not offered");
        let mut space = [0; NODE_CONFIG_BYTES];
        config.read(0, &mut space);
        assert!(!config.write(0, &space, Features::all(), true).refused);
        assert!(config.write(28, &[8], Features::all(), true).refused);
        assert!(config.write(92, &[0], Features::all(), true).refused);
        // A target for the whole balloon leaves the nodes to the driver.
        config.set_target(&Target::whole(5 << 12));
        assert_eq!([NUM_PAGES, 24, 28, 36].map(read), [5, 0, 0, 0]);
    }
}
