//! `mb-server store`: backup of the durable values, and back; checks and compaction.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{Exit, Result, admin_http::Endpoint, failure, printable, usage};
use crate::{
    config::{self, Flags, store::Remote},
    files::{PRIVATE, Unfinished},
    store::{CACHE, Checked, Reader, Store},
};

/// Damaged places that are named one by one.
const MAX_NAMED: u32 = 100;

/// Back up the durable values of the services, restore, check or compact them
///
/// Stop the server first, or export from the running one with --admin: one
/// process at a time has the file open. Where `store.url` names Valkey or Redis,
/// export and import work on that. Exit codes: 0 done, 1 it could not be done, or
/// something is damaged.
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
        /// Export from the running server, over its admin endpoint
        #[arg(long, value_name = "HOST:PORT|unix:FILE")]
        admin: Option<String>,
        /// Send the token also to another machine, where everybody on the way can read it
        #[arg(long, requires = "admin")]
        allow_unsecure: bool,
    },
    /// Read a backup; into a file all of it or nothing
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
    if let Action::Export {
        to,
        admin: Some(admin),
        allow_unsecure,
    } = &arguments.action
    {
        let endpoint = Endpoint::new(Some(admin.clone()), &config, *allow_unsecure);
        return download(&endpoint, to);
    }
    if let Some(remote) = config.store.remote().ok().flatten() {
        return run_remote(remote, &arguments.action);
    }
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
        Action::Export { to, .. } => {
            let reader = Reader::open(&file, CACHE, false).map_err(|e| named(&file, &e))?;
            export(to, |out, lost| reader.export(out, lost))
        }
        Action::Import { from, merge } => {
            let input = input(from)?;
            let store = Store::open(&file, CACHE).map_err(|e| named(&file, &e))?;
            import(&store, &file, input, *merge)
        }
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

/// Works on an engine over the network.
#[cfg(feature = "redis")]
fn run_remote(remote: Remote, action: &Action) -> Result {
    let url = PathBuf::from("store.url");
    let store = Store::remote(remote, None).map_err(|e| named(&url, &e))?;
    match action {
        Action::Export { to, .. } => export(to, |out, lost| store.export(out, lost)),
        Action::Import { from, merge } => import(&store, &url, input(from)?, *merge),
        Action::Check | Action::Compact => {
            Err(failure("store.url names an engine that does this itself"))
        }
    }
}

/// Settings that name one are out of bounds.
#[cfg(not(feature = "redis"))]
fn run_remote(_: Remote, _: &Action) -> Result {
    Err(failure("this program has no client for store.url"))
}

/// Writes a backup of a store that this process has open.
fn export(
    to: &Path,
    write: impl Fn(&mut dyn Write, &mut dyn FnMut(&str)) -> io::Result<Checked>,
) -> Result {
    let checked = write_whole(to, &mut |out| {
        write(out, &mut name_lost()).map_err(|error| named(to, &error))
    })?;
    Ok(verdict(checked, "they are not in the backup"))
}

/// Takes a backup from a running server.
fn download(endpoint: &Endpoint, to: &Path) -> Result {
    let checked = write_whole(to, &mut |out| {
        let mut out = LastLine {
            out,
            last: Vec::new(),
        };
        match endpoint.download("/store/export", &mut out)? {
            (200, _) => out
                .checked()
                .ok_or_else(|| named(to, &"it was cut off; the server's log says why")),
            (_, answer) => {
                let page: Value = serde_json::from_str(&answer).unwrap_or_default();
                let problem = page["error"].as_str().unwrap_or(&answer);
                Err(named(to, &printable(problem)))
            }
        }
    })?;
    Ok(verdict(
        checked,
        "they are not in the backup; the server's log names them",
    ))
}

/// Keeps the last line of what it writes: a backup is whole if that says so.
struct LastLine<'a> {
    out: &'a mut dyn Write,
    last: Vec<u8>,
}

impl LastLine<'_> {
    /// More than the last line of a backup takes, in bytes.
    const MAX: usize = 128;

    fn checked(&self) -> Option<Checked> {
        let text = String::from_utf8_lossy(&self.last);
        let line = text.strip_suffix('\n')?.rsplit('\n').next()?;
        let line: Value = serde_json::from_str(line).ok()?;
        Some(Checked {
            entries: line["entries"].as_u64()?,
            damaged: line["damaged"].as_u64().unwrap_or(0),
        })
    }
}

impl Write for LastLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        let tail = &bytes[written.saturating_sub(Self::MAX)..written];
        self.last.extend_from_slice(tail);
        self.last.drain(..self.last.len().saturating_sub(Self::MAX));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes a backup: to standard output, or to a file that is there only once it
/// is whole.
fn write_whole(
    to: &Path,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<Checked>,
) -> Result<Checked> {
    let refused = |error: io::Error| named(to, &error);
    let mut write_to = |out: &mut dyn Write| {
        let mut out = BufWriter::new(out);
        let checked = write(&mut out)?;
        out.flush().map_err(refused)?;
        Ok(checked)
    };
    if is_dash(to) {
        return write_to(&mut io::stdout().lock());
    }
    if to.exists() {
        return Err(named(to, &"there is such a file; name another"));
    }
    let mut unfinished = Unfinished::create(to, PRIVATE).map_err(refused)?;
    let checked = write_to(&mut unfinished.file)?;
    unfinished.publish().map_err(refused)?;
    Ok(checked)
}

fn input(from: &Path) -> Result<Box<dyn BufRead>> {
    if is_dash(from) {
        return Ok(Box::new(io::stdin().lock()));
    }
    let input = File::open(from).map_err(|e| named(from, &e))?;
    Ok(Box::new(BufReader::new(input)))
}

fn import(store: &Store, file: &Path, mut input: Box<dyn BufRead>, merge: bool) -> Result {
    let entries = store.import(&mut input, merge);
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
    if is_dash(file) {
        return failure(format!("standard output: {error}"));
    }
    failure(format!("{}: {error}", file.display()))
}

fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}
