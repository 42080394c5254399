//! The records that travel over the control socket, as typed values.
//!
//! Every record is read leniently: a member this version does not know is ignored and a counter
//! that the peer does not send is zero, so that a reclaimer and a device of different versions
//! still understand each other. Sizes are bytes; names on the wire carry their unit.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where a balloon device stands in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// No virtual machine is attached.
    #[default]
    Disconnected,
    /// A virtual machine is attached, its driver is not running yet.
    Configured,
    /// The guest's driver is running.
    Active,
    /// The virtual machine is paused: no queue is served.
    Paused,
    /// The guest broke a ring; the device waits for a reset.
    NeedsReset,
    /// A state that this version does not know.
    #[serde(other)]
    Unknown,
}

impl DeviceState {
    /// The name used on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Configured => "configured",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::NeedsReset => "needs-reset",
            Self::Unknown => "unknown",
        }
    }
}

/// What happened to the pages that went through a balloon, since the device was created.
///
/// The honest books of invariant I4: `requested + reopened = discarded + pending + held + withdrawn + every
/// skipped`, so memory that was *acknowledged* can be told from memory that was *freed*.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct PageCounters {
    /// Bytes that the guest put into the balloon.
    pub requested_bytes: u64,
    /// Bytes given back to the host.
    pub discarded_bytes: u64,
    /// Bytes acknowledged and waiting in the write-behind window.
    pub pending_bytes: u64,
    /// Bytes held until the rest of their huge frame arrives.
    pub held_bytes: u64,
    /// Bytes that left a huge frame already given back.
    pub reopened_bytes: u64,
    /// Bytes that the guest took back before they were discarded.
    pub withdrawn_bytes: u64,
    /// Bytes left alone because discarding was inhibited.
    pub skipped_inhibited_bytes: u64,
    /// Bytes outside guest memory.
    pub skipped_out_of_range_bytes: u64,
    /// Bytes that were in the balloon already.
    pub skipped_duplicate_bytes: u64,
    /// Bytes of incomplete pages.
    pub skipped_partial_bytes: u64,
    /// Bytes that another user of the memory has pinned.
    pub skipped_pinned_bytes: u64,
    /// Bytes whose discard failed.
    pub skipped_failed_bytes: u64,
    /// Bytes refused because the balloon was as large as it should be.
    pub skipped_over_target_bytes: u64,
    /// Bytes that the guest sent before it acknowledged a reset of its balloon.
    pub skipped_late_bytes: u64,
    /// Of the skipped bytes, those that the guest was told are refused.
    pub refused_bytes: u64,
    /// Bytes that the guest took back.
    pub returned_bytes: u64,
    /// Bytes that the guest wanted back without having given them.
    pub rejected_take_bytes: u64,
    /// Bytes that the guest reported as unused.
    pub report_requested_bytes: u64,
    /// Reported bytes given back to the host.
    pub report_discarded_bytes: u64,
    /// System calls made to discard memory.
    pub discard_calls: u64,
    /// Ranges discarded by those calls.
    pub discard_ranges: u64,
    /// Nanoseconds spent in those calls.
    pub discard_ns: u64,
    /// Descriptor chains received on the inflate queue.
    pub inflate_chains: u64,
    /// Descriptor chains received on the deflate queue.
    pub deflate_chains: u64,
    /// Descriptor chains received on the statistics queue.
    pub stats_chains: u64,
    /// Free page hint buffers handled.
    pub hint_chains: u64,
    /// Descriptor chains received on the reporting queue.
    pub report_chains: u64,
    /// Chains that were acknowledged although their contents made no sense.
    pub chain_errors: u64,
    /// Rings that the guest broke.
    pub broken_rings: u64,
    /// Times that a driver began to speak the protocol.
    pub handshakes: u64,
    /// Times that it was refused.
    pub handshakes_failed: u64,
    /// Configuration accesses that made no sense.
    pub config_errors: u64,
}

impl PageCounters {
    /// The sum of everything that was requested and deliberately left alone.
    #[must_use]
    pub fn skipped_bytes(&self) -> u64 {
        [
            self.skipped_inhibited_bytes,
            self.skipped_out_of_range_bytes,
            self.skipped_duplicate_bytes,
            self.skipped_partial_bytes,
            self.skipped_pinned_bytes,
            self.skipped_failed_bytes,
            self.skipped_over_target_bytes,
            self.skipped_late_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// The counters of one host memory node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct NodeStatus {
    /// The host node's number; `None` is memory whose node is not known.
    pub node: Option<u32>,
    /// What happened to the pages of this node.
    pub counters: PageCounters,
}

/// Everything the device tells about itself in one answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DeviceStatus {
    /// Where the device stands in its life.
    pub state: DeviceState,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// How large the balloon should be.
    pub target_bytes: u64,
    /// How large the driver says the balloon is.
    pub actual_bytes: u64,
    /// How large the balloon is by the device's own record of page ownership.
    pub ballooned_bytes: u64,
    /// Feature bits that the driver accepted.
    pub features: u64,
    /// Their names.
    pub feature_names: Vec<String>,
    /// What happened to the pages, over all nodes.
    pub counters: PageCounters,
    /// The same for each host node.
    pub nodes: Vec<NodeStatus>,
}

/// Statistics that the guest's driver reports about its own memory.
///
/// A value that the guest did not report is absent. Peers that speak QMP write the largest 64-bit
/// number in that case; it is treated as absent too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct GuestStats {
    stats: BTreeMap<String, u64>,
    last_update: u64,
}

impl GuestStats {
    pub(super) fn new(stats: BTreeMap<String, u64>, last_update: u64) -> Self {
        Self { stats, last_update }
    }

    /// The value of one statistic by its name on the wire, for example `stat-free-memory`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.stats
            .get(name)
            .copied()
            .filter(|value| *value != u64::MAX)
    }

    /// Memory that is not in use at all.
    #[must_use]
    pub fn free_memory_bytes(&self) -> Option<u64> {
        self.get("stat-free-memory")
    }

    /// Memory the guest has.
    #[must_use]
    pub fn total_memory_bytes(&self) -> Option<u64> {
        self.get("stat-total-memory")
    }

    /// Memory the guest could use without swapping.
    #[must_use]
    pub fn available_memory_bytes(&self) -> Option<u64> {
        self.get("stat-available-memory")
    }

    /// When the guest sent these values, in seconds of UNIX time; zero if it never did.
    #[must_use]
    pub fn last_update_unix_seconds(&self) -> u64 {
        self.last_update
    }

    /// Every statistic that the guest reported, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.stats
            .iter()
            .filter(|(_, value)| **value != u64::MAX)
            .map(|(name, value)| (name.as_str(), *value))
    }
}

/// The guest changed the size of its balloon.
///
/// Both protocols name the value `actual`, and it is the memory *left to the guest*, as in QMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonEvent {
    /// Memory left to the guest.
    pub left_bytes: u64,
    /// When the device saw the change, in microseconds of UNIX time.
    pub unix_micros: u64,
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestRange {
    /// Guest address of its first byte.
    pub gpa: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// Where a round of free page hints stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HintState {
    /// No round, or it has ended.
    Idle,
    /// The guest was asked, or is sending.
    Running,
    /// The guest has told all; it waits for the end of the round.
    Complete,
}

/// Free page hints that were taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// Where the round stands.
    pub state: HintState,
    /// What the guest said is free.
    pub ranges: Vec<GuestRange>,
}

/// The balloon at the moment of a change (requirement A9).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HistoryEntry {
    /// Its number, always growing.
    pub sequence: u64,
    /// When, by the host's `CLOCK_MONOTONIC`.
    pub monotonic_ns: u64,
    /// What changed, as docs/control-socket.md words it.
    pub event: String,
    /// How large the balloon should be.
    pub target_bytes: u64,
    /// How large the driver said it is.
    pub actual_bytes: u64,
    /// How large it was by the device's own record.
    pub ballooned_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_missing_members_are_tolerated() {
        let text = r#"{"state":"active","memory-bytes":10,"new-thing":{"a":1},
            "counters":{"requested-bytes":7,"counter-of-next-year":9},
            "nodes":[{"node":3,"counters":{"discarded-bytes":5}}]}"#;

        let status: DeviceStatus = serde_json::from_str(text).unwrap();

        assert_eq!(status.state, DeviceState::Active);
        assert_eq!((status.memory_bytes, status.target_bytes), (10, 0));
        assert_eq!(status.counters.requested_bytes, 7);
        assert_eq!(
            (
                status.nodes[0].node.unwrap(),
                status.nodes[0].counters.discarded_bytes
            ),
            (3, 5)
        );
    }

    #[test]
    fn states_have_the_names_of_the_wire() {
        for state in [
            DeviceState::Disconnected,
            DeviceState::Configured,
            DeviceState::Active,
            DeviceState::Paused,
            DeviceState::NeedsReset,
        ] {
            let text = serde_json::to_string(&state).unwrap();
            assert_eq!(text, format!("\"{}\"", state.as_str()));
            assert_eq!(serde_json::from_str::<DeviceState>(&text).unwrap(), state);
        }
        assert_eq!(
            serde_json::from_str::<DeviceState>("\"levitating\"").unwrap(),
            DeviceState::Unknown
        );
    }

    #[test]
    fn a_statistic_the_guest_does_not_know_is_absent() {
        let text = r#"{"stats":{"stat-free-memory":4096,
            "stat-htlb-pgalloc":18446744073709551615},"last-update":12}"#;

        let stats: GuestStats = serde_json::from_str(text).unwrap();

        assert_eq!(stats.free_memory_bytes(), Some(4096));
        assert_eq!(stats.get("stat-htlb-pgalloc"), None);
        assert_eq!(stats.total_memory_bytes(), None);
        assert_eq!(
            stats.iter().collect::<Vec<_>>(),
            [("stat-free-memory", 4096)]
        );
        assert_eq!(stats.last_update_unix_seconds(), 12);
    }

    #[test]
    fn skipped_bytes_is_the_sum_of_all_reasons() {
        let counters = PageCounters {
            skipped_inhibited_bytes: 1,
            skipped_out_of_range_bytes: 2,
            skipped_duplicate_bytes: 4,
            skipped_pinned_bytes: 8,
            skipped_failed_bytes: 16,
            skipped_partial_bytes: 32,
            ..PageCounters::default()
        };
        assert_eq!(counters.skipped_bytes(), 63);
    }
}
