//! The demonstration's synthetic guest: the same story where no real guest can be had.
//!
//! It needs a [`DemoGuest`] over the project's own test VMM: guest memory in a memfd, whose blocks
//! are the host memory; a driver that behaves as Linux does; the device behind the C ABI.

use super::{DemoError, guest::DemoGuest, options::Options};

/// Starts a synthetic guest.
///
/// # Errors
/// Always, until the test VMM is joined here.
pub fn start(_options: &Options) -> Result<Box<dyn DemoGuest>, DemoError> {
    Err(DemoError::Unavailable(
        "a synthetic guest is not part of this build; use --guest uml".to_owned(),
    ))
}
