//! Server-sent events: the same as the pages show, every second.

use std::{
    io::{self, Write},
    thread,
    time::Duration,
};

use serde_json::json;

use super::Admin;
use crate::log::lines;

/// Between two events.
const EVERY: Duration = Duration::from_secs(1);
/// Lines of the log in one event, the newest.
const MAX_LINES: usize = 100;

impl Admin {
    /// Writes an event each second, until a write fails; the head alone where
    /// that is all that is asked for.
    pub(super) fn write_events(&self, out: &mut dyn Write, head_only: bool) -> io::Result<()> {
        out.write_all(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\
              Cache-Control: no-store\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n\r\n",
        )?;
        if head_only {
            return Ok(());
        }
        // Those who come now have just read the log itself.
        let mut last = lines::LINES
            .after(0, 1, |_| true)
            .last()
            .map_or(0, |line| line.number);
        loop {
            let snapshot = self.operations.snapshot();
            let new = lines::LINES.after(last, MAX_LINES, |_| true);
            last = new.last().map_or(last, |line| line.number);
            let event = json!({
                "accepting": snapshot.accepting,
                "totals": snapshot.totals,
                "calls": snapshot.calls,
                "lines": new,
            });
            out.write_all(format!("data: {event}\n\n").as_bytes())?;
            thread::sleep(EVERY);
        }
    }
}
