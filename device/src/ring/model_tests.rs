//! The arithmetic of indices, for every value that there is: small models instead of samples.

use super::passed;

/// Walking from `old` to `new` one index at a time, as the rule of 2.7.10.1 is meant: was the step made
/// that used the entry with index `event`?
fn walked_past(event: u16, old: u16, steps: u16) -> bool {
    (0..steps).any(|step| old.wrapping_add(step) == event)
}

#[test]
fn passed_is_what_walking_shows_at_every_wrap() {
    // The rule depends on differences only, so all of it shows around any index; 0 and the wrap are in.
    for base in [0u16, 1, 0x7fff, 0x8000, u16::MAX - 3, u16::MAX] {
        for old in (0..6).map(|by| base.wrapping_add(by)) {
            for steps in 0..20u16 {
                for event in (0..40).map(|by| base.wrapping_sub(15).wrapping_add(by)) {
                    let new = old.wrapping_add(steps);
                    let expected = walked_past(event, old, steps);
                    assert_eq!(passed(event, old, new), expected, "{event} {old} {new}");
                }
            }
        }
    }
}

#[test]
fn passed_knows_every_event_index() {
    for event in 0..=u16::MAX {
        for steps in [1, 2, 255, 32767] {
            let old = 0xff00u16;
            let at = event.wrapping_sub(old);
            assert_eq!(
                passed(event, old, old.wrapping_add(steps)),
                at < steps,
                "{event}"
            );
        }
    }
}
