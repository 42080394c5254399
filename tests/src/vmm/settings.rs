//! In which settings the suites run: what is left open by a test is chosen by the environment variable
//! `AEROSTAT_TEST_SETTINGS`, a list of `packed`, `in-order` and `write-behind` (CONTRIBUTING.md,
//! "Settings"). `make test` runs them in several.

use super::device::Device;
use super::error::Result;
use aerostat::{AEROSTAT_FEATURE_IN_ORDER, AEROSTAT_FEATURE_RING_PACKED};
use std::sync::OnceLock;

/// The bytes and the milliseconds of the window: a quarter of what the header recommends, since the guests of
/// the suites are small and are to fill it.
const WINDOW: (u64, u32) = (32 << 20, 10);
const VARIABLE: &str = "AEROSTAT_TEST_SETTINGS";

/// What a guest's device is like beyond what its test is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Its queues have the packed layout.
    pub packed: bool,
    /// IN_ORDER is negotiated.
    pub in_order: bool,
    /// Inflated pages are discarded behind the acknowledgement.
    pub write_behind: bool,
}

impl Settings {
    /// What the environment says.
    ///
    /// # Panics
    /// If it says something else than the names of settings.
    #[must_use]
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Settings> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let mut settings = Self::default();
            let list = std::env::var(VARIABLE).unwrap_or_default();
            for name in list
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
            {
                match name {
                    "packed" => settings.packed = true,
                    "in-order" => settings.in_order = true,
                    "write-behind" => settings.write_behind = true,
                    other => assert!(other.is_empty(), "{VARIABLE}: {other:?} is no setting"),
                }
            }
            settings
        })
    }

    /// Split rings used as they come: for tests that write rings themselves.
    #[must_use]
    pub fn with_plain_split_rings(self) -> Self {
        Self {
            packed: false,
            in_order: false,
            ..self
        }
    }

    /// The features that these settings are about.
    #[must_use]
    pub fn features(self) -> u64 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.packed, AEROSTAT_FEATURE_RING_PACKED)
            | bit(self.in_order, AEROSTAT_FEATURE_IN_ORDER)
    }

    /// Sets up what is no feature.
    ///
    /// # Errors
    /// The device refuses.
    pub fn apply(self, device: &Device) -> Result<()> {
        if self.write_behind {
            device.set_write_behind(WINDOW.0, WINDOW.1)?;
        }
        Ok(())
    }
}
