//! What ends a connection: the reason, and what its peer gets before.

use std::{sync::Arc, time::Instant};

use super::{Machine, State, Step};
use crate::{
    dispatch::Outcome,
    server::{
        connection::{
            close_reason::{CloseReason, RETRY_WHEN_BUSY_MS},
            message::Message,
        },
        encoding::Encoding,
        peer::Peer,
    },
    websocket,
    wire::{Code, ErrorBody, Header, Kind},
};

impl Machine {
    /// Closes it instead of calling for a message: one of HTTP gets the ERROR.
    pub(crate) fn close_unbegun(&mut self, message: Message, end: CloseReason) {
        self.postponed = Some(message);
        self.close_with(end);
    }

    /// Closes it after what was begun. The first reason counts.
    pub(crate) fn close_with(&mut self, end: CloseReason) {
        if self.closing.is_some() && !end.is_silent() {
            return;
        }
        if end.is_silent() {
            self.outbox.clear();
            self.closing_said = true;
            self.leaves = false;
        }
        let is_silent = end.is_silent();
        match &mut self.closing {
            None => self.closing = Some(end),
            // It could not be sent why: that is the reason now.
            Some(before) if is_silent => *before = end,
            Some(_) => {}
        }
        if is_silent || !matches!(self.state, State::Writing { .. }) {
            self.state = State::Ending;
        }
    }

    /// What is to be done before it closes: all answers, then the closing
    /// ERROR.
    pub(super) fn finish(&mut self, peer: &Peer, now: Instant) -> Step {
        let left = peer.calls_left();
        if self.closing.as_ref().is_some_and(CloseReason::is_silent) {
            self.outbox.clear();
        } else {
            peer.collect_late(&mut self.outbox);
            if left == 0 && !self.closing_said {
                self.closing_said = true;
                self.say_closing(peer);
            }
            match self.state {
                State::Writing { .. } if self.may_write() => return Step::Write,
                State::Writing { .. } if self.closing_said && peer.is_cut_off() => {
                    self.outbox.clear();
                }
                State::Writing { .. } => return self.wait(peer, now),
                _ if !self.outbox.is_empty() => return Step::Write,
                _ => {}
            }
        }
        self.state = State::Ending;
        if left > 0 { Step::Wait } else { Step::Close }
    }

    /// Puts the closing ERROR into the outbox, and WebSocket's close frame.
    fn say_closing(&mut self, peer: &Peer) {
        let Some(reason) = &self.closing else { return };
        if self.outbox.said_close() {
            return;
        }
        let postponed = self.postponed.take();
        let Some(encoding) = self.input.decoder.closing_encoding(postponed) else {
            return;
        };
        let close_frame = match encoding {
            Encoding::WebSocket => reason.close_frame(),
            Encoding::Frames | Encoding::Http(_) => None,
        };
        let says_all = matches!(close_frame, Some((_, _, true)));
        if let Some((code, body)) = reason.closing().filter(|_| !says_all) {
            let outcome = Outcome::Error(Some(code), body);
            let traffic = peer.traffic();
            self.outbox.answer(&encoding, None, outcome, None, traffic);
        }
        if let Some((code, reason, _)) = close_frame {
            let mut frame = Vec::new();
            websocket::write_close(&mut frame, code, &reason);
            self.outbox.push_bytes(&frame);
        }
    }

    /// Answers the request whose rest could not be read for want of memory, if
    /// its header line has arrived: nothing ran.
    pub(super) fn answer_unread(&mut self, peer: &Peer) {
        if !matches!(self.state, State::Memory { .. }) {
            return;
        }
        let input = Arc::clone(&self.input);
        let Some((partial, encoding)) = input.decoder.partial() else {
            return;
        };
        let header = Header::parse(partial).ok().map(|(header, _)| header);
        if header.is_some_and(|header| header.kind == Kind::Request && header.request_id.is_some())
        {
            let code = Code::ServiceUnavailable;
            let body = ErrorBody::server(code, "the server's memory is used up; nothing ran")
                .with_details(&serde_json::json!({"retryAfterMs": RETRY_WHEN_BUSY_MS}));
            peer.traffic().messages_in.add(1);
            let (outcome, traffic) = (Outcome::Error(Some(code), body), peer.traffic());
            self.outbox
                .answer(&encoding, header.as_ref(), outcome, None, traffic);
        }
    }
}
