//! `mb-server check`: the effective configuration, and where it comes from.

use super::{Exit, Result, edge, printable, serve, serving, usage};
use crate::{catalog::component_files, config::MemoryPlan};

/// Widest column of settings, in characters. The source of a longer one follows
/// it.
const LONGEST_COLUMN: usize = 60;

/// Print the effective configuration and where each setting comes from
///
/// Also checks that the services folder can be read and that the system allows
/// enough open files, and the files that store.url needs; not the components, the
/// ports or what is in the store. Takes the same flags as serve. Exit codes: 0 the
/// server could start with these settings, 2 it could not.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    settings: serve::Arguments,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let loaded = arguments.settings.load().map_err(usage)?;
    serve::check_state_dir(&loaded.config.state_dir())?;
    edge::check_exposure(&loaded.config)?;
    edge::Edge::load(&loaded.config)?;
    #[cfg(feature = "redis")]
    check_store(&loaded.config)?;
    let width = loaded
        .rows
        .iter()
        .map(|row| row.key.len() + row.value.len())
        .max()
        .unwrap_or(0)
        .min(LONGEST_COLUMN)
        + 3;
    for row in &loaded.rows {
        let setting = format!("{} = {}", row.key, row.value);
        say!("{setting:width$}  # {}", row.source);
    }
    say!("");
    for line in MemoryPlan::of(&loaded.config).lines() {
        say!("# {line}");
    }
    let dir = &loaded.config.services_dir;
    let files = component_files(dir).map_err(|error| {
        usage(format!(
            "services folder {}: {error}; --services names another",
            printable(&dir.display().to_string())
        ))
    })?;
    say!(
        "# services folder: can be read, component files: {}",
        files.len()
    );
    if let Some(warning) = serving::Capacity::of(&loaded.config).warning() {
        complain!("mb-server: warning: {warning}");
    }
    Ok(Exit::Success)
}

/// Reads the files that an engine over the network needs, and connects to
/// nothing.
#[cfg(feature = "redis")]
fn check_store(config: &crate::config::Config) -> Result<()> {
    use crate::{
        store::Store,
        trusted::{self, Purpose},
    };
    let Some(remote) = config.store.remote().map_err(usage)? else {
        return Ok(());
    };
    if let Some(file) = &remote.password_file {
        trusted::open(file, Purpose::Data)
            .map_err(|error| {
                usage(format!(
                    "store.password_file {}: {error}; put the engine's password there, or name another file",
                    file.display()
                ))
            })?;
    }
    Store::remote(remote, None).map_err(|error| usage(format!("store.ca: {error}")))?;
    Ok(())
}
