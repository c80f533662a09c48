//! A session that waits without a thread, or changes threads.

use std::{mem, time::Instant};

use super::Session;
use crate::server::connection::Connection;

impl Session {
    /// Its place at the poller.
    pub(in crate::server) fn slot(&self) -> usize {
        self.permit.slot()
    }

    pub(in crate::server) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Whether the poller tells when there is something to read.
    pub(in crate::server) fn is_at_poller(&self) -> bool {
        self.at_poller
    }

    pub(in crate::server) fn set_at_poller(&mut self) {
        self.at_poller = true;
    }

    pub(super) fn leave_poller(&mut self) {
        if mem::take(&mut self.at_poller) {
            self.shared.poller.forget(&self.connection);
        }
    }

    /// Whether the last read may have left something.
    pub(in crate::server) fn may_have_more(&self) -> bool {
        self.buffer.was_filled()
    }

    /// Whether it may wait without a thread. With TLS, the socket does not say
    /// whether there is something to read; who has to say who it is has other
    /// deadlines; and a large message comes in fewer reads where a thread
    /// waits for it.
    pub(super) fn may_park(&mut self) -> bool {
        if self.buffer.is_large()
            || self.connection.stream().is_encrypted()
            || self.identity.must_say()
        {
            return false;
        }
        // What a large message needed is given back now, not when the next one
        // comes.
        let capacity = self.buffer.next_capacity();
        if capacity < self.buffer.capacity() {
            self.buffer.spare();
        }
        let wanted = capacity.saturating_sub(self.shared.settings.read_buffer_size);
        if wanted < self.charge.held() {
            self.charge.set(wanted);
        }
        let midway = self.buffer.is_midway();
        self.connection.waits(midway);
        self.midway_since = midway.then(|| self.midway_since.unwrap_or_else(Instant::now));
        true
    }

    /// Whether it is time to say that the peer has been silent for too long, or
    /// may not stay.
    pub(in crate::server) fn is_overdue(&self, now: Instant) -> bool {
        if self.is_expired(now) {
            return true;
        }
        let settings = &self.shared.settings;
        match self.midway_since {
            Some(since) => since + settings.read_timeout <= now,
            None if self.connection.phase().attached() > 1 => false,
            None => self.active.max(self.connection.last_answer()) + settings.idle_timeout <= now,
        }
    }

    /// The peer has something to say.
    pub(in crate::server) fn wake(self: Box<Self>) {
        self.run(|session| {
            if let Some(count) = session.read_what_is_there()? {
                session.is_open(count)?;
            }
            session.serve_on()
        });
    }

    /// Finds out on this thread what the time that has passed means.
    pub(in crate::server) fn find_out(self: Box<Self>) {
        self.run(|session| {
            let count = session.read()?;
            session.is_open(count)?;
            session.serve_on()
        });
    }

    /// A thread of its own waits for what the peer says next, from now on or
    /// until it may wait without one.
    pub(in crate::server) fn wait_on_thread(self: Box<Self>) {
        let permit = self.permit.clone();
        if let Err(here) = permit.execute(move || self.find_out()) {
            // There is none; the others have to do without this one.
            here();
        }
    }
}
