//! The synchronisation of protocols that loom checks: the real thing, or loom's models of it when the
//! crate is built with `--cfg loom` (`make loom`), in which threads run in every order that matters.

#[cfg(loom)]
mod model;

#[cfg(not(loom))]
pub(crate) use crossbeam_channel as channel;
#[cfg(not(loom))]
pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::{hint::spin_loop, time::Instant};

#[cfg(loom)]
pub(crate) use loom::hint::spin_loop;
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
#[cfg(loom)]
pub(crate) use model::{Condvar, Instant, Mutex, MutexGuard, RwLock, channel, step};

/// Before what loom cannot see, as it is done by the processor or the kernel: an access to a ring, a look
/// for kicks, a discard. In a model another thread may go on first; otherwise this is nothing.
#[cfg(not(loom))]
#[inline]
pub(crate) fn step() {}
