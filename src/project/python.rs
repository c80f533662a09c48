//! What goes into a component of Python: what `requirements.txt` names, and
//! nothing else that happens to be installed.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Deserialize;

use super::ProjectError;

/// The module that the component begins with; it brings in the project's own.
pub(super) const ENTRY: &str = "mb_entry";

/// Run by the project's Python: copies the packages, and reads the sources.
const PACK: &str = include_str!("python/pack.py");
/// Becomes the module [`ENTRY`].
const ENTRY_SOURCE: &str = include_str!("python/entry.py");

/// Packages that are ready to be taken into a component.
#[derive(Debug)]
pub(super) struct Packed {
    /// A folder like that of a virtual environment.
    pub(super) dir: PathBuf,
    /// Wheels with machine code, which was left out: package, a file of it,
    /// how many there are.
    native: Vec<(String, String, usize)>,
}

/// What `pack.py` prints.
#[derive(Deserialize)]
struct Report {
    native: Vec<(String, String, usize)>,
    warnings: Vec<String>,
}

/// Packs what the project requires, into a folder in its `.venv`.
pub(super) fn pack(dir: &Path, say: &dyn Fn(&str)) -> Result<Packed, ProjectError> {
    let packed = dir.join(".venv/mb-server-packed");
    let output = Command::new(dir.join(".venv/bin/python"))
        .args(["-I", "-c", PACK])
        .arg(&packed)
        .arg(ENTRY)
        .current_dir(dir)
        .env("MB_ENTRY_SOURCE", ENTRY_SOURCE)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| {
            ProjectError::Failed(format!(
                ".venv/bin/python: {error}; remove .venv, the next build creates it again"
            ))
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        return Err(ProjectError::Failed(match text.trim() {
            "" => "the packages of .venv could not be read; remove .venv, the next build creates it again".into(),
            text => text.to_owned(),
        }));
    }
    let report: Report = serde_json::from_slice(&output.stdout)
        .map_err(|error| ProjectError::Failed(format!("pack.py: {error}")))?;
    for warning in &report.warnings {
        say(&format!("warning: {warning}"));
    }
    Ok(Packed {
        dir: packed,
        native: report.native,
    })
}

impl Packed {
    /// Adds to a failed build what native wheels may have to do with it.
    pub(super) fn explain(&self, error: ProjectError) -> ProjectError {
        let ProjectError::Failed(text) = error else {
            return error;
        };
        let native: String = self
            .native
            .iter()
            .map(|(package, file, count)| {
                let more = match count - 1 {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                format!(
                    "\n{package} is a native wheel: {file}{more} is machine code, which a component can't run; take a \
                     package in pure Python, or do that work in a service in Rust and call it"
                )
            })
            .collect();
        ProjectError::Failed(text + &native)
    }
}
