//! The demonstration: a guest gives memory back through the library, and gets it again.
//!
//! - [`options`]: the command line;
//! - [`guest`]: what the story needs of a guest, whatever it is made of;
//! - [`uml`], [`synthetic`]: the two kinds of guest; [`protocols`]: guests that speak other protocols;
//! - [`story`]: what happens, and what must hold at the end;
//! - [`recorder`]: readings over time, taken by a thread of their own;
//! - [`progress`], [`summary`], [`chart`]: how it is shown.

pub mod chart;
pub mod guest;
pub mod options;
pub mod progress;
pub mod protocols;
pub mod recorder;
pub mod story;
pub mod summary;
pub mod synthetic;
pub mod uml;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::{
    backend::BackendError,
    guest::{GuestError, Prerequisites},
    vmm::VmmError,
};
use aerostat_reclaim::vm::VmError;
use guest::DemoGuest;
use options::{GuestKind, Options, Protocol};

/// Why the demonstration could not be carried through.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The guest failed.
    #[error("the guest failed")]
    Guest(#[from] GuestError),
    /// The back-end failed.
    #[error("the vhost-user back-end failed")]
    Backend(#[from] BackendError),
    /// The control socket failed.
    #[error("the control of the device failed")]
    Control(#[from] VmError),
    /// The sizes asked for do not fit together.
    #[error("{0}")]
    Sizes(String),
    /// The test VMM failed.
    #[error("the synthetic guest failed")]
    Vmm(#[from] VmmError),
    /// The guest stopped on the way to its target.
    #[error("{what}: no progress for {seconds} s, at {reached_mib} MiB of {target_mib} MiB")]
    Stalled {
        /// What was being done.
        what: &'static str,
        /// How long nothing had moved.
        seconds: u64,
        /// How far it got.
        reached_mib: u64,
        /// Where it should have gone.
        target_mib: u64,
    },
    /// A result cannot be written.
    #[error("writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// Runs the demonstration; true if everything that it shows held.
///
/// # Errors
/// See [`DemoError`].
pub fn run(options: &Options) -> Result<bool, DemoError> {
    options.check()?;
    let mut guest = start(options)?;
    println!("{}", guest.description());
    let outcome = story::tell(guest.as_mut(), options)?;
    let chart = options.output_directory().join("timeline.svg");
    let write_error = |source| DemoError::Write {
        path: chart.clone(),
        source,
    };
    fs::create_dir_all(options.output_directory()).map_err(write_error)?;
    fs::write(&chart, chart::draw(&outcome)).map_err(write_error)?;
    print!("{}", summary::table(&outcome));
    println!("\nTimeline: {}", shortened(&chart).display());
    Ok(outcome.passed())
}

fn start(options: &Options) -> Result<Box<dyn DemoGuest>, DemoError> {
    if options.protocol != Protocol::Virtio {
        return Ok(Box::new(protocols::ProtocolGuest::start(options)?));
    }
    let kind = match options.guest {
        GuestKind::Auto => match Prerequisites::find() {
            Ok(_) => GuestKind::Uml,
            Err(error) => {
                println!("{error}\nA synthetic guest takes its place.");
                GuestKind::Synthetic
            }
        },
        kind => kind,
    };
    match kind {
        GuestKind::Synthetic => Ok(Box::new(synthetic::SyntheticGuest::start(options)?)),
        GuestKind::Auto | GuestKind::Uml => Ok(Box::new(uml::UmlDemoGuest::start(options)?)),
    }
}

/// The path from the current directory if it is below that.
fn shortened(path: &Path) -> &Path {
    let here = env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path)
}

/// Bytes as MiB, for display.
#[must_use]
#[expect(
    clippy::cast_precision_loss,
    reason = "sizes of guests are far below 2^53"
)]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
