//! Page refusal: the host takes the pages that it wants, tells the guest which it does not, and leaves those
//! alone (requirements V1, V2, V4; invariants I1, I4; docs/virtio-balloon-extensions.md). Each test runs
//! with the library's own rings and with elements.

use aerostat::{
    AEROSTAT_FEATURE_HOST_RESET, AEROSTAT_FEATURE_PAGE_REFUSAL, AEROSTAT_FEATURE_RING_PACKED,
};
use aerostat_tests::vmm::driver::{Role, refused_of};
use aerostat_tests::vmm::elements::ElementQueues;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::vring::Piece;
use aerostat_tests::vmm::working_set::WorkingSet;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};
use std::sync::Arc;
use std::time::Duration;

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest of one region whose device offers what stock guests select, and page refusal.
fn config(elements: bool, backing: Backing) -> Result<GuestConfig> {
    let mut config = GuestConfig::new(backing, 16);
    config.offered = default_features()? | AEROSTAT_FEATURE_PAGE_REFUSAL;
    config.selected |= AEROSTAT_FEATURE_PAGE_REFUSAL;
    config.elements = elements;
    Ok(config)
}

/// What a device offers unless the VMM chooses.
fn default_features() -> Result<u64> {
    let guest = Vmm::new()?.assemble(&GuestConfig::new(MEMFD, 8))?;
    guest.device().offered_features()
}

/// Runs `test` with rings and with elements.
fn both_ways(test: impl Fn(bool) -> Result<()>) -> Result<()> {
    test(false)?;
    test(true)
}

/// Unused pages with known contents; the driver's allocator does not have them any more.
fn pages(guest: &Guest, count: u64) -> Result<WorkingSet> {
    WorkingSet::allocate(guest.ram(), &mut guest.driver().allocator, count, 3)
}

/// Fails unless exactly the pages of `set` that are not in `kept` are gone, each of them to the last byte.
#[track_caller]
fn assert_kept(guest: &Guest, set: &WorkingSet, kept: &[u64]) {
    let settled = guest.settled_books();
    assert!(settled.is_ok(), "{settled:?}");
    let damaged = set.damaged(guest.ram());
    for pfn in set.pfns() {
        assert_eq!(damaged.contains(pfn), !kept.contains(pfn), "page {pfn:#x}");
        let zero = guest.ram().page_is(*pfn, |_| 0);
        assert_eq!(zero, !kept.contains(pfn), "page {pfn:#x}");
    }
}

/// V4: the feature is not offered unless the VMM asks for it, and a driver that does not select it is
/// never refused anything, as before.
#[test]
fn stock_drivers_are_not_affected() -> Result<()> {
    let extensions = AEROSTAT_FEATURE_PAGE_REFUSAL | AEROSTAT_FEATURE_HOST_RESET;
    assert_eq!(default_features()? & extensions, 0);
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut config = config(elements, MEMFD)?;
        config.offered |= extensions;
        config.selected &= !extensions;
        let guest = vmm.boot(&config)?;
        guest.device().set_target(MIB)?;
        let set = pages(&guest, 300)?;

        for pfns in set.pfns().chunks(150) {
            let list = guest.driver().write_pfns(pfns);
            assert_eq!(guest.driver().exchange(Role::Inflate, &[list])?.written, 0);
        }

        let books = guest.settled_books()?;
        assert_eq!(
            books.balloon.discarded_bytes,
            300 * PAGE_BYTES,
            "over the target"
        );
        assert_eq!(books.refused_bytes, 0);
        assert_kept(&guest, &set, &[]);
        Ok(())
    })
}

/// V1: the target changed since the guest last looked. V2: what is refused is not ballooned and untouched.
#[test]
fn pages_over_the_target_are_refused_and_keep_every_byte() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, MEMFD)?)?;
        guest.device().set_target(MIB)?;
        let set = pages(&guest, 300)?;
        // Reading has the host allocate the driver's own pages too, before the measurement.
        drop(guest.ram().snapshot());
        let before = guest.ram().allocated_bytes()?;

        let (used, refused) = guest.driver().offer(set.pfns())?;

        assert_eq!(used.written, 300u32.div_ceil(8));
        assert_eq!(refused, set.pfns()[256..]);
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.requested_bytes, 300 * PAGE_BYTES);
        assert_eq!(books.balloon.discarded_bytes, MIB);
        assert_eq!(books.balloon.skipped_over_target_bytes, 44 * PAGE_BYTES);
        assert_eq!(books.refused_bytes, 44 * PAGE_BYTES);
        assert_eq!(guest.device().query()?.ballooned_bytes, MIB);
        assert_eq!(before - guest.ram().allocated_bytes()?, MIB);
        assert_kept(&guest, &set, &refused);
        Ok(())
    })
}

#[test]
fn nothing_is_written_if_nothing_is_refused() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, Backing::Anonymous)?)?;
        guest.device().set_target(8 * MIB)?;
        let set = pages(&guest, 256)?;
        let (used, refused) = guest.driver().offer(set.pfns())?;
        assert_eq!((used.written, refused.len()), (0, 0));
        guest.settled_books()?;
        assert_kept(&guest, &set, &[]);
        Ok(())
    })
}

/// Each reason, in the middle of a buffer, and each with its own counter.
#[test]
fn refusals_in_the_middle_of_a_buffer_are_told_apart() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut config = config(elements, MEMFD)?;
        let region = |gpa| RegionSpec::new(gpa, MIB, MEMFD);
        let mut pinned = region(32 * MIB);
        pinned.pinned = true;
        let mut rom = region(48 * MIB);
        rom.readonly = true;
        config.regions.extend([pinned, rom]);
        let guest = vmm.boot(&config)?;
        guest.device().set_target(8 * MIB)?;
        let set = pages(&guest, 40)?;
        let page = |gpa: u64| gpa / PAGE_BYTES;
        let others = [
            page(32 * MIB),
            page(48 * MIB),
            page(80 * MIB),
            u64::from(u32::MAX),
        ];
        let given = set.pfns();
        let mut list = given[..20].to_vec();
        list.extend(others);
        list.push(given[3]);
        list.extend(&given[20..]);
        let sums: Vec<u64> = others[..2]
            .iter()
            .map(|pfn| guest.ram().page_sum(*pfn))
            .collect();

        let (used, refused) = guest.driver().offer(&list)?;

        // Places 20 to 24: up to the first bit of the fourth byte.
        assert_eq!(used.written, 4);
        assert_eq!(refused[..4], others);
        assert_eq!(refused[4..], [given[3]], "the second of its two places");
        let books = guest.settled_books()?.balloon;
        assert_eq!(books.discarded_bytes, 40 * PAGE_BYTES);
        assert_eq!(books.skipped_pinned_bytes, PAGE_BYTES);
        assert_eq!(books.skipped_out_of_range_bytes, 3 * PAGE_BYTES);
        assert_eq!(books.skipped_duplicate_bytes, PAGE_BYTES);
        assert_eq!(guest.books()?.refused_bytes, 5 * PAGE_BYTES);
        assert_kept(&guest, &set, &[]);
        for (pfn, sum) in others.iter().zip(sums) {
            assert_eq!(guest.ram().page_sum(*pfn), sum);
        }
        Ok(())
    })
}

/// While discarding is inhibited the guest keeps its pages instead of losing them for nothing.
#[test]
fn pages_are_refused_while_discarding_is_inhibited() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, MEMFD)?)?;
        guest.device().set_target(8 * MIB)?;
        let set = pages(&guest, 100)?;
        guest.device().inhibit()?;
        let (_, refused) = guest.driver().offer(set.pfns())?;
        assert_eq!(refused, set.pfns());
        assert_eq!(
            guest.books()?.balloon.skipped_inhibited_bytes,
            100 * PAGE_BYTES
        );
        assert_eq!(guest.device().query()?.ballooned_bytes, 0);
        assert_kept(&guest, &set, set.pfns());

        guest.device().uninhibit()?;
        assert!(guest.driver().offer(set.pfns())?.1.is_empty());
        assert_eq!(guest.settled_books()?.refused_bytes, 100 * PAGE_BYTES);
        assert_kept(&guest, &set, &[]);
        Ok(())
    })
}

/// A buffer without room for its answer gives nothing; what room there is says so.
#[test]
fn a_buffer_without_room_for_the_bitmap_gives_nothing() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, MEMFD)?)?;
        guest.device().set_target(8 * MIB)?;
        let set = pages(&guest, 100)?;
        let (list, answer) = {
            let driver = guest.driver();
            (driver.write_pfns(set.pfns()), driver.answer(100))
        };
        let short = Piece {
            len: answer.len - 1,
            ..answer
        };
        let empty = Piece { len: 0, ..answer };
        for (count, (pieces, written)) in (1..).zip([
            (vec![list], 0),
            (vec![list, empty], 0),
            (vec![list, short], short.len),
        ]) {
            let used = guest.driver().exchange(Role::Inflate, &pieces)?;
            assert_eq!(used.written, written);
            let books = guest.books()?;
            assert_eq!((books.chain_errors, books.inflate_chains), (count, count));
            assert_eq!(books.balloon.requested_bytes, 0);
        }
        let mut bitmap = [0; 12];
        guest.ram().read(answer.gpa, &mut bitmap);
        assert_eq!(bitmap, [0xff; 12]);
        assert_kept(&guest, &set, set.pfns());
        Ok(())
    })
}

/// Lists and bitmaps may be cut anywhere.
#[test]
fn numbers_and_bitmaps_may_straddle_descriptors() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, MEMFD)?)?;
        guest.device().set_target(10 * PAGE_BYTES)?;
        let set = pages(&guest, 30)?;
        let (list, answer) = {
            let driver = guest.driver();
            (driver.write_pfns(set.pfns()), driver.answer(30))
        };
        let cut = |piece: Piece, at: u32| {
            let head = Piece { len: at, ..piece };
            let gpa = piece.gpa + u64::from(at);
            let tail = Piece {
                gpa,
                len: piece.len - at,
                ..piece
            };
            [head, tail]
        };
        let pieces = [cut(list, 7), cut(answer, 1)].concat();
        let used = guest.driver().exchange(Role::Inflate, &pieces)?;
        let mut bitmap = [0; 4];
        guest.ram().read(answer.gpa, &mut bitmap);
        assert_eq!(
            (used.written, bitmap),
            (4, [0, 0b1111_1100, 0xff, 0b11_1111])
        );
        assert_kept(&guest, &set, &set.pfns()[10..]);
        guest.books()?;
        Ok(())
    })
}

/// V2: the guest tries other pages, and lets refused ones go when the target is reached.
#[test]
fn a_driver_reaches_the_target_with_other_pages() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut config = config(elements, MEMFD)?;
        // The allocator hands out the lowest pages first, and those of the second half are pinned.
        config.regions = vec![
            RegionSpec::new(0, 6 * MIB, MEMFD),
            RegionSpec {
                pinned: true,
                ..RegionSpec::new(6 * MIB, 4 * MIB, MEMFD)
            },
            RegionSpec::new(10 * MIB, 6 * MIB, MEMFD),
        ];
        let guest = vmm.boot(&config)?;
        let pinned: Vec<u64> = (6 * MIB / PAGE_BYTES..10 * MIB / PAGE_BYTES).collect();
        let set = WorkingSet::fill(guest.ram(), pinned.clone(), 5);
        guest.device().set_target(8 * MIB)?;
        let mut aside = 0;
        loop {
            let (_, reached) = guest.driver().step()?;
            aside = aside.max(guest.driver().refused().len());
            guest.books()?;
            if reached {
                break;
            }
        }
        assert_eq!(aside, pinned.len());
        assert!(guest.driver().refused().is_empty());
        assert!(
            pinned.iter().all(|pfn| guest.driver().allocator.take(*pfn)),
            "free again"
        );
        assert_eq!(guest.device().query()?.ballooned_bytes, 8 * MIB);
        assert_eq!(guest.settled_books()?.balloon.discarded_bytes, 8 * MIB);
        guest.assert_intact(&set);
        Ok(())
    })
}

/// V1 as a race: the target moves all the time while the guest follows; it never passes what it was at most.
#[test]
fn a_balloon_never_passes_the_largest_target() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut guest = vmm.boot(&config(elements, Backing::Anonymous)?)?;
        let working_set = guest.fill_memory(300, 8)?;
        guest.start_following()?;
        for round in 0..200u64 {
            let target = 1 + round * 37 % 8;
            guest.device().set_target(target * MIB)?;
            assert!(guest.device().query()?.ballooned_bytes <= 8 * MIB);
            guest.books()?;
        }
        guest.device().set_target(5 * MIB)?;
        guest.wait_actual(5 * MIB, PATIENCE)?;
        guest.stop_following();
        // A step that had read an earlier target may have been the last one.
        guest.driver().follow_target()?;
        assert_eq!(guest.device().query()?.ballooned_bytes, 5 * MIB);
        guest.assert_intact(&working_set);
        guest.settled_books()?;
        Ok(())
    })
}

/// Huge frames: pages that are taken are held as ever; refused ones leave their frame incomplete.
#[test]
fn a_refused_page_keeps_its_frame_on_the_host() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut config = config(elements, MEMFD)?;
        config.regions[0].page_size_bytes = 2 * MIB;
        let guest = vmm.boot(&config)?;
        guest.fill_memory(0, 1)?;
        guest.device().set_target(511 * PAGE_BYTES)?;
        let frame: Vec<u64> = (8 * MIB / PAGE_BYTES..10 * MIB / PAGE_BYTES).collect();
        let set = WorkingSet::fill(guest.ram(), frame.clone(), 6);

        let (_, refused) = guest.driver().offer(&frame)?;
        assert_eq!(refused, frame[511..]);
        assert_eq!(guest.books()?.balloon.held_bytes, 511 * PAGE_BYTES);
        guest.assert_intact(&set);

        guest.device().set_target(2 * MIB)?;
        assert!(guest.driver().offer(&refused)?.1.is_empty());
        let books = guest.settled_books()?.balloon;
        assert_eq!((books.held_bytes, books.discarded_bytes), (0, 2 * MIB));
        assert_kept(&guest, &set, &[]);
        Ok(())
    })
}

/// Chains that are served together: refused in the order of the chains, before anything is discarded.
#[test]
fn chains_of_one_batch_are_decided_in_their_order() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let mut guest = vmm.assemble(&config(elements, MEMFD)?)?;
        let features = guest.negotiate()?;
        guest.start_queues(features)?;
        guest.device().activate()?;
        guest.device().set_target(25 * PAGE_BYTES)?;
        let set = pages(&guest, 30)?;
        if !elements {
            guest.device().pause()?;
        }
        // The second chain repeats a page of the first, and the third is over the target from its
        // sixth page on.
        let mut lists = [
            set.pfns()[..10].to_vec(),
            set.pfns()[10..20].to_vec(),
            set.pfns()[20..].to_vec(),
        ];
        lists[1][4] = lists[0][9];
        let ram = Arc::clone(guest.ram());
        let mut answers = Vec::new();
        for list in &lists {
            let mut driver = guest.driver();
            let scratch = driver.allocator.allocate().unwrap_or_default() * PAGE_BYTES;
            for (gpa, pfn) in (scratch..).step_by(4).zip(list) {
                ram.write(gpa, &u32::try_from(*pfn).unwrap_or(0).to_le_bytes());
            }
            let numbers = Piece {
                gpa: scratch,
                len: 40,
                writable: false,
            };
            let answer = Piece {
                gpa: scratch + 2048,
                len: 2,
                writable: true,
            };
            let queue = driver.queue(Role::Inflate)?;
            answers.push((queue.add(&ram, &[numbers, answer])?, answer.gpa));
        }
        let mut written = Vec::new();
        if elements {
            let mut queues = ElementQueues::new(&guest)?;
            assert_eq!(queues.submit_available()?, 3);
            while written.len() < 3 {
                let done = queues.collect_within(PATIENCE)?;
                written.extend(done.iter().map(|completion| completion.written_bytes));
            }
        } else {
            guest.device().resume()?;
            for (head, _) in &answers {
                let used = guest
                    .driver()
                    .queue(Role::Inflate)?
                    .wait_used(&ram, PATIENCE)?;
                assert_eq!(used.head, *head);
                written.push(used.written);
            }
        }
        let refused = |chain: usize| {
            let mut bitmap = [0; 2];
            ram.read(answers[chain].1, &mut bitmap);
            refused_of(&lists[chain], &bitmap, written[chain])
        };
        assert_eq!(written, [0, 1, 2]);
        assert_eq!(refused(0), [0; 0]);
        assert_eq!(refused(1), [lists[0][9]]);
        // 10 and 9 are in; 6 more reach the target.
        assert_eq!(refused(2), lists[2][6..]);
        let books = guest.settled_books()?;
        assert_eq!(books.balloon.discarded_bytes, 25 * PAGE_BYTES);
        assert_eq!(books.balloon.skipped_duplicate_bytes, PAGE_BYTES);
        assert_eq!(books.balloon.skipped_over_target_bytes, 4 * PAGE_BYTES);
        let mut kept = refused(2);
        kept.push(set.pfns()[14]);
        assert_kept(&guest, &set, &kept);
        Ok(())
    })
}

/// Deflating is as it was: no answer, and nothing is refused.
#[test]
fn deflating_has_no_answer() -> Result<()> {
    both_ways(|elements| {
        let vmm = Vmm::new()?;
        let guest = vmm.boot(&config(elements, MEMFD)?)?;
        guest.balloon_to(4 * MIB)?;
        guest.device().set_target(0)?;
        let given = guest.driver().balloon().to_vec();
        let used = guest.driver().tell(Role::Deflate, &given[..256])?;
        assert_eq!(used.written, 0);
        assert_eq!(guest.books()?.returned_bytes, MIB);
        // With a writable part the content is wrong; the pages come back all the same.
        let (list, answer) = {
            let driver = guest.driver();
            (driver.write_pfns(&given[256..512]), driver.answer(256))
        };
        let used = guest.driver().exchange(Role::Deflate, &[list, answer])?;
        assert_eq!(used.written, 0);
        let books = guest.books()?;
        assert_eq!((books.returned_bytes, books.chain_errors), (2 * MIB, 1));
        Ok(())
    })
}

/// The layouts differ below; packed rings with an answer are shown where the rings are.
#[test]
fn refusal_can_be_offered_with_packed_rings() -> Result<()> {
    let mut config = config(false, MEMFD)?;
    config.offered |= AEROSTAT_FEATURE_RING_PACKED;
    config.selected |= AEROSTAT_FEATURE_RING_PACKED;
    let guest = Vmm::new()?.assemble(&config)?;
    let both = AEROSTAT_FEATURE_RING_PACKED | AEROSTAT_FEATURE_PAGE_REFUSAL;
    assert_eq!(guest.negotiate()? & both, both);
    Ok(())
}
