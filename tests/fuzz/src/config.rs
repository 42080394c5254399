//! The configuration space: any access, against a model of sixteen bytes.

use aerostat_device::{Device, DeviceConfig, DeviceKind, Runtime};
use arbitrary::{Arbitrary, Unstructured};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

const KIND: DeviceKind = DeviceKind::VirtioBalloon;
/// Without what is not in the standard.
const CONFIG_BYTES: usize = KIND.config_bytes(0);

thread_local! {
    static RUNTIME: RefCell<Option<Arc<Runtime>>> = const { RefCell::new(None) };
}

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
}

/// Plays the accesses.
///
/// # Panics
/// If the space is not what the model says.
pub fn run(bytes: &[u8]) {
    let Ok(accesses) = Vec::<Access>::arbitrary(&mut Unstructured::new(bytes)) else {
        return;
    };
    let runtime = RUNTIME.with_borrow_mut(|runtime| {
        Arc::clone(runtime.get_or_insert_with(|| Runtime::inline().expect("a runtime")))
    });
    let config = DeviceConfig {
        features: KIND.supported_features(),
        ..DeviceConfig::default()
    };
    let device = Device::new(&runtime, config).expect("a device");
    for access in accesses.iter().take(200) {
        step(&device, access);
        while runtime.turn() {}
    }
}

/// The whole space.
fn space(device: &Device) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    device.read_config(0, &mut space);
    space
}

fn step(device: &Device, access: &Access) {
    let before = space(device);
    match access {
        Access::Read(offset, len) => read(device, *offset, *len),
        Access::Near(offset, len) => read(device, u64::from(offset % 24), *len),
        Access::Write(offset, data) => write(device, *offset, &data.0),
        Access::WriteNear(offset, data) => write(device, u64::from(offset % 24), &data.0),
        Access::Target(bytes) => match device.set_target_bytes(*bytes) {
            Ok(set) => {
                assert_eq!((set, set % 4096), (device.target_bytes(), 0));
                let pages = u32::try_from(set / 4096).expect("32 bits");
                assert_eq!(space(device)[..4], pages.to_le_bytes());
            }
            Err(_) => assert_eq!(space(device), before, "refused, and nothing changed"),
        },
        Access::Features(bits) => drop(device.set_features(u64::from(*bits))),
        Access::Activate => drop(device.activate()),
        Access::Reset => {
            device.reset();
            assert_eq!(
                space(device)[4..],
                [0; 12],
                "a new driver starts with nothing"
            );
            assert_eq!(space(device)[..4], before[..4], "the target is the host's");
        }
        Access::Hints(true) => drop(device.start_hints(Duration::from_secs(600))),
        Access::Hints(false) => drop(device.finish_hints()),
    }
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

/// Only `actual`, and `poison_val` before DRIVER_OK with its feature, are the driver's.
fn write(device: &Device, offset: u64, data: &[u8]) {
    let (before, errors) = (space(device), device.counters().config_errors);
    let poison = device.features() & 1 << 4 != 0
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
            Some(place @ 0..16) => refused |= before[place] != *byte,
            _ => refused = true,
        }
    }
    let changed = device.write_config(offset, data);
    assert_eq!(space(device), expected);
    assert_eq!(changed, before[4..8] != expected[4..8]);
    assert_eq!(device.counters().config_errors - errors, u64::from(refused));
}
