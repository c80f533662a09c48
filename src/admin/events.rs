//! Server-sent events: the same as the pages show, every second.

use std::{
    io::{self, Write},
    sync::{Arc, atomic::Ordering::SeqCst},
    thread,
    time::Duration,
};

use serde_json::json;
use tiny_http::{Request, Response};

use super::Admin;
use crate::log::lines;

/// Listeners at the same time; each has a thread.
pub(super) const MAX_LISTENERS: usize = 8;
/// Between two events.
const EVERY: Duration = Duration::from_secs(1);
/// Lines of the log in one event, the newest.
const MAX_LINES: usize = 100;

/// A listener's place; given back when dropped.
struct Place(Arc<Admin>);

impl Place {
    /// Takes one, if there is one.
    fn take(admin: &Arc<Admin>) -> Option<Self> {
        let taken = admin.busy.listeners.fetch_add(1, SeqCst);
        let place = Self(Arc::clone(admin));
        (taken < MAX_LISTENERS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.busy.listeners.fetch_sub(1, SeqCst);
    }
}

impl Admin {
    /// Answers with events until the listener goes.
    pub(super) fn listen(self: &Arc<Self>, request: Request) {
        let Some(place) = Place::take(self) else {
            let error = json!({"error": "as many listen already as may"}).to_string();
            let _ = request.respond(Response::from_string(error).with_status_code(503));
            return;
        };
        let speak = move || {
            // Ends with the first write that fails, a second after the
            // listener went.
            let _ = place.0.speak(&mut *request.into_writer());
        };
        if let Err(error) = thread::Builder::new().name("mb-events".into()).spawn(speak) {
            tracing::warn!("admin endpoint: {error}");
        }
    }

    fn speak(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\n\r\n"
        )?;
        // Those who come now have just read the log itself.
        let mut last = lines::LINES
            .after(0, 1, |_| true)
            .last()
            .map_or(0, |line| line.number);
        loop {
            let snapshot = (self.snapshot)();
            let new = lines::LINES.after(last, MAX_LINES, |_| true);
            last = new.last().map_or(last, |line| line.number);
            let event = json!({
                "accepting": snapshot.accepting,
                "totals": snapshot.totals,
                "calls": snapshot.calls,
                "lines": new,
            });
            write!(out, "data: {event}\n\n")?;
            out.flush()?;
            thread::sleep(EVERY);
        }
    }
}
