//! The configuration space (5.5.4): 16 little-endian bytes, legacy or not.
//!
//! Reading and writing never wait for a queue: a VMM does both from its vCPU threads.

use super::Features;
use std::sync::atomic::{AtomicU32, Ordering};

/// Its length: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`, all le32.
pub(crate) const CONFIG_BYTES: usize = 16;

const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const HINT_CMD_ID: usize = 8;
const POISON_VAL: usize = 12;

/// The fields as host values.
#[derive(Debug, Default)]
pub(crate) struct ConfigSpace {
    num_pages: AtomicU32,
    actual: AtomicU32,
    hint_cmd_id: AtomicU32,
    poison_val: AtomicU32,
}

/// What a driver's write did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// `actual` has a new value.
    pub(crate) actual_changed: bool,
    /// A field that is not the driver's to change, or not now, would have changed.
    pub(crate) refused: bool,
}

impl ConfigSpace {
    pub(crate) fn num_pages(&self) -> u32 {
        self.num_pages.load(Ordering::Acquire)
    }

    pub(crate) fn set_num_pages(&self, pages: u32) {
        self.num_pages.store(pages, Ordering::Release);
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

    /// A new driver starts with an empty balloon; the target is the host's and stays.
    pub(crate) fn reset(&self) {
        self.actual.store(0, Ordering::Release);
        self.poison_val.store(0, Ordering::Release);
    }

    /// Takes over a saved device's fields.
    pub(crate) fn restore(&self, num_pages: u32, actual: u32, poison_val: u32) {
        self.num_pages.store(num_pages, Ordering::Release);
        self.actual.store(actual, Ordering::Release);
        self.poison_val.store(poison_val, Ordering::Release);
    }

    fn bytes(&self) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let fields = [
            (NUM_PAGES, self.num_pages()),
            (ACTUAL, self.actual()),
            (HINT_CMD_ID, self.hint_cmd_id.load(Ordering::Acquire)),
            (POISON_VAL, self.poison_val()),
        ];
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
            .min(CONFIG_BYTES);
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
        written.refused |= end > CONFIG_BYTES && !data.is_empty();
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
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_end_may_write_the_whole_space_back() {
        let config = ConfigSpace::default();
        config.set_num_pages(1000);
        let mut space = [0; CONFIG_BYTES];
        config.read(0, &mut space);
        space[4..8].copy_from_slice(&77u32.to_le_bytes());
        let written = config.write(0, &space, Features::all(), true);
        assert_eq!(
            written,
            Written {
                actual_changed: true,
                refused: false
            }
        );
        assert_eq!((config.num_pages(), config.actual()), (1000, 77));
    }

    #[test]
    fn num_pages_is_the_devices_and_poison_val_is_fixed_once_active() {
        let config = ConfigSpace::default();
        config.set_num_pages(5);
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
}
