//! The newest lines of the log, for the admin endpoint.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::{self, Write as _},
    sync::Mutex,
    time::SystemTime,
};

use serde::Serialize;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

use super::AUDIT;
use crate::locks::lock;

/// Lines that are kept.
const MAX_LINES: usize = 1000;
/// Lines of each kind of the audit trail that are kept beside them.
const MAX_AUDIT: usize = 200;
/// Longest message that is kept whole, in bytes.
const MAX_MESSAGE: usize = 2048;
/// Longest value of a field that is kept whole, in bytes.
const MAX_FIELD: usize = 512;

/// One line.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Its number since the start.
    pub number: u64,
    /// RFC 3339.
    pub time: String,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: &'static str,
    /// The module that wrote it; `mb_server::service` for services.
    pub target: String,
    /// What it says.
    pub message: String,
    /// What it says it of.
    pub fields: BTreeMap<&'static str, String>,
}

/// The newest lines.
pub struct Lines(Mutex<RecentLines>);

struct RecentLines {
    lines: VecDeque<Line>,
    /// Of the audit trail, by kind: refusals, which anybody can cause, displace
    /// no change.
    audit: BTreeMap<String, VecDeque<Line>>,
    next: u64,
}

/// Those of this process.
pub static LINES: Lines = Lines(Mutex::new(RecentLines {
    lines: VecDeque::new(),
    audit: BTreeMap::new(),
    next: 1,
}));

impl Lines {
    /// Copies of those after the given number that fit, oldest first, the
    /// newest `limit` of them.
    #[must_use]
    pub fn after(&self, number: u64, limit: usize, fits: impl Fn(&Line) -> bool) -> Vec<Line> {
        let kept = lock(&self.0);
        let mut found: Vec<_> = kept
            .audit
            .values()
            .chain([&kept.lines])
            .flat_map(|lines| lines.iter().rev().take_while(|line| line.number > number))
            .filter(|line| fits(line))
            .collect();
        found.sort_by_key(|line| line.number);
        let older = found.len().saturating_sub(limit);
        found[older..].iter().copied().cloned().collect()
    }

    fn keep(&self, mut line: Line) {
        let mut kept = lock(&self.0);
        line.number = kept.next;
        kept.next += 1;
        let (lines, max) = if line.target == AUDIT {
            let kind = line.fields.get("security").cloned().unwrap_or_default();
            (kept.audit.entry(kind).or_default(), MAX_AUDIT)
        } else {
            (&mut kept.lines, MAX_LINES)
        };
        if lines.len() == max {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// Gives every line that passes the filter to [`LINES`].
#[derive(Debug, Clone, Copy)]
pub struct Keeper;

impl<S: Subscriber> Layer<S> for Keeper {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut visitor = LineVisitor::default();
        event.record(&mut visitor);
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warn",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        LINES.keep(Line {
            number: 0,
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            level,
            target: event.metadata().target().to_owned(),
            message: visitor.message,
            fields: visitor.fields,
        });
    }
}

#[derive(Default)]
struct LineVisitor {
    message: String,
    fields: BTreeMap<&'static str, String>,
}

impl LineVisitor {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let (text, limit) = match field.name() {
            "message" => (&mut self.message, MAX_MESSAGE),
            name => (self.fields.entry(name).or_default(), MAX_FIELD),
        };
        text.clear();
        let _ = text.write_fmt(value);
        text.truncate(text.floor_char_boundary(limit));
    }
}

impl Visit for LineVisitor {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept() {
        let lines = Lines(Mutex::new(RecentLines {
            lines: VecDeque::new(),
            audit: BTreeMap::new(),
            next: 1,
        }));
        let line = |message: String| Line {
            number: 0,
            time: String::new(),
            level: "info",
            target: "t".into(),
            message,
            fields: BTreeMap::new(),
        };
        (1..=MAX_LINES + 5).for_each(|number| lines.keep(line(number.to_string())));
        let all = lines.after(0, usize::MAX, |_| true);
        assert_eq!(
            (all.len(), all[0].number, &*all[0].message),
            (MAX_LINES, 6, "6")
        );
        let last = lines.after(1000, 2, |line| line.message != "1005");
        assert_eq!(
            last.iter().map(|line| line.number).collect::<Vec<_>>(),
            [1003, 1004]
        );
        // Neither traffic nor refusals displace a change.
        let audit = |kind: &str| Line {
            target: AUDIT.into(),
            fields: [("security", kind.into())].into(),
            ..line(kind.into())
        };
        lines.keep(audit("change"));
        (0..1000).for_each(|_| lines.keep(audit("rights")));
        (0..2000).for_each(|_| lines.keep(line("traffic".into())));
        let kept = lines.after(0, usize::MAX, |line| line.target == AUDIT);
        assert_eq!((kept.len(), kept[0].number), (MAX_AUDIT + 1, 1006));
        assert!(
            lines
                .after(0, usize::MAX, |_| true)
                .is_sorted_by_key(|line| line.number)
        );
        assert_eq!(
            lines
                .after(1006, usize::MAX, |line| line.message == "change")
                .len(),
            0
        );
    }
}
