//! `mb-server store`: backup of the durable values, and back.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter},
    path::{Path, PathBuf},
};

use super::{Exit, Result, failure, usage};
use crate::{
    config::{self, Flags},
    store::Store,
};

/// Back up the durable values of the services, or restore them
///
/// Stop the server first: one process at a time has the store open.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
    /// Settings in TOML, which say where the store is
    #[arg(long, value_name = "FILE", env = "MB_CONFIG", global = true)]
    config: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Write everything as lines of JSON
    Export {
        /// File to write; - is standard output
        #[arg(default_value = "-")]
        to: PathBuf,
    },
    /// Read a backup, all of it or nothing
    Import {
        /// File to read; - is standard input
        from: PathBuf,
        /// Into a store that is not empty; the backup's values win
        #[arg(long)]
        merge: bool,
    },
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let config = config::load(arguments.config.as_deref(), Flags::default())
        .map_err(usage)?
        .config;
    let file = config.store_file();
    let named = |error: &dyn std::fmt::Display| failure(format!("{}: {error}", file.display()));
    if matches!(arguments.action, Action::Export { .. }) && !file.exists() {
        return Err(named(
            &"there is no store; state_dir says where it would be",
        ));
    }
    let store = Store::open(&file, config.store_cache.0).map_err(|e| named(&e))?;
    let entries = match &arguments.action {
        Action::Export { to } if is_dash(to) => {
            store.export(&mut BufWriter::new(io::stdout().lock()))
        }
        Action::Export { to } => {
            let out =
                File::create_new(to).map_err(|e| failure(format!("{}: {e}", to.display())))?;
            let exported = store.export(&mut BufWriter::new(&out));
            out.sync_all()
                .map_err(|e| failure(format!("{}: {e}", to.display())))?;
            exported
        }
        Action::Import { from, merge } if is_dash(from) => {
            store.import(&mut io::stdin().lock(), *merge)
        }
        Action::Import { from, merge } => {
            let input =
                File::open(from).map_err(|e| failure(format!("{}: {e}", from.display())))?;
            store.import(&mut BufReader::new(input), *merge)
        }
    };
    complain!("{} entries", entries.map_err(|e| named(&e))?);
    Ok(Exit::Success)
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}
