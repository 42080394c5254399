//! `aerostat-manual DIRECTORY`: writes manual pages and completions for shells, as they are to lie under
//! a prefix. `make install` runs it.
//!
//! The pages of programs come from their command lines, that of the library from its header, so neither
//! can fall behind.

mod header;

use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const HEADER: &str = include_str!("../../include/aerostat.h");

/// The programs, and the section of the manual that each belongs to.
fn programs() -> [(Command, &'static str); 1] {
    [(aerostat_vhost_user::command(), "1")]
}

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: aerostat-manual DIRECTORY");
        return ExitCode::FAILURE;
    };
    match write_all(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("aerostat-manual: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write_all(prefix: &Path) -> Result<(), Box<dyn Error>> {
    write(
        &prefix.join("share/man/man3/aerostat.3"),
        &header::page(HEADER),
    )?;
    for (command, section) in programs() {
        let name = command.get_name().to_owned();
        let mut page = Vec::new();
        Man::new(command.clone())
            .section(section)
            .render(&mut page)?;
        let file = format!("share/man/man{section}/{name}.{section}");
        write(&prefix.join(file), &page)?;
        complete(prefix, command)?;
    }
    Ok(())
}

/// Where each shell looks, and under which name.
fn complete(prefix: &Path, mut command: Command) -> Result<(), Box<dyn Error>> {
    let name = command.get_name().to_owned();
    let homes = [
        (
            Shell::Bash,
            "share/bash-completion/completions",
            name.clone(),
        ),
        (Shell::Zsh, "share/zsh/site-functions", format!("_{name}")),
        (
            Shell::Fish,
            "share/fish/vendor_completions.d",
            format!("{name}.fish"),
        ),
    ];
    for (shell, home, wanted) in homes {
        let home = prefix.join(home);
        fs::create_dir_all(&home)?;
        let made = generate_to(shell, &mut command, &name, &home)?;
        fs::rename(made, home.join(wanted))?;
    }
    Ok(())
}

fn write(file: &Path, content: &[u8]) -> Result<(), Box<dyn Error>> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    Ok(fs::write(file, content)?)
}
