//! The books of one VM in the VMM's own process: the device says what leaves and what goes back, and the
//! limit of the VM's cgroup follows (I5).
//!
//! The budget is the limit that the cgroup had when it was attached. What the balloon takes out of it is the
//! pool's, for whoever manages the cgroups above to give to others; it is the VM's again before the guest
//! is told that it has the memory back.

use parking_lot::Mutex;

use super::{
    ByNode, Ledger,
    limits::{self, LimitFile},
};
use crate::{
    cgroup::CgroupError,
    policy::{NodeId, VmId},
};

/// Limits move in steps of at least this, so that small batches cause no writes.
const STEP_BYTES: u64 = 4 << 20;

/// A cgroup whose limit follows a balloon.
#[derive(Debug)]
pub struct AttachedCgroup<F> {
    file: F,
    vm: VmId,
    ledger: Mutex<Ledger>,
    slack_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the balloon took and has not given back.
    out_bytes: u64,
    failures: u64,
}

/// The account of an attached cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachedAccount {
    /// The limit when it was attached.
    pub budget_bytes: u64,
    /// The limit now.
    pub limit_bytes: u64,
    /// What the balloon took out of it and has left.
    pub pool_bytes: u64,
    /// Limits that could not be moved.
    pub failures: u64,
}

/// A cgroup cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It has no limit.
    #[error("the cgroup has no memory.high: set it to what the VM may occupy, it is the budget")]
    NoLimit,
    /// Its files cannot be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl<F: LimitFile> AttachedCgroup<F> {
    /// Attaches the cgroup behind `file`; its limit stays `slack_bytes` above what it occupies.
    ///
    /// # Errors
    /// It has no limit, or cannot be read.
    pub fn new(file: F, slack_bytes: u64) -> Result<Self, AttachError> {
        let budget = file.limit_bytes()?.ok_or(AttachError::NoLimit)?;
        file.current_bytes()?;
        let vm = VmId::new("attached");
        let mut ledger = Ledger::new(&ByNode::from([(NodeId(0), budget)]));
        // It is the first account of these books.
        let _ = ledger.adopt(&vm, budget, &ByNode::new());
        Ok(Self {
            file,
            vm,
            ledger: Mutex::new(ledger),
            slack_bytes,
            state: Mutex::default(),
        })
    }

    /// The balloon gave `bytes` back to the host: the limit falls by what has left.
    pub fn reclaimed(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.out_bytes = state.out_bytes.saturating_add(bytes);
        let (budget, limit) = self.books();
        let wanted = budget.saturating_sub(state.out_bytes);
        if limit.saturating_sub(wanted) >= STEP_BYTES {
            let lowered =
                limits::lower(&self.ledger, &self.vm, &self.file, wanted, self.slack_bytes);
            state.failures += u64::from(lowered.is_err());
        }
    }

    /// `bytes` are about to go back to the guest: the limit is raised first.
    pub fn returning(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.out_bytes = state.out_bytes.saturating_sub(bytes);
        let (budget, limit) = self.books();
        let missing = budget.saturating_sub(state.out_bytes).saturating_sub(limit);
        if missing > 0 {
            let raised = limits::raise(&self.ledger, &self.vm, &self.file, missing, None);
            state.failures += u64::from(raised.is_err());
        }
    }

    /// All of it goes back: the cgroup gets its whole budget again first.
    pub fn emptied(&self) {
        self.returning(u64::MAX);
    }

    /// The account.
    pub fn account(&self) -> AttachedAccount {
        let failures = self.state.lock().failures;
        let (budget_bytes, limit_bytes) = self.books();
        AttachedAccount {
            budget_bytes,
            limit_bytes,
            pool_bytes: budget_bytes - limit_bytes,
            failures,
        }
    }

    /// Budget and limit; the limit is never above the budget.
    fn books(&self) -> (u64, u64) {
        let ledger = self.ledger.lock();
        let budget = ledger.budget_bytes();
        (
            budget,
            ledger.account_bytes(&self.vm).unwrap_or(0).min(budget),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::cgroup::Cgroup;

    const MIB: u64 = 1 << 20;

    fn cgroup(dir: &Path, high: &str) -> Cgroup {
        for (file, text) in [
            ("cgroup.controllers", "memory"),
            ("memory.high", high),
            ("memory.current", "1048576"),
            ("memory.min", "0"),
            ("memory.low", "0"),
            ("memory.max", "max"),
        ] {
            fs::write(dir.join(file), text).unwrap();
        }
        Cgroup::open_unchecked(dir).unwrap()
    }

    #[test]
    fn the_limit_follows_what_leaves_and_is_raised_before_it_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let attached = AttachedCgroup::new(cgroup(dir.path(), "536870912"), MIB).unwrap();
        let high = || -> u64 {
            fs::read_to_string(dir.path().join("memory.high"))
                .unwrap()
                .parse()
                .unwrap()
        };

        attached.reclaimed(MIB);
        assert_eq!(high(), 512 * MIB, "small batches wait");
        attached.reclaimed(255 * MIB);
        assert_eq!(high(), 256 * MIB);
        // Most of it is still occupied: the limit stays above that.
        fs::write(dir.path().join("memory.current"), (200 * MIB).to_string()).unwrap();
        attached.reclaimed(200 * MIB);
        assert_eq!(high(), 201 * MIB);
        assert_eq!(attached.account().pool_bytes, 311 * MIB);

        attached.returning(300 * MIB);
        assert_eq!(high(), 356 * MIB);
        attached.returning(1000 * MIB);
        assert_eq!(high(), 512 * MIB, "never more than the budget");
        attached.reclaimed(200 * MIB);
        assert_eq!(high(), 312 * MIB);
        attached.emptied();
        assert_eq!(high(), 512 * MIB);
        assert_eq!(attached.account().failures, 0);
    }

    #[test]
    fn a_cgroup_without_a_limit_is_refused_and_one_that_goes_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let refused = AttachedCgroup::new(cgroup(dir.path(), "max"), 0).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("set it to what the VM may occupy")
        );
        let attached = AttachedCgroup::new(cgroup(dir.path(), "536870912"), 0).unwrap();
        drop(dir);

        attached.reclaimed(100 * MIB);

        let account = attached.account();
        assert_eq!((account.failures, account.limit_bytes), (1, 512 * MIB));
    }
}
