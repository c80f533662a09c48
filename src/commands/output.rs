//! Standard output, and whether what was said there has arrived.

use std::{
    fmt,
    io::{self, Write as _},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

static IS_GONE: AtomicBool = AtomicBool::new(false);
static LOST: OnceLock<String> = OnceLock::new();

/// Prints a line.
pub(super) fn say(line: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{line}") {
        note(&error);
    }
}

/// Notes that something could not be written.
pub(super) fn note(error: &io::Error) {
    if error.kind() == io::ErrorKind::BrokenPipe {
        IS_GONE.store(true, Relaxed);
    } else {
        LOST.get_or_init(|| error.to_string());
    }
}

/// Whether nothing more arrives: the reader has seen enough, as `head` has, which
/// is no failure, or something was lost.
pub(super) fn is_over() -> bool {
    IS_GONE.load(Relaxed) || lost().is_some()
}

/// Why something was lost that somebody wanted.
pub(super) fn lost() -> Option<&'static str> {
    LOST.get().map(String::as_str)
}
