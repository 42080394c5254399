//! A target for each node of the guest, and what is in the balloon there (requirements X1, X2, X8, X9;
//! docs/virtio-balloon-extensions.md, docs/memballoon.md). The guest has two nodes.

use aerostat::{
    AEROSTAT_FEATURE_NODE_TARGETS, AEROSTAT_FEATURE_PAGE_REFUSAL, AEROSTAT_MEMBALLOON_FEATURE_NODE,
    AEROSTAT_NO_TARGET,
};
use aerostat_tests::vmm::device::Device;
use aerostat_tests::vmm::mapping::Backing;
use aerostat_tests::vmm::memballoon::{Memballoon, Said, size_feature};
use aerostat_tests::vmm::ram::RegionSpec;
use aerostat_tests::vmm::{Guest, GuestConfig, MIB, PAGE_BYTES, Result, Vmm};

const MEMFD: Backing = Backing::Memfd { offset_bytes: 0 };
/// Node 1 is above node 0, with a hole between.
const NODE_1: u64 = 32 * MIB;
const NODE_BYTES: u64 = 16 * MIB;

fn regions() -> [RegionSpec; 2] {
    let upper = RegionSpec {
        guest_node: 1,
        ..RegionSpec::new(NODE_1, NODE_BYTES, MEMFD)
    };
    [RegionSpec::new(0, NODE_BYTES, MEMFD), upper]
}

/// A guest whose device offers `extensions`, of which its driver selects `selected`.
fn boot(vmm: &Vmm, extensions: u64, selected: u64) -> Result<Guest> {
    let mut config = GuestConfig::with_regions(regions().to_vec());
    let stock = vmm.assemble(&config)?.device().offered_features()?;
    config.offered = stock | extensions;
    config.selected |= selected;
    vmm.boot(&config)
}

/// What is in the balloon of each node, in MiB.
fn ballooned_mib(device: &Device) -> Result<[u64; 2]> {
    let [low, high] = [device.query_node(0)?, device.query_node(1)?];
    assert_eq!([low.memory_bytes, high.memory_bytes], [NODE_BYTES; 2]);
    let whole = device.query()?;
    let nodes = [low.ballooned_bytes, high.ballooned_bytes];
    assert_eq!(nodes.iter().sum::<u64>(), whole.ballooned_bytes);
    Ok(nodes.map(|bytes| bytes / MIB))
}

fn targets(device: &Device) -> Result<[u64; 2]> {
    let [low, high] = [device.query_node(0)?, device.query_node(1)?];
    Ok([low.target_bytes, high.target_bytes])
}

/// X9: the host sees by guest address what a driver does that knows nothing of nodes.
#[test]
fn a_stock_driver_is_observed_by_guest_address() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, 0, 0)?;
    let device = guest.device();
    device.set_target(20 * MIB)?;
    guest.driver().follow_target()?;
    // Its allocator begins at the bottom, where its queues are.
    let [low, high] = ballooned_mib(device)?;
    assert!(low >= NODE_BYTES / MIB - 1 && high > 0, "{low} and {high}");
    assert_eq!(targets(device)?, [AEROSTAT_NO_TARGET; 2]);
    assert_eq!(device.query_node(7)?.memory_bytes, 0, "no such node");
    device.set_target(0)?;
    guest.driver().follow_target()?;
    assert_eq!(ballooned_mib(device)?, [0, 0]);
    Ok(())
}

/// X1, X2: each node is brought to its own target, up and down, and none makes up for another.
#[test]
fn each_node_has_its_own_target() -> Result<()> {
    let vmm = Vmm::new()?;
    let feature = AEROSTAT_FEATURE_NODE_TARGETS;
    for refusal in [0, AEROSTAT_FEATURE_PAGE_REFUSAL] {
        let guest = boot(&vmm, feature | refusal, feature | refusal)?;
        let device = guest.device();
        for mib in [[3, 5], [8, 0], [0, 16], [2, 2]] {
            device.set_node_targets(&mib.map(|mib| mib * MIB))?;
            assert_eq!(device.query()?.target_bytes, mib.iter().sum::<u64>() * MIB);
            assert_eq!(targets(device)?, mib.map(|mib| mib * MIB));
            guest.driver().follow_target()?;
            assert_eq!(ballooned_mib(device)?, mib);
        }
        // A list that ends early: the others get nothing.
        device.set_node_targets(&[4 * MIB])?;
        guest.driver().follow_target()?;
        assert_eq!(ballooned_mib(device)?, [4, 0]);
        // Nothing of node 0 is left to give, and node 1 does not make up for it.
        device.set_node_targets(&[NODE_BYTES, MIB])?;
        guest.driver().follow_target()?;
        let [low, high] = ballooned_mib(device)?;
        assert_eq!((low < NODE_BYTES / MIB, high), (true, 1));
        guest.books()?;
        // A target for the whole balloon leaves the nodes to the driver again.
        device.set_target(18 * MIB)?;
        assert_eq!(targets(device)?, [AEROSTAT_NO_TARGET; 2]);
        guest.driver().follow_target()?;
        assert_eq!(device.query()?.ballooned_bytes, 18 * MIB);
    }
    Ok(())
}

/// X9: the sum is what a driver hears that did not select the feature.
#[test]
fn a_driver_without_the_feature_follows_the_sum() -> Result<()> {
    let vmm = Vmm::new()?;
    let guest = boot(&vmm, AEROSTAT_FEATURE_NODE_TARGETS, 0)?;
    guest
        .device()
        .set_node_targets(&[2 * MIB, 3 * MIB + PAGE_BYTES + 1])?;
    guest.driver().follow_target()?;
    let balloon = guest.device().query()?;
    assert_eq!(balloon.actual_bytes, 5 * MIB + PAGE_BYTES);
    assert_eq!(balloon.target_bytes, balloon.actual_bytes);
    Ok(())
}

#[test]
fn targets_that_cannot_be_are_refused() -> Result<()> {
    let vmm = Vmm::new()?;
    let refused = |device: &Device, targets: &[u64], errno| {
        let error = device.set_node_targets(targets).expect_err("it was taken");
        assert_eq!(error.errno(), Some(errno), "{targets:?}: {error}");
    };
    let stock = boot(&vmm, 0, 0)?;
    refused(stock.device(), &[0], libc::ENOTSUP);
    let guest = boot(&vmm, AEROSTAT_FEATURE_NODE_TARGETS, 0)?;
    guest.device().set_target(MIB)?;
    refused(guest.device(), &[], libc::EINVAL);
    refused(guest.device(), &[0; 17], libc::EINVAL);
    refused(guest.device(), &[NODE_BYTES + PAGE_BYTES, 0], libc::EINVAL);
    refused(guest.device(), &[0, 0, PAGE_BYTES], libc::EINVAL);
    refused(guest.device(), &[u64::MAX, u64::MAX], libc::EINVAL);
    assert_eq!(guest.device().query()?.target_bytes, MIB, "it stays");
    Ok(())
}

/// Memory that is unplugged takes its node's target along, and gets it back with the memory.
#[test]
fn no_node_is_asked_for_more_than_it_has_left() -> Result<()> {
    let vmm = Vmm::new()?;
    let feature = AEROSTAT_FEATURE_NODE_TARGETS;
    let guest = boot(&vmm, feature, feature)?;
    let device = guest.device();
    device.set_node_targets(&[MIB, 4 * MIB])?;
    device.set_memory(&guest.ram().without(NODE_1))?;
    assert_eq!(targets(device)?, [MIB, 0]);
    assert_eq!(device.query()?.target_bytes, MIB);
    assert_eq!(guest.driver().node_targets()?, [256, 0]);
    device.set_memory(guest.ram())?;
    assert_eq!(targets(device)?, [MIB, 4 * MIB]);
    assert_eq!(guest.driver().target_pages()?, 5 * 256);
    Ok(())
}

/// S13: targets of nodes, and what is in the balloon there, move with the guest.
#[test]
fn targets_of_nodes_move_with_the_guest() -> Result<()> {
    let vmm = Vmm::new()?;
    let feature = AEROSTAT_FEATURE_NODE_TARGETS;
    let mut guest = boot(&vmm, feature, feature)?;
    guest.device().set_node_targets(&[MIB, 3 * MIB])?;
    guest.driver().follow_target()?;
    guest.move_to(&vmm)?;
    assert_eq!(ballooned_mib(guest.device())?, [1, 3]);
    assert_eq!(targets(guest.device())?, [MIB, 3 * MIB]);
    assert_eq!(guest.driver().node_targets()?, [256, 768]);
    guest.device().set_node_targets(&[0, 4 * MIB])?;
    guest.driver().follow_target()?;
    assert_eq!(ballooned_mib(guest.device())?, [0, 4]);
    Ok(())
}

/// A device that does not offer the feature goes on with the sum, whatever it knows of nodes.
#[test]
fn a_target_of_nodes_is_their_sum_where_nodes_are_not_offered() -> Result<()> {
    let vmm = Vmm::new()?;
    let from = boot(&vmm, AEROSTAT_FEATURE_NODE_TARGETS, 0)?;
    from.device().set_node_targets(&[MIB, 3 * MIB])?;
    from.device().pause()?;
    let state = from.device().save()?;
    let to = vmm.assemble(&GuestConfig::with_regions(regions().to_vec()))?;
    to.device().restore(&state)?;
    assert_eq!(to.device().query()?.target_bytes, 4 * MIB);
    assert_eq!(targets(to.device())?, [AEROSTAT_NO_TARGET; 2]);
    Ok(())
}

/// X2 over memballoon: one message for all nodes; the sum to drivers without NODE.
#[test]
fn memballoon_says_the_minimum_of_each_node() -> Result<()> {
    let vmm = Vmm::new()?;
    let selected = Memballoon::TRANSPORT | size_feature(2 * MIB);
    let mut guest = Memballoon::boot(
        &vmm,
        &regions(),
        selected | AEROSTAT_MEMBALLOON_FEATURE_NODE,
    )?;
    guest.device().set_node_targets(&[4 * MIB, 6 * MIB])?;
    assert_eq!(guest.listen()?, Said::Nodes(vec![4 * MIB, 6 * MIB]));
    let pages = |from: u64, count: u64| (0..count).map(move |page| from + page * 2 * MIB);
    let given: Vec<u64> = pages(4 * MIB, 2).chain(pages(NODE_1, 3)).collect();
    guest.give(&given)?;
    assert_eq!(ballooned_mib(guest.device())?, [4, 6]);
    guest.books()?;

    // The whole balloon's target is said as ever, and the latest of either kind counts.
    guest.device().set_target(8 * MIB)?;
    assert_eq!(guest.listen()?, Said::Minimum((8 * MIB).cast_signed()));
    guest.move_to(&vmm)?;
    assert_eq!(guest.listen()?, Said::Minimum((8 * MIB).cast_signed()));
    guest.device().set_node_targets(&[0, 2 * MIB])?;
    assert_eq!(guest.listen()?, Said::Nodes(vec![0, 2 * MIB]));
    assert_eq!(guest.get(&given[..4])?, 4);
    assert_eq!(ballooned_mib(guest.device())?, [0, 2]);
    guest.move_to(&vmm)?;
    assert_eq!(guest.listen()?, Said::Nodes(vec![0, 2 * MIB]));
    // A new driver hears of it too.
    guest.restart()?;
    assert_eq!(guest.listen()?, Said::Nodes(vec![0, 2 * MIB]));

    // A buffer that is too short for it comes back empty, and the next one is used.
    let errors = guest.books()?.chain_errors;
    guest.buffer_bytes = 16;
    guest.restart()?;
    assert_eq!(guest.wait_message()?.written, 0);
    assert_eq!(guest.books()?.chain_errors, errors + 1);
    guest.buffer_bytes = 32;
    guest.leave_buffer(32)?;
    assert_eq!(guest.listen()?, Said::Nodes(vec![0, 2 * MIB]));

    let mut stock = Memballoon::boot(&vmm, &regions(), selected)?;
    let error = stock
        .device()
        .set_node_targets(&[MIB])
        .expect_err("not offered");
    assert_eq!(error.errno(), Some(libc::ENOTSUP));
    stock.device().set_target(2 * MIB)?;
    assert_eq!(stock.listen()?, Said::Minimum((2 * MIB).cast_signed()));
    Ok(())
}
