//! One round inside the host VM: boots the guests once, then runs each rule.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use aerostat_reclaim::{
    results::{Outcome, Point, Runs},
    vm::ControlClient,
};

use super::{
    ExperimentError, failed,
    load::{self, Load},
    machine,
    plan::Plan,
};
use crate::{
    artifacts,
    backend::Backend,
    guest::{GuestError, UmlConfig, UmlGuest},
};

/// Marks a result among the lines that the program writes.
pub const RESULT: &str = "RESULT ";

/// All phases, on a host that is busy swapping.
const LOAD_TIMEOUT: Duration = Duration::from_secs(900);
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
const SAMPLE_PERIOD: Duration = Duration::from_secs(1);
/// What a shell says of a process that was ended by SIGKILL.
const KILLED: i32 = 128 + 9;
const MIB: u64 = 1 << 20;
/// What guests see of the host: a directory with one sparse file.
const SOURCES: &str = "/dev/shm/sources";
const CONFIG: &str = "/tmp/aerostatd.toml";
const LOG: &str = "/tmp/aerostatd.log";

/// A guest in a thread of its own: guests end with the thread that started them.
struct Worker {
    commands: Sender<String>,
    answers: Receiver<Result<Answer, GuestError>>,
}

/// What a command wrote, and how long it took.
struct Answer {
    text: String,
    took: Duration,
}

impl Worker {
    fn start<'scope>(scope: &'scope thread::Scope<'scope, '_>, config: UmlConfig) -> Self {
        let (commands, inbox) = mpsc::channel::<String>();
        let (outbox, answers) = mpsc::channel();
        scope.spawn(move || {
            let begin = Instant::now();
            let mut guest = match UmlGuest::boot(&config) {
                Ok(guest) => guest,
                Err(error) => {
                    // The other end is there as long as the experiment is.
                    let _ = outbox.send(Err(error));
                    return;
                }
            };
            let answer = |ran: Result<String, GuestError>, begin: Instant| {
                let took = begin.elapsed();
                let _ = outbox.send(ran.map(|text| Answer { text, took }));
            };
            answer(Ok(String::new()), begin);
            for command in inbox {
                let begin = Instant::now();
                answer(guest.run_within(&command, LOAD_TIMEOUT), begin);
            }
        });
        Self { commands, answers }
    }

    fn send(&self, command: String) {
        let _ = self.commands.send(command);
    }

    fn answer(&self) -> Result<Answer, ExperimentError> {
        let ended = || ExperimentError::Unexpected("a guest's thread ended".to_owned());
        Ok(self.answers.recv().map_err(|_| ended())??)
    }
}

/// Runs a round and prints a line for each rule.
///
/// # Errors
/// A guest, the back-end or the host does not do what it should.
pub fn run(plan: &Plan) -> Result<(), ExperimentError> {
    let sources = Path::new(SOURCES);
    fs::create_dir_all(sources)
        .and_then(|()| File::create(sources.join(load::SOURCES)))
        .and_then(|file| file.set_len(1 << 30))
        .map_err(failed("making", sources))?;
    let backend = Backend::start(&artifacts::vhost_user_backend(), plan.guests)?;
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for number in 0..plan.guests {
            let cpu = u32::try_from(number % 2).unwrap_or(0);
            let config = UmlConfig::new(plan.guest_mib)
                .balloon(&backend.socket(number))
                .without_reporting()
                .on_cpu(cpu)
                .in_cgroup(&machine::cgroup(number)?)
                .boot_timeout(BOOT_TIMEOUT);
            workers.push(Worker::start(scope, config));
        }
        for (number, worker) in workers.iter().enumerate() {
            println!(
                "guest {number} up after {:.0} s",
                worker.answer()?.took.as_secs_f64()
            );
        }
        let round = Round {
            plan,
            backend: &backend,
            workers: &workers,
        };
        round.everywhere(&load::prepare(SOURCES))?;
        round.settle()?;
        let mut occupied = 0;
        for number in 0..plan.guests {
            occupied += machine::occupied_bytes(number)?;
        }
        machine::leave_room(plan.room_mib * MIB, occupied)?;
        println!("guests occupy {} MiB of {}", occupied / MIB, plan.room_mib);
        for rule in plan.order() {
            round.settle()?;
            let outcome = round.measure(&rule)?;
            let runs = Runs {
                policy: rule,
                outcomes: vec![outcome],
            };
            let line = serde_json::to_string(&runs)
                .map_err(|error| ExperimentError::Unexpected(error.to_string()))?;
            println!("{RESULT}{line}");
        }
        Ok(())
    })
}

/// What one round works with.
struct Round<'a> {
    plan: &'a Plan,
    backend: &'a Backend,
    workers: &'a [Worker],
}

impl Round<'_> {
    /// The state before each run: nothing in the guests, nothing in swap, no balloons, and no more
    /// memory touched than the guests need.
    fn settle(&self) -> Result<(), ExperimentError> {
        self.everywhere(load::RESET)?;
        let most = self.plan.guest_mib.saturating_sub(self.plan.floor_mib) * MIB;
        let mut clients = self.clients()?;
        for target in [most, 0] {
            for client in &mut clients {
                client.set_target(target)?;
            }
            let deadline = Instant::now() + SETTLE_TIMEOUT;
            for client in &mut clients {
                wait_for_balloon(client, target, deadline)?;
            }
            if target > 0 {
                machine::empty_swap()?;
            }
        }
        Ok(())
    }

    /// Runs a command in every guest; returns what each wrote.
    fn everywhere(&self, command: &str) -> Result<Vec<String>, ExperimentError> {
        for worker in self.workers {
            worker.send(command.to_owned());
        }
        let answers = self.workers.iter().map(|worker| Ok(worker.answer()?.text));
        answers.collect()
    }

    /// Pages of files that guests have read again, since they booted.
    fn refaults(&self) -> Result<u64, ExperimentError> {
        let texts = self.everywhere(load::REFAULTS)?;
        let counts = texts.iter().map(|text| {
            let unclear = || ExperimentError::Unexpected(format!("refaults: {text:?}"));
            text.trim().parse::<u64>().map_err(|_| unclear())
        });
        counts.sum()
    }

    fn clients(&self) -> Result<Vec<ControlClient>, ExperimentError> {
        let sockets = (0..self.plan.guests).map(|number| self.backend.control_socket(number));
        sockets
            .map(|path| Ok(ControlClient::connect(&path, CONTROL_TIMEOUT)?))
            .collect()
    }

    /// All guests build at the same time. Returns how long each took, and how many had a process killed.
    fn builds(&self) -> Result<(Vec<f64>, u64), ExperimentError> {
        for (number, worker) in self.workers.iter().enumerate() {
            worker.send(load::build(number, self.plan.repeat));
        }
        timed(self.workers)
    }

    /// One guest after the other has its peak, again and again. Returns how long each took, and how many
    /// had a process killed.
    fn peaks(&self) -> Result<(Vec<f64>, u64), ExperimentError> {
        let (mut runtimes, mut killed) = (Vec::new(), 0);
        for _ in 0..self.plan.repeat {
            for worker in self.workers {
                worker.send(load::peak(self.plan.peak_mib));
                let (took, of_those) = timed(std::slice::from_ref(worker))?;
                runtimes.extend(took);
                killed += of_those;
            }
        }
        Ok((runtimes, killed))
    }

    fn measure(&self, rule: &str) -> Result<Outcome, ExperimentError> {
        let refaults = self.refaults()?;
        let before = machine::Counters::read()?;
        let daemon = match rule {
            "none" => None,
            _ => Some(Daemon::start(self.plan, rule, self.backend)?),
        };
        let clients = self.clients()?;
        let done = &AtomicBool::new(false);
        let begin = Instant::now();
        let mut outcome = thread::scope(|scope| {
            let floor = self.plan.floor_mib * MIB;
            let watch = scope.spawn(move || watch(clients, floor, begin, done));
            let ran = match self.plan.load {
                Load::Builds => self.builds(),
                Load::Peaks => self.peaks(),
            };
            done.store(true, Ordering::Relaxed);
            let watched = watch.join();
            let mut outcome = watched
                .map_err(|_| ExperimentError::Unexpected("the watch panicked".to_owned()))??;
            (outcome.runtimes_s, outcome.oom_kills) = ran?;
            Ok::<_, ExperimentError>(outcome)
        })?;
        outcome.end_s = begin.elapsed().as_secs_f64();
        let after = machine::Counters::read()?;
        if let Some(daemon) = daemon {
            daemon.end(self.plan.explain)?;
        }
        let pages = |after: u64, before: u64| (after - before) as f64 * 4096.0;
        outcome.image_bytes = pages(self.refaults()?, refaults);
        outcome.swap_in_bytes = pages(after.swapped_in_pages, before.swapped_in_pages);
        outcome.swap_out_bytes = pages(after.swapped_out_pages, before.swapped_out_pages);
        outcome.some_s = (after.some_us - before.some_us) as f64 / 1e6;
        outcome.full_s = (after.full_us - before.full_us) as f64 / 1e6;
        Ok(outcome)
    }
}

/// Waits for the end of what workers do.
fn timed(workers: &[Worker]) -> Result<(Vec<f64>, u64), ExperimentError> {
    let (mut runtimes, mut killed) = (Vec::new(), 0);
    for worker in workers {
        match worker.answer() {
            Ok(answer) => runtimes.push(answer.took.as_secs_f64()),
            // A process was killed for want of memory: that is a result.
            Err(ExperimentError::Guest(GuestError::Command { status: KILLED, .. })) => killed += 1,
            Err(error) => return Err(error),
        }
    }
    Ok((runtimes, killed))
}

/// Looks at host and balloons every second.
fn watch(
    mut clients: Vec<ControlClient>,
    floor_bytes: u64,
    begin: Instant,
    done: &AtomicBool,
) -> Result<Outcome, ExperimentError> {
    let mut directions = vec![(0_u64, 0_i8); clients.len()];
    let mut outcome = Outcome::default();
    while !done.load(Ordering::Relaxed) {
        let memory = machine::Memory::read()?;
        let mut point = Point {
            at_s: begin.elapsed().as_secs_f64(),
            free_mib: memory.available_bytes as f64 / MIB as f64,
            swapped_mib: memory.swapped_bytes as f64 / MIB as f64,
            ..Point::default()
        };
        for (client, (last, direction)) in clients.iter_mut().zip(&mut directions) {
            let status = client.query()?;
            point.balloon_mib += status.ballooned_bytes as f64 / MIB as f64;
            if status.target_bytes.abs_diff(*last) >= MIB {
                let now = if status.target_bytes > *last { 1 } else { -1 };
                outcome.turns += u32::from(*direction == -now);
                (*last, *direction) = (status.target_bytes, now);
            }
            // A guest that is too busy to answer is left out of this sample.
            let Ok(stats) = client.guest_stats(SAMPLE_PERIOD) else {
                continue;
            };
            let told = stats
                .total_memory_bytes()
                .zip(stats.available_memory_bytes());
            if let Some((total, available)) = told {
                let used = total.saturating_sub(available);
                point.used_mib += used as f64 / MIB as f64;
                let promised = status.memory_bytes.saturating_sub(status.target_bytes);
                if promised < used.max(floor_bytes) {
                    outcome.below_floor_s += SAMPLE_PERIOD.as_secs_f64();
                }
            }
        }
        outcome.points.push(point);
        thread::sleep(SAMPLE_PERIOD);
    }
    Ok(outcome)
}

/// Waits until the balloon is as large as it should be, or as large as it gets.
fn wait_for_balloon(
    client: &mut ControlClient,
    target_bytes: u64,
    deadline: Instant,
) -> Result<(), ExperimentError> {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let now = client.query()?.actual_bytes;
        if now == target_bytes || Instant::now() >= deadline {
            return Ok(());
        }
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > Duration::from_secs(5) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// `aerostatd` with one rule.
struct Daemon(Child);

impl Daemon {
    fn start(plan: &Plan, rule: &str, backend: &Backend) -> Result<Self, ExperimentError> {
        fs::write(CONFIG, configuration(plan, rule, backend)).map_err(failed("writing", CONFIG))?;
        let log = File::create(LOG).map_err(failed("making", LOG))?;
        let errors = log.try_clone().map_err(failed("making", LOG))?;
        let program = program();
        Command::new(&program)
            .args(["run", "--config", CONFIG])
            .env("AEROSTAT_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map(Self)
            .map_err(failed("starting", program))
    }

    /// Ends it, and shows what it said if that is wanted; it is an error if it had ended by itself.
    fn end(mut self, explain: bool) -> Result<(), ExperimentError> {
        let ended = self.0.try_wait();
        // Failure means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
        let said = fs::read_to_string(LOG).unwrap_or_default();
        if explain {
            println!("{said}");
        }
        match ended {
            Ok(None) => Ok(()),
            _ => Err(ExperimentError::Unexpected(format!(
                "aerostatd ended by itself: {said}"
            ))),
        }
    }
}

/// The built `aerostatd`.
#[must_use]
pub fn program() -> PathBuf {
    artifacts::directory().join("aerostatd")
}

fn configuration(plan: &Plan, rule: &str, backend: &Backend) -> String {
    let mut text = format!(
        "[host]\nperiod-ms = 1000\ntimeout-ms = 3000\ncgroup-root = {:?}\nlimits = {:?}\n\
         budget = \"{}M\"\noverhead = \"48M\"\ncontrol-socket = \"/tmp/aerostatd.sock\"\nmetrics = \"off\"\n\n\
         [policy]\nname = {rule:?}\nhigh-bytes = {}\nlow-bytes = {}\n",
        machine::cgroup_root(),
        plan.limits,
        plan.room_mib,
        // The defaults are parts of the host's memory, and most of this host's is locked away.
        plan.room_mib * MIB / 10,
        plan.room_mib * MIB / 25,
    );
    for number in 0..plan.guests {
        let socket = backend.control_socket(number);
        text += &format!(
            "\n[[vm]]\nname = \"g{number}\"\nprotocol = \"aerostat\"\nsocket = {socket:?}\n\
             cgroup = \"g{number}\"\nfloor = \"{}M\"\ntraits = {{ demand-fault-from-swap = true }}\n",
            plan.floor_mib
        );
    }
    text
}
