//! The books of memory: double entry between the world, a pool and one account a VM (I5).
//!
//! An account holds what its VM may occupy: the limit in its cgroup. The pool holds what nobody may.
//! Each entry takes bytes from one account and adds them to another, so per host node
//!
//! ```text
//! pool + sum of the VMs' accounts = budget
//! ```
//!
//! holds at every instant, by construction. [`limits`] connects an account to the limit file: raised
//! in the books before the file, lowered in the file before the books, and never below what is seen
//! in `memory.current`. So whatever is interrupted, the files never allow more than the books say,
//! and the books can be made again from the files ([`Ledger::adopt`]): nothing else is stored.
//!
//! Only what others did can overdraw the pool: limits found above the budget at a start, or raised
//! from outside. The pool is then negative, is shown so, and grants nothing until it is made good.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use serde::Serialize;

use crate::policy::{NodeId, VmId};

pub mod attached;
pub mod limits;

/// Entries kept for explanations; the sums do not depend on them.
const JOURNAL_LIMIT: usize = 1024;

/// Bytes by host node. A host without NUMA is node 0.
pub type ByNode = BTreeMap<NodeId, u64>;

/// Who holds memory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Account {
    /// Outside of the budget. Its balance is minus the budget.
    World,
    /// Promised to nobody.
    Pool,
    /// A VM's limit.
    Vm(VmId),
}

/// Why bytes moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The budget was set.
    Budget,
    /// A limit was found when the books were opened, or a VM appeared.
    Adopted,
    /// A VM may use more.
    Raised,
    /// A VM's memory has left.
    Lowered,
    /// A limit could not be written after all.
    Undone,
    /// Someone else changed a limit.
    Foreign,
    /// The VM has gone.
    Closed,
}

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Entry {
    /// Its number, always growing.
    pub sequence: u64,
    /// Who lost the bytes.
    pub from: Account,
    /// Who got them.
    pub to: Account,
    /// Where they are.
    pub node: NodeId,
    /// How many.
    pub bytes: u64,
    /// Why.
    pub cause: Cause,
}

/// A step the books refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// There is no such account.
    #[error("{vm} has no account in the ledger; it is opened when the VM is found again")]
    Unknown {
        /// The VM.
        vm: VmId,
    },
    /// The account exists already.
    #[error("{vm} has an account in the ledger already; give each VM a name of its own")]
    Duplicate {
        /// The VM.
        vm: VmId,
    },
    /// The pool cannot cover it.
    #[error(
        "the pool has {available} bytes, {vm} asks for {asked}: take memory from other VMs first, \
         or raise the budget"
    )]
    Short {
        /// The VM.
        vm: VmId,
        /// What it asked for.
        asked: u64,
        /// What the pool has; negative when it is overdrawn.
        available: i128,
    },
    /// The memory has not left yet.
    #[error("{vm} occupies {current} bytes: its limit cannot fall to {limit}")]
    InUse {
        /// The VM.
        vm: VmId,
        /// The limit that was asked for.
        limit: u64,
        /// What the VM occupies.
        current: u64,
    },
}

/// The books.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    balances: BTreeMap<Account, BTreeMap<NodeId, i128>>,
    journal: VecDeque<Entry>,
    posted: u64,
}

impl Ledger {
    /// Books with everything in the pool.
    #[must_use]
    pub fn new(budget: &ByNode) -> Self {
        let mut ledger = Self::default();
        ledger.set_budget(budget);
        ledger
    }

    /// Changes the budget; what is gained or lost is the pool's.
    pub fn set_budget(&mut self, budget: &ByNode) {
        let mut nodes: Vec<NodeId> = budget.keys().copied().collect();
        nodes.extend(
            self.balances
                .get(&Account::World)
                .into_iter()
                .flatten()
                .map(|(n, _)| *n),
        );
        nodes.sort();
        nodes.dedup();
        for node in nodes {
            let old = -self.balance(&Account::World, node);
            let new = i128::from(budget.get(&node).copied().unwrap_or(0));
            self.shift(
                &Account::World,
                &Account::Pool,
                node,
                new - old,
                Cause::Budget,
            );
        }
    }

    /// The budget, over all nodes.
    #[must_use]
    pub fn budget_bytes(&self) -> u64 {
        u64::try_from(-self.sum(&Account::World)).unwrap_or(0)
    }

    /// What is promised to nobody, over all nodes; negative when others overdrew it.
    #[must_use]
    pub fn pool_bytes(&self) -> i128 {
        self.sum(&Account::Pool)
    }

    /// The same by node.
    #[must_use]
    pub fn pool_by_node(&self) -> BTreeMap<NodeId, i128> {
        self.balances
            .get(&Account::Pool)
            .cloned()
            .unwrap_or_default()
    }

    /// What the VM may occupy; `None` without an account.
    #[must_use]
    pub fn account_bytes(&self, vm: &VmId) -> Option<u64> {
        let account = Account::Vm(vm.clone());
        self.balances
            .contains_key(&account)
            .then(|| u64::try_from(self.sum(&account)).unwrap_or(0))
    }

    /// The same by node.
    #[must_use]
    pub fn account_by_node(&self, vm: &VmId) -> ByNode {
        let balances = self.balances.get(&Account::Vm(vm.clone()));
        let positive = |(node, bytes): (&NodeId, &i128)| Some((*node, u64::try_from(*bytes).ok()?));
        balances
            .into_iter()
            .flatten()
            .filter_map(positive)
            .collect()
    }

    /// VMs with an account.
    pub fn vms(&self) -> impl Iterator<Item = &VmId> {
        self.balances.keys().filter_map(|account| match account {
            Account::Vm(vm) => Some(vm),
            Account::World | Account::Pool => None,
        })
    }

    /// The last entries, oldest first.
    pub fn journal(&self) -> impl Iterator<Item = &Entry> {
        self.journal.iter()
    }

    /// Opens an account with the limit that its cgroup has already: how the books are made (again)
    /// from the files. It may overdraw the pool, since the limit is a fact.
    ///
    /// `used` says where the VM's memory is; the limit is spread alike. Without it, the limit goes
    /// where the pool has most.
    ///
    /// # Errors
    /// The VM has an account.
    pub fn adopt(&mut self, vm: &VmId, limit: u64, used: &ByNode) -> Result<(), LedgerError> {
        let account = Account::Vm(vm.clone());
        if self.balances.contains_key(&account) {
            return Err(LedgerError::Duplicate { vm: vm.clone() });
        }
        self.balances.insert(account.clone(), BTreeMap::new());
        for (node, bytes) in self.spread_like(limit, used) {
            self.post(&Account::Pool, &account, node, bytes, Cause::Adopted);
        }
        Ok(())
    }

    /// Closes the account of a VM whose cgroup has gone; everything is the pool's again.
    ///
    /// # Errors
    /// It has none.
    pub fn close(&mut self, vm: &VmId) -> Result<u64, LedgerError> {
        let account = Account::Vm(vm.clone());
        let Some(balances) = self.balances.get(&account).cloned() else {
            return Err(LedgerError::Unknown { vm: vm.clone() });
        };
        let total = self.sum(&account);
        for (node, bytes) in balances {
            self.shift(&account, &Account::Pool, node, bytes, Cause::Closed);
        }
        self.balances.remove(&account);
        Ok(u64::try_from(total).unwrap_or(0))
    }

    /// Promises the VM `bytes` more, from the nodes where the pool has most, `prefer` first. Call it
    /// before the limit is written and before any memory goes back to the guest.
    ///
    /// # Errors
    /// The VM has no account, or the pool has not as much: nothing is promised then.
    pub fn raise(
        &mut self,
        vm: &VmId,
        bytes: u64,
        prefer: Option<NodeId>,
    ) -> Result<ByNode, LedgerError> {
        let account = self.known(vm)?;
        let available = self.pool_bytes();
        if i128::from(bytes) > available {
            return Err(LedgerError::Short {
                vm: vm.clone(),
                asked: bytes,
                available,
            });
        }
        let parts = self.take_from_pool(bytes, prefer);
        if parts.values().sum::<u64>() != bytes {
            // The total is there, but one node is overdrawn and makes it so.
            return Err(LedgerError::Short {
                vm: vm.clone(),
                asked: bytes,
                available: i128::from(parts.values().sum::<u64>()),
            });
        }
        for (node, bytes) in &parts {
            self.post(&Account::Pool, &account, *node, *bytes, Cause::Raised);
        }
        Ok(parts)
    }

    /// Takes `bytes` of the VM's promise back, `current` being what it is seen to occupy. Call it
    /// after the limit was written.
    ///
    /// # Errors
    /// The VM has no account, or occupies more than would be left.
    pub fn lower(&mut self, vm: &VmId, bytes: u64, current: u64) -> Result<(), LedgerError> {
        let account = self.known(vm)?;
        let held = u64::try_from(self.sum(&account)).unwrap_or(0);
        match held.checked_sub(bytes) {
            Some(limit) if limit >= current => {
                self.give_to_pool(&account, bytes, Cause::Lowered);
                Ok(())
            }
            limit => Err(LedgerError::InUse {
                vm: vm.clone(),
                limit: limit.unwrap_or(0),
                current,
            }),
        }
    }

    /// Enters the limit that is really in the file: after a write whose outcome is not known, or
    /// when someone else changed it. Returns how far the books were off: positive when the file
    /// allows more than they said.
    ///
    /// # Errors
    /// The VM has no account.
    pub fn correct(&mut self, vm: &VmId, limit: u64, cause: Cause) -> Result<i128, LedgerError> {
        let account = self.known(vm)?;
        let held = self.sum(&account);
        let off = i128::from(limit) - held;
        if off > 0 {
            let more = u64::try_from(off).unwrap_or(u64::MAX);
            let mut parts = self.take_from_pool(more, None);
            let covered: u64 = parts.values().sum();
            *parts.entry(self.first_node()).or_default() += more - covered;
            for (node, bytes) in parts {
                self.post(&Account::Pool, &account, node, bytes, cause);
            }
        } else if off < 0 {
            let less = u64::try_from(-off).unwrap_or(u64::MAX);
            self.give_to_pool(&account, less, cause);
        }
        Ok(off)
    }

    /// Shows that the books balance: per node, all balances sum to zero, and only the pool and the
    /// world may be negative.
    #[must_use]
    pub fn balanced(&self) -> bool {
        let mut sums = BTreeMap::<NodeId, i128>::new();
        for (account, nodes) in &self.balances {
            for (node, bytes) in nodes {
                *sums.entry(*node).or_default() += bytes;
                if *bytes < 0 && matches!(account, Account::Vm(_)) {
                    return false;
                }
            }
        }
        sums.values().all(|sum| *sum == 0)
    }

    fn known(&self, vm: &VmId) -> Result<Account, LedgerError> {
        let account = Account::Vm(vm.clone());
        if self.balances.contains_key(&account) {
            Ok(account)
        } else {
            Err(LedgerError::Unknown { vm: vm.clone() })
        }
    }

    /// The one way in which bytes move.
    fn post(&mut self, from: &Account, to: &Account, node: NodeId, bytes: u64, cause: Cause) {
        if bytes == 0 {
            return;
        }
        *self.entry(from, node) -= i128::from(bytes);
        *self.entry(to, node) += i128::from(bytes);
        if self.journal.len() == JOURNAL_LIMIT {
            self.journal.pop_front();
        }
        self.posted += 1;
        self.journal.push_back(Entry {
            sequence: self.posted,
            from: from.clone(),
            to: to.clone(),
            node,
            bytes,
            cause,
        });
    }

    /// [`Self::post`] in the direction that the sign of `bytes` says.
    fn shift(&mut self, from: &Account, to: &Account, node: NodeId, bytes: i128, cause: Cause) {
        let amount = u64::try_from(bytes.unsigned_abs()).unwrap_or(u64::MAX);
        if bytes >= 0 {
            self.post(from, to, node, amount, cause);
        } else {
            self.post(to, from, node, amount, cause);
        }
    }

    /// Takes from the account's nodes in proportion, the last one what is left by rounding.
    fn give_to_pool(&mut self, account: &Account, bytes: u64, cause: Cause) {
        let held = self.balances.get(account).cloned().unwrap_or_default();
        let total = held.values().sum::<i128>().max(1);
        let mut left = i128::from(bytes);
        let mut parts: Vec<(NodeId, i128)> = held
            .iter()
            .map(|(node, had)| (*node, (had * i128::from(bytes) / total).min(*had)))
            .collect();
        left -= parts.iter().map(|(_, part)| part).sum::<i128>();
        for (node, part) in &mut parts {
            let more = (held.get(node).copied().unwrap_or(0) - *part).min(left);
            *part += more;
            left -= more;
        }
        for (node, part) in parts {
            self.shift(account, &Account::Pool, node, part, cause);
        }
    }

    /// Where `bytes` could come from, as far as the pool has them: `prefer`, then the richest node.
    fn take_from_pool(&self, bytes: u64, prefer: Option<NodeId>) -> ByNode {
        let mut nodes: Vec<(NodeId, u64)> = self
            .balances
            .get(&Account::Pool)
            .into_iter()
            .flatten()
            .filter_map(|(node, bytes)| Some((*node, u64::try_from(*bytes).ok()?)))
            .collect();
        nodes.sort_by_key(|(node, bytes)| (Some(*node) != prefer, std::cmp::Reverse(*bytes)));
        let mut left = bytes;
        let mut parts = ByNode::new();
        for (node, available) in nodes {
            let part = available.min(left);
            if part > 0 {
                parts.insert(node, part);
            }
            left -= part;
        }
        parts
    }

    /// Spreads `limit` as `used` is spread; where nothing is used, over the pool, the rest on the
    /// first node.
    fn spread_like(&self, limit: u64, used: &ByNode) -> ByNode {
        let known: ByNode = used
            .iter()
            .filter(|(node, bytes)| **bytes > 0 && self.has_node(**node))
            .map(|(node, bytes)| (*node, *bytes))
            .collect();
        let total: u128 = known.values().map(|bytes| u128::from(*bytes)).sum();
        let mut parts = if total == 0 {
            self.take_from_pool(limit, None)
        } else {
            let part = |bytes: u64| u128::from(limit) * u128::from(bytes) / total;
            known
                .iter()
                .map(|(node, bytes)| (*node, u64::try_from(part(*bytes)).unwrap_or(0)))
                .collect()
        };
        let covered: u64 = parts.values().sum();
        let rest_on = parts.keys().next().copied().unwrap_or(self.first_node());
        *parts.entry(rest_on).or_default() += limit - covered;
        parts
    }

    fn has_node(&self, node: NodeId) -> bool {
        self.balances
            .get(&Account::World)
            .is_some_and(|nodes| nodes.contains_key(&node))
    }

    fn first_node(&self) -> NodeId {
        self.balances
            .get(&Account::World)
            .and_then(|nodes| nodes.keys().next().copied())
            .unwrap_or_default()
    }

    fn entry(&mut self, account: &Account, node: NodeId) -> &mut i128 {
        self.balances
            .entry(account.clone())
            .or_default()
            .entry(node)
            .or_default()
    }

    fn balance(&self, account: &Account, node: NodeId) -> i128 {
        self.balances
            .get(account)
            .and_then(|nodes| nodes.get(&node))
            .copied()
            .unwrap_or(0)
    }

    fn sum(&self, account: &Account) -> i128 {
        self.balances
            .get(account)
            .map_or(0, |nodes| nodes.values().sum())
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "budget {} = pool {} + {} in {} accounts",
            self.budget_bytes(),
            self.pool_bytes(),
            i128::from(self.budget_bytes()) - self.pool_bytes(),
            self.vms().count()
        )
    }
}

#[cfg(test)]
mod tests;
