//! `mb-server check`: the effective configuration, and where it comes from.

use super::{Exit, Result, serve, usage};
use crate::config::MemoryPlan;

/// Print the effective configuration and where each setting comes from
///
/// Takes the same flags as serve. Exit codes: 0 the server could start with
/// these settings, 2 it could not.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: serve::Arguments,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let loaded = arguments.settings.load().map_err(usage)?;
    serve::check_exposure(&loaded.config)?;
    let width = loaded.rows.iter().map(|row| row.key.len() + row.value.len()).max().unwrap_or(0) + 3;
    for row in &loaded.rows {
        let setting = format!("{} = {}", row.key, row.value);
        println!("{setting:width$}  # {}", row.source);
    }
    println!();
    for line in MemoryPlan::of(&loaded.config).lines() {
        println!("# {line}");
    }
    Ok(Exit::Success)
}
