//! The configuration space (requirements S, "Config"; hostile drivers: "partial, oversize or
//! read-only config writes; poison_val after DRIVER_OK").

use aerostat::{AEROSTAT_CONFIG_BYTES, AEROSTAT_FEATURE_PAGE_POISON};
use aerostat_tests::vmm::driver::{CONFIG_ACTUAL, CONFIG_NUM_PAGES, CONFIG_POISON};
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, Result, Vmm};

fn space(guest: &Guest) -> Result<Vec<u8>> {
    let mut bytes = vec![0xff; AEROSTAT_CONFIG_BYTES as usize];
    guest.device().read_config(0, &mut bytes)?;
    Ok(bytes)
}

fn assemble(vmm: &Vmm) -> Result<Guest> {
    let mut config = GuestConfig::new(Backing::Anonymous, 8);
    config.selected |= AEROSTAT_FEATURE_PAGE_POISON;
    vmm.assemble(&config)
}

#[test]
fn fields_are_little_endian_and_readable_before_features_ok() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = assemble(&vmm)?;
    guest.device().set_target(3 * MIB)?;
    guest
        .device()
        .write_config(CONFIG_ACTUAL, &[0x78, 0x56, 0x34, 0x12])?;
    assert_eq!(
        space(&guest)?,
        [0, 3, 0, 0, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(guest.device().query()?.actual_bytes, 0x1234_5678 << 12);
    Ok(())
}

/// Every offset and length, inside and outside: bytes are those of the fields, or zero.
#[test]
fn partial_and_oversize_reads_are_zero_behind_the_end() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = assemble(&vmm)?;
    guest.device().set_target(7 * MIB)?;
    guest
        .device()
        .write_config(CONFIG_ACTUAL, &0xa1b2_c3d4u32.to_le_bytes())?;
    let mut expected = space(&guest)?;
    expected.resize(64, 0);
    for offset in 0..20 {
        for len in 0..40 {
            let mut bytes = vec![0xee; len];
            guest.device().read_config(offset as u64, &mut bytes)?;
            assert_eq!(bytes, expected[offset..offset + len], "{len} at {offset}");
        }
    }
    let mut bytes = [0xee; 4];
    guest.device().read_config(u64::MAX - 1, &mut bytes)?;
    assert_eq!(bytes, [0; 4]);
    Ok(())
}

#[test]
fn num_pages_stays_the_devices() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = assemble(&vmm)?;
    guest.device().set_target(2 * MIB)?;
    for bytes in [&[0xff][..], &[1, 2, 3, 4]] {
        assert!(!guest.device().write_config(CONFIG_NUM_PAGES, bytes)?);
    }
    assert_eq!(guest.device().query()?.target_bytes, 2 * MIB);
    assert_eq!(guest.books()?.config_errors, 2);
    Ok(())
}

/// A front end may write back the whole space: num_pages stays the device's, `actual` is taken.
#[test]
fn writing_the_whole_space_back_changes_actual_only() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = assemble(&vmm)?;
    guest.device().set_target(2 * MIB)?;
    let mut bytes = space(&guest)?;
    bytes[4] = 9;
    assert!(guest.device().write_config(0, &bytes)?);
    assert!(
        !guest.device().write_config(0, &bytes)?,
        "the same again is no change"
    );
    let balloon = guest.device().query()?;
    assert_eq!(
        (balloon.target_bytes, balloon.actual_bytes),
        (2 * MIB, 9 << 12)
    );
    assert_eq!(guest.books()?.config_errors, 0);
    Ok(())
}

/// Every offset and length of a write: only `actual` (and poison_val, before DRIVER_OK) follow.
#[test]
fn partial_and_oversize_writes_change_only_what_is_the_drivers() -> Result<()> {
    let vmm = Vmm::new()?;
    for offset in 0..20usize {
        for len in 1..24usize {
            let mut guest = assemble(&vmm)?;
            let features = guest.negotiate()?;
            guest.device().set_target(MIB)?;
            let old = space(&guest)?;
            guest
                .device()
                .write_config(offset as u64, &vec![0x5a; len])?;
            let new = space(&guest)?;
            for (at, (was, is)) in old.iter().zip(&new).enumerate() {
                let written = (offset..offset + len).contains(&at);
                let drivers = (4..8).contains(&at) || (12..16).contains(&at);
                let expected = if written && drivers { 0x5a } else { *was };
                assert_eq!(*is, expected, "byte {at} after {len} at {offset}");
            }
            guest.start_queues(features)?;
        }
    }
    Ok(())
}

#[test]
fn poison_val_is_fixed_after_driver_ok() -> Result<()> {
    let vmm = Vmm::new()?;
    let mut guest = assemble(&vmm)?;
    let features = guest.negotiate()?;
    guest.device().write_config(CONFIG_POISON, &[0xaa; 4])?;
    guest.start_queues(features)?;
    guest.device().activate()?;
    guest.device().write_config(CONFIG_POISON, &[0; 4])?;
    assert_eq!(space(&guest)?[12..], [0xaa; 4]);
    assert_eq!(guest.books()?.config_errors, 1);
    Ok(())
}
