//! The command line.

use crate::features;
use crate::vm::Offer;
use aerostat_device::{DeviceKind, WriteBehind};
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  One guest, with a control socket:
    aerostat-vhost-user --socket-path vm.sock --control-path vm.ctl

  Two guests in one process; the first control path belongs to the first socket:
    aerostat-vhost-user --socket-path a.sock --control-path a.ctl \\
                        --socket-path b.sock --control-path b.ctl

  A front-end for it, User-Mode Linux:
    linux mem=512M virtio_uml.device=vm.sock:5 ...

  Shrink the guest by 256 MiB, and look:
    printf '%s\\n' '{\"execute\":\"qmp_capabilities\"}' \\
      '{\"execute\":\"aerostat-set-target\",\"arguments\":{\"bytes\":268435456}}' \\
      '{\"execute\":\"aerostat-query\"}' | socat - UNIX-CONNECT:vm.ctl

Logging goes to stderr; AEROSTAT_LOG=warn, info (the default), debug chooses how much.";

/// The devices that a front-end can have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// The traditional memory balloon, virtio device ID 5.
    #[default]
    VirtioBalloon,
    /// The memory balloon with virtio device ID 13 (docs/memballoon.md).
    Memballoon,
}

impl Protocol {
    const fn kind(self) -> DeviceKind {
        match self {
            Self::VirtioBalloon => DeviceKind::VirtioBalloon,
            Self::Memballoon => DeviceKind::Memballoon,
        }
    }
}

/// A virtio balloon for virtual machines, as a vhost-user back-end.
///
/// Serves one virtual machine on each socket. Memory that a guest gives away is returned to the host.
#[derive(Debug, Parser)]
#[command(name = "aerostat-vhost-user", version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Listen here for a vhost-user front-end; once for each virtual machine.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "print_capabilities"
    )]
    pub(crate) socket_path: Vec<PathBuf>,

    /// Listen here for control connections (JSON, docs/control-socket.md). The first one belongs to
    /// the first --socket-path, and so on.
    #[arg(long, value_name = "PATH")]
    pub(crate) control_path: Vec<PathBuf>,

    /// The file mode of the sockets, in octal.
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    pub(crate) socket_mode: u32,

    /// Worker threads for each host node; 0 chooses by the number of processors.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub(crate) workers: u32,

    /// Which device to be; the front-end has to present it under the same device ID.
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t)]
    pub(crate) device: Protocol,

    /// What to offer to guests, separated by commas: default, none, must-tell-host, stats-vq,
    /// deflate-on-oom, free-page-hint, page-poison, page-reporting, ring-packed, in-order, page-refusal,
    /// host-reset. The default is what cannot undo what the host decided and needs nothing of the VMM:
    /// must-tell-host, stats-vq, page-poison, page-reporting. A memballoon offers all page sizes.
    #[arg(long, value_name = "LIST", default_value = "default", value_parser = features::parse)]
    pub(crate) features: u64,

    /// Discard inflated pages behind the guest's back, this many MiB at a time, if its driver tells
    /// before it uses them again (must-tell-host); 0 discards before each acknowledgement.
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub(crate) write_behind: u32,

    /// Record here what a guest gives and takes, page by page, for benchmarks; the first file belongs to
    /// the first --socket-path, and so on. Each session begins it anew.
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Vec<PathBuf>,

    /// Print what this program can do as JSON, and exit.
    #[arg(long)]
    pub(crate) print_capabilities: bool,
}

impl Arguments {
    /// What drivers are to find.
    pub(crate) fn offer(&self) -> Offer {
        let limit_bytes = u64::from(self.write_behind) << 20;
        let write_behind = WriteBehind {
            limit_bytes,
            ..WriteBehind::RECOMMENDED
        };
        Offer {
            kind: self.device.kind(),
            features: match self.device {
                Protocol::VirtioBalloon => self.features,
                Protocol::Memballoon => 0,
            },
            write_behind,
        }
    }

    fn chose_features(&self) -> bool {
        self.features != DeviceKind::VirtioBalloon.default_features()
    }

    /// What clap cannot check.
    pub(crate) fn check(&self) -> Result<(), String> {
        let sockets = self.socket_path.len();
        let given = [
            ("--control-path", self.control_path.len()),
            ("--record", self.record.len()),
        ];
        match given.into_iter().find(|(_, count)| *count > sockets) {
            Some((option, count)) => Err(format!(
                "{count} {option} for {sockets} --socket-path: each belongs to a socket"
            )),
            None if self.device != Protocol::VirtioBalloon && self.chose_features() => {
                Err("--features names what a virtio-balloon has; leave it out".to_owned())
            }
            None => Ok(()),
        }
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or_else(|| "expected an octal mode from 0 to 777".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_memballoon_offers_what_it_has() {
        let parse = |more: &[&str]| {
            let words = [
                "aerostat-vhost-user",
                "--socket-path",
                "s",
                "--device",
                "memballoon",
            ];
            Arguments::try_parse_from(words.iter().chain(more)).unwrap()
        };
        let arguments = parse(&[]);
        assert!(arguments.check().is_ok());
        let offer = arguments.offer();
        assert_eq!((offer.kind, offer.features), (DeviceKind::Memballoon, 0));
        assert!(parse(&["--features", "stats-vq"]).check().is_err());
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(parse_mode("660"), Ok(0o660));
        assert!(parse_mode("1000").is_err());
        assert!(parse_mode("8").is_err());
    }
}
