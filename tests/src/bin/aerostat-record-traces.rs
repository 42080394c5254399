//! `aerostat-record-traces DIRECTORY [NAME...]`: records the traces that benchmarks play back, from stock Linux
//! guests (User-Mode Linux) behind `aerostat-vhost-user --record`.

use aerostat_reclaim::vm::DeviceState;
use aerostat_tests::artifacts;
use aerostat_tests::backend::Backend;
use aerostat_tests::guest::{UmlConfig, UmlGuest};
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(120);

/// A trace to be recorded.
struct Scene {
    name: &'static str,
    /// What happens in the guest before it is asked for memory.
    before: &'static [&'static str],
    target_mib: u64,
}

const SCENES: [Scene; 3] = [
    Scene {
        name: "fresh-boot",
        before: &[],
        target_mib: 256,
    },
    // The guest's memory was full of file pages, which two programs wrote side by side; they are gone again.
    Scene {
        name: "after-load",
        before: &[
            "dd if=/dev/zero of=/mem/a bs=64k count=3300 2>/dev/null & \
             dd if=/dev/zero of=/mem/b bs=12k count=17000 2>/dev/null; wait; rm /mem/a /mem/b",
            "grep -E '^(MemFree|Shmem):' /proc/meminfo",
        ],
        target_mib: 256,
    },
    // Files of two pages each, and every second of them is removed: free memory lies in small pieces.
    Scene {
        name: "fragmented",
        before: &[
            "awk 'BEGIN { for (i = 0; i < 40000; i++) { f = \"/mem/\" i; printf \"%8192s\", \"\" >f; close(f) } }'",
            "cd /mem && rm -f *[13579]",
            "grep -E '^(MemFree|Shmem):' /proc/meminfo",
        ],
        target_mib: 128,
    },
];

fn main() -> ExitCode {
    let Some(directory) = std::env::args().nth(1) else {
        eprintln!("usage: aerostat-record-traces DIRECTORY [NAME...]");
        return ExitCode::from(2);
    };
    let names: Vec<String> = std::env::args().skip(2).collect();
    let wanted = |scene: &Scene| names.is_empty() || names.iter().any(|name| name == scene.name);
    for scene in SCENES.into_iter().filter(wanted) {
        let file = Path::new(&directory)
            .join(scene.name)
            .with_extension("trace");
        if let Err(error) = record(&scene, &file) {
            eprintln!("{}: {error}", scene.name);
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn record(scene: &Scene, file: &Path) -> Result<(), Box<dyn Error>> {
    let file = file.to_str().ok_or("the directory has a strange name")?;
    let options: &'static [&'static str] =
        Box::leak(Box::new(["--record", file.to_owned().leak()]));
    let backend = Backend::start_with(&artifacts::vhost_user_backend(), 1, options)?;
    let config = UmlConfig::new(MEMORY_MIB)
        .balloon(&backend.socket(0))
        .without_reporting();
    let mut guest = UmlGuest::boot(&config)?;
    for command in scene.before {
        print!("{}", guest.run_within(command, PATIENCE)?);
    }
    let (mut control, target) = (backend.control(0)?, scene.target_mib * MIB);
    control.set_target(target)?;
    let start = Instant::now();
    while control.query()?.actual_bytes < target {
        if start.elapsed() > PATIENCE {
            return Err(format!("the guest gave {:?}", control.query()?.actual_bytes).into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    guest.power_off()?;
    // The recording is complete when the back-end has noticed.
    while control.query()?.state != DeviceState::Disconnected {
        if start.elapsed() > 2 * PATIENCE {
            return Err("the back-end still has a guest".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{file}: {} bytes", std::fs::metadata(file)?.len());
    Ok(())
}
