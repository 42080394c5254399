//! Waiting for what other processes do, as long as a test has patience.

use std::{
    fmt::Debug,
    thread,
    time::{Duration, Instant},
};

/// Looks until the first value is true; returns the second one.
///
/// # Panics
/// That takes longer than `patience`.
pub fn eventually<T: Debug>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> (bool, T),
) -> T {
    let deadline = Instant::now() + patience;
    loop {
        let (done, seen) = look();
        if done {
            return seen;
        }
        assert!(
            Instant::now() < deadline,
            "not within {patience:?}: {what}; last seen: {seen:?}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}
