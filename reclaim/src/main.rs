//! aerostatd: gives memory of idle guests to busy ones, and keeps the books in cgroup v2.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use aerostat_reclaim::{
    config::{Config, Size},
    daemon::{
        check::{self, Grade},
        client,
        control::{Answer, Request},
        run, top, view,
    },
    engine::{Command, attributes, status::VmStatus},
    policy::{Mode, VmId},
    simulate::{self, SimulateArgs},
};
use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
Examples:
  aerostatd check --config /etc/aerostat/aerostatd.toml    what this host can do, and how to fix it
  aerostatd run --config aerostatd.toml --dry-run          decide, and carry nothing out
  aerostatd run --config /etc/aerostat/aerostatd.toml      the daemon
  aerostatd status                                         one line a VM, with the last decision
  aerostatd top                                            the same, live
  aerostatd explain web                                    one VM: figures, rule, outcome, history
  aerostatd set web mode manual                            the policy leaves web alone
  aerostatd set web target 2G                              2 GiB of web's memory into its balloon
  aerostatd set web target none                            no target by hand any more
  aerostatd set web floor 1G                               always leave web 1 GiB
  aerostatd get web actual-bytes                           one value, for scripts
  aerostatd simulate offset-peaks                          try a policy in virtual time

AEROSTAT_LOG=warn, info (the default), debug chooses how much is logged, to stderr.

Targets are the size of the balloon, not of the guest. A first configuration:

  [[vm]]
  protocol = \"qmp\"                      # qemu ... -qmp unix:/run/aerostat/NAME.qmp,server=on,wait=off
  socket = \"/run/aerostat/{name}.qmp\"

docs/operations.md has every key.";

#[derive(Parser)]
#[command(version, about = "Gives memory of idle guests to busy ones, and never swaps a guest to death", after_help = EXAMPLES)]
struct Arguments {
    /// The running daemon's control socket.
    #[arg(long, global = true, default_value = "/run/aerostat/aerostatd.sock")]
    socket: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run the daemon. SIGHUP reads the configuration again.
    Run {
        /// The configuration.
        #[arg(long, default_value = "/etc/aerostat/aerostatd.toml")]
        config: PathBuf,
        /// Decide and explain, but change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// What this host and its VMs can and cannot do, and how to fix it.
    Check {
        /// The configuration.
        #[arg(long, default_value = "/etc/aerostat/aerostatd.toml")]
        config: PathBuf,
    },
    /// The host and all VMs.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The host and all VMs, live.
    Top,
    /// Everything about one VM: figures, rule, outcome, history.
    Explain {
        /// Its name.
        vm: String,
    },
    /// The attributes of a VM, or the value of one.
    Get {
        /// Its name.
        vm: String,
        /// One of them.
        attribute: Option<String>,
    },
    /// Change a VM until the daemon ends or its configuration changes.
    Set {
        /// Its name.
        vm: String,
        /// What to change.
        attribute: Writable,
        /// A size as in 512M; "none" for no target; manual, floor-only, auto or fluid; a weight.
        value: String,
        /// For a target in mode manual: go below the floor all the same.
        #[arg(long)]
        override_floor: bool,
    },
    /// Play a scenario in virtual time, with this policy and its rivals.
    Simulate(SimulateArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum Writable {
    #[value(alias = "target-bytes")]
    Target,
    #[value(alias = "floor-bytes")]
    Floor,
    Mode,
    Weight,
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match act(Arguments::parse()) {
        Ok(code) => code,
        // The reader has left, as in `aerostatd status | head`.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "aerostatd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn act(arguments: Arguments) -> Result<ExitCode, Failure> {
    let socket = arguments.socket;
    match arguments.action {
        Action::Run { config, dry_run } => {
            log_to_stderr();
            run::run(&config, dry_run)?;
        }
        Action::Check { config } => return check(&config),
        Action::Status { json } => {
            let status = client::status(&socket)?;
            if json {
                print(&(serde_json::to_string_pretty(&*status)? + "\n"))?;
            } else {
                print(&view::table(&status))?;
            }
        }
        Action::Top => top::run(&socket)?,
        Action::Explain { vm } => print(&view::explain(&find(&socket, &vm)?))?,
        Action::Get { vm, attribute } => print(&get(&find(&socket, &vm)?, attribute.as_deref())?)?,
        Action::Set {
            vm,
            attribute,
            value,
            override_floor,
        } => {
            let command = command(VmId::new(&vm), attribute, &value, override_floor)?;
            match client::ask(&socket, &Request::Set { command })? {
                Answer::Done { text } => print(&(text + "\n"))?,
                Answer::Refused { text } => return Err(text.into()),
                Answer::Status { .. } => return Err("the daemon did not understand".into()),
            }
        }
        Action::Simulate(arguments) => simulate::run(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> io::Result<()> {
    io::stdout().write_all(text.as_bytes())
}

fn check(path: &std::path::Path) -> Result<ExitCode, Failure> {
    let config = Config::read(path)?;
    let findings = check::check(&config);
    for finding in &findings {
        print(&format!("{finding}\n"))?;
    }
    let bad = findings.iter().any(|finding| finding.grade == Grade::Bad);
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn find(socket: &std::path::Path, name: &str) -> Result<VmStatus, Failure> {
    let status = client::status(socket)?;
    let found = status.vms.iter().find(|vm| vm.name.as_str() == name);
    found
        .cloned()
        .ok_or_else(|| format!("there is no VM {name}; `aerostatd status` lists them").into())
}

fn get(vm: &VmStatus, attribute: Option<&str>) -> Result<String, Failure> {
    let value = |attribute: &attributes::Attribute| (attribute.value)(vm).unwrap_or_default();
    match attribute {
        Some(name) => {
            let attribute = attributes::by_name(name).ok_or_else(|| {
                format!("there is no attribute {name}; without one, all of them are shown")
            })?;
            Ok(value(attribute) + "\n")
        }
        None => Ok(attributes::ATTRIBUTES
            .iter()
            .map(|attribute| format!("{} {}\n", attribute.name, value(attribute)))
            .collect()),
    }
}

fn command(
    vm: VmId,
    attribute: Writable,
    value: &str,
    override_floor: bool,
) -> Result<Command, Failure> {
    let size = |text: &str| -> Result<u64, Failure> {
        text.parse::<Size>()
            .map(|size| size.0)
            .map_err(|error| format!("{text}: {error}").into())
    };
    Ok(match attribute {
        Writable::Target => Command::TargetBytes {
            vm,
            bytes: match value {
                "none" => None,
                text => Some(size(text)?),
            },
            override_floor,
        },
        Writable::Floor => Command::FloorBytes {
            vm,
            bytes: size(value)?,
        },
        Writable::Mode => {
            let mode: Mode = serde_json::from_value(serde_json::Value::String(value.to_owned()))
                .map_err(|_| format!("{value}: a mode is manual, floor-only, auto or fluid"))?;
            Command::Mode { vm, mode }
        }
        Writable::Weight => Command::Weight {
            vm,
            weight: value
                .parse()
                .map_err(|_| format!("{value}: a weight is a number; 100 is ordinary"))?,
        },
    })
}

/// Logs to standard error, one line an event: journald adds the time itself. A full disk behind it
/// costs log lines, not the daemon.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("AEROSTAT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_env_filter(filter)
        .log_internal_errors(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        builder.without_time().init();
    } else {
        builder.init();
    }
}
