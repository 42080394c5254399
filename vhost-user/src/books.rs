//! The books of a virtual machine over all its sessions: counters by name, summed.

use aerostat_device::memory::NodeId;
use aerostat_device::{Counters, Device, Flow};

/// How many counters there are.
const COUNT: usize = 48;

/// Counters with the names that the control socket gives them.
pub(crate) type Named = [(&'static str, u64); COUNT];

/// Counters in total and by host node; the last entry is what belongs to no known node.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub(crate) total: Counters,
    pub(crate) nodes: Vec<(Option<NodeId>, Counters)>,
}

impl Books {
    /// Empty books for `nodes` host nodes.
    pub(crate) fn new(nodes: u32) -> Self {
        let ids = (0..nodes).map(|id| Some(NodeId(id))).chain([None]);
        Self {
            total: Counters::default(),
            nodes: ids.map(|id| (id, Counters::default())).collect(),
        }
    }

    /// These books and those of a device.
    pub(crate) fn plus(mut self, device: &Device) -> Self {
        self.total = self.total + device.counters();
        for (id, sum) in &mut self.nodes {
            if let Ok(counters) = device.node_counters(*id) {
                *sum = *sum + counters;
            }
        }
        self
    }
}

/// Names the counters. They are taken apart in full, so that a new one cannot be forgotten here.
pub(crate) fn named(counters: &Counters) -> Named {
    let Counters {
        balloon,
        report,
        returned_bytes,
        rejected_take_bytes,
        discard_calls,
        discard_ranges,
        discard_ns,
        inflate_chains,
        deflate_chains,
        report_chains,
        stats_chains,
        hint_chains,
        chain_errors,
        broken_rings,
        handshakes,
        handshakes_failed,
        config_errors,
        refused_bytes,
        late_take_bytes,
        host_resets,
        host_resets_acknowledged,
        host_reset_bytes,
    } = *counters;
    let balloon = values(balloon);
    let report = values(report);
    [
        ("requested-bytes", balloon[0]),
        ("discarded-bytes", balloon[1]),
        ("pending-bytes", balloon[2]),
        ("held-bytes", balloon[3]),
        ("reopened-bytes", balloon[4]),
        ("withdrawn-bytes", balloon[5]),
        ("skipped-inhibited-bytes", balloon[6]),
        ("skipped-out-of-range-bytes", balloon[7]),
        ("skipped-duplicate-bytes", balloon[8]),
        ("skipped-pinned-bytes", balloon[9]),
        ("skipped-partial-bytes", balloon[10]),
        ("skipped-failed-bytes", balloon[11]),
        ("skipped-over-target-bytes", balloon[12]),
        ("skipped-late-bytes", balloon[13]),
        ("report-requested-bytes", report[0]),
        ("report-discarded-bytes", report[1]),
        ("report-pending-bytes", report[2]),
        ("report-held-bytes", report[3]),
        ("report-reopened-bytes", report[4]),
        ("report-withdrawn-bytes", report[5]),
        ("report-skipped-inhibited-bytes", report[6]),
        ("report-skipped-out-of-range-bytes", report[7]),
        ("report-skipped-duplicate-bytes", report[8]),
        ("report-skipped-pinned-bytes", report[9]),
        ("report-skipped-partial-bytes", report[10]),
        ("report-skipped-failed-bytes", report[11]),
        ("report-skipped-over-target-bytes", report[12]),
        ("report-skipped-late-bytes", report[13]),
        ("returned-bytes", returned_bytes),
        ("rejected-take-bytes", rejected_take_bytes),
        ("discard-calls", discard_calls),
        ("discard-ranges", discard_ranges),
        ("discard-ns", discard_ns),
        ("inflate-chains", inflate_chains),
        ("deflate-chains", deflate_chains),
        ("report-chains", report_chains),
        ("stats-chains", stats_chains),
        ("hint-chains", hint_chains),
        ("chain-errors", chain_errors),
        ("broken-rings", broken_rings),
        ("handshakes", handshakes),
        ("handshakes-failed", handshakes_failed),
        ("config-errors", config_errors),
        ("refused-bytes", refused_bytes),
        ("late-take-bytes", late_take_bytes),
        ("host-resets", host_resets),
        ("host-resets-acknowledged", host_resets_acknowledged),
        ("host-reset-bytes", host_reset_bytes),
    ]
}

/// A flow's values, in the order in which [`named`] names them.
fn values(flow: Flow) -> [u64; 14] {
    let Flow {
        requested_bytes,
        discarded_bytes,
        pending_bytes,
        held_bytes,
        reopened_bytes,
        withdrawn_bytes,
        skipped_inhibited_bytes,
        skipped_out_of_range_bytes,
        skipped_duplicate_bytes,
        skipped_pinned_bytes,
        skipped_partial_bytes,
        skipped_failed_bytes,
        skipped_over_target_bytes,
        skipped_late_bytes,
    } = flow;
    [
        requested_bytes,
        discarded_bytes,
        pending_bytes,
        held_bytes,
        reopened_bytes,
        withdrawn_bytes,
        skipped_inhibited_bytes,
        skipped_out_of_range_bytes,
        skipped_duplicate_bytes,
        skipped_pinned_bytes,
        skipped_partial_bytes,
        skipped_failed_bytes,
        skipped_over_target_bytes,
        skipped_late_bytes,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_add_each_counter_to_its_own() {
        let counters = Counters {
            balloon: Flow {
                requested_bytes: 4096,
                skipped_failed_bytes: 1,
                ..Flow::default()
            },
            report: Flow {
                held_bytes: 7,
                ..Flow::default()
            },
            config_errors: u64::MAX,
            ..Counters::default()
        };
        let sum = Books::new(1).total + counters + counters;
        let nonzero: Vec<_> = named(&sum)
            .into_iter()
            .filter(|(_, value)| *value != 0)
            .collect();
        assert_eq!(
            nonzero,
            [
                ("requested-bytes", 8192),
                ("skipped-failed-bytes", 2),
                ("report-held-bytes", 14),
                ("config-errors", u64::MAX - 1),
            ]
        );
    }
}
