//! Arithmetic on bytes: fractions, rates, and how amounts are shown.

use std::fmt;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// What targets are rounded to: balloons count in 4 KiB pages.
pub(super) const PAGE_BYTES: u64 = 4096;

/// `bytes * factor`, never negative, never beyond 64 bits.
#[must_use]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast from float to integer saturates, and what is lost is below a byte in 2^53"
)]
pub fn scaled(bytes: u64, factor: f64) -> u64 {
    (bytes as f64 * factor).max(0.0) as u64
}

/// A whole number of pages, rounded down.
pub(super) fn whole_pages(bytes: u64) -> u64 {
    bytes & !(PAGE_BYTES - 1)
}

/// `part / whole`, 0 for an empty whole.
pub(super) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Bytes as MiB or GiB, for people.
#[derive(Clone, Copy, Debug)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / MIB as f64;
        if mib >= 10_240.0 {
            write!(formatter, "{:.1} GiB", mib / 1024.0)
        } else if mib >= 10.0 || self.0.is_multiple_of(MIB) {
            write!(formatter, "{mib:.0} MiB")
        } else {
            write!(formatter, "{mib:.1} MiB")
        }
    }
}
