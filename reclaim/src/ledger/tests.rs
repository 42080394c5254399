//! The books: by hand, and under random steps with random faults.

use std::cell::Cell;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::{limits::*, *};
use crate::cgroup::CgroupError;

const MIB: u64 = 1 << 20;

fn node(id: u32) -> NodeId {
    NodeId(id)
}

fn vm(name: &str) -> VmId {
    VmId::new(name)
}

fn one_node(bytes: u64) -> ByNode {
    ByNode::from([(node(0), bytes)])
}

#[test]
fn bytes_move_between_pool_and_accounts_and_the_sum_stays() {
    let mut ledger = Ledger::new(&one_node(100 * MIB));
    ledger.adopt(&vm("a"), 30 * MIB, &ByNode::new()).unwrap();
    ledger.adopt(&vm("b"), 20 * MIB, &ByNode::new()).unwrap();
    assert_eq!(ledger.pool_bytes(), i128::from(50 * MIB));

    ledger.raise(&vm("a"), 10 * MIB, None).unwrap();
    ledger.lower(&vm("b"), 5 * MIB, 15 * MIB).unwrap();

    assert_eq!(ledger.account_bytes(&vm("a")), Some(40 * MIB));
    assert_eq!(ledger.account_bytes(&vm("b")), Some(15 * MIB));
    assert_eq!(ledger.pool_bytes(), i128::from(45 * MIB));
    assert_eq!(ledger.close(&vm("a")), Ok(40 * MIB));
    assert_eq!(ledger.account_bytes(&vm("a")), None);
    assert!(ledger.balanced());
    let causes: Vec<Cause> = ledger.journal().map(|entry| entry.cause).collect();
    assert_eq!(
        causes,
        [
            Cause::Budget,
            Cause::Adopted,
            Cause::Adopted,
            Cause::Raised,
            Cause::Lowered,
            Cause::Closed
        ]
    );
}

#[test]
fn more_than_the_pool_has_is_not_promised() {
    let mut ledger = Ledger::new(&one_node(10 * MIB));
    ledger.adopt(&vm("a"), 8 * MIB, &ByNode::new()).unwrap();

    let refused = ledger.raise(&vm("a"), 3 * MIB, None);

    assert!(
        matches!(refused, Err(LedgerError::Short { available, .. }) if available == i128::from(2 * MIB))
    );
    assert_eq!(ledger.account_bytes(&vm("a")), Some(8 * MIB));
}

#[test]
fn what_is_still_occupied_is_not_lowered() {
    let mut ledger = Ledger::new(&one_node(10 * MIB));
    ledger.adopt(&vm("a"), 8 * MIB, &ByNode::new()).unwrap();

    assert!(matches!(
        ledger.lower(&vm("a"), 3 * MIB, 6 * MIB),
        Err(LedgerError::InUse { .. })
    ));
    assert!(matches!(
        ledger.lower(&vm("a"), 9 * MIB, 0),
        Err(LedgerError::InUse { .. })
    ));
    ledger.lower(&vm("a"), 2 * MIB, 6 * MIB).unwrap();
}

#[test]
fn nodes_have_books_of_their_own() {
    let budget = ByNode::from([(node(0), 10 * MIB), (node(1), 20 * MIB)]);
    let mut ledger = Ledger::new(&budget);
    ledger
        .adopt(
            &vm("a"),
            8 * MIB,
            &ByNode::from([(node(1), 3 * MIB), (node(0), MIB)]),
        )
        .unwrap();
    assert_eq!(
        ledger.account_by_node(&vm("a")),
        ByNode::from([(node(0), 2 * MIB), (node(1), 6 * MIB)])
    );

    let parts = ledger.raise(&vm("a"), 12 * MIB, Some(node(0))).unwrap();

    assert_eq!(
        parts,
        ByNode::from([(node(0), 8 * MIB), (node(1), 4 * MIB)])
    );
    assert_eq!(ledger.pool_by_node()[&node(0)], 0);
    ledger.lower(&vm("a"), 10 * MIB, 0).unwrap();
    assert_eq!(ledger.account_bytes(&vm("a")), Some(10 * MIB));
    assert!(ledger.balanced());
}

#[test]
fn limits_found_above_the_budget_overdraw_the_pool_and_nothing_is_granted_until_it_is_made_good() {
    let mut ledger = Ledger::new(&one_node(10 * MIB));
    ledger.adopt(&vm("a"), 12 * MIB, &ByNode::new()).unwrap();

    assert_eq!(ledger.pool_bytes(), -i128::from(2 * MIB));
    assert!(ledger.raise(&vm("a"), 1, None).is_err());
    ledger.lower(&vm("a"), 4 * MIB, 8 * MIB).unwrap();
    ledger.raise(&vm("a"), 2 * MIB, None).unwrap();
    assert!(ledger.balanced());
}

#[test]
fn a_smaller_budget_is_taken_from_the_pool() {
    let mut ledger = Ledger::new(&one_node(10 * MIB));
    ledger.adopt(&vm("a"), 6 * MIB, &ByNode::new()).unwrap();

    ledger.set_budget(&one_node(5 * MIB));

    assert_eq!(
        (ledger.budget_bytes(), ledger.pool_bytes()),
        (5 * MIB, -i128::from(MIB))
    );
    assert!(ledger.balanced());
}

/// A cgroup whose reads and writes fail on command.
#[derive(Debug)]
struct FakeFile {
    limit: Cell<Option<u64>>,
    current: Cell<u64>,
    fault: Cell<Fault>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    /// The write fails and has no effect.
    WriteLost,
    /// The write fails and has taken effect.
    WriteDone,
    /// Every access fails: the cgroup is gone.
    Gone,
    /// The write fails with effect, and reading fails too.
    DoneAndUnreadable,
}

impl FakeFile {
    fn new(limit: Option<u64>, current: u64) -> Self {
        Self {
            limit: Cell::new(limit),
            current: Cell::new(current),
            fault: Cell::default(),
        }
    }

    fn fail(&self) -> CgroupError {
        CgroupError::Gone {
            path: "fake".into(),
        }
    }
}

impl LimitFile for FakeFile {
    fn current_bytes(&self) -> Result<u64, CgroupError> {
        match self.fault.get() {
            Fault::Gone => Err(self.fail()),
            _ => Ok(self.current.get()),
        }
    }

    fn limit_bytes(&self) -> Result<Option<u64>, CgroupError> {
        match self.fault.get() {
            Fault::Gone | Fault::DoneAndUnreadable => Err(self.fail()),
            _ => Ok(self.limit.get()),
        }
    }

    fn set_limit_bytes(&self, limit: u64) -> Result<(), CgroupError> {
        match self.fault.get() {
            Fault::None => {
                self.limit.set(Some(limit));
                Ok(())
            }
            Fault::WriteDone | Fault::DoneAndUnreadable => {
                self.limit.set(Some(limit));
                Err(self.fail())
            }
            Fault::WriteLost | Fault::Gone => Err(self.fail()),
        }
    }
}

#[test]
fn a_limit_lowered_by_someone_else_is_obeyed_and_one_raised_is_restored() {
    let ledger = Mutex::new(Ledger::new(&one_node(100 * MIB)));
    ledger
        .lock()
        .adopt(&vm("a"), 40 * MIB, &ByNode::new())
        .unwrap();
    let file = FakeFile::new(Some(40 * MIB), 20 * MIB);
    assert_eq!(
        reconcile(&ledger, &vm("a"), &file).unwrap(),
        Foreign::Untouched
    );

    file.limit.set(Some(30 * MIB));
    let lowered = reconcile(&ledger, &vm("a"), &file).unwrap();
    assert_eq!(lowered, Foreign::Lowered { to: 30 * MIB });
    assert_eq!(ledger.lock().pool_bytes(), i128::from(70 * MIB));

    file.limit.set(None);
    let restored = reconcile(&ledger, &vm("a"), &file).unwrap();
    assert_eq!(
        restored,
        Foreign::Restored {
            from: None,
            to: 30 * MIB
        }
    );
    assert_eq!(file.limit.get(), Some(30 * MIB));

    file.limit.set(Some(90 * MIB));
    file.current.set(80 * MIB);
    let accepted = reconcile(&ledger, &vm("a"), &file).unwrap();
    assert_eq!(accepted, Foreign::Accepted { to: 80 * MIB });
    assert!(ledger.lock().balanced());
}

#[test]
fn a_limit_is_never_lowered_into_what_is_occupied() {
    let ledger = Mutex::new(Ledger::new(&one_node(100 * MIB)));
    ledger
        .lock()
        .adopt(&vm("a"), 50 * MIB, &ByNode::new())
        .unwrap();
    let file = FakeFile::new(Some(50 * MIB), 30 * MIB);

    let limit = lower(&ledger, &vm("a"), &file, 10 * MIB, 4 * MIB).unwrap();

    assert_eq!((limit, file.limit.get()), (34 * MIB, Some(34 * MIB)));
    assert_eq!(ledger.lock().account_bytes(&vm("a")), Some(34 * MIB));
}

#[derive(Clone, Debug)]
enum Step {
    Raise(usize, u64),
    Lower(usize, u64),
    Uses(usize, u64),
    Foreign(usize, Option<u64>),
    Reconcile(usize),
    Fault(usize, Fault),
    /// The VM's cgroup goes; it comes back empty.
    Dies(usize),
    /// kill -9: the books are made again from the files.
    Crash,
    Budget(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = 0..3_usize;
    let bytes = 0..200 * MIB;
    let fault = prop_oneof![
        Just(Fault::None),
        Just(Fault::WriteLost),
        Just(Fault::WriteDone),
        Just(Fault::Gone),
        Just(Fault::DoneAndUnreadable)
    ];
    let step = prop_oneof![
        4 => (which.clone(), bytes.clone()).prop_map(|(v, b)| Step::Raise(v, b)),
        4 => (which.clone(), bytes.clone()).prop_map(|(v, b)| Step::Lower(v, b)),
        4 => (which.clone(), bytes.clone()).prop_map(|(v, b)| Step::Uses(v, b)),
        1 => (which.clone(), prop::option::of(bytes.clone())).prop_map(|(v, b)| Step::Foreign(v, b)),
        2 => which.clone().prop_map(Step::Reconcile),
        3 => (which.clone(), fault).prop_map(|(v, f)| Step::Fault(v, f)),
        1 => which.prop_map(Step::Dies),
        1 => Just(Step::Crash),
        1 => (100 * MIB..900 * MIB).prop_map(Step::Budget),
    ];
    prop::collection::vec(step, 1..80)
}

/// Three VMs and their ledger, as the engine would hold them.
struct World {
    ledger: Mutex<Ledger>,
    files: Vec<FakeFile>,
    names: Vec<VmId>,
    budget: u64,
    /// The VMs whose file someone else has raised and nobody has looked at since.
    meddled: Vec<bool>,
}

impl World {
    fn new() -> Self {
        let budget = 500 * MIB;
        let world = Self {
            ledger: Mutex::new(Ledger::new(&two_nodes(budget))),
            files: (0..3)
                .map(|_| FakeFile::new(Some(100 * MIB), 50 * MIB))
                .collect(),
            names: ["a", "b", "c"].map(VmId::new).to_vec(),
            budget,
            meddled: vec![false; 3],
        };
        world.open();
        world
    }

    fn open(&self) {
        let used = ByNode::from([(node(1), 2), (node(0), 1)]);
        for (name, file) in self.names.iter().zip(&self.files) {
            let limit = file.limit.get().unwrap_or(file.current.get());
            // What has no limit gets one: what it occupies.
            file.limit.set(Some(limit));
            self.ledger.lock().adopt(name, limit, &used).unwrap();
        }
    }

    fn step(&mut self, step: Step) {
        let ledger = &self.ledger;
        match step {
            Step::Raise(v, bytes) => {
                let _ = raise(ledger, &self.names[v], &self.files[v], bytes, None);
            }
            Step::Lower(v, wanted) => {
                let before = self.files[v].limit.get();
                let _ = lower(ledger, &self.names[v], &self.files[v], wanted, MIB);
                let after = self.files[v].limit.get();
                if after != before {
                    assert!(after.unwrap() >= self.files[v].current.get() + MIB);
                }
            }
            Step::Uses(v, bytes) => {
                let limit = self.files[v].limit.get().unwrap_or(u64::MAX);
                self.files[v].current.set(bytes.min(limit));
            }
            Step::Foreign(v, limit) => {
                self.files[v].limit.set(limit);
                self.meddled[v] = true;
            }
            Step::Reconcile(v) => {
                if reconcile(ledger, &self.names[v], &self.files[v]).is_ok() {
                    self.meddled[v] = false;
                }
            }
            Step::Fault(v, fault) => self.files[v].fault.set(fault),
            Step::Dies(v) => {
                ledger.lock().close(&self.names[v]).unwrap();
                self.files[v] = FakeFile::new(Some(0), 0);
                ledger
                    .lock()
                    .adopt(&self.names[v], 0, &ByNode::new())
                    .unwrap();
                self.meddled[v] = false;
            }
            Step::Crash => {
                self.ledger = Mutex::new(Ledger::new(&two_nodes(self.budget)));
                self.open();
                self.meddled = vec![false; 3];
            }
            Step::Budget(bytes) => {
                self.budget = bytes;
                ledger.lock().set_budget(&two_nodes(bytes));
            }
        }
    }
}

fn two_nodes(budget: u64) -> ByNode {
    ByNode::from([(node(0), budget / 3), (node(1), budget - budget / 3)])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_conserved_under_random_faults(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            let what = format!("{step:?}");
            world.step(step);
            let ledger = world.ledger.lock();
            prop_assert!(ledger.balanced(), "unbalanced after {}", what);
            let held: i128 = world.names.iter().map(|name| i128::from(ledger.account_bytes(name).unwrap())).sum();
            prop_assert_eq!(held + ledger.pool_bytes(), i128::from(world.budget), "after {}", &what);
            for ((name, file), meddled) in world.names.iter().zip(&world.files).zip(&world.meddled) {
                let account = ledger.account_bytes(name).unwrap();
                let limit = file.limit.get().unwrap_or(u64::MAX);
                prop_assert!(*meddled || limit <= account, "{name}'s file allows {limit}, the books {account}, after {}", what);
            }
        }
    }

    #[test]
    fn books_made_again_from_the_files_say_the_same(raises in prop::collection::vec((0..3_usize, 0..100 * MIB), 0..20)) {
        let mut world = World::new();
        for (v, bytes) in raises {
            world.step(Step::Raise(v, bytes));
        }
        let before: Vec<_> = world.names.iter().map(|name| world.ledger.lock().account_bytes(name)).collect();
        world.step(Step::Crash);
        let after: Vec<_> = world.names.iter().map(|name| world.ledger.lock().account_bytes(name)).collect();
        prop_assert_eq!(before, after);
    }
}
