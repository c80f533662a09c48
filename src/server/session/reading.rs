//! Waits for bytes, and for the memory that they need.

use std::{
    io,
    time::{Duration, Instant},
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::RecvFlags,
};

use super::{End, Session};
use crate::{
    dispatch::Outcome,
    server::connection::RETRY_WHEN_BUSY_MS,
    wire::{Code, ErrorBody, Header, Kind},
};

/// How long a connection that waits keeps the memory of a large message for
/// the next one of the kind.
const KEPT_LARGE_FOR: Duration = Duration::from_secs(1);
/// How long a connection that waits for memory may go without looking at the
/// drain.
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Session {
    /// Waits for bytes: for the rest of a message until `read_timeout` after
    /// the thread began to wait for it, else until `idle_timeout`.
    pub(super) fn read(&mut self) -> Result<usize, End> {
        self.leave_poller();
        loop {
            self.check()?;
            let Some(read) = self.read_once().transpose() else {
                continue;
            };
            // Answers that come later than this thread has read count too.
            if !matches!(read, Err(End::Notice(Code::IdleTimeout, _))) {
                return read;
            }
            let now = Instant::now();
            let busy = self.connection.phase().attached() > 1;
            let since = if busy {
                now
            } else {
                self.connection.last_answer()
            };
            if since + self.shared.settings.idle_timeout <= now {
                return read;
            }
            self.active = since;
        }
    }

    /// The same once; none if there was something else to look after first.
    fn read_once(&mut self) -> Result<Option<usize>, End> {
        self.room()?;
        let settings = &self.shared.settings;
        let midway = self.buffer.is_midway();
        self.connection.waits(midway);
        let deadline = if midway {
            *self.midway_since.get_or_insert_with(Instant::now) + settings.read_timeout
        } else {
            self.midway_since = None;
            self.active + settings.idle_timeout
        };
        // What has to come before anything else does not wait for silence.
        let hello = self.identity.must_say() && self.handshake_until < deadline;
        let deadline = if hello {
            self.handshake_until
        } else {
            deadline
        };
        let mut until = self.next_check().map_or(deadline, |at| at.min(deadline));
        if !hello && self.buffer.is_kept_large() {
            // The next wait begins with giving it back.
            until = until.min(Instant::now() + KEPT_LARGE_FOR);
        }
        match self.connection.stream().read(self.buffer.spare(), until) {
            Ok(count) => {
                self.arrived(count);
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut && until < deadline => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                if hello {
                    return Err(self.said_nothing());
                }
                let (code, setting, timeout) = if midway {
                    (
                        Code::ReadTimeout,
                        "a message was begun but not finished",
                        settings.read_timeout,
                    )
                } else {
                    (Code::IdleTimeout, "nothing arrived", settings.idle_timeout)
                };
                Err(End::Notice(
                    code,
                    format!("{setting} within {} ms", timeout.as_millis()),
                ))
            }
            Err(error) => Err(End::Io(error)),
        }
    }

    /// Reads what has come, without waiting; none if nothing has.
    pub(super) fn read_what_is_there(&mut self) -> Result<Option<usize>, End> {
        self.room()?;
        let socket = self.connection.stream().socket().stream();
        match retry_on_intr(|| rustix::net::recv(socket, self.buffer.spare(), RecvFlags::DONTWAIT))
        {
            Ok((_, count)) => {
                self.arrived(count);
                Ok(Some(count))
            }
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(End::Io(error.into())),
        }
    }

    /// Reads on without waiting where the last read left no room: requests
    /// that came together are answered together, and so their client sends
    /// the next ones together.
    pub(super) fn read_more(&mut self) -> bool {
        let wanted = self
            .buffer
            .next_capacity()
            .saturating_sub(self.shared.settings.read_buffer_size);
        let stream = self.connection.stream();
        if !self.buffer.was_filled() || wanted > self.charge.held() || stream.is_encrypted() {
            return false;
        }
        let read = rustix::net::recv(
            stream.socket().stream(),
            self.buffer.spare(),
            RecvFlags::DONTWAIT,
        );
        // Whatever else it is, the next read sees it too.
        let Ok((count @ 1.., _)) = read else {
            return false;
        };
        self.arrived(count);
        true
    }

    /// Bytes have come into the buffer's spare room.
    fn arrived(&mut self, count: usize) {
        self.buffer.advance(count);
        self.active = Instant::now();
        self.connection.heard(count, self.active);
    }

    /// Sees to it that there is memory for the next read. While the server
    /// has none it does not read, so no read deadline runs; it gives up after
    /// as long.
    fn room(&mut self) -> Result<(), End> {
        let settings = &self.shared.settings;
        let wanted = self
            .buffer
            .next_capacity()
            .saturating_sub(settings.read_buffer_size);
        if wanted <= self.charge.held() {
            if wanted < self.charge.held() {
                self.charge.set(wanted);
            }
            return Ok(());
        }
        self.shared.poller.step_aside();
        let begun = Instant::now();
        while !self.charge.raise_until(wanted, Instant::now() + LOOK_EVERY) {
            if self.connection.draining() || begun.elapsed() >= settings.read_timeout {
                self.answer_unread();
                self.flush()?;
                let message = format!(
                    "no memory for the rest of a message within {} ms; {} bytes of {} are taken",
                    begun.elapsed().as_millis(),
                    settings.memory.used(),
                    settings.memory.limit()
                );
                return Err(End::Notice(Code::ServerBusy, message));
            }
        }
        if let Some(since) = &mut self.midway_since {
            *since += begun.elapsed();
        }
        Ok(())
    }

    /// The request whose end can't be read was not begun, and is told so if
    /// its header line is there.
    fn answer_unread(&self) {
        let header = Header::parse(self.buffer.partial())
            .ok()
            .map(|(header, _)| header);
        if header.is_some_and(|header| header.kind == Kind::Request && header.request_id.is_some())
        {
            let body = ErrorBody::server(
                Code::ServiceUnavailable,
                "the server's memory is used up; nothing ran",
            )
            .with_details(&serde_json::json!({"retryAfterMs": RETRY_WHEN_BUSY_MS}));
            self.connection.request_read();
            self.shared
                .metrics
                .count_error(Some(Code::ServiceUnavailable));
            self.connection.answer(
                header.as_ref(),
                Outcome::Error(Some(Code::ServiceUnavailable), body),
            );
        }
    }
}
