//! How devices and memory tables are made, right or wrong.

use super::arguments::{Fd, RegionArgument, Size, checked};
use super::{MEMORY_BYTES, Play, SLOTS};
use aerostat::*;
use std::ffi::c_void;
use std::ptr::null_mut;

impl Play<'_> {
    pub(super) fn make_device(
        &mut self,
        device: u8,
        size: Size,
        flags: u8,
        features: u64,
        fds: [Fd; 2],
        null: u8,
    ) {
        let supported = aerostat_device_config {
            size: size.of(24).min(24),
            flags: flags.into(),
            features: match features {
                u64::MAX => ::aerostat_device::DeviceKind::VirtioBalloon.supported_features(),
                some if some % 4 == 0 => some,
                some => some & ::aerostat_device::DeviceKind::VirtioBalloon.supported_features(),
            },
            config_fd: self.host.fd(fds[0]),
            completion_fd: self.host.fd(fds[1]),
            kind: u32::from(null >> 6),
            reserved: 0,
        };
        let index = usize::from(device) % SLOTS;
        self.destroy(index);
        let runtime = if null == 1 {
            null_mut()
        } else {
            self.host.runtime
        };
        let config = if null == 2 {
            std::ptr::null()
        } else {
            &raw const supported
        };
        let place = if null == 3 {
            null_mut()
        } else {
            &raw mut self.devices[index]
        };
        // SAFETY: the handle is alive or NULL, the pointers are to variables, or NULL.
        let answer = checked(unsafe { aerostat_device_new(runtime, config, place) });
        assert_eq!(
            answer == 0,
            !self.devices[index].is_null(),
            "a device, or NULL"
        );
    }

    pub(super) fn destroy(&mut self, index: usize) {
        // SAFETY: alive or NULL, and used no more.
        unsafe { aerostat_device_destroy(&raw mut self.devices[index]) };
        assert!(self.devices[index].is_null(), "destroyed");
        self.elements[index].clear();
    }

    pub(super) fn make_memory(&mut self, memory: u8, regions: &[RegionArgument], null: u8) {
        let page = 4096;
        let regions: Vec<_> = regions
            .iter()
            .take(8)
            .map(|from| aerostat_memory_region {
                size: from.size.of(64).min(64),
                flags: u32::from(from.flags & 7) | if from.flags > 250 { 64 } else { 0 },
                gpa: u64::from(from.gpa) * page + u64::from(from.gpa == 255),
                len_bytes: u64::from(from.pages % 17) * page,
                hva: if from.null {
                    null_mut()
                } else {
                    self.host.memory as *mut c_void
                },
                fd: self.host.fd(from.fd),
                node: from.node.into(),
                fd_offset_bytes: u64::from(from.offset / 8) * page,
                page_size_bytes: [0, 4096, 16384, 12288, 1 << 21, 1 << 40]
                    [usize::from(from.page % 6)],
                guest_node: u32::from(from.pages / 17),
                reserved: 0,
            })
            .collect();
        let index = usize::from(memory) % SLOTS;
        let count = if null == 2 { usize::MAX } else { regions.len() };
        let from = if null == 1 {
            std::ptr::null()
        } else {
            regions.as_ptr()
        };
        // SAFETY: the old handle is used no more; `from` has as many regions as are said, all of one
        // size, or the count is refused; their memory stays mapped.
        unsafe {
            aerostat_memory_destroy(&raw mut self.memories[index]);
            checked(aerostat_memory_new(
                from,
                count,
                &raw mut self.memories[index],
            ));
        }
    }

    pub(super) fn set_up(&mut self, device: u8, elements: bool) {
        let region = aerostat_memory_region {
            size: 64,
            flags: 0,
            gpa: 0,
            len_bytes: MEMORY_BYTES as u64,
            hva: self.host.memory as *mut c_void,
            fd: -1,
            node: -1,
            fd_offset_bytes: 0,
            page_size_bytes: 0,
            guest_node: 0,
            reserved: 0,
        };
        let mut memory = null_mut();
        let device = self.device(device);
        // SAFETY: as in `call`.
        unsafe {
            checked(aerostat_memory_new(&raw const region, 1, &raw mut memory));
            checked(aerostat_device_set_memory(device, memory));
            aerostat_memory_destroy(&raw mut memory);
            checked(aerostat_device_set_features(device, 1 << 32 | 0x23));
        }
        for index in 0..4 {
            let at = u64::from(index) * 4096;
            let config = aerostat_queue_config {
                size: 48,
                flags: u32::from(elements),
                queue_size: 16,
                next_avail: 0,
                next_used: 0,
                reserved: 0,
                kick_fd: self.host.fd(Fd::Event),
                call_fd: self.host.fd(Fd::Other),
                desc_gpa: at,
                avail_gpa: at + 0x800,
                used_gpa: at + 0xc00,
            };
            // SAFETY: as in `call`.
            checked(unsafe { aerostat_device_start_queue(device, index, &raw const config) });
        }
        // SAFETY: as in `call`.
        checked(unsafe { aerostat_device_activate(device) });
    }
}
