//! One thread for each VM: all that can block on it happens here, so that a VM whose socket hangs, or
//! a limit whose write waits for reclaim, holds up nothing else.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use parking_lot::{Condvar, Mutex};

use super::limits::VmLimits;
use crate::{
    cgroup::Reclaimed,
    ledger::{Ledger, limits as steps},
    policy::{NodeTarget, VmId},
    vm::{Endpoint, Observation, Vm, VmError},
};

/// The first pause after a connection failed; it doubles up to the second.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(30);

/// What to do with a VM, in this order: raise, retarget, lower, reclaim.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// Bytes that its limit must be raised by before the target falls.
    pub(super) raise_bytes: u64,
    /// The balloon's new target.
    pub(super) target_bytes: Option<u64>,
    /// The same by node, for balloons that take one for each.
    pub(super) nodes: Vec<NodeTarget>,
    /// The limit that is enough by now.
    pub(super) lower_to_bytes: Option<u64>,
    /// Take this much by `memory.reclaim`.
    pub(super) reclaim_bytes: u64,
    /// Its cgroup, and how far a limit stays above what it occupies.
    pub(super) limits: Option<(Arc<VmLimits>, u64)>,
}

/// What the thread has been told and has not done. There is one step at most: a newer decision takes the
/// place of one that a VM which answers slowly has not got round to.
#[derive(Debug, Default)]
struct Orders {
    step: Option<Box<Step>>,
    /// A look is ordered or under way.
    look: bool,
    /// A step is under way.
    carrying: bool,
    ended: bool,
}

impl Orders {
    /// The thread has a step to carry out, or does so.
    fn has_step(&self) -> bool {
        self.carrying || self.step.is_some()
    }
}

/// Where orders are left for the thread.
#[derive(Debug, Default)]
struct Desk {
    orders: Mutex<Orders>,
    given: Condvar,
}

impl Desk {
    /// Waits for orders; `None` at the end. The step comes before the look, so that the look sees it.
    fn take(&self) -> Option<(Option<Box<Step>>, bool)> {
        let mut orders = self.orders.lock();
        loop {
            if orders.ended {
                return None;
            }
            let step = orders.step.take();
            if step.is_some() || orders.look {
                orders.carrying = step.is_some();
                return Some((step, orders.look));
            }
            self.given.wait(&mut orders);
        }
    }
}

/// How far a step went.
enum Done {
    All,
    /// Nobody was there to be told, of which the looks speak.
    Nothing,
}

/// What is known about the VM, as its thread last left it.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The last observation, and when it was made.
    pub(super) observation: Option<(Observation, Instant)>,
    /// The VMM's process.
    pub(super) pid: Option<u32>,
    /// What went wrong with the last look, with advice.
    pub(super) trouble: Option<String>,
    /// What went wrong with the last step.
    pub(super) step_trouble: Option<String>,
    /// How many things went wrong.
    pub(super) errors: u64,
    /// The target that was set last, on the connection that there is.
    pub(super) target_bytes: Option<u64>,
    /// How long the last look took.
    pub(super) took: Duration,
}

/// The thread's handle. Dropping it lets the thread end when its VM has answered or timed out.
#[derive(Debug)]
pub(super) struct Worker {
    desk: Arc<Desk>,
    seen: Arc<Mutex<Seen>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.desk.orders.lock().ended = true;
        self.desk.given.notify_one();
    }
}

struct Thread {
    vm: VmId,
    endpoint: Endpoint,
    timeout: Duration,
    ledger: Arc<Mutex<Ledger>>,
    seen: Arc<Mutex<Seen>>,
    desk: Arc<Desk>,
    connection: Option<Box<dyn Vm>>,
    retry: Option<(Instant, Duration)>,
}

impl Worker {
    /// Starts a thread for the VM. `observed` gets its name after each look at it.
    pub(super) fn start(
        vm: VmId,
        endpoint: Endpoint,
        timeout: Duration,
        ledger: Arc<Mutex<Ledger>>,
        observed: Sender<VmId>,
    ) -> std::io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let name = format!("vm-{}", vm.as_str().chars().take(12).collect::<String>());
        let thread = Thread {
            vm,
            endpoint,
            timeout,
            ledger,
            seen: seen.clone(),
            desk: desk.clone(),
            connection: None,
            retry: None,
        };
        thread::Builder::new()
            .name(name)
            .stack_size(512 << 10)
            .spawn(move || thread.run(&observed))?;
        Ok(Self { desk, seen })
    }

    /// Asks for a look at the VM; false if the thread has something else to do first.
    pub(super) fn observe(&self) -> bool {
        let mut orders = self.desk.orders.lock();
        let at_once = !orders.look && !orders.has_step();
        orders.look = true;
        self.desk.given.notify_one();
        at_once
    }

    /// Hands the newest step over, in place of one that has not been begun; `None`: there is nothing to do.
    pub(super) fn carry(&self, step: Option<Step>) {
        let mut orders = self.desk.orders.lock();
        orders.step = step.map(Box::new);
        if orders.step.is_some() {
            self.desk.given.notify_one();
        } else {
            // What could not be done need not be done any more.
            self.seen.lock().step_trouble = None;
        }
    }

    /// A step is under way, or about to be.
    pub(super) fn is_carrying(&self) -> bool {
        self.desk.orders.lock().has_step()
    }

    /// What is known about the VM.
    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().clone()
    }
}

impl Thread {
    fn run(mut self, observed: &Sender<VmId>) {
        let desk = self.desk.clone();
        while let Some((step, look)) = desk.take() {
            if let Some(step) = step {
                let outcome = self.carry(&step);
                desk.orders.lock().carrying = false;
                self.note_step(outcome);
            }
            if look {
                let begin = Instant::now();
                self.observe();
                self.seen.lock().took = begin.elapsed();
                desk.orders.lock().look = false;
                // The engine may have stopped waiting, or ended.
                let _ = observed.try_send(self.vm.clone());
            }
        }
    }

    /// The connection; made if there is none and it is time to try.
    fn connection(&mut self) -> Option<&mut Box<dyn Vm>> {
        if self.connection.is_none() {
            if self.retry.is_some_and(|(at, _)| Instant::now() < at) {
                return None;
            }
            match self.endpoint.connect(self.timeout) {
                Ok(vm) => {
                    tracing::info!(vm = %self.vm, protocol = vm.protocol(), "connected");
                    let mut seen = self.seen.lock();
                    seen.pid = vm.peer_pid();
                    // Another VMM may be behind the socket, which was told nothing yet.
                    seen.target_bytes = None;
                    drop(seen);
                    self.retry = None;
                    self.connection = Some(vm);
                }
                Err(error) => {
                    self.failed(&error);
                    return None;
                }
            }
        }
        self.connection.as_mut()
    }

    fn observe(&mut self) {
        let Some(vm) = self.connection() else { return };
        match vm.observe() {
            Ok(observation) => {
                let mut seen = self.seen.lock();
                seen.observation = Some((observation, Instant::now()));
                if let Some(trouble) = seen.trouble.take() {
                    tracing::info!(vm = %self.vm, "answers again, after: {trouble}");
                }
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Carries a step out as far as it goes.
    ///
    /// # Errors
    /// What went wrong, with advice.
    fn carry(&mut self, step: &Step) -> Result<Done, String> {
        let limits = step.limits.as_ref();
        if let Some((limits, _)) = limits
            && step.raise_bytes > 0
        {
            // Without the limit the memory must not go back (I5).
            steps::raise(
                &self.ledger,
                &self.vm,
                limits.as_ref(),
                step.raise_bytes,
                None,
            )
            .map_err(|error| format!("its limit was not raised: {error}"))?;
        }
        if let Some(target) = step.target_bytes {
            let Some(vm) = self.connection() else {
                return Ok(Done::Nothing);
            };
            let told = if step.nodes.is_empty() {
                vm.set_target_bytes(target)
            } else {
                vm.set_node_targets(&step.nodes)
            };
            if let Err(error) = told {
                self.disconnect(&error);
                return Err(explain(&error));
            }
            self.seen.lock().target_bytes = Some(target);
        }
        let Some((limits, slack)) = limits else {
            return Ok(Done::All);
        };
        let lowered = step.lower_to_bytes.map_or(Ok(0), |wanted| {
            steps::lower(&self.ledger, &self.vm, limits.as_ref(), wanted, *slack)
        });
        if step.reclaim_bytes > 0 {
            match limits.cgroup().reclaim(step.reclaim_bytes, None) {
                Ok(Reclaimed::All | Reclaimed::Short) => {}
                Ok(Reclaimed::Unsupported) => {
                    let text = "this kernel has no memory.reclaim; set allow-reclaim = false";
                    return Err(text.to_owned());
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        lowered
            .map(|_| Done::All)
            .map_err(|error| format!("its limit was not lowered: {error}"))
    }

    /// Enters how a step went; logged when it is news.
    fn note_step(&self, outcome: Result<Done, String>) {
        if matches!(outcome, Ok(Done::Nothing)) {
            return;
        }
        let mut seen = self.seen.lock();
        let before = std::mem::replace(&mut seen.step_trouble, outcome.err());
        match (&before, &seen.step_trouble) {
            (Some(before), None) => tracing::info!(vm = %self.vm, "no longer: {before}"),
            (before, Some(now)) => {
                if before.as_ref() != Some(now) {
                    tracing::warn!(vm = %self.vm, "{now}");
                }
                seen.errors += 1;
            }
            (None, None) => {}
        }
    }

    fn failed(&mut self, error: &VmError) {
        self.disconnect(error);
        self.trouble(&explain(error));
    }

    /// A conversation that broke off is begun anew, a little later.
    fn disconnect(&mut self, error: &VmError) {
        if matches!(error, VmError::Refused { .. }) {
            return;
        }
        self.connection = None;
        let pause = self
            .retry
            .map_or(RETRY_FIRST, |(_, pause)| (pause * 2).min(RETRY_LAST));
        self.retry = Some((Instant::now() + pause, pause));
    }

    /// Enters what went wrong with a look; logged when it is news.
    fn trouble(&self, text: &str) {
        let mut seen = self.seen.lock();
        seen.errors += 1;
        if seen.trouble.as_deref() != Some(text) {
            tracing::warn!(vm = %self.vm, "{text}");
            seen.trouble = Some(text.to_owned());
        }
    }
}

/// An error with its cause, and what to do.
fn explain(error: &VmError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}; {}", cause.unwrap_or_default(), error.advice())
}
