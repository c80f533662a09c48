//! `wasi:logging`, and what components print: lines in the server's log,
//! bounded in size and number, under the request that they belong to.

use std::fmt::Write as _;

use super::{Context, Granted, Host, bindings::wasi::logging::logging};
use crate::config::LogLevel;

/// Longest line in bytes; the rest of a longer one is dropped.
const MAX_LINE: usize = 4096;

/// Of what a call printed to standard error, the newest bytes that are kept
/// for the history of failed calls.
const MAX_STDERR: usize = 2048;

/// What one call may still write.
pub(super) struct Meter {
    left: usize,
    dropped: u64,
    /// The end of what was printed to standard error, logged or not.
    stderr: String,
    /// The unfinished line of each of the two streams.
    lines: [String; 2],
}

/// Where printed text came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Meter {
    pub(super) fn new(bytes: usize) -> Self {
        Self {
            left: bytes,
            dropped: 0,
            stderr: String::new(),
            lines: Default::default(),
        }
    }

    /// The newest lines that were printed to standard error.
    pub(super) fn stderr(&self) -> Vec<String> {
        // Rust's panics end with advice that a service can't follow.
        let has_content = |line: &&str| !line.is_empty() && !line.contains("`RUST_BACKTRACE=1`");
        let lines = self.stderr.lines().filter(has_content);
        lines.map(|line| escape(line, MAX_STDERR)).collect()
    }

    /// Writes one line, if the service may.
    fn line(
        &mut self,
        granted: &Granted,
        context: &Context,
        level: LogLevel,
        source: &str,
        text: &str,
    ) {
        if level < granted.log || granted.log == LogLevel::Off || text.is_empty() {
            return;
        }
        if self.left == 0
            || granted
                .log_rate
                .as_ref()
                .is_some_and(|rate| rate.take().is_err())
        {
            self.dropped += 1;
            return;
        }
        let size = text.len().min(MAX_LINE);
        // A line that does not fit into what is left is the last one.
        self.left = self.left.saturating_sub(size.max(1));
        emit(
            granted,
            context,
            level,
            &escape(source, 64),
            &escape(text, MAX_LINE),
        );
    }

    /// Takes what was printed, and writes the lines that are whole.
    fn print(&mut self, granted: &Granted, context: &Context, stream: Stream, bytes: &[u8]) {
        let text = String::from_utf8_lossy(bytes);
        if stream == Stream::Stderr {
            self.keep(&text);
        }
        let level = stream.level();
        for piece in text.split_inclusive('\n') {
            let line = &mut self.lines[stream as usize];
            let free = MAX_LINE.saturating_sub(line.len());
            line.push_str(&piece[..piece.floor_char_boundary(free)]);
            if piece.ends_with('\n') {
                let line = std::mem::take(line);
                self.line(
                    granted,
                    context,
                    level,
                    stream.name(),
                    line.trim_end_matches(['\n', '\r']),
                );
            }
        }
    }

    /// Keeps the end of what was printed to standard error.
    fn keep(&mut self, text: &str) {
        let skipped = text.len().saturating_sub(MAX_STDERR);
        self.stderr
            .push_str(&text[text.ceil_char_boundary(skipped)..]);
        let over = self.stderr.len().saturating_sub(MAX_STDERR);
        self.stderr.drain(..self.stderr.ceil_char_boundary(over));
    }

    /// Writes unfinished lines, and how much was dropped.
    #[inline]
    pub(super) fn finish(&mut self, granted: &Granted, context: &Context) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = std::mem::take(&mut self.lines[stream as usize]);
            if !line.is_empty() {
                self.line(granted, context, stream.level(), stream.name(), &line);
            }
        }
        if self.dropped > 0 && granted.log_dropped.allows("service log") {
            let text = format!(
                "{} lines dropped, beyond 64 KiB in a call or 1,000 in a second",
                self.dropped
            );
            emit(granted, context, LogLevel::Warn, "mb-server", &text);
        }
        self.dropped = 0;
    }
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }

    fn level(self) -> LogLevel {
        match self {
            Self::Stdout => LogLevel::Info,
            Self::Stderr => LogLevel::Warn,
        }
    }
}

impl Host {
    /// What a component prints is its log too.
    pub(super) fn print(&mut self, stream: Stream, bytes: &[u8]) {
        let Self {
            context,
            granted,
            log,
            ..
        } = self;
        log.print(granted, context, stream, bytes);
    }
}

impl logging::Host for Host {
    fn log(
        &mut self,
        level: logging::Level,
        source: String,
        message: String,
    ) -> wasmtime::Result<()> {
        let level = match level {
            logging::Level::Trace => LogLevel::Trace,
            logging::Level::Debug => LogLevel::Debug,
            logging::Level::Info => LogLevel::Info,
            logging::Level::Warn => LogLevel::Warn,
            logging::Level::Error | logging::Level::Critical => LogLevel::Error,
        };
        let Self {
            context,
            granted,
            log,
            ..
        } = self;
        log.line(granted, context, level, &source, &message);
        Ok(())
    }
}

fn emit(granted: &Granted, context: &Context, level: LogLevel, source: &str, text: &str) {
    macro_rules! event {
        ($level:ident) => {
            tracing::event!(
                target: "mb_server::service",
                tracing::Level::$level,
                service = &*granted.service,
                request_id = context.request_id.as_deref().unwrap_or("-"),
                parent_request_id = context.parent_request_id.as_deref().unwrap_or("-"),
                connection = context.caller.connection_id,
                source,
                "{text}"
            )
        };
    }
    match level {
        LogLevel::Trace => event!(TRACE),
        LogLevel::Debug => event!(DEBUG),
        LogLevel::Info => event!(INFO),
        LogLevel::Warn => event!(WARN),
        LogLevel::Error | LogLevel::Off => event!(ERROR),
    }
}

/// Untrusted text, cut to a length, in which nothing moves the cursor,
/// ends the line or turns the direction of writing.
fn escape(text: &str, limit: usize) -> String {
    let cut = &text[..text.floor_char_boundary(limit)];
    let mut escaped = crate::log::escaped(cut, &[]);
    if cut.len() < text.len() {
        let _ = write!(escaped, "… ({} bytes more)", text.len() - cut.len());
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_line_is_obeyed() {
        let check = |text: &str, expected: &str| assert_eq!(escape(text, 20), expected);
        check("plain, ünïcode", "plain, ünïcode");
        check("a\nb\r\x1b[31m", "a\\nb\\r\\u{1b}[31m");
        check("\u{202e}x\u{9b}", "\\u{202e}x\\u{9b}");
        check(
            &"x".repeat(25),
            &format!("{}… (5 bytes more)", "x".repeat(20)),
        );
    }

    #[test]
    fn the_end_of_standard_error_is_kept() {
        let mut meter = Meter::new(0);
        meter.keep(&"x".repeat(MAX_STDERR));
        meter.keep("é\nValueError: \u{1b}[31m\n");
        let lines = meter.stderr();
        assert!(lines[0].starts_with('x') && lines[0].len() < MAX_STDERR);
        assert_eq!(lines[1], "ValueError: \\u{1b}[31m");
        meter.keep(&"ö".repeat(MAX_STDERR));
        assert_eq!(meter.stderr(), ["ö".repeat(MAX_STDERR / 2)]);
    }
}
