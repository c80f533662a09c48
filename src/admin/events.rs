//! Server-sent events: the same as the pages show, every second.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
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

/// Listeners that there are.
pub(super) static LISTENERS: AtomicUsize = AtomicUsize::new(0);

/// Gives back a listener's place.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        LISTENERS.fetch_sub(1, SeqCst);
    }
}

/// Takes a place, if there is one.
fn place() -> Option<Place> {
    let taken = LISTENERS.fetch_add(1, SeqCst);
    let place = Place;
    (taken < MAX_LISTENERS).then_some(place)
}

impl Admin {
    /// Answers with events until the listener goes.
    pub(super) fn listen(self: &Arc<Self>, request: Request) {
        let Some(place) = place() else {
            let error = json!({"error": "as many listen already as may"}).to_string();
            let _ = request.respond(Response::from_string(error).with_status_code(503));
            return;
        };
        let admin = Arc::clone(self);
        let speak = move || {
            let _place = place;
            // Ends with the first write that fails, a second after the
            // listener went.
            let _ = admin.speak(&mut *request.into_writer());
        };
        if let Err(error) = thread::Builder::new().name("mb-events".into()).spawn(speak) {
            tracing::warn!("admin endpoint: {error}");
        }
    }

    fn speak(&self, out: &mut dyn Write) -> io::Result<()> {
        write!(
            out,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
        )?;
        // Those who come now have just read the log itself.
        let mut last = lines::LINES.after(0, 1, |_| true).last().map_or(0, |line| line.number);
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
