//! The threads that serve devices.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Refusal, call, call_unit, check_flags, check_reserved};
use crate::handle::{self, Handle, Slot};
use crate::versioned::{self, Versioned};
use ::aerostat_device::{Runtime, RuntimeConfig};
use std::ffi::c_int;
use std::sync::Arc;

/// The worker threads, which also wait for kicks. One runtime serves many devices; a
/// process normally has one.
#[derive(Debug)]
pub struct aerostat_runtime {
    pub(crate) runtime: Arc<Runtime>,
}

impl Handle for aerostat_runtime {
    const NAME: &'static str = "runtime";
}

/// How a runtime is set up; see `AEROSTAT_RUNTIME_CONFIG_INIT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_runtime_config {
    /// sizeof(struct aerostat_runtime_config).
    pub size: u32,
    /// 0; no flags are defined.
    pub flags: u32,
    /// Worker threads for each host NUMA node that has processors. 0 chooses by the number of
    /// processors.
    pub workers_per_node: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_runtime_config {
    const NAME: &'static str = "aerostat_runtime_config";
    const FIRST_BYTES: usize = 16;
}

/// Finds out what the host can do, and starts the threads that serve devices.
///
/// All threads of the library are started before this returns. They block all signals but those of
/// faults (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP). The system calls that they make, for a seccomp
/// filter, are listed in docs/c-abi.md.
///
/// Returns: 0, or
/// -EINVAL (an unknown flag, or more than 64 workers a node),
/// -EMSGSIZE, -E2BIG (config->size),
/// -EFAULT (a pointer is NULL),
/// or what the operating system answered (-EAGAIN, -EMFILE, -ENOMEM, -EPERM) if threads or
/// descriptors cannot be had. On failure *out is NULL.
///
/// Lifetime: config is read during the call only.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_runtime_new(
    config: *const aerostat_runtime_config,
    out: *mut *mut aerostat_runtime,
) -> c_int {
    call_unit(|| {
        // SAFETY: NULL, or writable during this call (the header's rule for pointers).
        let slot = unsafe { Slot::new(out) }?;
        // SAFETY: NULL, or as long as its size says (the same rule).
        let config = unsafe { versioned::read(config) }?;
        check_flags("aerostat_runtime_config.flags", config.flags, 0)?;
        check_reserved("aerostat_runtime_config.reserved", config.reserved.into())?;
        let runtime = Runtime::new(&RuntimeConfig {
            workers_per_node: config.workers_per_node,
        })?;
        slot.fill(aerostat_runtime { runtime });
        Ok(())
    })
}

/// Gives up a runtime and sets *runtime to NULL. NULL, and a pointer to NULL, are ignored.
///
/// Devices keep the threads they need: those end with the last device, or here if there is none.
///
/// Threads: any that the library did not start; no other thread may be using this handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_runtime_destroy(runtime: *mut *mut aerostat_runtime) {
    // SAFETY: NULL or writable, and the handle's last use (the header's rules for handles).
    unsafe { handle::destroy(runtime) }
}

/// Tells how far the host's NUMA nodes are numbered: aerostat_device_node_counters() takes numbers
/// below this one, and -1.
///
/// Returns: one more than the highest number of a node, or -EFAULT if runtime is NULL.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_runtime_nodes(runtime: *const aerostat_runtime) -> c_int {
    call(|| {
        // SAFETY: NULL or alive (the header's rule for handles).
        let handle = handle::required(unsafe { handle::get(runtime) })?;
        to_int(handle.runtime.nodes())
    })
}

/// Counts the runtime's worker threads.
///
/// Returns: the number of threads, at least 1, or -EFAULT if runtime is NULL.
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_runtime_workers(runtime: *const aerostat_runtime) -> c_int {
    call(|| {
        // SAFETY: NULL or alive (the header's rule for handles).
        let handle = handle::required(unsafe { handle::get(runtime) })?;
        to_int(handle.runtime.workers())
    })
}

fn to_int(count: u32) -> Result<c_int, Refusal> {
    Ok(c_int::try_from(count).unwrap_or(c_int::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_librarys_threads_block_the_signals_of_the_vmm() {
        let config = aerostat_runtime_config {
            size: 16,
            workers_per_node: 2,
            ..Default::default()
        };
        let mut runtime = std::ptr::null_mut();
        // SAFETY: the pointers are to this function's variables.
        unsafe {
            assert_eq!(aerostat_runtime_new(&raw const config, &raw mut runtime), 0);
            assert!(aerostat_runtime_workers(runtime) >= 2);
        }

        // A thread gives itself its name when it begins to run.
        let mut blocked = masks_of_workers();
        while blocked.len() < 2 {
            std::thread::yield_now();
            blocked = masks_of_workers();
        }

        let sigterm = 1 << (libc::SIGTERM - 1);
        assert!(
            blocked.iter().all(|mask| mask & sigterm != 0),
            "{blocked:x?}"
        );
        // SAFETY: the handle is alive, and used no more.
        unsafe { aerostat_runtime_destroy(&raw mut runtime) };
    }

    /// The signals that threads called `aerostat-<node>.<number>` block, a bit each.
    fn masks_of_workers() -> Vec<u64> {
        fs::read_dir("/proc/self/task")
            .unwrap()
            // Threads of other tests' runtimes may end while they are looked at.
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok())
            .filter(|status| {
                let name = status.lines().next().unwrap_or_default();
                name.starts_with("Name:\taerostat-") && name.contains('.')
            })
            .filter_map(|status| {
                let line = status
                    .lines()
                    .find_map(|line| line.strip_prefix("SigBlk:"))?;
                u64::from_str_radix(line.trim(), 16).ok()
            })
            .collect()
    }
}
