//! The guest's file system: busybox, the virtio drivers and `tests/guest/init`, as an initramfs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{cpio::Archive, guest::GuestError, host_vm::HostVmPrerequisites};

const INIT: &str = include_str!("../../guest/init");

/// In the order in which they need each other; `lib/modules/order` tells init.
const MODULES: [&str; 6] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
];

/// Builds the archive; `programs` come into `bin`, and `driver` is loaded last.
pub(super) fn build(
    parts: &HostVmPrerequisites,
    programs: &[PathBuf],
    driver: Option<&Path>,
) -> Result<Vec<u8>, GuestError> {
    let mut archive = Archive::default();
    // The kernel opens its console before init can mount anything.
    archive.character_device("dev/console", (5, 1));
    archive.program("bin/busybox", &read(&parts.busybox)?);
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        archive.program(&format!("bin/{name}"), &read(program)?);
    }
    let mut order = String::new();
    let stock = MODULES.map(|module| parts.drivers.join(format!("virtio/{module}.ko")));
    for file in stock.iter().map(PathBuf::as_path).chain(driver) {
        let module = file.file_stem().unwrap_or_default().to_string_lossy();
        archive.program(&format!("lib/modules/{module}.ko"), &read(file)?);
        order += &format!("{module}\n");
    }
    archive.program("lib/modules/order", order.as_bytes());
    archive.program("init", INIT.as_bytes());
    Ok(archive.finish())
}

fn read(file: &Path) -> Result<Vec<u8>, GuestError> {
    fs::read(file).map_err(GuestError::io("reading", file))
}
