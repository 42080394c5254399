//! Results of rules that were run against each other, simulated or real: figures, a table, plots.

mod outcome;
mod plot;
mod table;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

pub use outcome::{Outcome, Point, Runs, Spread};
pub use table::table;

/// A result cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// To a file.
    #[error("writing {path}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// As a plot.
    #[error("drawing {path}: {detail}")]
    Plot {
        /// Where.
        path: PathBuf,
        /// Why.
        detail: String,
    },
}

/// Writes `results.json`, `swap.svg`, `runtime.svg` and `memory.svg` into a directory, which is made
/// if need be.
///
/// # Errors
/// A file cannot be written.
pub fn write(directory: &Path, title: &str, results: &[Runs]) -> Result<(), ResultsError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ResultsError::Write { path, source }
    };
    fs::create_dir_all(directory).map_err(failed(directory))?;
    let json = directory.join("results.json");
    let text = serde_json::to_string_pretty(results).map_err(io::Error::from);
    fs::write(&json, text.map_err(failed(&json))?).map_err(failed(&json))?;
    let plots = [
        ("swap.svg", plot::swap as fn(&Path, &str, &[Runs]) -> _),
        ("runtime.svg", plot::runtimes),
        ("memory.svg", plot::memory),
    ];
    for (name, draw) in plots {
        let path = directory.join(name);
        draw(&path, title, results).map_err(|error| ResultsError::Plot {
            path: path.clone(),
            detail: error.to_string(),
        })?;
    }
    Ok(())
}
