//! Which queue is which (5.5.2; requirements, "Queues").
//!
//! The standard numbers the queues 0 to 4. Linux leaves out those whose feature was not negotiated
//! and numbers the rest densely. Nothing on the wire says which a driver does, but the queues that
//! it sets up do: a dense driver leaves no gap.

use super::Features;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Inflate,
    Deflate,
    Stats,
    Hints,
    Reporting,
}

impl Role {
    /// In the order in which their queues are served.
    pub(super) const ALL: [Self; 5] = [
        Self::Inflate,
        Self::Deflate,
        Self::Stats,
        Self::Hints,
        Self::Reporting,
    ];
}

/// How many queues the fixed numbering has.
pub(crate) const QUEUES: u16 = 5;

/// The role of queue `index`, given what was negotiated and which queues (a bit each) are started.
pub(crate) fn role_of(index: u16, features: Features, started: u32) -> Option<Role> {
    let optional = [
        (2, Features::STATS_VQ, Role::Stats),
        (3, Features::FREE_PAGE_HINT, Role::Hints),
        (4, Features::PAGE_REPORTING, Role::Reporting),
    ];
    let present = || {
        optional
            .iter()
            .filter(|(_, feature, _)| features.contains(*feature))
    };
    match index {
        0 => Some(Role::Inflate),
        1 => Some(Role::Deflate),
        _ if is_dense(started, 2 + present().count()) => present()
            .nth(usize::from(index) - 2)
            .map(|(_, _, role)| *role),
        _ => present()
            .find(|(fixed, _, _)| *fixed == index)
            .map(|(_, _, role)| *role),
    }
}

/// Whether the started queues are the first ones of `count`, without a gap. Drivers and front-ends
/// start queues in ascending order, so this is right from the first one on.
fn is_dense(started: u32, count: usize) -> bool {
    let queues = started.trailing_ones();
    started >> queues == 0 && queues as usize <= count
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATS: Features = Features::STATS_VQ;
    const REPORTING: Features = Features::PAGE_REPORTING;

    #[test]
    fn linux_numbers_densely() {
        assert_eq!(role_of(2, REPORTING, 0b111), Some(Role::Reporting));
        assert_eq!(role_of(2, STATS, 0b111), Some(Role::Stats));
        assert_eq!(role_of(2, STATS | REPORTING, 0b1111), Some(Role::Stats));
        assert_eq!(role_of(3, STATS | REPORTING, 0b1111), Some(Role::Reporting));
        // Queues that come one by one are right at once.
        assert_eq!(role_of(2, STATS | REPORTING, 0b111), Some(Role::Stats));
    }

    #[test]
    fn other_drivers_number_as_the_text_says() {
        assert_eq!(role_of(4, REPORTING, 0b1_0011), Some(Role::Reporting));
        assert_eq!(role_of(2, STATS | REPORTING, 0b1_0111), Some(Role::Stats));
        assert_eq!(
            role_of(4, STATS | REPORTING, 0b1_0111),
            Some(Role::Reporting)
        );
        assert_eq!(role_of(3, STATS | REPORTING, 0b1_1111), None);
        assert_eq!(role_of(2, REPORTING, 0b1_0111), None);
    }

    #[test]
    fn hints_come_before_reporting_and_a_gap_gives_the_fixed_numbers_away() {
        let both = Features::FREE_PAGE_HINT | REPORTING;
        assert_eq!(role_of(2, both, 0b1111), Some(Role::Hints));
        assert_eq!(role_of(3, both, 0b1111), Some(Role::Reporting));
        assert_eq!(role_of(3, both, 0b0_1011), Some(Role::Hints));
        assert_eq!(role_of(4, both, 0b1_1011), Some(Role::Reporting));
        assert_eq!(role_of(4, both | STATS, 0b1_1111), Some(Role::Reporting));
    }

    #[test]
    fn queues_without_their_feature_have_no_role() {
        assert_eq!(role_of(0, Features::empty(), 1), Some(Role::Inflate));
        assert_eq!(role_of(1, Features::empty(), 3), Some(Role::Deflate));
        assert_eq!(role_of(2, Features::empty(), 7), None);
        assert_eq!(role_of(4, STATS, 0b1_0111), None);
    }
}
