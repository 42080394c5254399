//! VMware's balloon commands (docs/vmware-balloon.md; requirements W, V1 to V3): no queues, but calls
//! that a VMM makes for a guest's access to the backdoor port.

mod commands;
mod control;

pub use commands::VmwareAnswer;

use crate::balloon::bump;
use crate::error::{Error, Result};
use crate::memory::BALLOON_PAGE_SHIFT;
use crate::metrics::Books;
use crate::protocol::DeviceKind;
use crate::protocol::contract::{Broken, Notice, Protocol, Turn, Written};
use crate::service::queues::Queues;
use crate::target::Target;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// LOCK and UNLOCK of single pages; with the first version of the protocol all there is, and then
/// this is the version's number.
const BASIC: u64 = 1 << 1;
/// LOCK and UNLOCK of up to 512 pages.
const BATCHED: u64 = 1 << 2;
/// The same for pages of 2 MiB.
const BATCHED_2M: u64 = 1 << 3;
/// Targets of more than 32 bits of pages.
const TARGET_64: u64 = 1 << 5;

/// What can be offered. Bit 4, the doorbell, takes a VMCI device, which the VMM would have to have.
pub(crate) const CAPABILITIES: u64 = BASIC | BATCHED | BATCHED_2M | TARGET_64;

/// Where the guest stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Session {
    /// It has sent START, and the host has not reset it since.
    started: bool,
    /// Host resets that were asked for since the last START.
    resets_open: u64,
}

/// What one device of this protocol knows, beside the balloon.
#[derive(Debug)]
pub(crate) struct Vmware {
    offered: u64,
    target_bytes: AtomicU64,
    session: Mutex<Session>,
}

impl Vmware {
    /// The protocol of a new device that offers these capabilities.
    pub(crate) fn new(features: u64) -> Self {
        Self {
            offered: features | BASIC,
            target_bytes: AtomicU64::new(0),
            session: Mutex::default(),
        }
    }

    /// The target in pages, as far as the guest can be told.
    fn target_pages(&self, capabilities: u64) -> u64 {
        let pages = self.target_bytes.load(Ordering::Acquire) >> BALLOON_PAGE_SHIFT;
        if capabilities & TARGET_64 == 0 {
            pages.min(u64::from(u32::MAX))
        } else {
            pages
        }
    }

    /// The guest's START: host resets that were pending are over.
    fn start(&self, books: &Books) {
        let mut session = self.session.lock();
        session.started = true;
        let ended = std::mem::take(&mut session.resets_open);
        books.enter(|entry| bump(&mut entry.device().host_resets_acknowledged, ended));
    }

    /// Until the next START that is understood there is nothing to talk about.
    fn end_session(&self) {
        self.session.lock().started = false;
    }

    fn started(&self) -> bool {
        self.session.lock().started
    }
}

impl Protocol for Vmware {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vmware
    }

    fn offered(&self) -> u64 {
        self.offered
    }

    /// START selects.
    fn preselected(&self) -> Option<u64> {
        Some(0)
    }

    fn check_features(&self, _selected: u64) -> Result<()> {
        Ok(())
    }

    /// A guest unlocks a page before it uses it.
    fn tells_before_use(&self, _features: u64) -> bool {
        true
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&self, _offset: u64, data: &[u8], _features: u64, _active: bool) -> Written {
        Written {
            refused: !data.is_empty(),
            ..Written::default()
        }
    }

    fn check_target(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    fn show_target(&self, target: &Target) {
        self.target_bytes.store(target.bytes(), Ordering::Release);
    }

    /// It asks every second.
    fn announce(&self) -> Notice {
        Notice::Polled
    }

    fn actual_bytes(&self) -> Option<u64> {
        None
    }

    fn serve(&self, _work: u32, _queues: &mut Queues, _turn: &mut Turn<'_>) -> Result<u32, Broken> {
        Ok(0)
    }

    /// All guests understand it: the answer to whatever they say next (V3).
    fn check_host_reset(&self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn ask_for_host_reset(&self) {
        let mut session = self.session.lock();
        session.started = false;
        session.resets_open += 1;
    }

    fn host_reset_pending(&self) -> bool {
        self.session.lock().resets_open > 0
    }

    fn reset(&self, books: &Books) {
        let ended = std::mem::take(&mut *self.session.lock()).resets_open;
        books.enter(|entry| bump(&mut entry.device().host_resets_acknowledged, ended));
    }

    fn save(&self) -> Vec<u8> {
        let session = *self.session.lock();
        vec![u8::from(session.started) | u8::from(session.resets_open > 0) << 1]
    }

    fn check_saved(&self, own: &[u8], _negotiated: u64, empty: bool) -> Result<u64> {
        match own {
            [1] => Ok(0),
            // A guest that has not begun, or is to begin anew, has no page in the balloon.
            [0 | 2] if empty => Ok(0),
            _ => Err(Error::SavedState {
                what: "a session that cannot be",
                offset: 0,
            }),
        }
    }

    fn restore(&self, own: &[u8], books: &Books) {
        let flags = own.first().copied().unwrap_or(0);
        let pending = flags & 2 != 0;
        *self.session.lock() = Session {
            started: flags & 1 != 0,
            resets_open: u64::from(pending),
        };
        if pending {
            // So that asked is never below acknowledged in this device's books.
            books.enter(|entry| bump(&mut entry.device().host_resets, 1));
        }
    }
}
