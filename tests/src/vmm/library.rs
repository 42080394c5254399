//! The shared object: found, loaded, and its symbols resolved.
//!
//! Types come from the crate that the shared object is built from; the compiler checks each entry
//! of the table below against the function of that name. The calls themselves go through the
//! loaded file, as those of a VMM do.
#![allow(unsafe_code, reason = "loads a shared object")]

use super::error::{Result, VmmError};
use aerostat::{
    aerostat_balloon, aerostat_cgroup_account, aerostat_completion, aerostat_counters,
    aerostat_device, aerostat_device_config, aerostat_element, aerostat_guest_stats,
    aerostat_history_entry, aerostat_log_callback, aerostat_memory, aerostat_memory_region,
    aerostat_node_balloon, aerostat_queue_config, aerostat_queue_position, aerostat_range,
    aerostat_runtime, aerostat_runtime_config,
};
use std::env;
use std::ffi::{c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The file's name.
const FILE: &str = "libaerostat.so";

macro_rules! symbols {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of the loaded library, by their C names.
        #[derive(Debug)]
        #[expect(missing_docs, reason = "include/aerostat.h describes each of them")]
        pub struct Symbols {
            $(pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        // A signature that differs from the function's own does not compile.
        $(const _: unsafe extern "C" fn($($argument),*) $(-> $result)? = aerostat::$name;)*

        /// Every name in the table.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Symbols {
            fn resolve(library: &libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: the file was built from the crate whose function of this name
                        // the constant above has checked the type against.
                        *unsafe { library.get(name) }?
                    },)*
                })
            }
        }
    };
}

symbols! {
    aerostat_version() -> u32;
    aerostat_version_string() -> *const c_char;
    aerostat_last_error() -> *const c_char;
    aerostat_set_log(aerostat_log_callback, *mut c_void, c_int) -> c_int;
    aerostat_runtime_new(*const aerostat_runtime_config, *mut *mut aerostat_runtime) -> c_int;
    aerostat_runtime_destroy(*mut *mut aerostat_runtime);
    aerostat_runtime_nodes(*const aerostat_runtime) -> c_int;
    aerostat_runtime_workers(*const aerostat_runtime) -> c_int;
    aerostat_runtime_discard(
        *const aerostat_runtime, *const aerostat_memory, *const aerostat_range, usize, *mut c_int
    ) -> c_int;
    aerostat_memory_new(
        *const aerostat_memory_region, usize, *mut *mut aerostat_memory
    ) -> c_int;
    aerostat_memory_destroy(*mut *mut aerostat_memory);
    aerostat_device_new(
        *mut aerostat_runtime, *const aerostat_device_config, *mut *mut aerostat_device
    ) -> c_int;
    aerostat_device_destroy(*mut *mut aerostat_device);
    aerostat_device_state(*const aerostat_device) -> c_int;
    aerostat_device_set_memory(*mut aerostat_device, *const aerostat_memory) -> c_int;
    aerostat_device_offered_features(*const aerostat_device, *mut u64) -> c_int;
    aerostat_device_features(*const aerostat_device, *mut u64) -> c_int;
    aerostat_device_set_features(*mut aerostat_device, u64) -> c_int;
    aerostat_device_read_config(*const aerostat_device, u64, *mut c_void, usize) -> c_int;
    aerostat_device_write_config(*mut aerostat_device, u64, *const c_void, usize) -> c_int;
    aerostat_device_start_queue(*mut aerostat_device, u32, *const aerostat_queue_config) -> c_int;
    aerostat_device_stop_queue(*mut aerostat_device, u32, *mut aerostat_queue_position) -> c_int;
    aerostat_device_set_queue_call(*mut aerostat_device, u32, i32) -> c_int;
    aerostat_device_activate(*mut aerostat_device) -> c_int;
    aerostat_device_pause(*mut aerostat_device) -> c_int;
    aerostat_device_resume(*mut aerostat_device) -> c_int;
    aerostat_device_reset(*mut aerostat_device) -> c_int;
    aerostat_device_reset_balloon(*mut aerostat_device) -> c_int;
    aerostat_device_inhibit(*mut aerostat_device) -> c_int;
    aerostat_device_uninhibit(*mut aerostat_device) -> c_int;
    aerostat_device_set_target(*mut aerostat_device, u64) -> c_int;
    aerostat_device_set_node_targets(*mut aerostat_device, *const u64, usize) -> c_int;
    aerostat_device_query_node(*const aerostat_device, u32, *mut aerostat_node_balloon) -> c_int;
    aerostat_device_set_write_behind(*mut aerostat_device, u64, u32) -> c_int;
    aerostat_device_flush(*mut aerostat_device) -> c_int;
    aerostat_device_set_deflate(*mut aerostat_device, u32) -> c_int;
    aerostat_device_query(*const aerostat_device, *mut aerostat_balloon) -> c_int;
    aerostat_device_guest_stats(*mut aerostat_device, u32, *mut aerostat_guest_stats) -> c_int;
    aerostat_device_set_stats_interval(*mut aerostat_device, u32) -> c_int;
    aerostat_device_start_hints(*mut aerostat_device, u32) -> c_int;
    aerostat_device_finish_hints(*mut aerostat_device) -> c_int;
    aerostat_device_take_hints(*mut aerostat_device, *mut aerostat_range, usize, *mut u32) -> c_int;
    aerostat_device_history(
        *const aerostat_device, u64, *mut aerostat_history_entry, usize
    ) -> c_int;
    aerostat_device_attach_cgroup(*mut aerostat_device, *const c_char) -> c_int;
    aerostat_device_detach_cgroup(*mut aerostat_device) -> c_int;
    aerostat_device_query_cgroup(*const aerostat_device, *mut aerostat_cgroup_account) -> c_int;
    aerostat_device_save(*mut aerostat_device, *mut c_void, usize, *mut usize) -> c_int;
    aerostat_device_restore(*mut aerostat_device, *const c_void, usize) -> c_int;
    aerostat_device_saved_position(
        *const aerostat_device, u32, *mut aerostat_queue_position
    ) -> c_int;
    aerostat_device_counters(*const aerostat_device, *mut aerostat_counters) -> c_int;
    aerostat_device_node_counters(*const aerostat_device, i32, *mut aerostat_counters) -> c_int;
    aerostat_device_set_extra_grant(*mut aerostat_device, u64) -> c_int;
    aerostat_vmware_command(*mut aerostat_device, u64, u64, u64, *mut u32, *mut u64) -> c_int;
    aerostat_device_submit(*mut aerostat_device, *const aerostat_element, usize) -> c_int;
    aerostat_device_completions(*mut aerostat_device, *mut aerostat_completion, usize) -> c_int;
}

/// The library, loaded at the first call. It stays loaded: threads of it may outlive any handle.
///
/// # Errors
/// The file is missing, or lacks a symbol.
pub fn symbols() -> Result<&'static Symbols> {
    static SYMBOLS: OnceLock<Symbols> = OnceLock::new();
    match SYMBOLS.get() {
        Some(symbols) => Ok(symbols),
        None => {
            let symbols = load(&find()?)?;
            Ok(SYMBOLS.get_or_init(|| symbols))
        }
    }
}

/// Where the shared object is: `AEROSTAT_LIB_DIR`, else what cargo built along with this program.
///
/// # Errors
/// [`VmmError::NoLibrary`] names the directories.
pub fn find() -> Result<PathBuf> {
    let looked_in = match env::var_os("AEROSTAT_LIB_DIR") {
        Some(directory) => vec![PathBuf::from(directory)],
        None => build_directories(),
    };
    let mut files = looked_in.iter().map(|directory| directory.join(FILE));
    match files.find(|file| file.is_file()) {
        Some(file) => Ok(file),
        None => Err(VmmError::NoLibrary { looked_in }),
    }
}

/// Cargo puts the libraries that a program depends on into `deps`, where test programs are too;
/// other programs are one level up. What is built on request only comes second: it may be older.
fn build_directories() -> Vec<PathBuf> {
    let program = env::current_exe().unwrap_or_default();
    let beside = program.parent().unwrap_or(Path::new(".")).to_path_buf();
    let above = beside.parent().unwrap_or(Path::new(".")).to_path_buf();
    if beside.ends_with("deps") {
        vec![beside, above]
    } else {
        vec![beside.join("deps"), beside]
    }
}

fn load(path: &Path) -> Result<Symbols> {
    let bad = |error: libloading::Error| VmmError::BadLibrary {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    // SAFETY: the library's initialisers are those of Rust's runtime only, which may be run by any
    // thread, and it is never unloaded.
    let library = unsafe { libloading::Library::new(path) }.map_err(bad)?;
    let symbols = Symbols::resolve(&library).map_err(bad)?;
    std::mem::forget(library);
    Ok(symbols)
}
