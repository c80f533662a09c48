//! What the log needs beyond `tracing`: where it goes and what of it, a bound
//! for lines that peers can cause, and the text of a panic.

pub mod lines;
mod writer;

use std::{
    any::Any,
    io::{self, IsTerminal as _, Write as _},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use tracing_subscriber::{
    Registry,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt as _,
    reload,
    util::SubscriberInitExt as _,
};
use writer::{StandardError, Writer};

use crate::locks::lock;

/// Changes what is logged, once the log was started.
static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Writes the lines, once [`write_in_background`] was called.
static WRITER: OnceLock<Arc<Writer>> = OnceLock::new();

/// Target of the audit trail: what the operator changed, who authenticated and
/// who was refused. The field `security` names the kind of a line.
pub const AUDIT: &str = "audit";

/// How long the end of the process waits for the log to be written.
const FLUSH_WITHIN: Duration = Duration::from_millis(500);

/// How lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As text to a terminal, as JSON to anything else.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One JSON object a line, for programs.
    Json,
}

/// Writes the log to standard error from here on, and keeps its newest lines.
/// A second start, as in a test, changes nothing.
///
/// # Errors
/// The filter breaks its grammar.
pub fn start(filter: &str, format: Format) -> Result<(), String> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let terminal = io::stderr().is_terminal();
    let json = format == Format::Json || format == Format::Auto && !terminal;
    let lines = (!json).then(|| fmt::layer().with_writer(|| Line).with_ansi(terminal));
    let objects = json.then(|| fmt::layer().json().flatten_event(true).with_writer(|| Line));
    let log = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(objects)
        .with(lines::Keeper);
    if log.try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
    Ok(())
}

/// Writes to standard error from a thread from here on: logging never waits,
/// and lines that are not read in time are dropped and counted.
///
/// # Errors
/// If the thread can't be started.
pub fn write_in_background() -> io::Result<()> {
    if WRITER.get().is_none() {
        let writer = Writer::start(StandardError, |dropped| {
            tracing::warn!(
                "{dropped} lines of the log were dropped, because standard error did not take them in time"
            );
        })?;
        let _ = WRITER.set(writer);
    }
    Ok(())
}

/// Lines of the log that were dropped since the start, because standard error
/// did not take them.
#[must_use]
pub fn dropped_lines() -> u64 {
    WRITER.get().map_or(0, |writer| writer.dropped())
}

/// Writes a line to standard error that is not part of the log, after the
/// lines of the log.
pub fn print(line: &str) {
    // There is nowhere to report that nobody reads it.
    let _ = Line.write_all(format!("{line}\n").as_bytes());
}

/// Waits before the process ends until the log is written, half a second at
/// most.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        writer.flush(FLUSH_WITHIN);
    }
}

/// Takes one whole line with each write.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match WRITER.get() {
            Some(writer) => {
                writer.push(line);
                Ok(line.len())
            }
            None => io::stderr().write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is logged now.
#[must_use]
pub fn filter() -> String {
    let shown = FILTER
        .get()
        .and_then(|filter| filter.with_current(ToString::to_string).ok());
    shown.unwrap_or_default()
}

/// Changes what is logged.
///
/// # Errors
/// The filter breaks its grammar, or there is no log.
pub fn set_filter(filter: &str) -> Result<(), String> {
    let filter = parse(filter)?;
    let handle = FILTER.get().ok_or("the log was not started")?;
    handle.reload(filter).map_err(|error| error.to_string())
}

/// The filter of this text. The audit trail is in it, unless it says otherwise.
fn parse(text: &str) -> Result<Targets, String> {
    let filter: Targets = text.parse().map_err(|error| format!("{text:?}: {error}"))?;
    let silent = text.trim().eq_ignore_ascii_case("off");
    if silent || filter.iter().any(|(target, _)| target == AUDIT) {
        return Ok(filter);
    }
    Ok(filter.with_target(AUDIT, LevelFilter::INFO))
}

/// Lines of one kind within [`WINDOW`]; more are counted, not written.
const MAX_LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// Bounds one kind of line, so that no client can fill the disk with it.
#[derive(Debug)]
pub struct Limiter {
    max: u32,
    /// Its lines are of the audit trail.
    audit: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the window began; none before the first line.
    began: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

impl Limiter {
    /// One that has let nothing through.
    #[must_use]
    pub const fn new() -> Self {
        Self::with(MAX_LINES, false)
    }

    /// The same for a kind of line of the audit trail.
    #[must_use]
    pub const fn audit() -> Self {
        Self::with(MAX_LINES, true)
    }

    /// The same for so many lines a second.
    #[must_use]
    pub const fn audit_up_to(max: u32) -> Self {
        Self::with(max, true)
    }

    const fn with(max: u32, audit: bool) -> Self {
        Self {
            max,
            audit,
            state: Mutex::new(State {
                began: None,
                lines: 0,
                suppressed: 0,
            }),
        }
    }

    /// Whether a line may be written now. The first one after some were not
    /// is preceded by a line that says how many.
    #[must_use]
    pub fn allows(&self, what: &str) -> bool {
        let suppressed = self.judge(Instant::now());
        match suppressed {
            None | Some(0) => {}
            Some(lines) if self.audit => {
                tracing::warn!(target: AUDIT, "{lines} more lines were suppressed: {what}");
            }
            Some(lines) => tracing::warn!("{lines} more lines were suppressed: {what}"),
        }
        suppressed.is_some()
    }

    /// How many lines were not written before this one; none if this one is
    /// not either.
    fn judge(&self, now: Instant) -> Option<u64> {
        // Nothing in here panics, and nothing is logged under the lock.
        let mut state = lock(&self.state);
        if state
            .began
            .is_none_or(|began| now.saturating_duration_since(began) >= WINDOW)
        {
            state.began = Some(now);
            state.lines = 0;
        }
        if state.lines == self.max {
            state.suppressed += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

/// Untrusted text for people: what would move the cursor, change colours, turn
/// the direction of writing or is not seen at all is an escape, but for what is
/// `kept`.
#[must_use]
pub fn escaped(text: &str, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if (c.is_control() || hidden) && !kept.contains(&c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// What a panic says.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_a_second_and_then_how_many_were_not() {
        let limiter = Limiter::new();
        let begun = Instant::now();
        let at = |millis: u64| limiter.judge(begun + Duration::from_millis(millis));
        for line in 0..MAX_LINES {
            assert_eq!(at(u64::from(line)), Some(0), "{line}");
        }
        for _ in 0..500 {
            assert_eq!(at(999), None);
        }
        assert_eq!(
            at(1000),
            Some(500),
            "a new second, and what the last one lacks"
        );
        assert_eq!(at(1001), Some(0));
        assert_eq!(at(60_000), Some(0));
    }

    #[test]
    fn the_audit_trail_is_logged_unless_the_filter_names_it() {
        let shows = |text: &str| {
            parse(text)
                .unwrap()
                .would_enable(AUDIT, &tracing::Level::INFO)
        };
        assert!(shows("info") && shows("error") && shows("warn,mb_server::server=debug"));
        assert!(!shows("off") && !shows("info,audit=off") && !shows("info,audit=warn"));
    }

    #[test]
    fn panics_have_a_text() {
        let text = |panic: Box<dyn Any + Send>| panic_text(&*panic).to_owned();
        assert_eq!(text(Box::new("word")), "word");
        assert_eq!(text(Box::new(String::from("words"))), "words");
        assert_eq!(text(Box::new(7)), "no message");
    }
}
