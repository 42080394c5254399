//! Where the build's results are: beside the running program, whatever the target directory is.

use std::{env, path::PathBuf};

/// `target/<profile>`, derived from the running test or program.
#[must_use]
pub fn directory() -> PathBuf {
    let mut directory = env::current_exe().unwrap_or_else(|_| PathBuf::from("target/debug/x"));
    directory.pop();
    // Test programs are one level deeper than the others.
    if directory.file_name().is_some_and(|name| name == "deps") {
        directory.pop();
    }
    directory
}

/// The vhost-user back-end: `AEROSTAT_VHOST_USER`, or the one built with the running program.
#[must_use]
pub fn vhost_user_backend() -> PathBuf {
    env::var_os("AEROSTAT_VHOST_USER")
        .map_or_else(|| directory().join("aerostat-vhost-user"), PathBuf::from)
}

/// The reclaimer daemon: `AEROSTAT_AEROSTATD`, or the one built with the running program.
#[must_use]
pub fn aerostatd() -> PathBuf {
    env::var_os("AEROSTAT_AEROSTATD").map_or_else(|| directory().join("aerostatd"), PathBuf::from)
}
