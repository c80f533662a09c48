//! How long each state may last, and what becomes of it then.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Machine, State, Step};
use crate::{
    server::{connection::close_reason::CloseReason, peer::Peer},
    system::LINGER,
    wire::Code,
};

/// Quanta after a deadline until it expires although there is something to
/// read: after a pause of the whole process, what came in time lies in the
/// buffers of the system.
const QUANTA_WHEN_LATE: u8 = 8;

/// How long a connection that waits keeps the memory of a large message for
/// the next one of the kind.
const KEPT_LARGE_FOR: Duration = Duration::from_secs(1);

/// How often a connection that waits for memory tries again.
const RETRY_MEMORY: Duration = Duration::from_millis(20);

/// What is too late at a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// PROXY header or TLS handshake.
    Handshake,
    /// Authentication of the peer.
    Hello,
    /// Anything from the peer.
    Silence,
    /// The rest of a message.
    Message,
    /// Memory for it.
    Memory,
    /// The peer taking answers.
    Writing,
    /// The beginning of a postponed call. Its handler answers that.
    Postponed,
    /// Nothing; it is time to try for memory again.
    Retry,
    /// Nothing; it is time to release the memory of a large message.
    Shrink,
}

impl Machine {
    /// Notes that a deadline has passed. What arrived in time may have yet to
    /// be read.
    pub(crate) fn is_late(&mut self) {
        if self.late_for == 0 {
            self.late_for = QUANTA_WHEN_LATE;
        }
        (self.readable, self.writable) = (true, true);
    }

    /// Waits, unless it is too late for what it waits for.
    #[inline]
    pub(super) fn wait(&mut self, peer: &Peer, now: Instant) -> Step {
        if self.late_for == 0 {
            return Step::Wait;
        }
        self.late_for -= 1;
        if self.goes_on() && self.late_for > 0 {
            return Step::Wait;
        }
        self.late_for = 0;
        let mut was_late = false;
        while let Some((until, late)) = self.deadline(peer.calls_left())
            && until <= now
        {
            self.expires(late, peer, now);
            was_late = true;
        }
        if was_late {
            self.next(peer, now)
        } else {
            Step::Wait
        }
    }

    /// Returns the deadline of what it waits for, and what is late then; none
    /// without a deadline.
    pub(crate) fn deadline(&self, calls_left: u32) -> Option<(Instant, Late)> {
        let settings = &self.settings;
        let own = match self.state {
            State::ProxyHeader | State::Handshake => {
                return self.hello_until.map(|until| (until, Late::Handshake));
            }
            State::Writing { since } => {
                let mut until = since + settings.config.write_timeout.0;
                // A peer that must authenticate gets no longer than for that,
                // or than to read the closing ERROR.
                if let Some(hello) = self.hello_until {
                    until = until.min(hello.max(since + LINGER));
                }
                return Some((until, Late::Writing));
            }
            State::Ending => return None,
            State::Postponed if self.retries => return None,
            State::Postponed => {
                let postponed = self
                    .postponed
                    .as_ref()
                    .and_then(|message| message.postponed);
                return postponed.map(|postponed| (postponed.until, Late::Postponed));
            }
            State::Memory { since } => {
                let until = since + settings.config.read_timeout.0;
                let next = self.active.max(since) + RETRY_MEMORY;
                Some(if next < until {
                    (next, Late::Retry)
                } else {
                    (until, Late::Memory)
                })
            }
            State::Message => self
                .begun
                .map(|begun| (begun + settings.config.read_timeout.0, Late::Message)),
            State::Idle if self.input.buffer().is_kept_large() => {
                Some((self.active + KEPT_LARGE_FOR, Late::Shrink))
            }
            State::Idle if calls_left > 0 => None,
            State::Idle => Some((self.active + settings.config.idle_timeout.0, Late::Silence)),
        };
        let hello = self.hello_until.map(|until| (until, Late::Hello));
        own.into_iter().chain(hello).min_by_key(|(until, _)| *until)
    }

    /// Acts on a deadline that has passed.
    fn expires(&mut self, late: Late, peer: &Peer, now: Instant) {
        let settings = Arc::clone(&self.settings);
        let within =
            |what: &str, timeout: Duration| format!("{what} within {} ms", timeout.as_millis());
        match late {
            Late::Handshake => {
                let reason = if self.state == State::ProxyHeader {
                    "proxy-header"
                } else {
                    "timeout"
                };
                self.close_with(CloseReason::Handshake(reason, "timed out".into()));
            }
            Late::Hello => self.close_with(self.hello_timed_out()),
            Late::Silence => self.close_with(CloseReason::Notice(
                Code::IdleTimeout,
                within("nothing arrived", settings.config.idle_timeout.0),
            )),
            Late::Message => self.close_with(CloseReason::Notice(
                Code::ReadTimeout,
                within(
                    "a message was begun but not finished",
                    settings.config.read_timeout.0,
                ),
            )),
            Late::Memory => {
                self.answer_unread(peer);
                let message = within(
                    "no memory for the rest of a message",
                    settings.config.read_timeout.0,
                );
                let (used, limit) = (settings.memory.used(), settings.memory.limit());
                self.close_with(CloseReason::Notice(
                    Code::ServerBusy,
                    format!("{message}; {used} bytes of {limit} are taken"),
                ));
            }
            Late::Writing => self.close_with(CloseReason::WriteTimeout),
            Late::Postponed => self.retry(),
            // The next step tries.
            Late::Retry => self.active = now,
            Late::Shrink => {
                // The buffer is kept for one more read, which has not come.
                self.read_buffer();
                self.shrink();
            }
        }
    }

    fn hello_timed_out(&self) -> CloseReason {
        let millis = self.settings.config.handshake_timeout.0.as_millis();
        let message = format!("no system.hello with a token arrived within {millis} ms");
        CloseReason::Notice(Code::ReadTimeout, message)
    }
}
