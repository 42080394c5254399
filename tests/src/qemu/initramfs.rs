//! The guest's file system: busybox, the virtio drivers and `tests/guest/init`, as an initramfs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::Balloon;
use crate::{cpio::Archive, guest::GuestError, host_vm::HostVmPrerequisites};

const INIT: &str = include_str!("../../guest/init");

/// In the order in which they need each other; `lib/modules/order` tells init.
const VIRTIO: &[&str] = &[
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci",
    "virtio/virtio_balloon",
];
const VMWARE: &[&str] = &["misc/vmw_vmci/vmw_vmci", "misc/vmw_balloon"];

/// Builds the archive; `programs` come into `bin`, and `driver` is loaded last.
pub(super) fn build(
    parts: &HostVmPrerequisites,
    balloon: Balloon,
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
    let stock = match balloon {
        Balloon::Vmware => VMWARE,
        _ => VIRTIO,
    };
    let stock: Vec<_> = stock
        .iter()
        .map(|module| parts.drivers.join(format!("{module}.ko")))
        .collect();
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
