//! An account and its limit file move together, in the order that keeps I5 whatever fails.
//!
//! - Raise: books first, then the file. Between the two the books promise more than the file allows.
//! - Lower: file first, then the books. Between the two, again.
//! - A write that failed may have happened or not: the file is read and the books corrected to it.
//!
//! The ledger is locked for each entry, never while a file is written: a write may block.

use parking_lot::Mutex;

use super::{Cause, Ledger, LedgerError};
use crate::{
    cgroup::{Cgroup, CgroupError},
    policy::{NodeId, VmId},
};

/// The limit of a VM: its cgroup, or what stands for one in a test.
pub trait LimitFile {
    /// What the VM occupies.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    fn current_bytes(&self) -> Result<u64, CgroupError>;
    /// What it may occupy; `None` is no limit.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be read.
    fn limit_bytes(&self) -> Result<Option<u64>, CgroupError>;
    /// Sets what it may occupy.
    ///
    /// # Errors
    /// The cgroup is gone, or cannot be written.
    fn set_limit_bytes(&self, limit: u64) -> Result<(), CgroupError>;
}

impl LimitFile for Cgroup {
    fn current_bytes(&self) -> Result<u64, CgroupError> {
        self.memory_current_bytes()
    }

    fn limit_bytes(&self) -> Result<Option<u64>, CgroupError> {
        Ok(self.limits()?.high_bytes)
    }

    fn set_limit_bytes(&self, limit: u64) -> Result<(), CgroupError> {
        self.set_high_bytes(Some(limit))
    }
}

/// Why a limit did not move.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The books refuse.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The file does.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Raises the VM's limit by `bytes`. When this returns, the guest may have them.
///
/// # Errors
/// The pool is short, or the file could not be written; the books agree with the file then.
pub fn raise(
    ledger: &Mutex<Ledger>,
    vm: &VmId,
    file: &impl LimitFile,
    bytes: u64,
    prefer: Option<NodeId>,
) -> Result<u64, LimitError> {
    let limit = {
        let mut ledger = ledger.lock();
        ledger.raise(vm, bytes, prefer)?;
        ledger.account_bytes(vm).unwrap_or(0)
    };
    match file.set_limit_bytes(limit) {
        Ok(()) => Ok(limit),
        Err(error) => {
            believe_the_file(ledger, vm, file, limit - bytes, Cause::Undone);
            Err(error.into())
        }
    }
}

/// Lowers the VM's limit towards `wanted`, as far as what it occupies and `slack` above allow.
/// Returns the limit after it.
///
/// # Errors
/// The file could not be read or written; the books agree with the file then.
pub fn lower(
    ledger: &Mutex<Ledger>,
    vm: &VmId,
    file: &impl LimitFile,
    wanted: u64,
    slack: u64,
) -> Result<u64, LimitError> {
    let current = file.current_bytes()?;
    let held = account(ledger, vm)?;
    let limit = wanted.max(current.saturating_add(slack));
    if limit >= held {
        return Ok(held);
    }
    if let Err(error) = file.set_limit_bytes(limit) {
        believe_the_file(ledger, vm, file, held, Cause::Undone);
        return Err(error.into());
    }
    let mut ledger = ledger.lock();
    // The limit is in force, so it is a fact even if the VM has grown since.
    ledger.lower(vm, held - limit, current.min(limit))?;
    Ok(limit)
}

/// What someone else did to a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Nothing.
    Untouched,
    /// Lowered it: that holds, and the pool has the rest.
    Lowered {
        /// What is in force now.
        to: u64,
    },
    /// Raised it: the books' limit was written again.
    Restored {
        /// What was found; `None` is no limit.
        from: Option<u64>,
        /// What is in force now.
        to: u64,
    },
    /// Raised it, and the VM uses it: the books follow, the pool may be overdrawn.
    Accepted {
        /// What is in force now.
        to: u64,
    },
}

/// Compares the file with the books and makes them agree: who lowers a limit is obeyed; who raises
/// one is not, since the pool did not grow, unless the VM occupies it already.
///
/// # Errors
/// The VM has no account, or the file could not be read or written.
pub fn reconcile(
    ledger: &Mutex<Ledger>,
    vm: &VmId,
    file: &impl LimitFile,
) -> Result<Foreign, LimitError> {
    let held = account(ledger, vm)?;
    let found = file.limit_bytes()?;
    // The kernel rounds limits down to its pages, at most 64 KiB.
    let same = found.is_some_and(|found| found <= held && held - found < 1 << 16);
    if same {
        return Ok(Foreign::Untouched);
    }
    if let Some(found) = found.filter(|found| *found < held) {
        ledger.lock().correct(vm, found, Cause::Foreign)?;
        return Ok(Foreign::Lowered { to: found });
    }
    let current = file.current_bytes()?;
    let to = held.max(current);
    // Books first, as for any raise.
    let grown = to > held;
    if grown {
        ledger.lock().correct(vm, to, Cause::Foreign)?;
    }
    file.set_limit_bytes(to)?;
    Ok(if grown {
        Foreign::Accepted { to }
    } else {
        Foreign::Restored { from: found, to }
    })
}

fn account(ledger: &Mutex<Ledger>, vm: &VmId) -> Result<u64, LedgerError> {
    ledger
        .lock()
        .account_bytes(vm)
        .ok_or_else(|| LedgerError::Unknown { vm: vm.clone() })
}

/// After a write of unknown outcome. If the file cannot be read either, the larger of what may be in
/// it stays in the books: they never say less than the file allows.
fn believe_the_file(
    ledger: &Mutex<Ledger>,
    vm: &VmId,
    file: &impl LimitFile,
    before: u64,
    cause: Cause,
) {
    let mut ledger = ledger.lock();
    if let Ok(Some(limit)) = file.limit_bytes() {
        // A limit someone else has raised meanwhile is the next reconcile's.
        let held = ledger.account_bytes(vm).unwrap_or(0).max(before);
        let _ = ledger.correct(vm, limit.min(held), cause);
    }
}
