//! What the core asks of a balloon protocol, and what it lends it.
//!
//! A protocol knows a wire format: queues and what their buffers mean, features, configuration space,
//! timers, and its own part of a saved state. The core knows the balloon, rings, threads and the life
//! cycle, and no protocol by name. All calls but those marked so are made under the device's service
//! lock, and dynamic dispatch happens once a turn, not once a buffer.

use super::DeviceKind;
use crate::balloon::Balloon;
use crate::error::{Error, Result};
use crate::metrics::Books;
use crate::ring::RingError;
use crate::runtime::Scratch;
use crate::service::queues::Queues;
use crate::target::Target;
use crate::trace::Tape;
use std::any::Any;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Among the work of a turn, next to a bit for each kicked queue: the VMM asked the protocol for
/// something (statistics), or has something to say through a queue (a target).
pub(crate) const ASKED: u32 = 1 << 31;

/// What the core lends a protocol for one turn.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    pub(crate) balloon: &'a mut Balloon,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) books: &'a Books,
    /// What the guest gives and takes, while it is recorded.
    pub(crate) tape: &'a Tape,
    /// The balloon's size, for those who must not wait for its lock.
    pub(crate) ballooned_bytes: &'a AtomicU64,
    /// And how much the guest has beyond what it booted with.
    pub(crate) extra_bytes: &'a AtomicU64,
    /// What was negotiated.
    pub(crate) features: u64,
}

impl Turn<'_> {
    /// Lets those who must not wait for the lock see how large the balloon is.
    pub(crate) fn show_size(&self) {
        self.ballooned_bytes
            .store(self.balloon.ballooned_bytes(), Ordering::Release);
        self.extra_bytes
            .store(self.balloon.extra_bytes(), Ordering::Release);
    }
}

/// A queue that can no longer be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) queue: u16,
    pub(crate) error: RingError,
}

/// How the guest hears that the target was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// By a configuration-change interrupt.
    ConfigChange,
    /// Through a queue: the protocol is to be given a turn with [`ASKED`].
    Queue,
    /// It asks by itself.
    Polled,
}

/// What is due when a timer has expired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// The guest is to see a configuration change.
    pub(crate) config_change: bool,
    /// Work for the turn that follows.
    pub(crate) work: u32,
}

/// What a driver's write to the configuration space did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// `actual` has a new value.
    pub(crate) actual_changed: bool,
    /// A field that is not the driver's to change, or not now, would have changed.
    pub(crate) refused: bool,
    /// How many host resets it acknowledged.
    pub(crate) acknowledged_resets: u64,
}

/// One protocol of one device.
pub(crate) trait Protocol: Any + Debug + Send + Sync {
    /// Which one it is.
    fn kind(&self) -> DeviceKind;

    /// The features that the driver may select from. Never waits.
    fn offered(&self) -> u64;

    /// What is selected from the start, where nothing is negotiated before the device is activated.
    fn preselected(&self) -> Option<u64> {
        None
    }

    /// Refuses a subset of what is offered that makes no sense (FEATURES_OK).
    fn check_features(&self, _selected: u64) -> Result<()> {
        Ok(())
    }

    /// Whether the guest may get memory that it did not boot with (J6).
    fn has_extra_memory(&self) -> bool {
        false
    }

    /// Whether the driver tells before it uses pages of the balloon again, so that pages may be
    /// discarded after they were acknowledged (S7).
    fn tells_before_use(&self, features: u64) -> bool;

    /// Reads the configuration space; bytes behind its end are zero. Without the lock; never waits.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// A driver's write to it; `active` says that the driver has set DRIVER_OK. Without the lock; never
    /// waits.
    fn write_config(&self, offset: u64, data: &[u8], features: u64, active: bool) -> Written;

    /// Refuses a target that the protocol cannot say. Without the lock.
    fn check_target(&self, bytes: u64) -> Result<()>;

    /// Whether the driver can be told of a target for each node of the guest, if it selects that (X2).
    fn has_node_targets(&self) -> bool {
        false
    }

    /// The target is now this. Without the lock; never waits.
    fn show_target(&self, target: &Target);

    /// The guest is to be told of the target, be it the same one again (S11): how it hears of it. Without
    /// the lock; never waits.
    fn announce(&self) -> Notice;

    /// What the driver says that the balloon holds; `None` if it says nothing, and the device's own count
    /// is all there is. Without the lock; never waits.
    fn actual_bytes(&self) -> Option<u64>;

    /// The part of a turn that is the protocol's: serves what `work` names, and returns what is left, a bit
    /// for each queue. With `Err`, what came before the fault has been served.
    fn serve(&self, work: u32, queues: &mut Queues, turn: &mut Turn<'_>) -> Result<u32, Broken>;

    /// The queue and the token of a buffer that is held: popped last from it, and not completed.
    fn held(&self, _features: u64, _queues: &Queues) -> Option<(u16, u64)> {
        None
    }

    /// Queue `index` is about to be stopped: a buffer that is held goes back to where it came from.
    fn put_back(&self, _index: u16, _features: u64, _queues: &mut Queues) {}

    /// When [`Self::on_timer`] is to be called. Without the lock.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Does what is due.
    fn on_timer(&self) -> Due {
        Due::default()
    }

    /// Refuses to give the balloon back at once, where the guest would not understand it (V3).
    fn check_host_reset(&self, _features: u64) -> Result<()> {
        Err(Error::NotSupported("a reset of the balloon by the host"))
    }

    /// The balloon was emptied by the host: what the guest sends is late until it has acknowledged that.
    fn ask_for_host_reset(&self) {}

    /// Whether the guest has not acknowledged the last host reset. Without the lock; never waits.
    fn host_reset_pending(&self) -> bool {
        false
    }

    /// A new driver comes.
    fn reset(&self, books: &Books);

    /// Its part of a saved state, at most [`crate::saved_state::MAX_OWN_BYTES`].
    fn save(&self) -> Vec<u8>;

    /// Refuses what is no part of a saved state (which is untrusted) with these features selected and, or
    /// not, pages in the balloon; returns the features that it takes to go on with it.
    fn check_saved(&self, own: &[u8], negotiated: u64, empty: bool) -> Result<u64>;

    /// Goes on with a part that was checked.
    fn restore(&self, own: &[u8], books: &Books);
}
