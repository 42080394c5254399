//! Guest memory that goes away under our hands.
//!
//! A front-end owns the files behind the mappings. If it shortens one, or its file system runs full,
//! touching the memory raises SIGBUS, which would end the process and with it the service of all
//! other guests. Here the signal puts zeros in the place of the whole mapping instead, and marks it,
//! so that its session ends.
#![allow(unsafe_code, reason = "a signal handler replaces mappings")]

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use signal_hook::consts::SIGBUS;
use std::ffi::c_void;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// One mapping; `start` is 0 while the place is empty.
#[derive(Debug, Default)]
struct Place {
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

/// Where the handler looks. It may not lock or allocate, so this is made once, and only atomics.
static PLACES: OnceLock<Vec<Place>> = OnceLock::new();

fn places() -> &'static [Place] {
    PLACES.get().map_or(&[], Vec::as_slice)
}

/// A mapping that may lose its memory, as long as this is kept.
#[derive(Debug)]
pub(crate) struct Watched(&'static Place);

impl Watched {
    /// Watches over a mapping. `None` if there are too many.
    ///
    /// # Safety
    /// `[start, start + len)` is one mapping that stays until the value is dropped, and it may be
    /// replaced by zeros when touching it fails.
    pub(crate) unsafe fn new(start: usize, len: usize) -> Option<Self> {
        // 1 reserves a place: nothing is mapped there.
        let place = places().iter().find(|place| {
            let empty = place
                .start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            empty.is_ok()
        })?;
        place.len.store(len, Ordering::Release);
        place.lost.store(false, Ordering::Relaxed);
        place.start.store(start, Ordering::Release);
        Some(Self(place))
    }

    /// Whether its memory went away.
    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.start.store(0, Ordering::Release);
    }
}

/// Installs the handler, with room for this many mappings at a time; once, before there are any.
pub(crate) fn install(mappings: usize) -> io::Result<()> {
    PLACES.get_or_init(|| (0..mappings).map(|_| Place::default()).collect());
    // Handlers that were there before are called first, and that of Rust's runtime, which looks for
    // stack overflows, gives up the signal when it finds none: the second SIGBUS would be the end.
    // SAFETY: puts the default action in the place of a handler; nothing refers to either.
    if unsafe { libc::signal(SIGBUS, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the handler uses atomics, mmap and, for a SIGBUS that is no guest memory's, what
    // signal-hook has for handlers. All of these may be used in one.
    unsafe {
        signal_hook_registry::register_sigaction(SIGBUS, |info| {
            // SAFETY: the kernel fills in the address of every SIGBUS that it raises itself; for one
            // sent by kill the field is some number, which is only compared.
            let address = info.si_addr() as usize;
            if !replace(address) {
                let _ = signal_hook::low_level::emulate_default_handler(SIGBUS);
            }
        })
    }?;
    Ok(())
}

/// Puts zeros where the mapping around `address` is; false if there is none.
fn replace(address: usize) -> bool {
    for place in places() {
        let start = place.start.load(Ordering::Acquire);
        let len = place.len.load(Ordering::Acquire);
        if start <= 1 || address < start || address - start >= len {
            continue;
        }
        // Another session may have emptied the place and used it anew between the two: then the
        // length is that of another mapping.
        if place.start.load(Ordering::Relaxed) != start {
            continue;
        }
        place.lost.store(true, Ordering::Relaxed);
        // SAFETY: the range is one mapping that its owner allowed to be replaced (`Watched::new`).
        // Somebody is touching it at this moment, so it is not about to be unmapped.
        let zeros = unsafe {
            mmap_anonymous(
                start as *mut c_void,
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        return zeros.is_ok();
    }
    false
}
