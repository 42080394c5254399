//! One thread for each VM: all that can block on it happens here, so that a VM whose socket hangs, or
//! a limit whose write waits for reclaim, holds up nothing else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;

use super::limits::VmLimits;
use crate::{
    cgroup::Reclaimed,
    ledger::{Ledger, limits as steps},
    policy::{NodeTarget, VmId},
    vm::{Endpoint, Observation, Vm, VmError},
};

/// One order at a time: what a VM that hangs was not told is decided anew when it answers.
const QUEUE_LIMIT: usize = 1;

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

#[derive(Debug)]
enum Order {
    Observe,
    Carry(Box<Step>),
}

/// What is known about the VM, as its thread last left it.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// The last observation, and when it was made.
    pub(super) observation: Option<(Observation, Instant)>,
    /// The VMM's process.
    pub(super) pid: Option<u32>,
    /// The last thing that went wrong, with advice; none after a success.
    pub(super) trouble: Option<String>,
    /// How many things went wrong.
    pub(super) errors: u64,
    /// The target that was set last.
    pub(super) target_bytes: Option<u64>,
}

/// The thread's handle. Dropping it lets the thread end when its VM has answered or timed out.
#[derive(Debug)]
pub(super) struct Worker {
    orders: Sender<Order>,
    seen: Arc<Mutex<Seen>>,
    /// An order was given and is not done.
    busy: Arc<AtomicBool>,
}

struct Thread {
    vm: VmId,
    endpoint: Endpoint,
    timeout: Duration,
    ledger: Arc<Mutex<Ledger>>,
    seen: Arc<Mutex<Seen>>,
    busy: Arc<AtomicBool>,
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
        let (orders, received) = bounded(QUEUE_LIMIT);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let busy = Arc::new(AtomicBool::new(false));
        let name = format!("vm-{}", vm.as_str().chars().take(12).collect::<String>());
        let thread = Thread {
            vm,
            endpoint,
            timeout,
            ledger,
            seen: seen.clone(),
            busy: busy.clone(),
            connection: None,
            retry: None,
        };
        thread::Builder::new()
            .name(name)
            .stack_size(512 << 10)
            .spawn(move || thread.run(&received, &observed))?;
        Ok(Self { orders, seen, busy })
    }

    /// Asks for a look at the VM; false if it is still busy.
    pub(super) fn observe(&self) -> bool {
        self.order(Order::Observe)
    }

    /// Hands a step over; false if the VM is still busy, and the step is dropped.
    pub(super) fn carry(&self, step: Step) -> bool {
        self.order(Order::Carry(Box::new(step)))
    }

    fn order(&self, order: Order) -> bool {
        if self.busy.swap(true, Ordering::AcqRel) {
            return false;
        }
        match self.orders.try_send(order) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.busy.store(false, Ordering::Release);
                false
            }
        }
    }

    /// What is known about the VM.
    pub(super) fn seen(&self) -> Seen {
        self.seen.lock().clone()
    }
}

impl Thread {
    fn run(mut self, orders: &Receiver<Order>, observed: &Sender<VmId>) {
        for order in orders {
            match order {
                Order::Observe => {
                    self.observe();
                    self.busy.store(false, Ordering::Release);
                    // The engine may have stopped waiting, or ended.
                    let _ = observed.try_send(self.vm.clone());
                }
                Order::Carry(step) => {
                    self.carry(&step);
                    self.busy.store(false, Ordering::Release);
                }
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
                    self.seen.lock().pid = vm.peer_pid();
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

    fn carry(&mut self, step: &Step) {
        let limits = step.limits.as_ref();
        if let Some((limits, _)) = limits
            && step.raise_bytes > 0
            && let Err(error) = steps::raise(
                &self.ledger,
                &self.vm,
                limits.as_ref(),
                step.raise_bytes,
                None,
            )
        {
            // Without the limit the memory must not go back (I5).
            self.trouble(&format!("its limit was not raised: {error}"));
            return;
        }
        if let Some(target) = step.target_bytes
            && let Some(vm) = self.connection()
        {
            let told = if step.nodes.is_empty() {
                vm.set_target_bytes(target)
            } else {
                vm.set_node_targets(&step.nodes)
            };
            match told {
                Ok(()) => self.seen.lock().target_bytes = Some(target),
                Err(error) => {
                    self.failed(&error);
                    return;
                }
            }
        }
        let Some((limits, slack)) = limits else {
            return;
        };
        if let Some(wanted) = step.lower_to_bytes
            && let Err(error) =
                steps::lower(&self.ledger, &self.vm, limits.as_ref(), wanted, *slack)
        {
            self.trouble(&format!("its limit was not lowered: {error}"));
        }
        if step.reclaim_bytes > 0 {
            match limits.cgroup().reclaim(step.reclaim_bytes, None) {
                Ok(Reclaimed::All | Reclaimed::Short) => {}
                Ok(Reclaimed::Unsupported) => {
                    self.trouble("this kernel has no memory.reclaim; set allow-reclaim = false");
                }
                Err(error) => self.trouble(&error.to_string()),
            }
        }
    }

    fn failed(&mut self, error: &VmError) {
        if !matches!(error, VmError::Refused { .. }) {
            self.connection = None;
            let pause = self
                .retry
                .map_or(RETRY_FIRST, |(_, pause)| (pause * 2).min(RETRY_LAST));
            self.retry = Some((Instant::now() + pause, pause));
        }
        let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
        self.trouble(&format!(
            "{error}{}; {}",
            cause.unwrap_or_default(),
            error.advice()
        ));
    }

    /// Enters what went wrong; logged when it is news.
    fn trouble(&self, text: &str) {
        let mut seen = self.seen.lock();
        seen.errors += 1;
        if seen.trouble.as_deref() != Some(text) {
            tracing::warn!(vm = %self.vm, "{text}");
            seen.trouble = Some(text.to_owned());
        }
    }
}
