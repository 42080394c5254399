//! Huge frames: what is smaller than a page of the host is held until the frame is complete, across
//! buffers and kicks, and the books tell of it (design, "Huge frames"; invariant I4).
//!
//! On any host, a region of ordinary memory is declared to have large pages, which the library has to
//! treat the same way: 64 KiB as on hosts with such pages, and 2 MiB. The same tests, and those that
//! look at what the kernel itself says is free, run in a host VM with real huge pages.
#![expect(
    clippy::cast_possible_truncation,
    reason = "page frame numbers and sizes of these guests are small"
)]

use aerostat_tests::host_vm::{HostVmConfig, run_tests};

#[test]
fn host_vm_with_huge_pages() {
    let config = HostVmConfig::new()
        // Huge pages of 1 GiB have to fit beside the kernel.
        .memory_mib(3584)
        .hugepages_2m(48)
        .hugepages_1g(1)
        .transparent_hugepages("madvise")
        .exact_free_memory()
        .carry_library();
    run_tests(&config, &["on_any_host::", "inside::"]);
}

mod on_any_host {
    use aerostat_tests::vmm::allocator::Order;
    use aerostat_tests::vmm::mapping::{Backing, Mapping};
    use aerostat_tests::vmm::ram::RegionSpec;
    use aerostat_tests::vmm::working_set::WorkingSet;
    use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

    /// Where the region with huge frames begins.
    const HIGH: u64 = 64 * MIB;
    const FIRST: u64 = HIGH / PAGE_BYTES;
    /// Frames in it.
    const FRAMES: u64 = 8;

    /// Memory in frames of one size.
    #[derive(Clone, Copy, Debug)]
    struct Kind {
        backing: Backing,
        frame_bytes: u64,
    }

    impl Kind {
        /// Ordinary memory in frames of 2 MiB.
        fn declared(backing: Backing) -> Self {
            Self {
                backing,
                frame_bytes: 2 * MIB,
            }
        }

        /// Pages of 4 KiB in a frame.
        fn pages(self) -> u64 {
            self.frame_bytes / PAGE_BYTES
        }

        /// Pages of the n-th frame.
        fn frame(self, n: u64) -> Vec<u64> {
            (FIRST + n * self.pages()..FIRST + (n + 1) * self.pages()).collect()
        }

        /// A guest with its rings in ordinary memory, and eight frames.
        fn boot(self, vmm: &Vmm) -> Result<Guest> {
            let frames = RegionSpec {
                page_size_bytes: self.frame_bytes,
                ..RegionSpec::new(HIGH, FRAMES * self.frame_bytes, self.backing)
            };
            let low = RegionSpec::new(0, 8 * MIB, Backing::Anonymous);
            vmm.boot(&GuestConfig::with_regions(vec![low, frames]))
        }

        /// Writes to all frames.
        fn fill(self, guest: &Guest) -> WorkingSet {
            let pages = (FIRST..FIRST + FRAMES * self.pages()).collect();
            WorkingSet::fill(guest.ram(), pages, 8)
        }
    }

    fn kinds() -> Vec<Kind> {
        let of = |backing, frame_bytes| Kind {
            backing,
            frame_bytes,
        };
        let memfd = Backing::Memfd { offset_bytes: 0 };
        let mut kinds = vec![
            of(memfd, 64 << 10),
            of(Backing::Anonymous, 64 << 10),
            of(memfd, 2 * MIB),
            of(Backing::Anonymous, 2 * MIB),
        ];
        match huge_pages_free() {
            Some(FRAMES..) => {
                kinds.push(of(Backing::Hugetlb, 2 * MIB));
                kinds.push(of(Backing::AnonymousHugetlb, 2 * MIB));
            }
            _ => println!("this host has no huge pages to spare: tested on declared frames only"),
        }
        kinds
    }

    fn huge_pages_free() -> Option<u64> {
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    #[test]
    fn a_frame_is_freed_when_its_last_page_comes() -> Result<()> {
        for kind in kinds() {
            let vmm = Vmm::new()?;
            let guest = kind.boot(&vmm)?;
            let contents = kind.fill(&guest);
            let full = guest.ram().allocated_bytes()?;
            let (most, last) = (
                &kind.frame(1)[..kind.pages() as usize - 1],
                kind.frame(1)[kind.pages() as usize - 1],
            );

            guest.driver().give(most)?;
            let books = guest.settled_books()?.balloon;
            assert_eq!(
                (books.held_bytes, books.discarded_bytes),
                (kind.frame_bytes - PAGE_BYTES, 0)
            );
            guest.assert_intact(&contents);

            guest.driver().give(&[last])?;
            let books = guest.settled_books()?.balloon;
            assert_eq!(
                (books.held_bytes, books.discarded_bytes),
                (0, kind.frame_bytes)
            );
            // The driver's own memory may have grown by a page or two.
            assert!(full - guest.ram().allocated_bytes()? + 4 * PAGE_BYTES >= kind.frame_bytes);
            assert_eq!(
                contents.damaged(guest.ram()),
                kind.frame(1),
                "that frame and no other"
            );
        }
        Ok(())
    }

    /// Pages that are taken back from an incomplete frame were never gone; those of a complete one
    /// reopen it: the rest counts as held again, and the frame is freed anew when it is complete again.
    #[test]
    fn taking_a_page_back_withdraws_or_reopens() -> Result<()> {
        for kind in kinds() {
            let vmm = Vmm::new()?;
            let guest = kind.boot(&vmm)?;
            let contents = kind.fill(&guest);
            let pages = kind.frame(2);

            // Five eighths in, two of them back.
            let eighth = pages.len() / 8;
            let back = eighth..3 * eighth;
            let bytes = |pages: usize| pages as u64 * PAGE_BYTES;
            guest.driver().give(&pages[..5 * eighth])?;
            guest.driver().take(&pages[back.clone()])?;
            let books = guest.settled_books()?.balloon;
            assert_eq!(books.held_bytes, bytes(3 * eighth));
            assert_eq!(books.withdrawn_bytes, bytes(2 * eighth));
            guest.assert_intact(&contents);

            guest.driver().give(&pages[back])?;
            guest.driver().give(&pages[5 * eighth..])?;
            assert_eq!(
                guest.settled_books()?.balloon.discarded_bytes,
                kind.frame_bytes
            );

            guest.driver().take(&pages[7..8])?;
            let books = guest.settled_books()?.balloon;
            assert_eq!(books.held_bytes, kind.frame_bytes - PAGE_BYTES);
            assert_eq!(books.reopened_bytes, kind.frame_bytes - PAGE_BYTES);
            // I1: the guest's page is not touched by whatever comes next.
            let mine = WorkingSet::fill(guest.ram(), pages[7..8].to_vec(), 4);
            guest.driver().give(&kind.frame(3))?;
            guest.assert_intact(&mine);

            guest.driver().give(&pages[7..8])?;
            let books = guest.settled_books()?;
            assert_eq!(books.balloon.held_bytes, 0);
            assert_eq!(books.balloon.discarded_bytes, 3 * kind.frame_bytes);
            assert_eq!(books.returned_bytes, bytes(2 * eighth + 1));
        }
        Ok(())
    }

    /// Linux's arrays of 1 MiB never fill a frame by themselves; scattered ones fill them in the end.
    #[test]
    fn scattered_pages_free_all_frames_in_the_end() -> Result<()> {
        for kind in kinds() {
            let vmm = Vmm::new()?;
            let guest = kind.boot(&vmm)?;
            kind.fill(&guest);
            let full = guest.ram().allocated_bytes()?;
            let low: Vec<u64> = guest
                .driver()
                .allocator
                .unused()
                .filter(|pfn| *pfn < FIRST)
                .collect();
            for pfn in low {
                guest.driver().allocator.take(pfn);
            }
            guest.driver().allocator.set_order(Order::Random(3));
            while guest.driver().fill(256)? > 0 {
                let books = guest.books()?.balloon;
                assert_eq!(books.held_bytes % PAGE_BYTES, 0);
            }
            let books = guest.settled_books()?.balloon;
            assert_eq!(
                (books.held_bytes, books.discarded_bytes),
                (0, FRAMES * kind.frame_bytes)
            );
            assert!(
                full - guest.ram().allocated_bytes()? + 4 * PAGE_BYTES >= FRAMES * kind.frame_bytes
            );

            while guest.driver().leak(256)? > 0 {
                guest.books()?;
            }
            let books = guest.settled_books()?;
            assert_eq!(books.balloon.held_bytes, 0);
            assert_eq!(books.balloon.reopened_bytes, books.balloon.withdrawn_bytes);
            assert_eq!(books.returned_bytes, FRAMES * kind.frame_bytes);
        }
        Ok(())
    }

    #[test]
    fn reports_of_less_than_a_frame_are_left_alone() -> Result<()> {
        for kind in kinds() {
            let vmm = Vmm::new()?;
            let guest = kind.boot(&vmm)?;
            let contents = kind.fill(&guest);
            // Half of frame 0, all of 1 and 2, a page of 3.
            guest.driver().report(&[(
                FIRST + kind.pages() / 2,
                2 * kind.pages() + kind.pages() / 2 + 1,
            )])?;
            let books = guest.settled_books()?.report;
            assert_eq!(books.discarded_bytes, 2 * kind.frame_bytes);
            assert_eq!(
                books.skipped_partial_bytes,
                kind.frame_bytes / 2 + PAGE_BYTES
            );
            assert_eq!(
                contents.damaged(guest.ram()),
                [kind.frame(1), kind.frame(2)].concat()
            );
        }
        Ok(())
    }

    #[test]
    fn reset_and_memory_changes_forget_what_was_held() -> Result<()> {
        let kind = Kind::declared(Backing::Anonymous);
        let vmm = Vmm::new()?;
        let mut guest = kind.boot(&vmm)?;
        let contents = kind.fill(&guest);
        guest.driver().give(&kind.frame(1)[..100])?;
        assert_eq!(guest.books()?.balloon.held_bytes, 100 * PAGE_BYTES);
        guest.restart_driver()?;
        let books = guest.books()?.balloon;
        assert_eq!(
            (books.held_bytes, books.withdrawn_bytes),
            (0, 100 * PAGE_BYTES)
        );

        guest.driver().give(&kind.frame(2)[..50])?;
        guest.change_memory(None, Some(HIGH))?;
        let books = guest.books()?.balloon;
        assert_eq!(
            (books.held_bytes, books.withdrawn_bytes),
            (0, 150 * PAGE_BYTES)
        );
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        let _ = contents;
        Ok(())
    }

    /// Frames that were complete while discarding was inhibited are counted as skipped, once.
    #[test]
    fn frames_that_complete_while_inhibited_are_skipped() -> Result<()> {
        let kind = Kind::declared(Backing::Memfd { offset_bytes: 0 });
        let vmm = Vmm::new()?;
        let guest = kind.boot(&vmm)?;
        let contents = kind.fill(&guest);
        guest.driver().give(&kind.frame(0)[..200])?;
        guest.device().inhibit()?;
        guest.driver().give(&kind.frame(0)[200..])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(
            (books.skipped_inhibited_bytes, books.held_bytes),
            (kind.frame_bytes, 0)
        );
        guest.assert_intact(&contents);
        guest.device().uninhibit()?;
        guest.driver().take(&kind.frame(0)[..1])?;
        guest.driver().give(&kind.frame(0)[..1])?;
        assert_eq!(
            guest.settled_books()?.balloon.discarded_bytes,
            kind.frame_bytes
        );
        Ok(())
    }

    /// The mapping that these tests rely on has the alignment that frames need.
    #[test]
    fn mappings_are_aligned_to_frames() -> Result<()> {
        for kind in kinds() {
            let mapping = Mapping::new("frames", kind.backing, kind.frame_bytes)?;
            assert!((mapping.base() as usize).is_multiple_of(kind.frame_bytes as usize));
            assert_eq!(mapping.len_bytes(), kind.frame_bytes);
        }
        Ok(())
    }
}

/// What the kernel of the host says is free. Resident sets lie with transparent huge pages.
mod inside {
    use aerostat::AEROSTAT_DEFLATE_REBUILD;
    use aerostat_tests::vmm::mapping::Backing;
    use aerostat_tests::vmm::ram::RegionSpec;
    use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
    use std::fs;
    use std::time::{Duration, Instant};

    const HIGH: u64 = 1 << 30;
    const FIRST: u64 = HIGH / PAGE_BYTES;
    /// How far other things on this host move its free memory meanwhile.
    const NOISE: u64 = 6 * MIB;

    fn meminfo(name: &str) -> u64 {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        let value: u64 = word.and_then(|word| word.parse().ok()).unwrap_or(0);
        // Pages of hugetlbfs are counted, everything else is in KiB.
        if name.starts_with("HugePages") {
            value
        } else {
            value << 10
        }
    }

    fn free_gigantic() -> u64 {
        let path = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// A guest whose memory at 1 GiB is as `spec` says, all of it touched.
    fn boot(vmm: &Vmm, spec: RegionSpec) -> Result<Guest> {
        let low = RegionSpec::new(0, 16 * MIB, Backing::Anonymous);
        let guest = vmm.boot(&GuestConfig::with_regions(vec![low, spec]))?;
        let end = FIRST + spec.len_bytes / PAGE_BYTES;
        (FIRST..end).for_each(|pfn| guest.ram().touch(pfn));
        Ok(guest)
    }

    #[test]
    #[ignore = "needs huge pages: runs in the host VM"]
    fn huge_pages_go_back_to_the_pool_of_the_host() -> Result<()> {
        for backing in [Backing::Hugetlb, Backing::AnonymousHugetlb] {
            let before = meminfo("HugePages_Free");
            let vmm = Vmm::new()?;
            let spec = RegionSpec {
                page_size_bytes: 2 * MIB,
                ..RegionSpec::new(HIGH, 32 * MIB, backing)
            };
            let guest = boot(&vmm, spec)?;
            assert_eq!(meminfo("HugePages_Free"), before - 16, "{backing:?}");

            // Fifteen and a half frames: the half stays with the guest's host.
            let pages: Vec<u64> = (FIRST..FIRST + 15 * 512 + 256).collect();
            guest.driver().give(&pages)?;
            let books = guest.settled_books()?.balloon;
            assert_eq!(books.discarded_bytes, 30 * MIB);
            assert_eq!(books.held_bytes, MIB);
            assert_eq!(meminfo("HugePages_Free"), before - 1, "{backing:?}");

            // A page of a frame that is gone: the frame comes back when it is used.
            guest.driver().take(&pages[..1])?;
            guest.ram().touch(pages[0]);
            assert_eq!(
                guest.books()?.balloon.held_bytes,
                MIB + 2 * MIB - PAGE_BYTES
            );
            assert_eq!(meminfo("HugePages_Free"), before - 2, "{backing:?}");
        }
        Ok(())
    }

    #[test]
    #[ignore = "needs a huge page of 1 GiB: runs in the host VM"]
    fn a_gigantic_page_is_held_until_its_last_page_comes() -> Result<()> {
        assert_eq!(free_gigantic(), 1, "the host VM was to have one");
        let vmm = Vmm::new()?;
        let spec = RegionSpec::new(HIGH, 1 << 30, Backing::HugetlbGigantic);
        let low = RegionSpec::new(0, 16 * MIB, Backing::Anonymous);
        let guest = vmm.boot(&GuestConfig::with_regions(vec![low, spec]))?;
        guest.ram().touch(FIRST);
        assert_eq!(free_gigantic(), 0);

        let pages: Vec<u64> = (FIRST..2 * FIRST).collect();
        let (most, last) = pages.split_at(pages.len() - 1);
        guest.driver().give(most)?;
        assert_eq!(
            guest.settled_books()?.balloon.held_bytes,
            (1 << 30) - PAGE_BYTES
        );
        assert_eq!(free_gigantic(), 0);
        guest.driver().give(last)?;
        let books = guest.settled_books()?.balloon;
        assert_eq!((books.held_bytes, books.discarded_bytes), (0, 1 << 30));
        assert_eq!(free_gigantic(), 1);
        Ok(())
    }

    /// How many bytes are free beyond `before`, once that is `expected` or some seconds have passed: the
    /// lists of each processor, which are not counted, empty themselves by and by.
    fn freed_since(before: u64, expected: u64) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let freed = meminfo("MemFree").saturating_sub(before);
            if freed >= expected || Instant::now() > deadline {
                return freed;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What AEROSTAT_REGION_TRANSPARENT_HUGE is for, and what its absence means.
    #[test]
    #[ignore = "measures the free memory of the whole host: runs in the host VM"]
    fn transparent_huge_pages_are_freed_whole_or_not_at_all() -> Result<()> {
        const SIZE: u64 = 128 * MIB;
        for transparent_huge in [true, false] {
            let vmm = Vmm::new()?;
            let spec = RegionSpec {
                transparent_huge,
                ..RegionSpec::new(HIGH, SIZE, Backing::AnonymousHuge)
            };
            let huge_before = meminfo("AnonHugePages");
            let guest = boot(&vmm, spec)?;
            let huge = meminfo("AnonHugePages");
            assert!(
                huge >= huge_before + SIZE,
                "no transparent huge pages: {huge} bytes"
            );
            let free = meminfo("MemFree");

            // Every second page: half of the memory, and none of its frames.
            let end = FIRST + SIZE / PAGE_BYTES;
            let (even, odd): (Vec<u64>, Vec<u64>) = (FIRST..end).partition(|pfn| pfn % 2 == 0);
            guest.driver().give(&even)?;
            let books = guest.settled_books()?.balloon;
            let freed = meminfo("MemFree").saturating_sub(free);
            println!(
                "transparent_huge {transparent_huge}: {} MiB discarded, {} MiB held, {} MiB really free, \
                 huge pages {} MiB of {}",
                books.discarded_bytes >> 20,
                books.held_bytes >> 20,
                freed >> 20,
                meminfo("AnonHugePages") >> 20,
                huge >> 20,
            );
            assert!(freed < NOISE, "{freed} bytes");
            if transparent_huge {
                assert_eq!((books.discarded_bytes, books.held_bytes), (0, SIZE / 2));
                assert_eq!(meminfo("AnonHugePages"), huge, "none was split");
            } else {
                // The library cannot know; its documentation says so.
                assert_eq!((books.discarded_bytes, books.held_bytes), (SIZE / 2, 0));
            }

            guest.driver().give(&odd)?;
            let books = guest.settled_books()?.balloon;
            assert_eq!((books.discarded_bytes, books.held_bytes), (SIZE, 0));
            let freed = freed_since(free, SIZE - NOISE);
            assert!(freed >= SIZE - NOISE, "{freed} bytes");
        }
        Ok(())
    }

    /// AEROSTAT_DEFLATE_REBUILD: frames that were split are whole again when the guest has them back.
    #[test]
    #[ignore = "counts the huge pages of the whole host: runs in the host VM"]
    fn frames_taken_back_are_rebuilt_where_that_is_asked_for() -> Result<()> {
        const SIZE: u64 = 64 * MIB;
        for flags in [0, AEROSTAT_DEFLATE_REBUILD] {
            let vmm = Vmm::new()?;
            let guest = boot(&vmm, RegionSpec::new(HIGH, SIZE, Backing::AnonymousHuge))?;
            guest.device().set_deflate(flags)?;
            let huge = meminfo("AnonHugePages");
            let end = FIRST + SIZE / PAGE_BYTES;
            let even: Vec<u64> = (FIRST..end).step_by(2).collect();
            guest.driver().give(&even)?;
            guest.settled_books()?;
            let split = meminfo("AnonHugePages");
            assert!(split + SIZE <= huge, "{split} of {huge} bytes");
            guest.driver().take(&even)?;
            let back = meminfo("AnonHugePages") - split;
            println!("flags {flags}: {} MiB in huge pages again", back >> 20);
            assert_eq!(back, if flags == 0 { 0 } else { SIZE });
        }
        Ok(())
    }

    /// Shared memory is split and freed at once, so nothing is held, with the flag or without.
    #[test]
    #[ignore = "changes a setting of the host: runs in the host VM"]
    fn transparent_huge_pages_of_a_memfd_are_freed_page_by_page() -> Result<()> {
        const SIZE: u64 = 128 * MIB;
        fs::write(
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "advise",
        )
        .ok();
        let vmm = Vmm::new()?;
        let spec = RegionSpec {
            transparent_huge: true,
            ..RegionSpec::new(HIGH, SIZE, Backing::MemfdHuge)
        };
        let guest = boot(&vmm, spec)?;
        let huge = meminfo("ShmemHugePages");
        assert!(huge >= SIZE, "no transparent huge pages: {huge} bytes");
        let free = meminfo("MemFree");

        let end = FIRST + SIZE / PAGE_BYTES;
        let even: Vec<u64> = (FIRST..end).step_by(2).collect();
        guest.driver().give(&even)?;
        let books = guest.settled_books()?.balloon;
        assert_eq!((books.discarded_bytes, books.held_bytes), (SIZE / 2, 0));
        let freed = freed_since(free, SIZE / 2 - NOISE);
        println!(
            "memfd: {} MiB discarded, {} MiB really free",
            SIZE >> 21,
            freed >> 20
        );
        assert!(freed >= SIZE / 2 - NOISE, "{freed} bytes");
        Ok(())
    }

    /// Frames follow the host's addresses: a guest address that is not aligned to them changes nothing.
    #[test]
    #[ignore = "measures the free memory of the whole host: runs in the host VM"]
    fn transparent_huge_pages_need_no_aligned_guest_address() -> Result<()> {
        const SIZE: u64 = 64 * MIB;
        let vmm = Vmm::new()?;
        let spec = RegionSpec {
            transparent_huge: true,
            ..RegionSpec::new(HIGH + 3 * PAGE_BYTES, SIZE, Backing::AnonymousHuge)
        };
        let low = RegionSpec::new(0, 16 * MIB, Backing::Anonymous);
        let guest = vmm.boot(&GuestConfig::with_regions(vec![low, spec]))?;
        let first = FIRST + 3;
        let pages: Vec<u64> = (first..first + SIZE / PAGE_BYTES).collect();
        pages.iter().for_each(|pfn| guest.ram().touch(*pfn));
        let free = meminfo("MemFree");

        // All but one page of the first frame.
        guest.driver().give(&pages[1..])?;
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.discarded_bytes, SIZE - 2 * MIB);
        assert_eq!(books.held_bytes, 2 * MIB - PAGE_BYTES);
        let freed = freed_since(free, SIZE - 2 * MIB - NOISE);
        assert!(freed >= SIZE - 2 * MIB - NOISE, "{freed} bytes");
        Ok(())
    }
}
