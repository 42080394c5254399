//! The options of a deflate: what the library does for a guest that takes pages back, before it is
//! acknowledged. Frames that are rebuilt are in `vmm_frames.rs`, as they need a host with huge pages.

use aerostat::{AEROSTAT_DEFLATE_PREFAULT, AEROSTAT_DEFLATE_REBUILD};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Result, Vmm};

const BALLOON: u64 = 16 * MIB;

/// A guest that has used all its memory and has a balloon; returns what its memory takes on the host.
fn inflated(vmm: &Vmm, backing: Backing) -> Result<(Guest, u64)> {
    let guest = vmm.boot(&GuestConfig::new(backing, 64))?;
    guest.fill_memory(1000, 42)?;
    guest.balloon_to(BALLOON)?;
    guest.settled_books()?;
    let left = guest.ram().allocated_bytes()?;
    Ok((guest, left))
}

const BACKINGS: [Backing; 2] = [Backing::Anonymous, Backing::Memfd { offset_bytes: 0 }];

#[test]
fn pages_taken_back_are_on_the_host_before_the_guest_touches_them_if_prefaulted() -> Result<()> {
    let vmm = Vmm::new()?;
    for backing in BACKINGS {
        for (flags, there) in [(0, 0), (AEROSTAT_DEFLATE_PREFAULT, BALLOON)] {
            let (guest, left) = inflated(&vmm, backing)?;
            guest.device().set_deflate(flags)?;
            guest.balloon_to(0)?;
            let added = guest.ram().allocated_bytes()? - left;
            assert_eq!(added, there, "{backing:?}, flags {flags}");
            assert_eq!(guest.settled_books()?.balloon.discarded_bytes, BALLOON);
        }
    }
    Ok(())
}

#[test]
fn the_option_survives_a_reset() -> Result<()> {
    let vmm = Vmm::new()?;
    let (mut guest, _) = inflated(&vmm, Backing::Anonymous)?;
    guest.device().set_deflate(AEROSTAT_DEFLATE_PREFAULT)?;
    guest.restart_driver()?;
    guest.balloon_to(BALLOON)?;
    guest.settled_books()?;
    let left = guest.ram().allocated_bytes()?;
    guest.balloon_to(0)?;
    assert_eq!(guest.ram().allocated_bytes()? - left, BALLOON);
    Ok(())
}

#[test]
fn nothing_is_allocated_while_discarding_is_inhibited() -> Result<()> {
    let vmm = Vmm::new()?;
    let (guest, left) = inflated(&vmm, Backing::Anonymous)?;
    guest.device().set_deflate(AEROSTAT_DEFLATE_PREFAULT)?;
    guest.device().inhibit()?;
    guest.balloon_to(0)?;
    assert_eq!(guest.ram().allocated_bytes()?, left);
    Ok(())
}

#[test]
fn options_that_do_not_exist_are_refused() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = vmm.boot(&GuestConfig::new(Backing::Anonymous, 64))?;
    let all = AEROSTAT_DEFLATE_PREFAULT | AEROSTAT_DEFLATE_REBUILD;
    guest.device().set_deflate(all)?;
    let error = guest.device().set_deflate(all + 1).expect_err("refused");
    assert!(error.to_string().contains("flags"), "{error}");
    Ok(())
}
