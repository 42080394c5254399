//! The engine against VMs that misbehave, each by its own test: the fault is named with what to do, stays
//! with its VM, and leaves the books balanced and every guest above its floor.

use std::{
    fs,
    sync::Mutex as StdMutex,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{status::Condition, *};
use crate::{
    policy::{Decision, Mode, Reason},
    vm::test_peer::{self, Misdeed, Peer},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Far more than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest behind a control socket, and the memory it occupies in its cgroup.
#[derive(Debug)]
struct Guest {
    target: u64,
    balloon: u64,
    /// What it does with a target.
    follows: Follows,
    /// What it says is available, whatever it has.
    available: u64,
    /// How long it takes to tell its statistics.
    slow: Duration,
    /// Its limit when it was last told a target.
    high_when_told: Option<u64>,
    cgroup: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follows {
    /// Inflates and deflates at once.
    AtOnce,
    /// Accepts the target and does nothing.
    Never,
    /// Says that it inflated, and gives nothing back.
    Pretends,
}

const MEMORY: u64 = 4 * GIB;

impl Guest {
    fn set_target(&mut self, bytes: u64) {
        self.target = bytes;
        let high = fs::read_to_string(self.cgroup.join("memory.high")).ok();
        self.high_when_told = high.and_then(|high| high.parse().ok());
        match self.follows {
            Follows::Never => {}
            Follows::Pretends => self.balloon = bytes,
            Follows::AtOnce => self.resize(bytes),
        }
    }

    fn resize(&mut self, bytes: u64) {
        self.balloon = bytes;
        let current = (MEMORY - bytes).to_string();
        // A cgroup that has been removed has no such file.
        if self.cgroup.exists() {
            fs::write(self.cgroup.join("memory.current"), current).unwrap();
        }
    }
}

/// A host made of files, with guests behind sockets.
struct Lab {
    dir: tempfile::TempDir,
    peers: Vec<Peer>,
    guests: BTreeMap<String, Arc<StdMutex<Guest>>>,
    entries: String,
    period_ms: u64,
    budget: &'static str,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("proc/pressure")).unwrap();
        let lab = Self {
            dir,
            peers: Vec::new(),
            guests: BTreeMap::new(),
            entries: String::new(),
            period_ms: 50,
            budget: "budget = \"12G\"",
        };
        lab.host_available(8 * GIB);
        fs::create_dir(lab.root()).unwrap();
        fs::write(lab.root().join("cgroup.controllers"), "memory").unwrap();
        lab
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("cgroup")
    }

    fn host_available(&self, bytes: u64) {
        let text = format!(
            "MemTotal: {} kB\nMemAvailable: {} kB\n",
            16 << 20,
            bytes >> 10
        );
        fs::write(self.dir.path().join("proc/meminfo"), text).unwrap();
    }

    fn cgroup(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Removes a VM's cgroup, as when its scope ends.
    fn remove_cgroup(&self, name: &str) {
        // Not while its guest writes to a file in it.
        let _guest = self.guests[name].lock().unwrap();
        fs::remove_dir_all(self.cgroup(name)).unwrap();
    }

    fn file(&self, name: &str, file: &str) -> String {
        fs::read_to_string(self.cgroup(name).join(file)).unwrap()
    }

    fn make_cgroup(&self, name: &str) {
        let path = self.cgroup(name);
        fs::create_dir(&path).unwrap();
        for (file, text) in [
            ("cgroup.controllers", "memory".to_owned()),
            ("memory.current", MEMORY.to_string()),
            ("memory.high", "max".to_owned()),
            ("memory.max", "max".to_owned()),
        ] {
            fs::write(path.join(file), text).unwrap();
        }
    }

    /// A guest of 4 GiB with a floor of 1 GiB.
    fn guest(&mut self, name: &str, follows: Follows) {
        self.make_cgroup(name);
        let guest = Arc::new(StdMutex::new(Guest {
            target: 0,
            balloon: 0,
            follows,
            available: 3 * GIB,
            slow: Duration::ZERO,
            high_when_told: None,
            cgroup: self.cgroup(name),
        }));
        let served = guest.clone();
        let peer = test_peer::monitor(move |command, arguments| {
            let mut guest = served.lock().unwrap();
            match command {
                "aerostat-query" => Ok(json!({
                    "state": "active", "memory-bytes": MEMORY, "target-bytes": guest.target,
                    "actual-bytes": guest.balloon, "ballooned-bytes": guest.balloon,
                    "feature-names": ["stats-vq"],
                })),
                "aerostat-guest-stats" => {
                    std::thread::sleep(guest.slow);
                    Ok(json!({
                        "stats": {
                            "stat-total-memory": MEMORY.saturating_sub(guest.balloon),
                            "stat-available-memory": guest.available.saturating_sub(guest.balloon),
                        },
                        "last-update": 1,
                    }))
                }
                "aerostat-set-target" => {
                    guest.set_target(arguments["bytes"].as_u64().unwrap());
                    Ok(json!({}))
                }
                _ => Err("unknown command"),
            }
        });
        self.entry(name, &peer.path.display().to_string());
        self.peers.push(peer);
        self.guests.insert(name.to_owned(), guest);
    }

    fn entry(&mut self, name: &str, socket: &str) {
        self.entries += &format!(
            "[[vm]]\nname = \"{name}\"\nprotocol = \"aerostat\"\nsocket = \"{socket}\"\n\
             cgroup = \"{name}\"\nfloor = \"1G\"\n"
        );
    }

    fn config(&self, host: &str) -> Config {
        let text = format!(
            "[host]\nperiod-ms = {}\ntimeout-ms = 10000\n{}\noverhead = \"0\"\n\
             slack = \"16M\"\ncgroup-root = \"{}\"\n{host}\n{}",
            self.period_ms,
            self.budget,
            self.root().display(),
            self.entries
        );
        Config::parse(&text, Path::new("lab.toml")).unwrap()
    }

    fn engine(&self, policy: impl Policy + 'static) -> Engine {
        self.engine_with("", policy, false)
    }

    fn engine_with(&self, host: &str, policy: impl Policy + 'static, dry_run: bool) -> Engine {
        let world = World {
            root: self.dir.path().to_owned(),
            open_cgroup: Cgroup::open_unchecked,
        };
        let mut engine = Engine::new(self.config(host), world, dry_run).unwrap();
        engine.policy = Box::new(policy);
        engine
    }

    fn set(&self, name: &str, change: impl FnOnce(&mut Guest)) {
        change(&mut self.guests[name].lock().unwrap());
    }
}

/// A policy that wants the same of every VM that answers, whatever its floor.
#[derive(Debug)]
struct Wants(u64);

impl Policy for Wants {
    fn name(&self) -> &'static str {
        "wants"
    }

    fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
        let decide = |vm: &policy::VmSample| Decision {
            vm: vm.id.clone(),
            target_bytes: if vm.reachable {
                self.0
            } else {
                vm.target_bytes
            },
            nodes: Vec::new(),
            reclaim_bytes: 0,
            floor_bytes: GIB,
            reason: Reason::Unreachable,
        };
        sample.vms.iter().map(decide).collect()
    }
}

fn id(name: &str) -> VmId {
    VmId::new(name)
}

/// Lets the engine go round until `done`; the books balance after each round.
fn until(engine: &mut Engine, what: &str, done: impl Fn(&Engine) -> bool) {
    let start = Instant::now();
    loop {
        engine.tick(false);
        assert!(
            engine.ledger.lock().balanced(),
            "{what}: books out of balance"
        );
        if done(engine) {
            return;
        }
        let status = engine.status.read();
        assert!(start.elapsed() < PATIENCE, "{what}: {status:#?}");
        drop(status);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn account(engine: &Engine, name: &str) -> Option<u64> {
    engine.ledger.lock().account_bytes(&id(name))
}

fn vm_status(engine: &Engine, name: &str) -> status::VmStatus {
    let status = engine.status.read().clone();
    status
        .vms
        .iter()
        .find(|vm| vm.name == id(name))
        .unwrap()
        .clone()
}

#[test]
fn a_balloon_grows_and_the_limit_follows_what_has_left() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(2 * GIB));

    until(&mut engine, "the limit follows", |e| {
        account(e, "a") == Some(2 * GIB + 16 * MIB)
    });

    assert_eq!(
        lab.file("a", "memory.high"),
        (2 * GIB + 16 * MIB).to_string()
    );
    assert_eq!(
        lab.file("a", "memory.max"),
        "max",
        "only memory.high is kept by default"
    );
    until(&mut engine, "its size is seen", |e| {
        vm_status(e, "a").ballooned_bytes == 2 * GIB
    });
    let status = vm_status(&engine, "a");
    assert_eq!(status.condition, Condition::Running);
    assert!(
        status
            .history
            .iter()
            .any(|point| point.ballooned_bytes == 0)
    );
    assert_eq!(status.history.back().unwrap().ballooned_bytes, 2 * GIB);
}

#[test]
fn a_limit_is_raised_before_memory_goes_back_to_the_guest() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(3 * GIB));
    until(&mut engine, "inflated", |e| {
        account(e, "a") == Some(GIB + 16 * MIB)
    });
    lab.set("a", |guest| guest.follows = Follows::Never);
    engine.policy = Box::new(Wants(GIB));

    until(&mut engine, "told", |_| {
        lab.guests["a"].lock().unwrap().target == GIB
    });

    // As the guest saw it at the moment when it was told to deflate.
    let high = lab.guests["a"].lock().unwrap().high_when_told;
    assert!(high.unwrap() >= 3 * GIB, "{high:?}");
}

#[test]
fn a_vm_that_answers_slowly_is_told_its_target_all_the_same() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    // Longer than a decision waits, and than a period: it is busy whenever something is decided.
    lab.set("a", |guest| guest.slow = Duration::from_millis(120));
    let mut engine = lab.engine(Wants(GIB));

    for target in [2 * GIB, GIB] {
        engine.policy = Box::new(Wants(target));
        until(&mut engine, "told", |e| {
            vm_status(e, "a").ballooned_bytes == target
        });
    }
}

#[test]
fn what_a_step_could_not_do_stays_in_sight_until_one_succeeds() {
    /// Wants memory reclaimed, which this kernel cannot.
    #[derive(Debug)]
    struct Reclaims;
    impl Policy for Reclaims {
        fn name(&self) -> &'static str {
            "reclaims"
        }

        fn decide(&mut self, sample: &Sample) -> Vec<Decision> {
            let mut decisions = Wants(GIB).decide(sample);
            for decision in &mut decisions {
                decision.reclaim_bytes = MIB;
            }
            decisions
        }
    }
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine_with("allow-reclaim = true", Reclaims, false);
    let named = |e: &Engine| {
        let trouble = vm_status(e, "a").trouble;
        trouble.is_some_and(|text| text.contains("memory.reclaim"))
    };
    until(&mut engine, "named", named);
    for _ in 0..10 {
        engine.tick(false);
        assert!(named(&engine));
    }

    engine.policy = Box::new(Wants(2 * GIB));
    until(&mut engine, "over", |e| vm_status(e, "a").trouble.is_none());
}

#[test]
fn a_vm_that_was_started_again_is_told_its_target_again() {
    let mut lab = Lab::new();
    let left = Arc::new(StdMutex::new(MEMORY));
    let gone = Arc::new(StdMutex::new(false));
    let (served, breaks) = (left.clone(), gone.clone());
    let peer = test_peer::monitor(move |command, arguments| match command {
        "qom-list" if arguments["path"] == "/machine/peripheral" => {
            Ok(json!([{"name": "balloon0", "type": "child<virtio-balloon-pci>"}]))
        }
        "query-memory-size-summary" => Ok(json!({ "base-memory": MEMORY })),
        // An answer that makes no sense ends the connection.
        "query-status" if std::mem::take(&mut *breaks.lock().unwrap()) => Ok(json!(7)),
        "query-status" => Ok(json!({"running": true})),
        "query-balloon" => Ok(json!({ "actual": *served.lock().unwrap() })),
        "balloon" => {
            *served.lock().unwrap() = arguments["value"].as_u64().unwrap();
            Ok(json!({}))
        }
        _ => Err("no"),
    });
    lab.make_cgroup("q");
    lab.entry("q", &peer.path.display().to_string());
    lab.entries = lab.entries.replace("\"aerostat\"", "\"qmp\"");
    lab.peers.push(peer);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "told", |_| *left.lock().unwrap() == 3 * GIB);

    // Another QEMU behind the same socket, with an empty balloon.
    *left.lock().unwrap() = MEMORY;
    *gone.lock().unwrap() = true;

    until(&mut engine, "told again", |_| {
        *left.lock().unwrap() == 3 * GIB
    });
}

#[test]
fn limits_that_are_kept_no_longer_are_lifted() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine_with("limits = \"high-and-max\"", Wants(2 * GIB), false);
    let settled = 2 * GIB + 16 * MIB;
    until(&mut engine, "settled", |e| {
        account(e, "a") == Some(settled)
            && lab.file("a", "memory.high") == settled.to_string()
            && !e.members[&id("a")].worker.is_carrying()
    });
    assert_ne!(lab.file("a", "memory.max"), "max");

    // What is longer stays behind it in a file that is none of the kernel's.
    let lifted = |file| lab.file("a", file).starts_with("max");
    engine.reload(lab.config("limits = \"high\""));
    assert!(lifted("memory.max") && !lifted("memory.high"));
    // One that somebody else set is said to be in the way.
    fs::write(lab.cgroup("a").join("memory.max"), (3 * GIB).to_string()).unwrap();
    until(&mut engine, "named", |e| {
        let trouble = vm_status(e, "a").trouble;
        trouble.is_some_and(|text| text.contains("memory.max"))
    });

    engine.reload(lab.config("limits = \"none\""));
    assert!(lifted("memory.high"));
    assert_eq!(account(&engine, "a"), None);
}

#[test]
fn limits_below_a_root_that_moved_away_are_lifted() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(2 * GIB));
    until(&mut engine, "limited", |e| account(e, "a").is_some());

    let elsewhere = lab.root().join("a").display().to_string();
    let mut config = lab.config("");
    config.host.cgroup_root = Some(elsewhere.into());
    engine.reload(config);

    assert!(lab.file("a", "memory.high").starts_with("max"));
    assert_eq!(account(&engine, "a"), None);
}

#[test]
fn a_budget_follows_the_limit_of_its_cgroup() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    lab.budget = "";
    let mut engine = lab.engine(Wants(0));
    for (file, limit) in [("memory.max", 8 * GIB), ("memory.high", 6 * GIB)] {
        fs::write(lab.root().join(file), limit.to_string()).unwrap();
        engine.tick(false);
        assert_eq!(engine.ledger.lock().budget_bytes(), limit);
    }
}

#[test]
fn what_lacks_in_the_budget_others_are_asked_for() {
    let mut lab = Lab::new();
    // 16 GiB of 12, and a host that lacks nothing.
    for name in ["a", "b", "c", "d"] {
        lab.guest(name, Follows::AtOnce);
    }
    fs::write(lab.cgroup("d").join("memory.current"), GIB.to_string()).unwrap();
    let mut engine = lab.engine(policy::Aerostat::new(policy::PolicyConfig::default()));

    until(&mut engine, "it can grow", |e| {
        account(e, "d").is_some_and(|d| d >= GIB + 32 * MIB)
    });

    let status = engine.status.read().clone();
    let given: u64 = status.vms.iter().map(|vm| vm.ballooned_bytes).sum();
    assert!(given >= GIB, "{given}");
    assert!(status.vms.iter().any(|vm| {
        let reasons = vm.history.iter().map(|point| &point.reason);
        reasons
            .into_iter()
            .any(|text| text.starts_with("budget lacks"))
    }));
}

#[test]
fn commands_do_not_put_the_next_round_off() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    lab.period_ms = 1000;
    let mut engine = lab.engine(Wants(GIB));
    let status = engine.status();
    let (inputs, received) = bounded(64);
    let runner = std::thread::spawn(move || engine.run(&received));
    for weight in 1..=20 {
        let (answer, _) = bounded(1);
        let command = Command::Weight {
            vm: id("a"),
            weight,
        };
        inputs.send(Input::Command(command, answer)).unwrap();
    }
    let ticks = || status.read().ticks;
    let start = Instant::now();
    // The VM is not known in the first round, so that the first command may be refused.
    while ticks() < 20 {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
    let (commanded, at) = (ticks(), Instant::now());
    while ticks() < commanded + 2 {
        assert!(at.elapsed() < Duration::from_secs(10), "{}", ticks());
        std::thread::sleep(Duration::from_millis(5));
    }
    inputs.send(Input::Stop).unwrap();
    runner.join().unwrap();
}

#[test]
fn a_vm_that_lies_in_its_stats_is_named_and_not_relied_upon() {
    let mut lab = Lab::new();
    lab.guest("liar", Follows::AtOnce);
    lab.guest("other", Follows::AtOnce);
    lab.set("liar", |guest| guest.available = 100 * GIB);
    let mut engine = lab.engine(policy::Aerostat::new(policy::PolicyConfig::default()));
    lab.host_available(64 * MIB);

    until(&mut engine, "the other gives", |e| {
        vm_status(e, "other").ballooned_bytes > 0
    });

    let liar = vm_status(&engine, "liar");
    assert!(liar.trouble.unwrap().contains("more memory than it has"));
    assert_eq!(liar.guest.available_bytes, None);
    assert_eq!(vm_status(&engine, "other").trouble, None);
    assert!(
        MEMORY - lab.guests["liar"].lock().unwrap().target >= GIB,
        "floor"
    );
}

#[test]
fn a_guest_that_claims_a_balloon_larger_than_its_memory_is_named_and_stays_in_sight() {
    let mut lab = Lab::new();
    lab.guest("liar", Follows::Never);
    lab.set("liar", |guest| guest.balloon = 0xffff_ffff << 12);
    let mut engine = lab.engine(policy::Aerostat::new(policy::PolicyConfig::default()));

    until(&mut engine, "the claim is seen", |e| {
        vm_status(e, "liar").condition == Condition::Running
    });

    let liar = vm_status(&engine, "liar");
    assert!(
        liar.trouble
            .unwrap()
            .contains("a balloon larger than its memory")
    );
    assert_eq!(liar.ballooned_bytes, MEMORY);
}

#[test]
fn a_balloon_that_frees_nothing_lowers_no_limit() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::Pretends);
    let mut engine = lab.engine(Wants(2 * GIB));

    until(&mut engine, "pretends", |e| {
        e.ticks > 20 && vm_status(e, "a").ballooned_bytes == 2 * GIB
    });

    // What it occupies has not fallen, whatever it says: neither has its limit.
    assert!(account(&engine, "a").unwrap() >= MEMORY);
}

#[test]
fn a_vm_that_never_inflates_keeps_its_limit_and_harms_no_other() {
    let mut lab = Lab::new();
    lab.guest("stuck", Follows::Never);
    lab.guest("willing", Follows::AtOnce);
    let mut engine = lab.engine(policy::Aerostat::new(policy::PolicyConfig {
        stall_ms: 100,
        ..policy::PolicyConfig::default()
    }));
    lab.host_available(64 * MIB);

    until(&mut engine, "the willing gives down to its floor", |e| {
        vm_status(e, "willing").ballooned_bytes >= 512 * MIB
    });

    assert!(account(&engine, "stuck").unwrap() >= MEMORY);
    assert!(
        MEMORY - lab.guests["willing"].lock().unwrap().balloon >= GIB,
        "floor"
    );
}

#[test]
fn a_vm_that_deflates_at_once_gets_its_limit_back_from_the_pool() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(2 * GIB));
    until(&mut engine, "inflated", |e| {
        account(e, "a") == Some(2 * GIB + 16 * MIB)
    });

    // Unsolicited (A1), and it does not inflate again.
    lab.set("a", |guest| {
        guest.follows = Follows::Never;
        guest.resize(0);
    });

    // The books go before the file.
    until(&mut engine, "has its limit back", |e| {
        account(e, "a") == Some(MEMORY) && lab.file("a", "memory.high") == MEMORY.to_string()
    });
}

#[test]
fn a_vm_that_dies_mid_step_leaves_balanced_books() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    lab.guest("b", Follows::AtOnce);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "both run", |e| {
        account(e, "a").is_some() && account(e, "b").is_some_and(|b| b < MEMORY)
    });

    // Its process ends: the socket stays behind, its cgroup is emptied and removed.
    lab.remove_cgroup("a");
    fs::remove_file(&lab.peers[0].path).unwrap();
    engine.policy = Box::new(Wants(2 * GIB));

    until(&mut engine, "its account is closed", |e| {
        account(e, "a").is_none()
    });
    until(&mut engine, "the other goes on", |e| {
        account(e, "b") == Some(2 * GIB + 16 * MIB)
    });
    let ledger = engine.ledger.lock();
    let pool = i128::from(12 * GIB - (2 * GIB + 16 * MIB));
    assert_eq!(ledger.pool_bytes(), pool);
}

#[test]
fn a_vm_that_comes_back_under_its_name_is_met_again() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "runs", |e| account(e, "a").is_some());
    lab.remove_cgroup("a");
    until(&mut engine, "closed", |e| account(e, "a").is_none());

    lab.make_cgroup("a");
    lab.set("a", |guest| guest.set_target(0));

    until(&mut engine, "opened again", |e| {
        account(e, "a") == Some(3 * GIB + 16 * MIB)
    });
}

#[test]
fn a_hung_control_socket_delays_no_other_vm() {
    let mut lab = Lab::new();
    let hung = test_peer::misbehaving(rustix::net::SocketType::STREAM, Misdeed::Hang);
    lab.make_cgroup("hung");
    lab.entry("hung", &hung.path.display().to_string());
    lab.guest("other", Follows::AtOnce);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "the other is served", |e| {
        vm_status(e, "other").ballooned_bytes == GIB
    });

    // The hung one is waited for once, not at every round; its answer is ten seconds away.
    let start = Instant::now();
    let rounds = engine.ticks;
    until(&mut engine, "goes on", |e| e.ticks == rounds + 20);
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );

    let status = vm_status(&engine, "hung");
    assert!(matches!(
        status.condition,
        Condition::Absent | Condition::Unreachable
    ));
    until(&mut engine, "it is named, with advice", |e| {
        vm_status(e, "hung")
            .trouble
            .is_some_and(|text| text.contains("give aerostatd one of its own"))
    });
}

#[test]
fn a_cgroup_deleted_under_way_closes_its_account_and_the_vm_is_still_ballooned() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "opened", |e| account(e, "a").is_some());

    lab.remove_cgroup("a");
    engine.policy = Box::new(Wants(2 * GIB));

    until(&mut engine, "closed", |e| account(e, "a").is_none());
    assert_eq!(engine.ledger.lock().pool_bytes(), i128::from(12 * GIB));
    until(&mut engine, "still ballooned", |e| {
        vm_status(e, "a").ballooned_bytes == 2 * GIB
    });
    let status = vm_status(&engine, "a");
    assert_eq!((status.current_bytes, status.limit_bytes), (None, None));
    assert!(status.trouble.unwrap().contains("no such cgroup"));
}

#[test]
fn a_limit_raised_by_someone_else_is_restored_and_a_lowered_one_is_obeyed() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(2 * GIB));
    let settled = 2 * GIB + 16 * MIB;
    until(&mut engine, "settled", |e| account(e, "a") == Some(settled));

    fs::write(lab.cgroup("a").join("memory.high"), "max").unwrap();
    until(&mut engine, "restored", |_| {
        lab.file("a", "memory.high") == settled.to_string()
    });
    assert_eq!(account(&engine, "a"), Some(settled));

    // Lowered below what the guest is entitled to: the books follow, and then it gets its due again.
    fs::write(lab.cgroup("a").join("memory.high"), GIB.to_string()).unwrap();
    engine.tick(false);
    assert!(
        engine
            .ledger
            .lock()
            .journal()
            .any(|entry| entry.cause == crate::ledger::Cause::Foreign)
    );
    until(&mut engine, "due again", |e| {
        account(e, "a") == Some(2 * GIB)
    });
}

#[test]
fn no_policy_and_no_command_takes_a_guest_below_its_floor() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(4 * GIB));

    until(&mut engine, "inflated as far as may be", |e| {
        vm_status(e, "a").ballooned_bytes == 3 * GIB
    });
    for _ in 0..10 {
        engine.tick(true);
        assert!(lab.guests["a"].lock().unwrap().balloon <= 3 * GIB);
    }

    let refused = engine.command(&Command::TargetBytes {
        vm: id("a"),
        bytes: Some(7 * GIB / 2),
        override_floor: false,
    });
    assert!(
        matches!(refused, Err(CommandError::Floor(_))),
        "{refused:?}"
    );
}

#[test]
fn an_operator_who_says_so_goes_below_the_floor_in_mode_manual() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(policy::Aerostat::new(policy::PolicyConfig::default()));
    until(&mut engine, "runs", |e| account(e, "a").is_some());
    let mode = Command::Mode {
        vm: id("a"),
        mode: Mode::Manual,
    };
    engine.command(&mode).unwrap();
    let target = Command::TargetBytes {
        vm: id("a"),
        bytes: Some(7 * GIB / 2),
        override_floor: true,
    };
    engine.command(&target).unwrap();

    until(&mut engine, "below its floor", |e| {
        vm_status(e, "a").ballooned_bytes == 7 * GIB / 2
    });

    let unknown = engine.command(&Command::Weight {
        vm: id("nobody"),
        weight: 5,
    });
    assert!(matches!(unknown, Err(CommandError::UnknownVm { .. })));
}

#[test]
fn a_dry_run_decides_and_changes_nothing() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine_with("", Wants(2 * GIB), true);

    until(&mut engine, "observed", |e| {
        e.ticks > 5 && vm_status(e, "a").condition == Condition::Running
    });

    assert_eq!(lab.guests["a"].lock().unwrap().target, 0);
    assert_eq!(lab.file("a", "memory.high"), "max");
    assert!(engine.status.read().dry_run);
}

#[test]
fn a_pool_that_is_short_takes_back_what_others_do_not_use() {
    let mut lab = Lab::new();
    for name in ["a", "b", "c", "d"] {
        lab.guest(name, Follows::AtOnce);
        // 4 GiB promised to each would be 16 of 12; each occupies 2.
        fs::write(
            lab.cgroup(name).join("memory.current"),
            (2 * GIB).to_string(),
        )
        .unwrap();
    }
    let mut engine = lab.engine(Wants(0));

    until(&mut engine, "all have room above what they occupy", |e| {
        ["a", "b", "c", "d"]
            .iter()
            .all(|name| account(e, name).is_some_and(|a| a >= 2 * GIB + 16 * MIB))
    });

    assert!(engine.ledger.lock().pool_bytes() >= 0);
    // One wakes up: it is served although the pool had been given away.
    fs::write(
        lab.cgroup("d").join("memory.current"),
        (2 * GIB + 16 * MIB).to_string(),
    )
    .unwrap();
    until(&mut engine, "the one that needs it has more", |e| {
        account(e, "d").is_some_and(|account| account > 2 * GIB + 32 * MIB)
    });
}

#[test]
fn an_engine_that_was_killed_finds_its_books_in_the_files() {
    let mut lab = Lab::new();
    for name in ["a", "b"] {
        lab.guest(name, Follows::AtOnce);
    }
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "settled", |e| {
        ["a", "b"]
            .iter()
            .all(|name| account(e, name) == Some(3 * GIB + 16 * MIB))
    });
    // Nothing is told to it: this is kill -9.
    std::mem::forget(engine);

    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "the same books", |e| {
        ["a", "b"]
            .iter()
            .all(|name| account(e, name) == Some(3 * GIB + 16 * MIB))
    });
    let ledger = engine.ledger.lock();
    assert_eq!(
        ledger.pool_bytes(),
        i128::from(12 * GIB - 6 * GIB - 32 * MIB)
    );
    assert!(
        ledger
            .journal()
            .all(|entry| entry.cause != crate::ledger::Cause::Raised)
    );
}

#[test]
fn two_vms_in_one_cgroup_have_no_limit_and_are_told_apart_by_nothing() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    lab.guest("b", Follows::AtOnce);
    lab.entries = lab.entries.replace("cgroup = \"b\"", "cgroup = \"a\"");
    let mut engine = lab.engine(Wants(GIB));

    until(&mut engine, "named", |e| {
        e.ticks > 3
            && vm_status(e, "a")
                .trouble
                .is_some_and(|text| text.contains("several VMs"))
    });

    assert_eq!((account(&engine, "a"), account(&engine, "b")), (None, None));
    assert_eq!(lab.file("a", "memory.high"), "max");
}

#[test]
fn a_reload_adds_and_removes_vms_and_keeps_the_others() {
    let mut lab = Lab::new();
    lab.guest("a", Follows::AtOnce);
    let mut engine = lab.engine(Wants(GIB));
    until(&mut engine, "runs", |e| {
        account(e, "a") == Some(3 * GIB + 16 * MIB)
    });

    lab.guest("b", Follows::AtOnce);
    engine.reload(lab.config(""));
    engine.policy = Box::new(Wants(GIB));
    until(&mut engine, "both", |e| {
        account(e, "b") == Some(3 * GIB + 16 * MIB)
    });
    assert_eq!(account(&engine, "a"), Some(3 * GIB + 16 * MIB));

    lab.entries = lab
        .entries
        .split_inclusive("[[vm]]\n")
        .take(2)
        .collect::<String>();
    lab.entries = lab.entries.trim_end_matches("[[vm]]\n").to_owned();
    engine.reload(lab.config(""));
    engine.tick(false);
    assert_eq!(engine.status.read().vms.len(), 1);
    // Its cgroup is there, with its memory: the account stays open until that has gone.
    assert!(account(&engine, "b").is_some());
    lab.remove_cgroup("b");
    until(&mut engine, "closed", |e| account(e, "b").is_none());
}
