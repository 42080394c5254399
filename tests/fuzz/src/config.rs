//! The configuration space: any access, against a model of its bytes.

use crate::guest::Guest;
use aerostat_device::{Device, DeviceConfig, DeviceKind, Runtime};
use arbitrary::{Arbitrary, Unstructured};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

thread_local! {
    static HOST: RefCell<Option<(Arc<Runtime>, Guest)>> = const { RefCell::new(None) };
}

const PAGE_POISON: u64 = 1 << 4;
const HOST_RESET: u64 = 1 << 51;
const KIND: DeviceKind = DeviceKind::VirtioBalloon;
const NODE_TARGETS: u64 = 1 << 52;
const SPACE: usize = KIND.config_bytes(HOST_RESET | NODE_TARGETS);

#[derive(Arbitrary, Debug)]
enum Access {
    Read(u64, u8),
    Near(u8, u8),
    Write(u64, crate::script::Bytes),
    WriteNear(u8, crate::script::Bytes),
    Target(u64),
    Features(u8),
    Activate,
    Reset,
    Hints(bool),
    ResetBalloon,
    Acknowledge,
    NodeTargets(u8, [u32; 2]),
}

/// Plays the accesses.
///
/// # Panics
/// If the space is not what the model says.
pub fn run(bytes: &[u8]) {
    let Ok(accesses) = Vec::<Access>::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    let (runtime, memory) = HOST.with_borrow_mut(|host| {
        let new = || (Runtime::inline().expect("a runtime"), Guest::new());
        let (runtime, guest) = host.get_or_insert_with(new);
        (Arc::clone(runtime), guest.table(u8::MAX, false))
    });
    let config = DeviceConfig {
        features: KIND.supported_features(),
        ..DeviceConfig::default()
    };
    let device = Device::new(&runtime, config).expect("a device");
    device.set_memory(memory).expect("memory");
    for access in accesses.iter().take(200) {
        step(&device, access);
        while runtime.turn(true) {}
    }
}

/// The whole space.
fn space(device: &Device) -> [u8; SPACE] {
    let mut space = [0; SPACE];
    device.read_config(0, &mut space);
    space
}

/// `reset_id` and `reset_ack`.
fn reset_fields(space: &[u8; SPACE]) -> (&[u8], &[u8]) {
    space[16..24].split_at(4)
}

fn step(device: &Device, access: &Access) {
    let before = space(device);
    match access {
        Access::Read(offset, len) => read(device, *offset, *len),
        Access::Near(offset, len) => read(device, u64::from(offset % 96), *len),
        Access::Write(offset, data) => write(device, *offset, &data.0),
        Access::WriteNear(offset, data) => write(device, u64::from(offset % 96), &data.0),
        Access::Target(bytes) => match device.set_target_bytes(*bytes) {
            Ok(set) => {
                assert_eq!((set, set % 4096), (device.target_bytes(), 0));
                let pages = u32::try_from(set / 4096).expect("32 bits");
                assert_eq!(space(device)[..4], pages.to_le_bytes());
            }
            Err(_) => assert_eq!(space(device), before, "refused, and nothing changed"),
        },
        Access::NodeTargets(nodes, bytes) => {
            let bytes = bytes.map(u64::from);
            let nodes = bytes.get(..usize::from(*nodes)).unwrap_or(&bytes);
            match device.set_node_targets(nodes) {
                Ok(set) => {
                    assert_eq!(set, device.target_bytes());
                    let space = space(device);
                    let field = |at: usize| {
                        let bytes = space[at..at + 4].try_into().expect("four bytes");
                        u64::from(u32::from_le_bytes(bytes))
                    };
                    let each = nodes.iter().map(|bytes| bytes / 4096);
                    assert_eq!(field(24), nodes.len() as u64);
                    assert_eq!(field(0), each.clone().sum::<u64>());
                    assert!((28..).step_by(4).map(field).zip(each).all(|(a, b)| a == b));
                }
                Err(_) => assert_eq!(space(device), before, "refused, and nothing changed"),
            }
        }
        Access::Features(bits) => {
            let high = [(0x40, HOST_RESET), (0x80, NODE_TARGETS)];
            let high = high.iter().filter(|(bit, _)| bits & bit != 0);
            let high = high.fold(0, |features, (_, feature)| features | feature);
            drop(device.set_features(u64::from(bits & 0x3f) | high));
        }
        Access::Activate => drop(device.activate()),
        Access::Reset => {
            device.reset();
            let after = space(device);
            assert_eq!(after[4..16], [0; 12], "a new driver starts with nothing");
            assert_eq!(after[..4], before[..4], "the target is the host's");
            assert_eq!(after[16..20], before[16..20], "ids go on");
            assert_eq!(after[16..20], after[20..24], "nothing is pending");
        }
        Access::Hints(true) => drop(device.start_hints(Duration::from_secs(600))),
        Access::Hints(false) => drop(device.finish_hints()),
        Access::ResetBalloon => {
            let done = device.reset_balloon().is_ok();
            let after = space(device);
            assert_eq!(done, after[16..20] != before[16..20], "a new id each time");
            assert!(!done || device.reset_pending());
        }
        Access::Acknowledge => write(device, 20, reset_fields(&before).0),
    }
    let now = space(device);
    let (id, ack) = reset_fields(&now);
    assert_eq!(device.reset_pending(), id != ack, "what the driver sees");
    let counters = device.counters();
    let open = counters.host_resets - counters.host_resets_acknowledged;
    assert_eq!(device.reset_pending(), open > 0, "{counters:?}");
}

fn read(device: &Device, offset: u64, len: u8) {
    let mut data = vec![0xee; len.into()];
    let whole = space(device);
    device.read_config(offset, &mut data);
    for (at, byte) in data.iter().enumerate() {
        let place = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(at));
        let expected = place
            .and_then(|place| whole.get(place))
            .copied()
            .unwrap_or(0);
        assert_eq!(*byte, expected, "byte {at} from {offset:#x}");
    }
}

/// Only `actual`, `poison_val` before DRIVER_OK with its feature, and `reset_ack` while a reset is
/// pending, are the driver's.
fn write(device: &Device, offset: u64, data: &[u8]) {
    let (before, errors) = (space(device), device.counters().config_errors);
    let pending = device.features() & HOST_RESET != 0 && device.reset_pending();
    let poison = device.features() & PAGE_POISON != 0
        && device.state() == aerostat_device::DeviceState::Configuring;
    let mut expected = before;
    let mut refused = false;
    for (at, byte) in data.iter().enumerate() {
        let place = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(at));
        match place {
            Some(4..8) => expected[place.unwrap_or(0)] = *byte,
            Some(12..16) if poison => expected[place.unwrap_or(0)] = *byte,
            Some(20..24) if pending => expected[place.unwrap_or(0)] = *byte,
            Some(place @ 0..SPACE) => refused |= before[place] != *byte,
            _ => refused = true,
        }
    }
    let changed = device.write_config(offset, data);
    assert_eq!(space(device), expected);
    assert_eq!(changed, before[4..8] != expected[4..8]);
    assert_eq!(device.counters().config_errors - errors, u64::from(refused));
}
