//! Feature bits by name, for the command line and for the control socket.
//!
//! Specification: virtio 1.4, "Traditional Memory Balloon Device", "Feature bits", and "Reserved
//! Feature Bits".

use aerostat_device::DeviceKind;

const KIND: DeviceKind = DeviceKind::VirtioBalloon;

/// The driver says what it fills free pages with.
pub(crate) const PAGE_POISON: u64 = 1 << 4;
/// Queues have the packed layout.
pub(crate) const RING_PACKED: u64 = 1 << 34;

/// What can be chosen, by the names that VMMs give them: the device's own features, and how its rings are
/// laid out and used.
const CHOICES: [(&str, u64); 10] = [
    ("must-tell-host", 1 << 0),
    ("stats-vq", 1 << 1),
    ("deflate-on-oom", 1 << 2),
    ("free-page-hint", 1 << 3),
    ("page-poison", PAGE_POISON),
    ("page-reporting", 1 << 5),
    ("ring-packed", RING_PACKED),
    ("in-order", 1 << 35),
    ("page-refusal", 1 << 50),
    ("host-reset", 1 << 51),
];

/// The transport's, which are not for choosing.
const TRANSPORT: [(&str, u64); 5] = [
    ("ring-indirect-desc", 1 << 28),
    ("ring-event-idx", 1 << 29),
    ("version-1", 1 << 32),
    ("access-platform", 1 << 33),
    ("order-platform", 1 << 36),
];

/// The bits that are the device's to define (0 to 23, and 50 and above).
const DEVICE_BITS: u64 = ((1 << 24) - 1) | !((1 << 50) - 1);

/// The names of a selection; unknown bits are written as `bit-N`.
pub(crate) fn names(features: u64) -> Vec<String> {
    (0..u64::BITS)
        .map(|bit| (bit, 1_u64 << bit))
        .filter(|(_, mask)| features & mask != 0)
        .map(|(bit, mask)| {
            let mut known = CHOICES.iter().chain(&TRANSPORT);
            known
                .find(|(_, known)| *known == mask)
                .map_or_else(|| format!("bit-{bit}"), |(name, _)| (*name).to_owned())
        })
        .collect()
}

/// The features of the device that can be offered, by name.
pub(crate) fn supported() -> impl Iterator<Item = &'static str> {
    CHOICES
        .iter()
        .filter(|(_, bit)| KIND.supported_features() & bit != 0)
        .map(|(name, _)| *name)
}

/// What `--features` means: a comma-separated list, or `default`, or `none`.
pub(crate) fn parse(list: &str) -> Result<u64, String> {
    let transport = KIND.default_features() & !DEVICE_BITS;
    list.split(',')
        .map(str::trim)
        .try_fold(transport, |features, name| {
            let bits = match name {
                "default" => KIND.default_features(),
                "none" => 0,
                name => bit(name)?,
            };
            Ok(features | bits)
        })
}

fn bit(name: &str) -> Result<u64, String> {
    CHOICES
        .iter()
        .filter(|(_, bit)| KIND.supported_features() & bit != 0)
        .find_map(|(known, bit)| (*known == name).then_some(*bit))
        .ok_or_else(|| {
            let known: Vec<_> = supported().collect();
            format!(
                "{name:?} is not a feature; choose from default, none, {}",
                known.join(", ")
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cover_known_and_unknown_bits() {
        assert_eq!(
            names(1 << 1 | 1 << 32 | 1 << 50 | 1 << 62),
            ["stats-vq", "version-1", "page-refusal", "bit-62"]
        );
    }

    #[test]
    fn unknown_features_are_refused_with_the_known_ones() {
        let error = parse("default,warp-drive").unwrap_err();
        assert!(error.contains("warp-drive") && error.contains("default"));
    }
}
