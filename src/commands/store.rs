//! `mb-server store`: backup of the durable values, and back; checks and compaction.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter},
    path::{Path, PathBuf},
};

use super::{Exit, Result, failure, usage};
use crate::{
    config::{self, Flags},
    files::{PRIVATE, Unfinished},
    store::{CACHE, Checked, Reader, Store},
};

/// Damaged places that are named one by one.
const MAX_NAMED: u32 = 100;

/// Back up the durable values of the services, restore, check or compact them
///
/// Stop the server first: one process at a time has the store open. Exit codes:
/// 0 done, 1 it could not be done, or something is damaged.
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
    /// Write everything as lines of JSON; what is damaged is named and left out
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
    /// Read everything, verify all checksums, and name what is damaged; changes
    /// nothing
    Check,
    /// Give what the file does not need back to the disk
    Compact,
}

pub(super) fn run(arguments: &Arguments) -> Result {
    let config = config::load(arguments.config.as_deref(), Flags::default())
        .map_err(usage)?
        .config;
    let file = config.store_file();
    if !matches!(arguments.action, Action::Import { .. }) && !file.exists() {
        return Err(named(
            &file,
            &"there is no store; state_dir says where it would be",
        ));
    }
    // A panic of redb at a damaged page is caught, and named once.
    std::panic::set_hook(Box::new(|_| {}));
    match &arguments.action {
        Action::Export { to } => export(&file, to),
        Action::Import { from, merge } => import(&file, from, *merge),
        Action::Check => {
            let reader = Reader::open(&file, CACHE, true).map_err(|e| named(&file, &e))?;
            Ok(verdict(
                reader.check(&mut name_lost()),
                "mb-server store export saves what can be read",
            ))
        }
        Action::Compact => compact(&file),
    }
}

fn export(file: &Path, to: &Path) -> Result {
    let reader = Reader::open(file, CACHE, false).map_err(|e| named(file, &e))?;
    let checked = if is_dash(to) {
        let mut out = BufWriter::new(io::stdout().lock());
        let exported = reader.export(&mut out, &mut name_lost());
        exported.map_err(|e| named(Path::new("standard output"), &e.0))?
    } else {
        if to.exists() {
            return Err(named(to, &"there is such a file; name another"));
        }
        let refused = |error: io::Error| named(to, &error);
        // Under its name only when it is whole.
        let unfinished = Unfinished::create(to, PRIVATE).map_err(refused)?;
        let mut out = BufWriter::new(&unfinished.file);
        let exported = reader.export(&mut out, &mut name_lost());
        let checked = exported.map_err(|e| refused(e.0))?;
        drop(out);
        unfinished.publish().map_err(refused)?;
        checked
    };
    Ok(verdict(checked, "they are not in the backup"))
}

fn import(file: &Path, from: &Path, merge: bool) -> Result {
    let store = Store::open(file, CACHE).map_err(|e| named(file, &e))?;
    let entries = if is_dash(from) {
        store.import(&mut io::stdin().lock(), merge)
    } else {
        let input = File::open(from).map_err(|e| named(from, &e))?;
        store.import(&mut BufReader::new(input), merge)
    };
    complain!("{} entries", entries.map_err(|e| named(file, &e))?);
    Ok(Exit::Success)
}

fn compact(file: &Path) -> Result {
    let compacted = || {
        let store = Store::open(file, CACHE)?;
        let before = store.size()?.on_disk;
        store.compact()?;
        drop(store);
        Ok((before, Store::open(file, CACHE)?.size()?))
    };
    let (before, after) =
        compacted().map_err(|error: crate::store::StoreError| named(file, &error))?;
    complain!(
        "{before} bytes before, {} now, for {} bytes of entries",
        after.on_disk,
        after.used
    );
    Ok(Exit::Success)
}

/// Names damaged places to standard error, so many at most.
fn name_lost() -> impl FnMut(&str) {
    let mut count = 0;
    move |what| {
        count += 1;
        match count {
            ..=MAX_NAMED => complain!("damaged: {what}"),
            _ if count == MAX_NAMED + 1 => complain!("and more"),
            _ => {}
        }
    }
}

fn verdict(checked: Checked, then: &str) -> Exit {
    let Checked { entries, damaged } = checked;
    if damaged == 0 {
        complain!("{entries} entries");
        return Exit::Success;
    }
    complain!("{entries} entries; {damaged} damaged places, {then}");
    Exit::Failure
}

fn named(file: &Path, error: &dyn std::fmt::Display) -> (Exit, String) {
    failure(format!("{}: {error}", file.display()))
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}
