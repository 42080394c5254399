//! The text formats of cgroup files: pure functions.

use std::collections::BTreeMap;

use crate::policy::{NodeId, Pressure};

/// A limit: `None` if the text is neither a number nor `max`; `Some(None)` is `max`.
#[must_use]
pub fn parse_limit(text: &str) -> Option<Option<u64>> {
    match text.trim() {
        "max" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

/// Lines of `key value`. Lines of another form are left out: newer kernels may add some.
pub(super) fn flat_keyed(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.trim().parse().ok()?))
        })
        .collect()
}

/// Lines of `key N0=value N1=value`, turned around: by node, by key.
pub(super) fn by_node(text: &str) -> BTreeMap<NodeId, BTreeMap<&str, u64>> {
    let mut nodes = BTreeMap::<NodeId, BTreeMap<&str, u64>>::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next() else { continue };
        for word in words {
            let entry = word.strip_prefix('N').and_then(|rest| {
                let (node, value) = rest.split_once('=')?;
                Some((node.parse().ok()?, value.parse().ok()?))
            });
            if let Some((node, value)) = entry {
                nodes.entry(NodeId(node)).or_default().insert(key, value);
            }
        }
    }
    nodes
}

/// A pressure file. `None` if there is no line that begins with `some`.
#[must_use]
pub fn parse_pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut found = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next();
        let mut averages = [0.0; 3];
        let mut total = 0;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => averages[0] = value.parse().unwrap_or(0.0),
                "avg60" => averages[1] = value.parse().unwrap_or(0.0),
                "avg300" => averages[2] = value.parse().unwrap_or(0.0),
                "total" => total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        match kind {
            Some("some") => {
                found = true;
                [
                    pressure.some_avg10,
                    pressure.some_avg60,
                    pressure.some_avg300,
                ] = averages;
                pressure.some_total_us = total;
            }
            Some("full") => {
                [
                    pressure.full_avg10,
                    pressure.full_avg60,
                    pressure.full_avg300,
                ] = averages;
                pressure.full_total_us = total;
            }
            _ => {}
        }
    }
    found.then_some(pressure)
}
