//! The demonstration's command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use super::DemoError;
use crate::artifacts;

/// What a guest of User-Mode Linux needs for itself beside working set and balloon.
const GUEST_NEEDS_MIB: u64 = 96;

const EXAMPLES: &str = "\
Examples:
  aerostat-demo
      a guest of 1 GiB gives 640 MiB and gets them back
  aerostat-demo --memory-mib 2048 --target-mib 1536
      the same with a larger guest
  aerostat-demo --guest synthetic --out /tmp/demo
      without a real guest, results in another place
  aerostat-demo --protocol memballoon
      another protocol, in pages of 2 MiB

Exit status: 0 if at least 99 % of the request became free on the host and the guest's data
survived, 1 if not, 2 if the demonstration could not be carried through.";

/// Shows a guest that gives memory back to its host and gets it again.
///
/// The guest fills its memory and keeps data with a known checksum. It is then asked for memory,
/// and what becomes free is measured on the host, outside guest and device.
#[derive(Clone, Debug, Parser)]
#[command(name = "aerostat-demo", version, after_help = EXAMPLES)]
pub struct Options {
    /// The kind of guest.
    #[arg(long, value_enum, default_value_t = GuestKind::Auto)]
    pub guest: GuestKind,
    /// The protocol of the balloon; all but the first have a synthetic guest.
    #[arg(long, value_enum, default_value_t = Protocol::Virtio)]
    pub protocol: Protocol,
    /// Size of the guest's memory.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub memory_mib: u64,
    /// How much memory to take from the guest.
    #[arg(long, default_value_t = 640, value_name = "MIB")]
    pub target_mib: u64,
    /// How much data the guest keeps.
    #[arg(long, default_value_t = 200, value_name = "MIB")]
    pub working_set_mib: u64,
    /// The vhost-user back-end [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    pub backend: Option<PathBuf>,
    /// Where the results go [default: the build's directory `target/demo`].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// What the guest is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// A real Linux kernel in User-Mode Linux, with its own driver.
    Uml,
    /// A driver written for this project that behaves as Linux does.
    Synthetic,
    /// A real one if it can be had.
    Auto,
}

/// What guest and device speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// The traditional balloon of virtio, device ID 5.
    Virtio,
    /// The memory balloon with device ID 13.
    Memballoon,
    /// VMware's balloon commands.
    Vmware,
}

impl Options {
    /// Looks whether the sizes fit together.
    ///
    /// # Errors
    /// [`DemoError::Sizes`] says what does not.
    pub fn check(&self) -> Result<(), DemoError> {
        let needed = self
            .target_mib
            .saturating_add(self.working_set_mib)
            .saturating_add(GUEST_NEEDS_MIB);
        if self.target_mib == 0 || self.working_set_mib == 0 {
            return Err(DemoError::Sizes(
                "target and working set must not be empty".to_owned(),
            ));
        }
        if self.guest == GuestKind::Uml && self.protocol != Protocol::Virtio {
            return Err(DemoError::Sizes(
                "User-Mode Linux has no driver for other protocols: leave --guest out".to_owned(),
            ));
        }
        if needed > self.memory_mib {
            return Err(DemoError::Sizes(format!(
                "a guest of {} MiB cannot give {} MiB and keep {} MiB: it needs {GUEST_NEEDS_MIB} \
                 MiB for itself, so give it --memory-mib {needed} at least",
                self.memory_mib, self.target_mib, self.working_set_mib
            )));
        }
        Ok(())
    }

    /// The back-end to start.
    #[must_use]
    pub fn backend_program(&self) -> PathBuf {
        self.backend
            .clone()
            .unwrap_or_else(artifacts::vhost_user_backend)
    }

    /// Where the results go.
    #[must_use]
    pub fn output_directory(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| {
            let mut directory = artifacts::directory();
            directory.pop();
            directory.join("demo")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Options {
        Options::try_parse_from([&["aerostat-demo"], words].concat()).unwrap()
    }

    #[test]
    fn defaults_fit_together() {
        let options = parse(&[]);
        assert_eq!((options.memory_mib, options.target_mib), (1024, 640));
        options.check().unwrap();
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused_with_the_size_that_would() {
        let error = parse(&["--target-mib", "900"])
            .check()
            .unwrap_err()
            .to_string();
        assert!(error.contains("--memory-mib 1196"), "{error}");
        assert!(parse(&["--target-mib", "0"]).check().is_err());
        assert!(
            parse(&["--target-mib", &u64::MAX.to_string()])
                .check()
                .is_err()
        );
    }
}
