//! `mb-server new`: a project to begin with.

use std::path::PathBuf;

use super::{Exit, Result, usage};
use crate::project::{Language, create};

/// Create a project for a new service
///
/// Writes a folder with a service that works, its test, its README and the
/// SDK. Overwrites nothing. Exit codes: 0 created, 2 the name or the folder is
/// not available.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The service's name, and the folder's unless --dir names another
    name: String,
    /// What it is written in
    #[arg(long, value_enum)]
    lang: Language,
    /// The folder to create
    #[arg(long)]
    dir: Option<PathBuf>,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let Arguments { name, lang, dir } = arguments;
    let dir = dir.clone().unwrap_or_else(|| name.into());
    create(&dir, name, *lang).map_err(usage)?;
    let shown = dir.display();
    say!("created {shown}; go on with\n\n    mb-server dev {shown}\n\nand in another terminal\n");
    say!("    mb-server call {name}.greet '{{\"name\":\"Ada\"}}'");
    Ok(Exit::Success)
}
